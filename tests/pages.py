"""What a browser would fetch, or run, to show a page."""

from __future__ import annotations

import re
from html.parser import HTMLParser

CODE = {"script", "link", "iframe", "object", "embed", "base"}
SOURCES = {"src", "srcset", "poster", "background", "data", "action", "formaction"}
IN_STYLE = re.compile(r"url\s*\(|@import|image-set")


class _Reader(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self._is_style = False

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._is_style = tag == "style"
        if tag in CODE:
            self.found.append(tag)
        for name, value in attrs:
            text = value or ""
            is_far = name in SOURCES and not text.startswith("data:")
            leaves = name == "href" and re.match(r"\w+:|//", text) is not None
            runs = name.startswith("on") or (name == "style" and IN_STYLE.search(text) is not None)
            if is_far or leaves or runs:
                self.found.append(f'{tag} {name}="{text[:60]}"')

    def handle_data(self, data: str) -> None:
        if self._is_style and IN_STYLE.search(data):
            self.found.append(data[:60])

    def handle_endtag(self, tag: str) -> None:
        self._is_style = False


def loaded_from_elsewhere(page: str) -> list[str]:
    """Whatever in a page is not in the page itself; links to files beside it are left alone."""
    reader = _Reader()
    reader.feed(page)
    return reader.found
