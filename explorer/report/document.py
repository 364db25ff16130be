"""The HTML of a report, from blocks as ``explorer.ui.printing`` describes them.

Nothing of a run is believed: every text is escaped, and the file's own policy lets the browser run
the two scripts that are named there by their digests, load nothing, and send nothing.
"""

import base64
import hashlib
import html
import json
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from markdown_it import MarkdownIt
from plotly.offline import get_plotlyjs

from explorer.text import ABSENT, ABSENT_NOTE, unpieced

Block = Mapping[str, Any]

_HERE = Path(__file__).parent
# raw HTML stays text; no links and pictures, which a text from a run could make
_MARKDOWN = MarkdownIt("commonmark", {"html": False}).disable(["link", "image", "autolink"])
# names of icons that only the app has
_ICON = re.compile(r":material/\w+:\s*")
_COPY = (
    "A copy of what the pages of RouteScope showed. Figures can be zoomed, hovered and saved; what "
    "a page says of clicking and of drawing works in the app only."
)
_CLICK = re.compile(r"\s*(?:Click:|Draw a box) [^.]*\.")


def document(
    title: str,
    facts: Mapping[str, str],
    sections: Sequence[tuple[str, str]],
    *,
    failed: Mapping[str, str] | None = None,
) -> str:
    """Return the whole file.

    Parameters
    ----------
    title : str
    facts : mapping
        What the report is of, one line each.
    sections : sequence of (title, HTML)
        From ``section``.
    failed : mapping, optional
        Title of each section that is not whole, and why.
    """
    scripts = [get_plotlyjs(), (_HERE / "report.js").read_text(encoding="utf-8")]
    policy = (
        "default-src 'none'; style-src 'unsafe-inline'; img-src data: blob:; "
        # plotly compiles the drawing of points for the graphics card
        f"script-src {' '.join(_digest(script) for script in scripts)} 'unsafe-eval'; "
        "base-uri 'none'; form-action 'none'"
    )
    links = "".join(
        f'<a href="#part-{number}">{html.escape(name)}</a>'
        for number, (name, _) in enumerate(sections)
    )
    parts = "".join(
        f'<section id="part-{number}"><h2>{html.escape(name)}</h2>{body}</section>'
        for number, (name, body) in enumerate(sections)
    )
    lacking = "".join(
        f"<li>{html.escape(name)}: {html.escape(why)}</li>" for name, why in (failed or {}).items()
    )
    alarm = (
        f'<div class="note alarm" role="note">Sections that could not be made whole:'
        f"<ul>{lacking}</ul></div>"
        if lacking
        else ""
    )
    rows = "".join(
        f'<tr><th scope="row">{html.escape(name)}</th><td dir="auto">{html.escape(value)}</td></tr>'
        for name, value in facts.items()
    )
    style = (_HERE / "report.css").read_text(encoding="utf-8")
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{html.escape(policy)}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="generator" content="RouteScope">'
        f"<title>{html.escape(title)}</title><style>{style}</style></head><body>"
        f'<header><h1 dir="auto">{html.escape(title)}</h1>'
        '<button id="theme" type="button" aria-pressed="false">Dark</button></header>'
        f'<main><p class="caption">{_COPY}</p>{alarm}<nav>{links}</nav>{parts}'
        f'<section id="provenance"><h2>Where this is from</h2><table class="facts">{rows}</table>'
        "</section></main>"
        + "".join(f"<script>{script}</script>" for script in scripts)
        + "</body></html>\n"
    )


