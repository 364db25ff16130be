"""Figures and tiles on a page; a figure has a text for screen readers, a table and downloads."""

import hashlib
import html
import io
import re
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from typing import Any, Literal, NamedTuple

import pandas as pd
import plotly.graph_objects as go
import streamlit as st
from streamlit.delta_generator import DeltaGenerator

from explorer.run import Run
from explorer.text import ABSENT, ABSENT_NOTE, cell, counted
from explorer.ui import address, printing, theme
from explorer.ui.glossary import help_text, term_of
from explorer.ui.recipe import Recipe, python, sql
from explorer.ui.wording import escaped

# of the picture that the camera above a figure saves; kept for all figures of a session
_FORMAT = "format of pictures"
_DPI = "dots per inch of pictures"
_WIDTHS = "widths of figures"  # key of a figure -> one of WIDTHS; none = as the screen has it
_LISTED = 100_000  # rows of a table on a page; downloads have all
_FORMATS = {"png": "PNG", "svg": "SVG"}
WIDTHS = {"Screen": 0.0, "One column": 3.5, "Two columns": 7.16}  # inches, of IEEE's journals
_DPIS = (150, 300, 600)
_LONGEST = 120  # characters of a file's name
_LAYER = re.compile(r"\blayer (\d+(?:\.\d+)?)\b")
_OF_A_MAP = {"modeBarButtonsToRemove": [], "scrollZoom": True, "displayModeBar": True}
_CONFIG = {"displaylogo": False, "modeBarButtonsToRemove": ["select2d", "lasso2d"]}


def chart(
    figure: go.Figure,
    *,
    key: str,
    alt: str,
    table: pd.DataFrame | Callable[[], pd.DataFrame],
    on_click: Callable[[list[float]], None] | None = None,
    on_region: Callable[[Any], None] | None = None,
    made: tuple[Recipe, Run] | None = None,
) -> None:
    """Draw a figure and its table.

    Parameters
    ----------
    alt : str
        What the figure shows, in a sentence; plain text.
    table : DataFrame or callable
        The numbers of the figure; a function where making them takes a while.
    on_click : callable, optional
        Called before the rerun with the ``customdata`` of a mark that was clicked.
    on_region : callable, optional
        Called instead with the selection, as Streamlit has it, when a box or a line was drawn or
        taken away, or a mark was clicked (see ``clicked``). The wheel zooms.
    made : (Recipe, Run), optional
        How the table is made of the run, to be copied as code.
    """

    def drawn() -> None:
        state: Any = st.session_state.get(key)
        if on_region is not None:
            on_region(state["selection"] if state else {})

    def picked() -> None:
        state: Any = st.session_state.get(key)
        if on_click is not None and (mark := clicked(state["selection"] if state else {})):
            on_click(mark)

    source = _source(figure, key)
    inches = WIDTHS[st.session_state.get(_WIDTHS, {}).get(key, "Screen")]
    width: Literal["stretch", "content"] = "stretch"
    config = _config(source, inches)
    if inches:
        figure, width = theme.for_paper(figure, inches, source.said), "content"
    if on_region is not None:
        st.plotly_chart(
            figure,
            key=key,
            theme=None,
            width=width,
            config=config | _OF_A_MAP,
            alt=alt,
            on_select=drawn,
            selection_mode=("points", "box", "lasso"),
        )
    elif on_click is None:
        st.plotly_chart(figure, key=key, theme=None, width=width, config=config, alt=alt)
    else:
        st.plotly_chart(
            figure,
            key=key,
            theme=None,
            width=width,
            config=config,
            alt=alt,
            on_select=picked,
            selection_mode="points",
        )
    row = st.container(horizontal=True, gap="xsmall", vertical_alignment="center")
    # the rows travel only when somebody opens it: those of a large heatmap are megabytes
    box = row.expander(
        "Table",
        icon=":material/table:",
        key=f"table of {key}",
        on_change="rerun",
        expanded=printing.theme() is not None,
    )
    if box.open:
        table = table() if callable(table) else table
        # a report cuts the table itself, and says how many rows there are
        shown = table if printing.theme() else table.head(_LISTED)
        box.dataframe(shown, hide_index=True, alt=f"Table of: {alt}", placeholder=ABSENT)
        if printing.theme() is None:
            explain_dash(shown, box)
    name = term_of(key)
    row.page_link(
        "explorer/pages/learn/page.py",
        label="?",
        help=help_text(name)
        + "  \nPadding is never counted."
        + (" Click a mark of the figure to go to what it shows." if on_click else "")
        + (
            " With the box or the lasso above it, draw around what you want to see."
            if on_region
            else ""
        ),
        query_params=address.kept() | {"term": name},
    )
    menu = row.popover(
        "",
        icon=":material/download:",
        help="Download the figure or its data",
        key=f"downloads of {key}",
        on_change="rerun",
    )
    if menu.open:
        with menu:
            _downloads(table() if callable(table) else table, key, source)
    if made is not None and printing.theme() is None:
        _code(row, *made, key)


