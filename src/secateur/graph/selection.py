"""What a user decides about a traced graph: which channels may be removed, by the names of their modules."""

import difflib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import partial

from secateur.errors import SelectionError
from secateur.graph.blocks import enclosing_names
from secateur.graph.graph import Block, ChannelAxis, ChannelGraph, Role

_SUGGESTIONS = 4
_LIST_THEM = "`secateur inspect` lists the axes and their modules (in Python: graph.axes)."

Names = Callable[[ChannelAxis], Iterable[str]]
"""Gives the names by which a pattern may mean an axis."""


@dataclass(frozen=True)
class Selection:
    """Which axes of a graph may be cut, by name patterns.

    A pattern is a glob in which ``*`` also stands for dots, such as ``layer1.*`` or ``*.conv2``. It means an axis if it
    matches the name of the axis, or of a parameter, module or enclosing module that makes or carries its channels:
    ``layer2`` means everything inside of it. A layer that only *reads* channels does not count, because its inputs
    belong to the layer that makes them; thus ``include=("layer2",)`` prunes this stage only. An axis that several
    layers make, such as a residual stream, is meant by the name of any of them.

    A residual block may be removed only if all its weights may go: ``include`` must mean the block by its name, or
    every parameter that goes with it; ``exclude`` and ``whole`` keep it if they mean any of them.

    Attributes:
        include: If there are any, only what they mean may be cut.
        exclude: What they mean stays whole. Stronger than ``include``.
        whole: Layers that lose no weight: the channels they make or carry stay, and those they read too.
    """

    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    whole: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name in ("include", "exclude", "whole"):
            _check_pattern_types(getattr(self, name), name)

    def __bool__(self) -> bool:
        """Whether anything is chosen."""
        return bool(self.include or self.exclude or self.whole)

    def __str__(self) -> str:
        """The choices in words: ``include layer2, exclude *.conv2``; empty if there are none."""
        named = (("include", self.include), ("exclude", self.exclude), ("keep whole", self.whole))
        return ", ".join(f"{name} {' '.join(patterns)}" for name, patterns in named if patterns)

    def apply(self, graph: ChannelGraph) -> ChannelGraph:
        """The same graph with the axes frozen, and the blocks kept, that must stay whole, and this as their reason.

        What has a reason already keeps it.

        Raises:
            SelectionError: If a pattern means nothing in the graph, or nothing is left that may be cut.
        """
        if not self:
            return graph
        seen_in = _names_with_readers(graph)
        check_patterns(self.include, graph, "include")
        check_patterns(self.exclude, graph, "exclude")
        check_patterns(self.whole, graph, "whole", seen_in)
        chosen = graph.with_frozen({axis.name: why for axis in graph.prunable if (why := self._reason(axis, seen_in))})
        chosen = chosen.with_kept_blocks({b.name: why for b in graph.removable if (why := self._block_reason(b))})
        if (graph.prunable or graph.removable) and not (chosen.prunable or chosen.removable):
            raise SelectionError(self._nothing_left(graph))
        return chosen

    def _reason(self, axis: ChannelAxis, seen_in: Names) -> str | None:
        """Why an axis stays whole, or None."""
        excluded, kept = _first_match(self.exclude, _producer_names(axis)), _first_match(self.whole, seen_in(axis))
        if excluded is not None:
            return f"kept whole: matched exclude pattern {excluded!r}"
        if kept is not None:
            return f"kept whole: a layer that matched {kept!r} makes or reads it"
        if self.include and _first_match(self.include, _producer_names(axis)) is None:
            return f"kept whole: matched no include pattern ({', '.join(map(repr, self.include))})"
        return None

    def _block_reason(self, block: Block) -> str | None:
        """Why a block stays, or None."""
        names = {block.name}.union(*map(enclosing_names, block.tensors))
        excluded, kept = _first_match(self.exclude, names), _first_match(self.whole, names)
        if excluded is not None:
            return f"kept whole: matched exclude pattern {excluded!r}"
        if kept is not None:
            return f"kept whole: a layer of it matched {kept!r}"
        every = all(_first_match(self.include, enclosing_names(tensor)) is not None for tensor in block.tensors)
        if self.include and not every and _first_match(self.include, (block.name,)) is None:
            return f"kept whole: not all of it matched an include pattern ({', '.join(map(repr, self.include))})"
        return None

    def _nothing_left(self, graph: ChannelGraph) -> str:
        meant = [axis for axis in graph.axes if _first_match(self.include, _producer_names(axis)) is not None]
        frozen = [f"{axis.name} ({axis.frozen_because})" for axis in meant if axis.frozen_because is not None]
        because = f" What it includes is frozen: {'; '.join(frozen[:_SUGGESTIONS])}." if frozen else ""
        return (
            f"`choices` must leave something to cut; got {self}, which keeps all {len(graph.prunable)} axes whole."
            f"{because} Include more or exclude less. {_LIST_THEM}"
        )


