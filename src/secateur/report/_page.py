"""Tables of many runs as one page that needs nothing else."""

from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

from secateur.artifact import atomic_file


@dataclass(frozen=True)
class PageTable:
    """One table.

    Attributes:
        title: Above it.
        columns: Their names.
        rows: Cells as text; the first of a row names it.
        text: A sentence before it.
    """

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    text: str = ""


@dataclass(frozen=True)
class Page:
    """A page of tables.

    Attributes:
        title: Of the page.
        facts: (label, value) pairs under the title.
        notes: Sentences the reader must know.
        tables: In order.
        command: The exact command or call.
    """

    title: str
    facts: tuple[tuple[str, str], ...] = ()
    notes: tuple[str, ...] = ()
    tables: tuple[PageTable, ...] = ()
    command: str = ""


def write_page(path: Path | str, page: Page) -> Path:
    """Write tables as one HTML file that needs nothing else: no network, no scripts, light and dark.

    Args:
        path: Where; replaced atomically.
        page: What to show. All of it is escaped.

    Returns:
        The absolute path of the file.

    Raises:
        OSError: If the file cannot be written.
    """
    import jinja2
    import markupsafe

    path, here = Path(path).absolute(), files("secateur.report")
    template = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined).from_string(
        (here / "page.html").read_text(encoding="utf-8")
    )
    text = template.render(page=page, style=markupsafe.Markup((here / "report.css").read_text(encoding="utf-8")))
    with atomic_file(path) as part:
        part.write_text(text, encoding="utf-8", errors="backslashreplace")
    return path
