"""Text of strangers on pages, in tables and in terminals: characters that cannot be seen are shown as escapes.

Names of classes, modules and files can hold escape sequences, which change colors, titles or the clipboard of a
terminal; marks that reverse the order of letters; halves of characters, which cannot be written at all; and what a
spreadsheet takes for a formula. All writers use the functions of this file.
"""

import html
import math

LINES = "\n\t"
"""Line ends and tabs, which a terminal shows as such."""
PAGE = f"{LINES}\N{NO-BREAK SPACE}\N{NARROW NO-BREAK SPACE}"
"""What a page shows as such."""

_NAMED = {"\n": "\\n", "\r": "\\r", "\t": "\\t"}
_WIDE = "\N{FULLWIDTH EQUALS SIGN}\N{FULLWIDTH PLUS SIGN}\N{FULLWIDTH HYPHEN-MINUS}\N{FULLWIDTH COMMERCIAL AT}"
_FORMULA = ("=", "+", "-", "@", "\t", "\r", *_WIDE, "'")
"""What a cell begins with that a spreadsheet computes, and the quote itself, so that quoting can be undone."""


def visible(text: str, *, keep: str = LINES) -> str:
    r"""Show each character that cannot be printed as an escape of JSON, such as ``\u202e``.

    Args:
        text: Any text.
        keep: Characters that stay although they cannot be printed.
    """
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c in keep else _escape(c) for c in text)


def _escape(character: str) -> str:
    code = ord(character)
    return _NAMED.get(character) or (f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}")


def is_text(path: object) -> bool:
    """Whether a path is text: names of files are bytes, and libraries written in other languages take only UTF-8."""
    try:
        str(path).encode()
    except UnicodeEncodeError:
        return False
    return True


def html_text(text: str) -> str:
    """Return text for a page or an SVG: visible, and without meaning for the browser."""
    return html.escape(visible(text, keep=PAGE))


def csv_cell(text: str) -> str:
    """Return a cell that no spreadsheet computes: an apostrophe comes before what could be a formula; numbers stay."""
    shown = visible(text, keep="\t")
    return f"'{shown}" if text.startswith(_FORMULA) and not _is_number(text) else shown


def csv_text(cell: str) -> str:
    """Return the text of a cell that `csv_cell` made."""
    return cell[1:] if cell.startswith("'") else cell


def _is_number(text: str) -> bool:
    try:
        return not math.isnan(float(text))
    except ValueError:
        return False
