"""What is in a region of a map: its points in a table, what is over-represented, and a slice."""

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt
import pandas as pd
import streamlit as st

from explorer.maps.data import Source, expert_counts, expert_domains
from explorer.maps.point_table import PointTable, Region
from explorer.metrics.specialization import MIN_WHOLE, Lift, lift
from explorer.pages.clusters.figures import lift_bars
from explorer.pages.clusters.points import id_names
from explorer.queries.overview import prompt_tokens
from explorer.queries.routed import NOTHING
from explorer.text import ABSENT, visible
from explorer.ui import address, printing
from explorer.ui.chart import chart, explain_dash
from explorer.ui.problems import instead, section, without_ids
from explorer.ui.saved import save_slice
from explorer.ui.state import View, ask, is_dark
from explorer.ui.wording import domain_labels, domain_name, expert_label, ordinal

LISTED = 1_000  # rows of the table; the browser gets no more
_COLUMNS = {
    "tokens": "text, domain, expert, weight, entropy, prompt_id, position, phase, token_id",
    "prompts": "text, domain, tokens, expert, entropy, prompt_id",
    "experts": "layer, site, expert_id, kind, ratio, assignments, domain, lift",
}


@section("Selected points")
def selection_section(view: View, source: Source, table: PointTable, region: Region | None) -> None:
    """Draw the section; without a region, say how to draw one."""
    if region is None:
        # on paper there is nothing to draw on
        if not printing.theme():
            st.caption(
                ":material/select: Drag to move the map, turn the wheel to zoom, click a point to "
                "go to it. To see what is inside a region, choose the box or the lasso above the "
                "map and draw; double-click takes the selection away."
            )
        return
    rows = table.select(region)
    with st.container(border=True, key="selection"):
        title = f"Selected: {len(rows):,} of {table.n_shown:,} {source.unit}"
        address.closing(title, "region", label="Clear")
        if not len(rows):
            instead("No point of this selection is inside. Draw a larger box.")
            return
        _over_represented(view, source, table, rows)
        _list(view, source, table, rows)
        if source.unit != "experts":
            save_slice(view, lambda: _tokens(view, source, table, rows), key="of the map")


