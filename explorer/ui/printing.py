"""A page without a browser: what it shows, as plain values, for a report.

``python -m explorer.ui.printing`` reads a request from standard input, runs the pages as a
reader of the app would see them, and writes what they show to standard output. Every page can be
printed, because nothing here knows one page from another. This needs a process of its own: a
page is run by Streamlit's ``AppTest``, which takes the place of the server in its process.

The request is ``{"runs": FOLDER, "pages": [[NAME, ADDRESS], ...]}``, where an address is the
values after the ``?``. The answer is one object for each page: its ``blocks``, the ``address``
that it showed, and a ``problem`` where it failed, beside the blocks that were drawn until then; a
page that fails takes no other one down. A block is an object with a ``kind``: ``heading``,
``text``, ``caption``, ``note``, ``tile``, ``figure`` (plotly JSON, for light and dark ground),
``table``, ``strip`` (coloured tokens, for both), ``lines`` (tokens in context) or ``row`` with
lists of blocks that stand beside each other.
"""

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pandas as pd

from explorer.text import unpieced, visible

Block = dict[str, Any]
# of a page: "blocks", "address" and "problem"
Printed = dict[str, Any]

# rows of a table that are printed
MAX_ROWS = 500
_TIMEOUT = 600.0  # seconds for one page of a large run
_APP = Path(__file__).resolve().parent.parent.parent / "app.py"
_theme: str | None = None


def theme() -> str | None:
    """Return the theme that a page is being printed in; None while it is on a screen."""
    return _theme


def print_pages(runs: str, pages: list[tuple[str, dict[str, str]]]) -> list[Printed]:
    """Run pages and return what each of them shows."""
    # nothing is recorded or saved while a page is printed
    sys.argv = [str(_APP), "--read-only", "--runs", runs]
    light, dark = (_run(pages, ground) for ground in ("light", "dark"))
    for shown, other in zip(light, dark, strict=True):
        shown["problem"] = shown["problem"] or other["problem"]
        _merge(shown["blocks"], other["blocks"], whole=not shown["problem"])
    return light


def _run(pages: list[tuple[str, dict[str, str]]], ground: str) -> list[Printed]:
    global _theme
    from streamlit import config
    from streamlit.testing.v1 import AppTest

    _theme = ground
    # a report says why a section is missing; on a server only the console does
    config.set_option("client.showErrorDetails", "full")
    app = AppTest.from_file(str(_APP), default_timeout=_TIMEOUT)
    shown = []
    # pages are known to Streamlit after a first run only
    for name, address in [("", pages[0][1] if pages else {}), *pages]:
        for known in list(app.query_params):
            del app.query_params[known]
        for part, value in address.items():
            app.query_params[part] = value
        problem = ""
        try:
            if name:
                app.switch_page(f"explorer/pages/{name.replace('-', '_')}/page.py")
            app.run()
        except (RuntimeError, ValueError) as error:  # it took too long, or there is no such page
            problem = one_line(str(error))
        if app.exception:
            problem = _why(app.exception[0])
        elif app.main.error and not problem:
            problem = one_line(unpieced(str(app.main.error[0].value)).replace("\\", ""))
        if name:
            shown.append(_printed(app, address, problem))
    return shown


def _printed(app: Any, address: dict[str, str], problem: str) -> Printed:
    there = {part: value for part in app.query_params if (value := _value(app, part))}
    run = address.get("run", "")
    if run and there.get("run") != run:
        # a page falls back on another run where the one of a link is gone
        return {
            "blocks": [],
            "address": there,
            "problem": problem or f"The run {run} is not there any more.",
        }
    return {"blocks": list(_blocks(app.main)), "address": there, "problem": problem}


def _value(app: Any, part: str) -> str:
    value = app.query_params[part]
    return str(value if isinstance(value, str) else value[0])


def _why(error: Any) -> str:
    """Return one line about an exception that ended a page, and write all of it to the console."""
    sys.stderr.write("\n".join(error.stack_trace) + f"\n{error.message}\n")
    name = str(error.proto.type).rpartition(".")[2]
    known = name.endswith("Error") and name[:-5] in _KNOWN
    said = one_line(error.message)
    return said if known else f"{name}: {said}"


# names, less "Error", of errors whose message is made for readers
_KNOWN = frozenset({"Run", "Explorer", "Router", "Metric", "Store", "NotAllowed", "Capture"})


def one_line(text: str) -> str:
    """Return a message without the places of files, which are nobody else's business."""
    words = [word.rpartition("/")[2] if "/" in word else word for word in str(text).split()]
    return " ".join(words)[:200]


