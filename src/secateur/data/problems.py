"""Images of a set that cannot be used: all of them in one error, or left out if that is wanted."""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field

from secateur.errors import DataError

_MOST_NAMED = 20
"""Images named in one message; more are counted."""
_LONGEST_LIST = 5_000
"""Characters of such a list, so that long paths do not fill the terminal."""


@dataclass
class ImageProblems:
    """Collects the images of a set that cannot be used, while the set is read.

    Attributes:
        skip: Whether they are left out instead of being refused.
        found: What is wrong, by the name of the image's file or row, as sentences.
    """

    skip: bool = False
    found: dict[str, str] = field(default_factory=dict[str, str])

    def note(self, name: str, problem: DataError) -> None:
        """Note that an image cannot be used."""
        self.found[name] = str(problem)

    def settle(self, data: str, images: int) -> tuple[str, ...]:
        """Refuse a set in which images cannot be used, or warn of those that are left out; return their names.

        Args:
            data: Name of the set.
            images: Number of images that were looked at.

        Raises:
            DataError: If there are some, and they are not to be left out.
        """
        if not self.found:
            return ()
        if not self.skip:
            raise DataError(self._refusal(data, images))
        warnings.warn(f"{describe_skipped(data, tuple(self.found))}.", stacklevel=3)
        return tuple(self.found)

    def check_left(self, data: str, images: int, left: int) -> None:
        """Refuse a split of which no image can be used.

        Raises:
            DataError: If so, with all images that were found so far.
        """
        if not left:
            raise DataError(self._refusal(data, images))

    def _refusal(self, data: str, images: int) -> str:
        problems = list(self.found.values())
        way_out = "" if self.skip else " To go on without such images: --skip-bad-images (skip_bad_images=True)."
        if len(problems) == 1:
            return problems[0] + way_out
        shown = [f"- {problem}" for problem in problems[:_MOST_NAMED]]
        while len(shown) > 1 and sum(map(len, shown)) > _LONGEST_LIST:
            shown.pop()
        if len(problems) > len(shown):
            shown.append(f"- and {len(problems) - len(shown)} more")
        return "\n".join((f"{len(problems)} of {images} images of {data} cannot be used:", *shown)) + (
            f"\n{way_out.strip()}" if way_out else ""
        )


def describe_skipped(data: str, names: Sequence[str]) -> str:
    """Return how many images of a set were left out, and which, as a clause; empty if there are none."""
    if not names:
        return ""
    more = f" and {len(names) - _MOST_NAMED} more" if len(names) > _MOST_NAMED else ""
    count = "1 image" if len(names) == 1 else f"{len(names)} images"
    return f"{count} of {data} left out, which cannot be used: {', '.join(names[:_MOST_NAMED])}{more}"
