"""`Selection`: which channels and blocks of a traced graph may be removed, by the names of modules."""

import difflib
from collections.abc import Callable, Iterable, Iterator, Mapping
from fnmatch import fnmatchcase
from functools import partial

from secateur._kinds import settings
from secateur.errors import SelectionError
from secateur.graph.blocks import enclosing_names
from secateur.graph.graph import Block, ChannelAxis, ChannelGraph, Role

_SUGGESTIONS = 4
_LIST_THEM = "`secateur inspect` lists the axes and their modules (in Python: graph.axes)."

Names = Callable[[ChannelAxis], Iterable[str]]
"""A function that returns the names by which a pattern can match an axis."""


@settings
class Selection:
    """Name patterns that decide which axes and blocks of a graph may be cut.

    A pattern is a glob in which ``*`` also matches dots, such as ``layer1.*`` or ``*.conv2``. It matches an axis if it
    matches the name of the axis, or the name of a parameter, module or enclosing module that produces its channels or
    passes them through: ``layer2`` matches everything inside. Layers that only *read* the channels do not count,
    because their inputs belong to the layer that produces them; so ``include=("layer2",)`` prunes only this stage. An
    axis that several layers produce, such as a residual stream, is matched by the name of any of them.

    A residual block may be removed only if all its weights may be: ``include`` must match the name of the block, or
    every parameter that is removed with it; ``exclude`` and ``whole`` keep the block if they match any of them.

    Attributes:
        include: If there are any, only the axes and blocks that they match may be cut.
        exclude: The axes and blocks that they match are not cut. They take precedence over ``include``.
        whole: Layers that keep all their weights: neither the channels that they produce nor those they read are cut.
    """

    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    whole: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name in ("include", "exclude", "whole"):
            _check_pattern_types(getattr(self, name), name)

    def __bool__(self) -> bool:
        """Return whether there is any pattern."""
        return bool(self.include or self.exclude or self.whole)

    def __str__(self) -> str:
        """Return the patterns as text, such as ``include layer2, exclude *.conv2``; empty if there are none."""
        named = (("include", self.include), ("exclude", self.exclude), ("keep whole", self.whole))
        return ", ".join(f"{name} {' '.join(patterns)}" for name, patterns in named if patterns)

    def apply(self, graph: ChannelGraph) -> ChannelGraph:
        """Return the graph in which the axes are frozen and the blocks kept that may not be cut.

        Their reason is the pattern. What cannot be cut anyway keeps its reason.

        Raises:
            SelectionError: If a pattern matches nothing in the graph, or nothing is left to cut.
        """
        if not self:
            return graph
        seen_in = _names_with_readers(graph)
        check_patterns(self.include, graph, "include")
        check_patterns(self.exclude, graph, "exclude")
        # Unlike the others, `whole` may name a layer that only reads channels.
        check_patterns(self.whole, graph, "whole", seen_in)
        chosen = graph.with_frozen({axis.name: why for axis in graph.prunable if (why := self._reason(axis, seen_in))})
        chosen = chosen.with_kept_blocks({b.name: why for b in graph.removable if (why := self._block_reason(b))})
        # If nothing could be cut before, this is not the fault of the patterns.
        if (graph.prunable or graph.removable) and not (chosen.prunable or chosen.removable):
            raise SelectionError(self._nothing_left(graph))
        return chosen

    def _reason(self, axis: ChannelAxis, seen_in: Names) -> str | None:
        """Return why an axis may not be cut, or None."""
        # Readers count for `whole` only: as `include` or `exclude`, `layer2` would also mean the stream of `layer1`,
        # which it reads.
        excluded, kept = _first_match(self.exclude, _producer_names(axis)), _first_match(self.whole, seen_in(axis))
        if excluded is not None:
            return f"kept whole: matched exclude pattern {excluded!r}"
        if kept is not None:
            return f"kept whole: a layer that matched {kept!r} makes or reads it"
        if self.include and _first_match(self.include, _producer_names(axis)) is None:
            return f"kept whole: matched no include pattern ({', '.join(map(repr, self.include))})"
        return None

    def _block_reason(self, block: Block) -> str | None:
        """Return why a block may not be removed, or None."""
        names = {block.name}.union(*map(enclosing_names, block.tensors))
        excluded, kept = _first_match(self.exclude, names), _first_match(self.whole, names)
        if excluded is not None:
            return f"kept whole: matched exclude pattern {excluded!r}"
        if kept is not None:
            return f"kept whole: a layer of it matched {kept!r}"
        # Unlike an axis, a block is included only if all its parameters are, because all of them are removed.
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
    """Return whether a pattern matches the name of an axis or of what produces or passes its channels.

    Args:
        pattern: A glob; see `Selection`.
        axis: An axis of a traced graph.
    """
    return _first_match((pattern,), _producer_names(axis)) is not None


def check_patterns(patterns: Iterable[str], graph: ChannelGraph, name: str, names: Names | None = None) -> None:
    """Refuse patterns that match no axis of a graph, frozen ones included, and no block.

    Args:
        patterns: Globs.
        graph: The graph.
        name: The name of the argument, for the message.
        names: Returns the names of an axis; None stands for those that `matches_axis` uses.

    Raises:
        SelectionError: If there is one; the message suggests similar names.
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
    """Yield the name of an axis, and the names of the parameters and modules that produce or pass its channels."""
    yield axis.name
    for site in axis.sites:
        # Readers do not count: their inputs belong to the layer that produces them.
        if site.role is not Role.INPUT:
            yield from enclosing_names(site.tensor)


def _names_with_readers(graph: ChannelGraph) -> Names:
    """Return a function that yields the name of an axis and of everything that produces, passes or reads its channels.

    This includes the modules that ran such operations, because a module that shares another's weight has no site.
    """
    modules: dict[str, list[str]] = {}
    for module, axes in graph.module_axes.items():
        for name in axes:
            modules.setdefault(name, []).append(module)

    def names(axis: ChannelAxis) -> Iterator[str]:
        yield axis.name
        for name in (*(site.tensor for site in axis.sites), *modules.get(axis.name, ())):
            yield from enclosing_names(name)

    return names


def _first_match(patterns: Iterable[str], names: Iterable[str]) -> str | None:
    """Return the first pattern that matches any of the names, or None."""
    # Iterators would be empty for the second pattern.
    names = tuple(names)
    # `fnmatch` would ignore upper and lower case on Windows.
    return next((pattern for pattern in patterns if any(fnmatchcase(name, pattern) for name in names)), None)


def _suggest(pattern: str, known: Mapping[str, object]) -> str:
    """Return a sentence with the names that are similar to a pattern, or nothing."""
    # With its stars and the dots beside them, a pattern is not similar to any name.
    plain = pattern.replace("*", "").strip(".")
    similar = partial(difflib.get_close_matches, n=_SUGGESTIONS, cutoff=0.6)
    found = similar(pattern, known) or similar(plain, known)
    return f" Did you mean {', '.join(found)}?" if found else ""


def _check_pattern_types(patterns: object, name: str) -> None:
    if not isinstance(patterns, tuple) or not all(isinstance(one, str) and one for one in patterns):
        raise SelectionError(f'`{name}` must be a tuple of name patterns, such as ("layer1.*",); got {patterns!r}.')
