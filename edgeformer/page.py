"""The frame and the parts of an HTML page: self-contained, no script, no network; every text is escaped here."""

from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path
from typing import NamedTuple

from .summary import LONGEST, clean

POLICY = "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"


class Raw(NamedTuple):
    """Markup, to be told from text, which is always escaped."""

    html: str


Cell = str | Raw


def document(title: str, body: str) -> str:
    """A whole page. `body` is markup."""
    style = Path(__file__).with_name("report.css").read_text(encoding="utf-8")
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="color-scheme" content="light dark">'
        f"<title>{text(title)}</title><style>{style}</style></head><body><main>{body}</main></body></html>\n"
    )


def text(value: object, longest: int = LONGEST) -> str:
    """Words of anybody's as text of the page."""
    return escape(clean(value, longest), quote=True)


def section(key: str, title: str, inside: str, style: str = "") -> str:
    head = f'<h2 id="{key}-h">{title}</h2>'
    return f'<section id="{key}" class="{style}" aria-labelledby="{key}-h">{head}{inside}</section>'


def figure(picture: str, caption: str) -> str:
    return f'<figure><div class="scroll">{picture}</div><figcaption>{caption}</figcaption></figure>'


def details(summary: str, inside: str) -> str:
    return f"<details><summary>{summary}</summary>{inside}</details>"


def table(caption: str, heads: Sequence[str], lines: Iterable[Sequence[Cell]]) -> str:
    """A heading that begins with > makes a column of figures, with ~ one that does not wrap. First cells name lines."""
    styles = [{">": ' class="n"', "~": ' class="w"'}.get(head[:1], "") for head in heads]
    top = "".join(f'<th scope="col"{s}>{text(h.lstrip(">~"))}</th>' for s, h in zip(styles, heads, strict=True))
    body = "".join(f"<tr>{''.join(map(_cell, range(len(heads)), styles, line))}</tr>" for line in lines)
    inside = f"<caption>{text(caption)}</caption><thead><tr>{top}</tr></thead><tbody>{body}</tbody>"
    return f'<div class="scroll"><table>{inside}</table></div>'


def _cell(place: int, style: str, cell: Cell) -> str:
    inside = cell.html if isinstance(cell, Raw) else text(cell, 400)
    return f"<td{style}>{inside}</td>" if place else f'<th scope="row"{style}>{inside}</th>'