def _blocks(parent: Any, *, folded: bool = False) -> Iterator[Block]:
    """Yield what is inside an element of the page, in order."""
    for child in parent.children.values():
        if not hasattr(child, "children"):
            block = _READERS.get(child.type, _nothing)(child)
            if block is not None:
                yield block | {"folded": folded}
        elif child.type == "flex_container" and _is_row(child):
            columns = list(child.children.values())
            yield {
                "kind": "row",
                "blocks": [list(_blocks(column)) for column in columns],
                "weights": [float(getattr(column, "weight", 1.0)) for column in columns],
            }
        elif child.type not in ("popover", "form", "dialog"):
            yield from _blocks(child, folded=folded or child.type == "expander")


def _is_row(child: Any) -> bool:
    return any(inner.type == "column" for inner in child.children.values())


def _merge(light: list[Block], dark: list[Block], *, whole: bool) -> None:
    """Give figures and coloured tokens their dark forms; of a page that failed, those there are."""
    for block in _painted(light):
        if block["kind"] == "figure":
            block["dark"] = block["light"]
    for block, other in zip(_painted(light), _painted(dark), strict=whole):
        if block["kind"] != other["kind"]:
            return
        if block["kind"] == "figure":
            block["dark"] = other["light"]
        else:
            block["dark_hues"], block["dark_legend"] = other.get("hues"), other.get("legend")


def _painted(blocks: list[Block]) -> Iterator[Block]:
    for block in blocks:
        if block["kind"] in ("figure", "strip"):
            yield block
        for column in block.get("blocks", []):
            yield from _painted(column)


def _nothing(element: Any) -> None:
    """Leave out what only a browser can use, such as a button."""


def _heading(element: Any) -> Block:
    return {"kind": "heading", "level": int(element.proto.tag[1]), "text": element.proto.body}


def _text(kind: str) -> Callable[[Any], Block]:
    return lambda element: {"kind": kind, "text": element.value}


def _note(element: Any) -> Block:
    return {"kind": "note", "tone": element.type, "text": element.value}


def _tile(element: Any) -> Block:
    return {
        "kind": "tile",
        "label": element.label,
        "value": element.value,
        "delta": element.delta,
        "help": element.help,
    }


def _figure(element: Any) -> Block:
    return {"kind": "figure", "light": element.proto.spec, "alt": element.proto.alt}


def _table(element: Any) -> Block:
    frame = element.value
    known = json.loads(element.proto.columns or "{}")
    about = {str(column): known.get(str(column)) or {} for column in frame.columns}
    kept = [column for column in frame.columns if not about[str(column)].get("hidden")]
    names = [str(about[str(column)].get("label") or column) for column in kept]
    formats = [(about[str(column)].get("type_config") or {}).get("format") for column in kept]
    shown = frame[kept].head(MAX_ROWS).astype(object)
    rows = [
        [
            None if _missing(value) else _written(_plain(value), form)
            for value, form in zip(row, formats, strict=True)
        ]
        for row in shown.itertuples(index=False, name=None)
    ]
    return {
        "kind": "table",
        "columns": names,
        # a number that is written as its page has it is text, and still stands to the right
        "numbers": [form is not None for form in formats],
        "rows": rows,
        "total": len(frame),
        "alt": element.proto.alt,
    }


def _missing(value: Any) -> bool:
    return bool(pd.api.types.is_scalar(value) and pd.isna(value))


def _plain(value: Any) -> str | int | float:
    if isinstance(value, bool | int | float):
        return value
    if hasattr(value, "item"):
        return _plain(value.item())
    return visible(str(value))


def _written(value: str | int | float, form: str | None) -> str | int | float:
    """Return a number as the table of its page has it."""
    if form is None or isinstance(value, bool | str):
        return value
    if form in ("localized", "percent"):
        return f"{value:,}" if form == "localized" else f"{value:.2%}"
    try:
        return form % value
    except (TypeError, ValueError):
        return value


def _component(element: Any) -> Block | None:
    data = json.loads(element.proto.json or "null")
    if not isinstance(data, dict):
        return None
    if "texts" in data and "levels" in data:
        return {"kind": "strip", **data}
    if "rows" in data:
        return {"kind": "lines", "rows": data["rows"], "label": data.get("label", "")}
    return None


_READERS: dict[str, Callable[[Any], Block | None]] = {
    "title": _nothing,
    "header": _heading,
    "subheader": _heading,
    "markdown": _text("text"),
    "caption": _text("caption"),
    "info": _note,
    "success": _note,
    "warning": _note,
    "error": _note,
    "metric": _tile,
    "plotly_chart": _figure,
    "dataframe": _table,
    "bidi_component": _component,
}


def main() -> None:
    """Answer one request."""
    # what a library prints would break the answer: it goes to standard error instead
    out, sys.stdout = sys.stdout, sys.stderr
    request = json.load(sys.stdin)
    pages = [(str(name), dict(address)) for name, address in request["pages"]]
    json.dump(print_pages(request["runs"], pages), out)


if __name__ == "__main__":
    # the pages import this module by its name, and must find the same theme there
    from explorer.ui.printing import main as answer

    answer()