def _code(row: DeltaGenerator, recipe: Recipe, run: Run, key: str) -> None:
    """Offer the code that makes the table of a figure, written only when somebody asks for it."""
    menu = row.popover(
        "",
        icon=":material/code:",
        help="Copy the data as Python or SQL",
        key=f"code of {key}",
        on_change="rerun",
    )
    if not menu.open:
        return
    menu.markdown("**Python** · makes `table`, the data of this figure")
    menu.code(python(recipe, run.path.name), language="python")
    menu.markdown("**SQL** · what is read from the run; with `run.query` or plain DuckDB")
    menu.code(sql(recipe, run), language="sql", height=320)


def explain_dash(table: pd.DataFrame, place: DeltaGenerator | None = None) -> None:
    """Say what a dash means below a table that has one."""
    if table.isna().any(axis=None):
        (place or st).caption(ABSENT_NOTE)


def listing(
    table: pd.DataFrame, columns: Mapping[str, Sequence[str]], *, alt: str, **options: Any
) -> None:
    """Draw some columns of a table under their titles; what is missing is a dash.

    Parameters
    ----------
    columns : mapping
        Name -> title, or (title, format of the numbers).
    alt : str
        What the table holds; plain text.
    """
    st.dataframe(
        table[list(columns)],
        hide_index=True,
        alt=alt,
        placeholder=ABSENT,
        column_config={
            name: title
            if isinstance(title, str)
            else st.column_config.NumberColumn(title[0], format=title[1])
            for name, title in columns.items()
        },
        **options,
    )


def tile(
    place: DeltaGenerator, title: str, value: str, below: str = "", *, about: str | None = None
) -> None:
    """Draw a number in a box, with a line below it."""
    place.metric(
        title,
        value,
        border=True,
        delta=below or None,
        delta_color="off",
        delta_arrow="off",
        help=about,
    )


class _Source(NamedTuple):
    """What an export is of: its columns of provenance, and the beginning of its file's name."""

    columns: dict[str, str]
    file_name: str

    @property
    def said(self) -> str:
        """What the columns say, for a caption; escaped."""
        # filters are in the caption already
        named = ((n.replace("_", " "), v) for n, v in self.columns.items() if "_of" not in n)
        return ", ".join(
            f"{name} {escaped(value)}" for name, value in named if not name.startswith("filter")
        )


def _source(figure: go.Figure, key: str) -> _Source:
    """Say what a figure is of: the runs of the page, and what chose its tokens."""
    page = address.page()
    columns = {"run": st.query_params.get("run", "")}
    if page == "compare-runs":
        columns["run_b"] = st.query_params.get("against", "")
    if page == "compare":
        columns["comparison"] = st.query_params.get("comparison", "")
    known = (figure.layout.meta or {}).get("filters", {})
    filters = {name: html.unescape(value) for name, value in known.items()}
    title = html.unescape(str(figure.layout.title.text or ""))
    columns = {name: value for name, value in columns.items() if value}
    parts = [*columns.values(), key]
    if layer := _LAYER.search(title):
        columns["of_layer"] = layer[1]
        parts.append(f"layer {layer[1]}")
    parts += [f"{name} {value}" for name, value in filters.items()]
    columns |= {f"filter_{name}": value for name, value in filters.items()}
    return _Source(columns, _file_name(parts))