def _list(view: View, source: Source, table: PointTable, rows: npt.NDArray[np.int64]) -> None:
    # spread over all of them, since neighbours in the run are of the same prompt
    step = -(-len(rows) // LISTED)
    found = table.rows(_COLUMNS[source.unit], rows[::step])
    shown = _readable(view, source, found)
    key = f"selected {source.unit}"

    def picked() -> None:
        chosen = st.session_state[key]["selection"]["rows"]
        if chosen and chosen[0] < len(found):
            aim(view, source, found.iloc[chosen[0]])

    st.dataframe(
        shown,
        key=key,
        hide_index=True,
        height=430,
        alt=f"Table of the selected {source.unit}; choose a row to go there",
        placeholder=ABSENT,
        on_select=picked,
        selection_mode="single-row",
        column_config={
            "Weight": st.column_config.NumberColumn(format="%.3f"),
            "Gate entropy": st.column_config.NumberColumn("Gate entropy (nats)", format="%.2f"),
            "Load": st.column_config.NumberColumn("Load / uniform", format="%.2f ×"),
            "Lift": st.column_config.NumberColumn(format="%.2f ×"),
        },
    )
    explain_dash(shown)
    said = f"All {len(rows):,}" if step == 1 else f"Every {ordinal(step)} of {len(rows):,}"
    st.caption(f"{said}, in the order of the run. Choose a row to go to it.")


def _readable(view: View, source: Source, found: pd.DataFrame) -> pd.DataFrame:
    domain = [domain_name(name) for name in found["domain"]]
    if source.unit == "experts":
        places = zip(found["layer"], found["site"], found["expert_id"], strict=True)
        return pd.DataFrame(
            {
                "Expert": [
                    _unit_label(view, *place)
                    + (f", {NOTHING[kind].one}" if kind in NOTHING else "")
                    for place, kind in zip(places, found["kind"], strict=True)
                ],
                "Load": found["ratio"],
                "Assignments": found["assignments"],
                "Typical domain": domain,
                "Lift": found["lift"],
            }
        )
    expert = [
        "not recorded" if pd.isna(e) else expert_label(view.site_name, int(e))
        for e in found["expert"]
    ]
    text = [visible(text, spaces=source.unit == "tokens") for text in found["text"]]
    readable = {
        "Token" if source.unit == "tokens" else "Prompt": text,
        "Domain": domain,
        "Expert": expert,
    }
    if source.unit == "tokens":
        readable |= {"Weight": found["weight"], "Gate entropy": found["entropy"]}
        readable |= {"Prompt": found["prompt_id"], "Position": found["position"]}
        return pd.DataFrame(readable)
    readable |= {"Gate entropy": found["entropy"], "Tokens": found["tokens"]}
    return pd.DataFrame(readable | {"Number": found["prompt_id"]})


def _unit_label(view: View, layer: int, site: int, expert: int) -> str:
    several = len(view.run.layers) < len(view.run.sites)
    return expert_label(f"{layer}.{site}" if several else str(layer), expert)


def aim(view: View, source: Source, row: Mapping[str, int] | pd.Series) -> None:
    """Remember the point that was picked, to go to it (see ``address.follow_jump``).

    Parameters
    ----------
    row : mapping
        Has what ``points.PICKED`` lists.
    """
    if source.unit == "experts":
        address.jump_to_expert(view, [row["layer"], row["site"], row["expert_id"]])
    else:
        prompt = int(row["prompt_id"])
        is_token = source.unit == "tokens"
        token = row["token_id"] if is_token else prompt_tokens(view.run, [prompt])[0]
        address.jump_to_token(prompt, int(token))


def _over_represented(
    view: View, source: Source, table: PointTable, rows: npt.NDArray[np.int64]
) -> None:
    if source.unit == "experts":
        found, names, ids = _domains(view, table, rows)
        what, title = "domains", "Domains of these experts (share here / share in all experts)"
        each = "experts"
    else:
        if without_ids(view.run, "This comparison"):
            return
        found, names, ids = _experts(view, source, table, rows)
        what = f"experts of layer {view.site_name}"
        title = f"Experts of layer {view.site_name}, over-represented first"
        each = "prompts"
    if np.isnan(found.lift).all():
        instead(f"None of the {what} has {MIN_WHOLE} assignments: too few to compare.")
        return
    chart(
        lift_bars(
            found,
            names,
            ids,
            title=title,
            caption=f"lines: 9 of 10 draws of the {each} here; dotted: as often as in all; "
            f"fewer than {MIN_WHOLE} assignments: left out",
            dark=is_dark(),
        ),
        key="lift",
        alt=f"Bars: the {what} that are over-represented in the selection, with intervals.",
        table=pd.DataFrame(
            {
                what: names,
                "lift": found.lift,
                "low": found.low,
                "high": found.high,
                "assignments here": found.part,
                "assignments in all": found.whole,
            }
        ).sort_values("lift", ascending=False),
        on_click=None
        if source.unit == "experts"
        else lambda data: address.jump_to_expert(view, data),
    )


def _experts(
    view: View, source: Source, table: PointTable, rows: npt.NDArray[np.int64]
) -> tuple[Lift, list[str], npt.NDArray[np.int64]]:
    n_experts = view.run.site_info(view.layer, view.site).n_experts
    filters = view.filters if source.unit == "tokens" else view.prompt_filters
    where = view.place
    feature = source.feature if source.unit == "tokens" else None
    whole = ask(view, expert_counts, **where, **filters, feature=feature)
    ids = table.rows(id_names(source), rows).to_numpy(dtype=np.int64)[:, 0]
    part = expert_counts(view.run, **where, ids=ids, of=source.unit)  # type: ignore[arg-type]
    total = np.bincount(whole["expert_id"], whole["assignments"], minlength=n_experts)
    names = [expert_label(view.site_name, expert) for expert in range(n_experts)]
    places = np.array([(view.layer, view.site, expert) for expert in range(n_experts)])
    return lift(_dense(part, "prompt_id", "expert_id", n_experts), total), names, places


def _domains(
    view: View, table: PointTable, rows: npt.NDArray[np.int64]
) -> tuple[Lift, list[str], npt.NDArray[np.int64]]:
    loads = view.of_layers(ask(view, expert_domains))
    domains = {name: i for i, name in enumerate(dict.fromkeys(loads["domain"]))}
    loads = loads.assign(column=loads["domain"].map(domains))
    total = np.bincount(loads["column"], loads["assignments"], minlength=len(domains))
    place = ["layer", "site", "expert_id"]
    chosen = loads.merge(table.rows(", ".join(place), rows), on=place)
    chosen = chosen.assign(unit=chosen.groupby(place).ngroup())
    part = _dense(chosen, "unit", "column", len(domains))
    names = domain_labels(list(domains))
    return lift(part, total), names, np.zeros((len(names), 1), dtype=np.int64)


def _dense(rows: pd.DataFrame, unit: str, column: str, width: int) -> npt.NDArray[np.float64]:
    """Return counts [units, width] from rows with ``assignments``."""
    _, at = np.unique(rows[unit].to_numpy(dtype=np.int64), return_inverse=True)
    counts = np.zeros((int(at.max(initial=-1)) + 1, width))
    counts[at, rows[column].to_numpy(dtype=np.int64)] = rows["assignments"].to_numpy(np.float64)
    return counts


def _tokens(
    view: View, source: Source, table: PointTable, rows: npt.NDArray[np.int64]
) -> npt.NDArray[np.int64]:
    """Return the ids of the tokens of some points: themselves, or those of prompts."""
    ids = np.asarray(table.rows(id_names(source), rows).iloc[:, 0], dtype=np.int64)
    if source.unit == "prompts":
        return prompt_tokens(view.run, ids.tolist())
    return ids
