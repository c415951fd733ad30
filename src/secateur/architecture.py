"""An architecture: which channels each axis keeps. Plain data: hashable, JSON, independent of torch."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

from secateur.errors import SurgeryError


@dataclass(frozen=True)
class Architecture:
    """The kept channels of each axis; an axis that is not named is whole.

    Attributes:
        kept: (axis name, strictly increasing kept channel indices) pairs, sorted by name.
    """

    kept: tuple[tuple[str, tuple[int, ...]], ...] = ()

    def __post_init__(self) -> None:
        names = [name for name, _ in self.kept]
        if names != sorted(set(names)):
            raise SurgeryError(f"`kept` must name each axis once, in sorted order; got {names}. Use Architecture.of().")
        for name, channels in self.kept:
            if not channels or list(channels) != sorted(set(channels)) or channels[0] < 0:
                raise SurgeryError(
                    f"`kept[{name!r}]` must be non-empty, strictly increasing and not negative; got {channels}."
                )

    @classmethod
    def of(cls, kept: Mapping[str, object]) -> "Architecture":
        """Build from any mapping of axis name to an iterable of channel indices (in any order)."""
        pairs = ((name, tuple(sorted(int(c) for c in channels))) for name, channels in kept.items())  # type: ignore[attr-defined]
        return cls(tuple(sorted(pairs)))

    @cached_property
    def by_name(self) -> Mapping[str, tuple[int, ...]]:
        """Kept channels by axis name."""
        return dict(self.kept)

    @cached_property
    def widths(self) -> Mapping[str, int]:
        """Number of kept channels by axis name."""
        return {name: len(channels) for name, channels in self.kept}

    def to_json(self) -> dict[str, list[int]]:
        """A JSON object: axis name to kept channels."""
        return {name: list(channels) for name, channels in self.kept}

    @classmethod
    def from_json(cls, data: Mapping[str, object]) -> "Architecture":
        """Inverse of `to_json`.

        Raises:
            SurgeryError: If the object is not a mapping of names to integer lists.
        """
        for name, channels in data.items():
            if not isinstance(channels, list) or not all(type(c) is int for c in channels):
                raise SurgeryError(f"kept channels of {name!r} must be a list of integers; got {channels!r}.")
        return cls.of(data)