def _digest(script: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'"


def section(blocks: Sequence[Block]) -> str:
    """Return the HTML of what a page shows."""
    return "".join(_WRITERS[block["kind"]](block) for block in blocks if block["kind"] in _WRITERS)


def rich(text: str, *, inline: bool = False) -> str:
    """Return a page's Markdown as HTML; what a page escaped stays as it is."""
    text = _ICON.sub("", unpieced(text))
    rendered = _MARKDOWN.renderInline(text) if inline else _MARKDOWN.render(text)
    return str(rendered)


def _heading(block: Block) -> str:
    level = min(max(int(block["level"]), 3), 4)
    return f'<h{level} dir="auto">{rich(block["text"], inline=True)}</h{level}>'


def _text(block: Block) -> str:
    return f'<div class="{block["kind"]}" dir="auto">{rich(block["text"])}</div>'


def _note(block: Block) -> str:
    tone = "alarm" if block["tone"] in ("error", "warning") else "info"
    return f'<div class="note {tone}" role="note">{rich(block["text"])}</div>'


def _failure(block: Block) -> str:
    return f'<div class="note alarm" role="note">{html.escape(block["text"])}</div>'


def _tile(block: Block) -> str:
    about = f' title="{html.escape(block["help"])}"' if block["help"] else ""
    delta = f"<small>{rich(block['delta'], inline=True)}</small>" if block["delta"] else ""
    return (
        f'<div class="tile"{about}><span>{rich(block["label"], inline=True)}</span>'
        f"<strong>{html.escape(block['value'])}</strong>{delta}</div>"
    )


def _figure(block: Block) -> str:
    light, dark = json.loads(block["light"]), json.loads(block["dark"])
    figures = {"light": light, "changes": list(_changes(light, dark))}
    alt = html.escape(_CLICK.sub("", block["alt"]))
    # a script of data is not run, but would end at the first "</script"
    data = json.dumps(figures, separators=(",", ":")).replace("<", "\\u003c")
    height = int(light.get("layout", {}).get("height") or 380)
    return (
        f'<figure><div class="plot" role="img" aria-label="{alt}" style="height:{height}px"></div>'
        f'<script type="application/json">{data}</script></figure>'
    )


def _changes(light: Any, dark: Any, path: tuple[str | int, ...] = ()) -> Iterator[list[Any]]:
    """Yield [path, value] of what is different on dark ground: colours, but not the numbers."""
    if isinstance(light, dict) and isinstance(dark, dict) and light.keys() == dark.keys():
        for name in light:
            yield from _changes(light[name], dark[name], (*path, name))
    elif isinstance(light, list) and isinstance(dark, list) and len(light) == len(dark) < 100:
        for place, (one, other) in enumerate(zip(light, dark, strict=True)):
            yield from _changes(one, other, (*path, place))
    elif light != dark:
        yield [list(path), dark]


def _table(block: Block) -> str:
    numbers = block.get("numbers") or [False] * len(block["columns"])
    first = block["rows"][0] if block["rows"] else [None] * len(numbers)
    head = "".join(
        f'<th scope="col"{_side(number or type(value) in (int, float))}>{html.escape(name)}</th>'
        for name, number, value in zip(block["columns"], numbers, first, strict=True)
    )
    body = "".join("<tr>" + "".join(map(_cell, row, numbers)) + "</tr>" for row in block["rows"])
    shown, total = len(block["rows"]), int(block["total"])
    said = [f"The first {shown:,} of {total:,} rows."] if shown < total else []
    # the others say below themselves what a dash is
    if block["folded"] and any(_is_absent(value) for row in block["rows"] for value in row):
        said.append(ABSENT_NOTE)
    more = f"<caption>{' '.join(said)}</caption>" if said else ""
    alt = html.escape(_CLICK.sub("", block["alt"]))
    table = (
        f'<div class="scroll"><table aria-label="{alt}">{more}<thead><tr>{head}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )
    return f"<details><summary>Table</summary>{table}</details>" if block["folded"] else table


def _is_absent(value: Any) -> bool:
    return value is None or (isinstance(value, float) and math.isnan(value))


def _cell(value: Any, number: bool = False) -> str:
    if _is_absent(value):
        return f'<td class="absent">{ABSENT}</td>'
    if isinstance(value, float):
        return f'<td class="number">{value:.6g}</td>'
    if isinstance(value, int) and not isinstance(value, bool):
        return f'<td class="number">{value}</td>'
    return f'<td dir="auto"{_side(number)}>{html.escape(str(value))}</td>'


def _side(number: bool) -> str:
    """Return what puts numbers and their titles to the right."""
    return ' class="number"' if number else ""


def _strip(block: Block) -> str:
    """Write coloured tokens."""
    spans = []
    flagged = ("muted", "generated", "found")
    columns = ("texts", "hints", "levels", "hues", "dark_hues", "marks", "ids", *flagged)
    lists = [block.get(name) or [None] * len(block["texts"]) for name in columns]
    for text, hint, level, hue, dark, mark, number, *more in zip(*lists, strict=True):
        paint = _paint(hue, dark)
        flags = dict(zip(flagged, more, strict=True)) | {"unknown": level is None, "hued": paint}
        flags["chosen"] = number is not None and number == block.get("selected")
        names = " ".join(["token", *(name for name, holds in flags.items() if holds)])
        style = f"--level:{float(level or 0):.3f}{paint}"
        mark = f' data-mark="{html.escape(str(mark))}"' if mark else ""
        spans.append(
            f'<span class="{names}" style="{style}" title="{html.escape(str(hint or ""))}"{mark}>'
            f"{html.escape(text)}</span>"
        )
    legend = block.get("legend") or {}
    words = [legend.get("title", ""), legend.get("low", ""), legend.get("high", "")]
    ramp = '<span class="ramp"></span>' if legend.get("high") else ""
    swatches = legend.get("swatches", ())
    of_dark = (block.get("dark_legend") or legend).get("swatches", ())
    named = "".join(
        f'<span class="swatch hued" style="{_paint(color, dark)}"></span>{html.escape(name)} '
        for (color, name), (dark, _) in zip(swatches, of_dark, strict=True)
        if _paint(color, dark)
    )
    title, low, high = (html.escape(str(word)) for word in words)
    return (
        f'<p class="legend">{title} {low} {ramp} {high} {named}</p>'
        f'<div class="strip" dir="auto">{"".join(spans)}</div>'
    )


def _paint(light: str | None, dark: str | None) -> str:
    """Return the style of a hue on both grounds; nothing if there is none."""
    if not light or not re.fullmatch(r"#[0-9A-Fa-f]{6}", light):
        return ""
    if not dark or not re.fullmatch(r"#[0-9A-Fa-f]{6}", dark):
        dark = light
    return f";--light:{light};--dark:{dark}"


def _lines(block: Block) -> str:
    """Write tokens in their contexts."""
    rows = []
    for before, token, after, note, _, number in block["rows"]:
        left, middle, right, where, amount = (
            html.escape(str(part)) for part in (before, token, after, note, number)
        )
        rows.append(
            f'<tr><td class="before" dir="auto">{left}</td><td><mark dir="auto">{middle}</mark>'
            f'</td><td dir="auto">{right}</td><td>{where}</td><td class="number">{amount}</td></tr>'
        )
    return f'<div class="scroll"><table class="lines">{"".join(rows)}</table></div>'


def _row(block: Block) -> str:
    weights = [float(weight) for weight in block["weights"]]
    columns = "".join(
        # at least 1, so that one that is alone on its line fills it
        f'<div style="--weight:{weight / min(weights):.3f};'
        f'--part:{weight / max(weights):.3f}">{section(inner)}'
        "</div>"
        for inner, weight in zip(block["blocks"], weights, strict=True)
        if inner
    )
    tiles = all(inner and inner[0]["kind"] == "tile" for inner in block["blocks"])
    return f'<div class="row{" tiles" if tiles else ""}">{columns}</div>'


_WRITERS: dict[str, Callable[[Block], str]] = {
    "heading": _heading,
    "text": _text,
    "caption": _text,
    "note": _note,
    "failure": _failure,
    "tile": _tile,
    "figure": _figure,
    "table": _table,
    "strip": _strip,
    "lines": _lines,
    "row": _row,
}
