"""What a user decides about a traced graph: which channels may be removed, by the names of their modules."""

import difflib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import partial

from secateur.errors import ChoiceError
from secateur.graph._channels import ChannelAxis, ChannelGraph, Role

_SUGGESTIONS = 4
_LIST_THEM = "`secateur inspect` lists the axes and their modules (in Python: graph.axes)."


@dataclass(frozen=True)
class Choices:
    """Which axes of a graph may be cut, by name patterns.

    A pattern is a glob in which ``*`` also stands for dots, such as ``layer1.*`` or ``*.conv2``. It means an axis if it
    matches the name of the axis, or of a parameter, module or enclosing module that makes or carries its channels:
    ``layer2`` means everything inside of it. A layer that only *reads* channels does not count, because its inputs
    belong to the layer that makes them; thus ``include=("layer2",)`` prunes this stage only. An axis that several
    layers make, such as a residual stream, is meant by the name of any of them.

    Attributes:
        include: If there are any, only the axes they mean may be cut.
        exclude: The axes they mean stay whole. Stronger than ``include``.
        whole: Layers none of whose weights change: the channels they make or carry stay, and those they read too.
    """

    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    whole: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name in ("include", "exclude", "whole"):
            _check_patterns(getattr(self, name), name)

    def __bool__(self) -> bool:
        """Whether anything is chosen."""
        return bool(self.include or self.exclude or self.whole)

    def __str__(self) -> str:
        """The choices in words: ``include layer2, exclude *.conv2``; empty if there are none."""
        named = (("include", self.include), ("exclude", self.exclude), ("keep whole", self.whole))
        return ", ".join(f"{name} {' '.join(patterns)}" for name, patterns in named if patterns)

    def apply(self, graph: ChannelGraph) -> ChannelGraph:
        """The same graph with the axes frozen that must stay whole, and this as their reason.

        Axes that are frozen already keep their reason.

        Raises:
            ChoiceError: If a pattern means no axis of the graph, or nothing is left that may be cut.
        """
        if not self:
            return graph
        for name, patterns, where in (
            ("include", self.include, place_names),
            ("exclude", self.exclude, place_names),
            ("whole", self.whole, all_names),
        ):
            check_meant(patterns, graph, name, where)
        chosen = graph.with_frozen({axis.name: why for axis in graph.prunable if (why := self._reason(axis))})
        if graph.prunable and not chosen.prunable:
            raise ChoiceError(self._nothing_left(graph))
        return chosen

    def _reason(self, axis: ChannelAxis) -> str | None:
        """Why an axis stays whole, or None."""
        named, read = tuple(place_names(axis)), tuple(all_names(axis))
        excluded, kept = _first(self.exclude, named), _first(self.whole, read)
        if excluded is not None:
            return f"kept whole: matched exclude pattern {excluded!r}"
        if kept is not None:
            return f"kept whole: a layer that matched {kept!r} makes or reads it"
        if self.include and _first(self.include, named) is None:
            return f"kept whole: matched no include pattern ({', '.join(map(repr, self.include))})"
        return None

    def _nothing_left(self, graph: ChannelGraph) -> str:
        meant = [axis for axis in graph.axes if _first(self.include, tuple(place_names(axis))) is not None]
        frozen = [f"{axis.name} ({axis.frozen_because})" for axis in meant if axis.frozen_because is not None]
        because = f" What it includes is frozen: {'; '.join(frozen[:_SUGGESTIONS])}." if frozen else ""
        return (
            f"`choices` must leave an axis to cut; got {self}, which keeps all {len(graph.prunable)} whole."
            f"{because} Include more or exclude less. {_LIST_THEM}"
        )


Names = Callable[[ChannelAxis], Iterable[str]]


def means(pattern: str, axis: ChannelAxis) -> bool:
    """Whether a pattern means an axis: it matches its name or that of a place that makes or carries its channels.

    Args:
        pattern: A glob; see `Choices`.
        axis: Of a traced graph.
    """
    return _first((pattern,), tuple(place_names(axis))) is not None


def check_meant(patterns: Iterable[str], graph: ChannelGraph, name: str, names: "Names | None" = None) -> None:
    """Refuse a pattern that means no axis of a graph, frozen ones included.

    Args:
        patterns: Globs.
        graph: The graph.
        name: Of the argument, for the message.
        names: Names of an axis; None means those of `means`.

    Raises:
        ChoiceError: With the names that are nearest to it.
    """
    known = dict.fromkeys(one for axis in graph.axes for one in (names or place_names)(axis))
    for pattern in patterns:
        if not any(fnmatchcase(one, pattern) for one in known):
            raise ChoiceError(
                f"`{name}` must match an axis, module or parameter with channels; {pattern!r} matches none."
                f"{_near(pattern, known)} {_LIST_THEM}"
            )


def place_names(axis: ChannelAxis) -> Iterator[str]:
    """Name of the axis, and names of the parameters and modules that make or carry its channels."""
    yield axis.name
    yield from _names_of_sites(axis, reads=False)


def all_names(axis: ChannelAxis) -> Iterator[str]:
    """The same and those that only read them."""
    yield axis.name
    yield from _names_of_sites(axis, reads=True)


def _names_of_sites(axis: ChannelAxis, *, reads: bool) -> Iterator[str]:
    for site in axis.sites:
        if site.role is Role.INPUT and not reads:
            continue
        name = site.tensor
        while name:
            yield name
            name = name.rpartition(".")[0]


def _first(patterns: Iterable[str], names: tuple[str, ...]) -> str | None:
    return next((pattern for pattern in patterns if any(fnmatchcase(name, pattern) for name in names)), None)


def _near(pattern: str, known: Mapping[str, object]) -> str:
    """The names like a pattern, its wildcards left out."""
    plain = pattern.replace("*", "").strip(".")
    similar = partial(difflib.get_close_matches, n=_SUGGESTIONS, cutoff=0.6)
    found = similar(pattern, known) or similar(plain, known)
    return f" Did you mean {', '.join(found)}?" if found else ""


def _check_patterns(patterns: object, name: str) -> None:
    if not isinstance(patterns, tuple) or not all(isinstance(one, str) and one for one in patterns):
        raise ChoiceError(f'`{name}` must be a tuple of name patterns, such as ("layer1.*",); got {patterns!r}.')
