"""The result of a search as plain data: which channels each axis keeps, and which blocks are removed."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import cast

from secateur.errors import SurgeryError

_MOST_SHOWN = 16
"""Axes that `repr` lists, of which there may be hundreds."""


@dataclass(frozen=True)
class Architecture:
    """The kept channels of each axis, and the removed blocks. It is hashable and can be written as JSON.

    Attributes:
        kept: (axis name, strictly increasing indices of kept channels) pairs, sorted by name. An axis that is not named
            keeps all channels. An entry for an axis that exists only inside removed blocks has no effect.
        removed_blocks: Names of the residual blocks that are removed, sorted.
    """

    kept: tuple[tuple[str, tuple[int, ...]], ...] = ()
    removed_blocks: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        names = [name for name, _ in self.kept]
        if names != sorted(set(names)):
            raise SurgeryError(f"`kept` must name each axis once, in sorted order; got {names}. Use Architecture.of().")
        for name, channels in self.kept:
            if not channels or list(channels) != sorted(set(channels)) or channels[0] < 0:
                raise SurgeryError(
                    f"`kept[{name!r}]` must be non-empty, strictly increasing and not negative; got {channels}."
                )

        if list(self.removed_blocks) != sorted(set(self.removed_blocks)):
            raise SurgeryError(
                f"`removed_blocks` must name each block once, in sorted order; got {list(self.removed_blocks)}. "
                "Use Architecture.of()."
            )

    def __repr__(self) -> str:
        lines = [f"  {name}: {len(channels)} channels, {_abbreviate(channels)}" for name, channels in self.kept]
        if len(lines) > _MOST_SHOWN:
            lines[_MOST_SHOWN:] = [f"  ... and {len(lines) - _MOST_SHOWN} more axes"]
        blocks = list(self.removed_blocks[:_MOST_SHOWN])
        blocks += ["..."] if len(self.removed_blocks) > _MOST_SHOWN else []
        lines += [f"  removed blocks: {', '.join(blocks)}"] if blocks else []
        head = f"Architecture({len(self.kept)} axes, {len(self.removed_blocks)} blocks removed)"
        return "\n".join((head, *lines))

    @classmethod
    def of(cls, kept: Mapping[str, object], removed_blocks: Iterable[str] = ()) -> "Architecture":
        """Return the architecture that keeps these channels and removes these blocks, both in any order."""
        pairs = ((name, tuple(sorted(int(c) for c in channels))) for name, channels in kept.items())  # type: ignore[attr-defined]
        return cls(tuple(sorted(pairs)), tuple(sorted(set(removed_blocks))))

    @cached_property
    def by_name(self) -> Mapping[str, tuple[int, ...]]:
        """The kept channels by axis name."""
        return dict(self.kept)

    @cached_property
    def widths(self) -> Mapping[str, int]:
        """The number of kept channels by axis name."""
        return {name: len(channels) for name, channels in self.kept}

    def to_json(self) -> dict[str, object]:
        """Return a JSON object with ``kept`` (axis name to kept channels) and ``removed_blocks``."""
        kept = {name: list(channels) for name, channels in self.kept}
        return {"kept": kept, "removed_blocks": list(self.removed_blocks)}

    @classmethod
    def from_json(cls, data: Mapping[str, object]) -> "Architecture":
        """Return the architecture that `to_json` wrote.

        The mapping ``kept`` alone, which earlier versions wrote, is read too.

        Raises:
            SurgeryError: If the object is not a mapping of names to integer lists, with a list of block names.
        """
        kept, blocks = data, cast(object, [])
        if isinstance(data.get("kept"), Mapping):
            kept, blocks = cast(Mapping[str, object], data["kept"]), data.get("removed_blocks")
            if set(data) != {"kept", "removed_blocks"}:
                raise SurgeryError(
                    f"an architecture must have the fields 'kept' and 'removed_blocks'; got {sorted(data)}."
                )
        for name, channels in kept.items():
            if not isinstance(channels, list) or not all(type(c) is int for c in cast(list[object], channels)):
                raise SurgeryError(f"kept channels of {name!r} must be a list of integers; got {channels!r}.")
        if not isinstance(blocks, list) or not all(isinstance(name, str) for name in cast(list[object], blocks)):
            raise SurgeryError(f"`removed_blocks` must be a list of block names; got {blocks!r}.")
        return cls.of(kept, cast(list[str], blocks))


def _abbreviate(channels: tuple[int, ...]) -> str:
    """Return the channels as text: the first three and the last one where there are more than five."""
    shown = channels if len(channels) <= 5 else (*channels[:3], "...", channels[-1])
    return f"[{', '.join(map(str, shown))}]"
