"""A terminal that shows names of strangers, and does nothing that they say."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rich.console import Console

if TYPE_CHECKING:
    from collections.abc import Iterable

    from rich.console import ConsoleOptions
    from rich.segment import Segment

_KEPT = frozenset("\n\t")
_INSTEAD = "\N{REPLACEMENT CHARACTER}"


class PlainConsole(Console):
    """Replaces the characters that cannot be printed, whatever is shown.

    Names of classes, modules and files can hold escape sequences, which change colours, titles or the clipboard of a
    terminal; marks that reverse the order of letters; and halves of characters, which cannot be written at all. Only
    what rich itself adds for styles goes through, after this.
    """

    def render(self, renderable: Any, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        """The segments of what is shown, see `rich.console.Console.render`."""
        for segment in super().render(renderable, options):
            yield segment if segment.control else segment._replace(text=printable(segment.text))


def printable(text: str) -> str:
    """The text with a replacement character for each that cannot be printed; line ends and tabs stay."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c in _KEPT else _INSTEAD for c in text)
