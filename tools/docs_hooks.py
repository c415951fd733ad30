"""Hooks of mkdocs: links from the pages to files of the repository beside docs/ become names of these files.

The pages are read in the repository too, where such links lead to scripts and records that the site does not hold.
"""

import re
from typing import Any

_OUTSIDE = re.compile(r"\[([^\]]+)\]\(((?:\.\./)+)([^)#\s]+)(?:#[^)]*)?\)")


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Replace links that lead out of docs/; see mkdocs."""
    depth = page.file.src_uri.count("/")

    def plain(link: re.Match[str]) -> str:
        words, up, path = link.groups()
        if up.count("../") <= depth:
            return link[0]
        return f"`{path}`" if words.strip("`") in path else f"{words} (`{path}`)"

    return _OUTSIDE.sub(plain, markdown)
