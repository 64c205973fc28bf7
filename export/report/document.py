"""One HTML page with nothing from elsewhere: its style, its tables, its pictures."""

from __future__ import annotations

import base64
import html
from collections.abc import Sequence

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 1240px; margin: 2em auto; padding: 0 1em }
img { max-width: min(100%, 1050px) } figure { margin: 2em 0 } figcaption { color: #444 }
table { border-collapse: collapse; margin: 1em 0; font-size: 14px;
  font-variant-numeric: tabular-nums }
th, td { padding: 2px 7px; text-align: right; border-bottom: 1px solid #ddd }
th { border-bottom: 2px solid #888 } th:first-child, td:first-child { text-align: left }
td { white-space: nowrap } p, figcaption { max-width: 65em }
div.wide { overflow-x: auto } pre { background: #f4f4f4; padding: 1em; white-space: pre-wrap }
"""


def document(title: str, parts: Sequence[str]) -> str:
    """The whole page.

    Args:
        title: In the window's bar.
        parts: HTML, in order.
    """
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f"<title>{html.escape(title)}</title>"
        f"<style>{STYLE}</style></head><body>\n" + "\n".join(parts) + "\n</body></html>\n"
    )


def picture(name: str, png: bytes, caption: str) -> str:
    """A figure that holds its picture's bytes.

    Args:
        name: Its anchor.
        png: The picture.
        caption: Below it.
    """
    data, text = base64.b64encode(png).decode(), html.escape(caption)
    return (
        f'<figure id="{name}"><img alt="{text}" src="data:image/png;base64,{data}">'
        f"<figcaption>{text}</figcaption></figure>\n"
    )


def table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table; a wide one scrolls by itself."""
    head = "".join(f"<th>{html.escape(name)}</th>" for name in heads)
    body = "".join(
        "<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in rows
    )
    content = f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
    return f'<div class="wide">{content}</div>'