def _config(source: _Source, inches: float) -> dict[str, Any]:
    """Return plotly's options; the camera saves twice the pixels of the screen, or those asked."""
    dpi = st.session_state.get(_DPI) or _DPIS[1]
    picture = {
        "format": st.session_state.get(_FORMAT) or "png",
        "scale": dpi / theme.PIXELS_PER_INCH if inches else 2,
        "filename": source.file_name,
    }
    return _CONFIG | {"toImageButtonOptions": picture}


def _file_name(parts: list[str]) -> str:
    """Return a harmless name; of a long one the end is a digest, so that it is of this alone."""
    said = " ".join(parts)
    name = re.sub(r"[^\w.-]+", "-", said).strip("-.") or "figure"
    if len(name) <= _LONGEST:
        return name
    return f"{name[:_LONGEST]}-{hashlib.blake2b(said.encode(), digest_size=4).hexdigest()}"


def _downloads(table: pd.DataFrame, key: str, source: _Source) -> None:
    """Offer the data behind a figure, written only when somebody asks for it."""
    table = with_source(table, source.columns)
    kinds: dict[str, tuple[Callable[[], bytes], str]] = {
        "CSV": (lambda: csv(table), "text/csv"),
        "Parquet": (lambda: parquet(table), "application/vnd.apache.parquet"),
    }
    st.markdown(f"**Data** · {counted(len(table), 'row')}")
    with st.container(horizontal=True):
        for kind, (data, mime) in kinds.items():
            st.download_button(
                kind,
                data,
                file_name=f"{source.file_name}.{kind.lower()}",
                mime=mime,
                on_click="ignore",
                key=f"{kind} of {key}",
            )
    st.markdown("**Picture** · the camera above the figure saves it")
    state: Any = st.session_state
    _remembered(state, _FORMAT, "Format", _FORMATS, key)
    widths: dict[str, Any] = state.setdefault(_WIDTHS, {})
    _remembered(widths, key, "Width", {name: _width(name) for name in WIDTHS}, key)
    if WIDTHS[widths.get(key, "Screen")]:
        state.setdefault(_DPI, _DPIS[1])
        _remembered(state, _DPI, "Dots per inch", {n: str(n) for n in _DPIS}, key)


def _width(name: str) -> str:
    return f"{name} ({WIDTHS[name]:g} in)" if WIDTHS[name] else name


def _remembered(
    state: MutableMapping[str, Any], name: str, label: str, choices: dict[Any, str], key: str
) -> None:
    """Draw a choice that outlives the menu it stands in, in ``state[name]``."""
    widget = f"{label} of {key}"
    st.session_state[widget] = state.get(name) or next(iter(choices))

    def changed() -> None:
        state[name] = st.session_state[widget]

    st.segmented_control(
        label,
        list(choices),
        format_func=choices.__getitem__,
        required=True,
        key=widget,
        on_change=changed,
    )


def with_source(table: pd.DataFrame, source: Mapping[str, str]) -> pd.DataFrame:
    """Return a table with what it is of in columns at its end: runs, layer and filters."""
    taken = {str(name) for name in table.columns}
    columns = {f"{name}_of_figure" if name in taken else name: v for name, v in source.items()}
    return table.assign(**columns)


def csv(table: pd.DataFrame) -> bytes:
    """Return a table as a CSV file that is safe to open in a spreadsheet."""
    shown = table.set_axis([str(cell(str(name))) for name in table.columns], axis=1)
    for place, kind in enumerate(table.dtypes):
        if not pd.api.types.is_numeric_dtype(kind):
            shown.isetitem(place, table.iloc[:, place].astype(object).map(cell))
    return str(shown.to_csv(index=False)).encode()


def parquet(table: pd.DataFrame) -> bytes:
    """Return a table as a Parquet file, whose columns have names, not numbers."""
    buffer = io.BytesIO()
    table.set_axis([str(name) for name in table.columns], axis=1).to_parquet(buffer, index=False)
    return buffer.getvalue()


def clicked(selection: Any) -> list[float]:
    """Return the ``customdata`` of the first mark of a selection, as Streamlit has it; [] if none.

    A browser sends binary arrays as {"0": .., "1": ..}, and a number that is missing as null.
    """
    points = selection.get("points") or []
    customdata = points[0].get("customdata") if points else None
    if isinstance(customdata, dict):
        customdata = [customdata[key] for key in sorted(customdata, key=int)]
    return [float("nan") if value is None else float(value) for value in customdata or []]
