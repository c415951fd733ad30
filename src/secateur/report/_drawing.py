"""A channel graph as a file to look at."""

from pathlib import Path

from secateur.artifact import atomic_file
from secateur.errors import ExportError
from secateur.graph import ChannelGraph
from secateur.report._dot import dot
from secateur.report._svg import svg

_WRITERS = {".svg": svg, ".dot": dot}


def check_drawing(path: Path | str) -> None:
    """Refuse a file that `write_drawing` could not write.

    Raises:
        ExportError: If the name does not end in .svg or .dot, or is that of a folder.
    """
    path = Path(path)
    if path.suffix.lower() not in _WRITERS:
        raise ExportError(
            f"`draw` must be a file name that ends in .svg (opens in a browser) or .dot (for graphviz); got {path}."
        )
    if path.is_dir():
        raise ExportError(f"`draw` must be a file; got a folder: {path}. Choose another name.")


def write_drawing(path: Path | str, graph: ChannelGraph, title: str) -> Path:
    """Draw a graph: its layers, and which of them share an axis.

    An ``.svg`` needs nothing else and suits a light and a dark background; a ``.dot`` is for graphviz.

    Args:
        path: Where; replaced atomically.
        graph: A traced model, with choices applied or without.
        title: Above the drawing, such as the name of the model.

    Returns:
        The absolute path of the file.

    Raises:
        ExportError: If the name does not end in .svg or .dot, or is that of a folder.
        OSError: If the file cannot be written.
    """
    check_drawing(path)
    path = Path(path).absolute()
    text = _WRITERS[path.suffix.lower()](graph, title)
    with atomic_file(path) as part:
        part.write_text(text, encoding="utf-8", errors="backslashreplace")
    return path