def matches_axis(pattern: str, axis: ChannelAxis) -> bool:
    """Whether a pattern means an axis: it matches its name or that of a place that makes or carries its channels.

    Args:
        pattern: A glob; see `Selection`.
        axis: Of a traced graph.
    """
    return _first_match((pattern,), _producer_names(axis)) is not None


def check_patterns(patterns: Iterable[str], graph: ChannelGraph, name: str, names: Names | None = None) -> None:
    """Refuse a pattern that means no axis of a graph, frozen ones included, and no block.

    Args:
        patterns: Globs.
        graph: The graph.
        name: Of the argument, for the message.
        names: Names of an axis; None means those of `matches_axis`.

    Raises:
        SelectionError: With the names that are nearest to it.
    """
    known = dict.fromkeys(one for axis in graph.axes for one in (names or _producer_names)(axis))
    known |= dict.fromkeys(block.name for block in graph.blocks)
    for pattern in patterns:
        if not any(fnmatchcase(one, pattern) for one in known):
            raise SelectionError(
                f"`{name}` must match an axis, module or parameter with channels; {pattern!r} matches none."
                f"{_suggest(pattern, known)} {_LIST_THEM}"
            )


def _producer_names(axis: ChannelAxis) -> Iterator[str]:
    """Name of the axis, and names of the parameters and modules that make or carry its channels."""
    yield axis.name
    for site in axis.sites:
        if site.role is not Role.INPUT:
            yield from enclosing_names(site.tensor)


def _names_with_readers(graph: ChannelGraph) -> Names:
    """Names of an axis, and names of everything that makes, carries or reads its channels.

    Modules that saw them run count as well: one that shares another's weight is no site of its own.
    """
    modules: dict[str, list[str]] = {}
    for module, axes in graph.touching.items():
        for name in axes:
            modules.setdefault(name, []).append(module)

    def names(axis: ChannelAxis) -> Iterator[str]:
        yield axis.name
        for name in (*(site.tensor for site in axis.sites), *modules.get(axis.name, ())):
            yield from enclosing_names(name)

    return names


def _first_match(patterns: Iterable[str], names: Iterable[str]) -> str | None:
    """The first pattern that matches any of the names."""
    names = tuple(names)
    return next((pattern for pattern in patterns if any(fnmatchcase(name, pattern) for name in names)), None)


def _suggest(pattern: str, known: Mapping[str, object]) -> str:
    """The names like a pattern, its wildcards left out."""
    plain = pattern.replace("*", "").strip(".")
    similar = partial(difflib.get_close_matches, n=_SUGGESTIONS, cutoff=0.6)
    found = similar(pattern, known) or similar(plain, known)
    return f" Did you mean {', '.join(found)}?" if found else ""


def _check_pattern_types(patterns: object, name: str) -> None:
    if not isinstance(patterns, tuple) or not all(isinstance(one, str) and one for one in patterns):
        raise SelectionError(f'`{name}` must be a tuple of name patterns, such as ("layer1.*",); got {patterns!r}.')
