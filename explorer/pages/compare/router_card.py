"""A router's card: what it does, where it comes from, and what it is worth beside others."""

import pandas as pd
import streamlit as st

from explorer.comparison.results_file import Comparison
from explorer.comparison.verdicts import CONTROLS, NATIVE, Paired, against_controls, paired
from explorer.pages.compare.figures import badges, family_name, gate_histogram
from explorer.text import counted, plain
from explorer.ui import address
from explorer.ui.chart import chart
from explorer.ui.problems import section
from explorer.ui.state import is_dark


@section("A router's card")
def router_card(comparison: Comparison, live: pd.DataFrame) -> None:
    """Show what one router does, and whether it beats chance at the same compute."""
    cards = comparison.rows("routers").drop_duplicates("router").set_index("router")
    names = [name for name in dict.fromkeys(live["router"]) if name in cards.index]
    if not names:
        return
    st.subheader("A router's card", anchor=False)
    name = address.choose(
        st.selectbox,
        "router",
        "Router",
        names,
        default=next((n for n in names if _own(n, cards)), names[0]),
    )
    card = cards.loc[name]
    rows = live[live["router"] == name]
    with st.container(border=True):
        wearing = sorted({badge for _, row in rows.iterrows() for badge in badges(row)})
        family = plain(family_name(card["family"]))
        st.markdown(
            f"**{plain(str(card['title']))}** · {family}"
            + "".join(f" :orange-badge[{badge}]" for badge in wearing)
        )
        st.markdown(plain(str(card["summary"])))
        st.code(str(card["formula"]), language=None)
        paper, fits = card["paper"], card["fits"]
        known = isinstance(paper, str) and paper
        st.caption(
            (f"Source: {plain(paper.rstrip('.'))}. " if known else "")
            + (
                f"How it is fitted: {plain(fits)}."
                if isinstance(fits, str)
                else "Nothing is fitted."
            )
        )
        _spanning(comparison, name)
        _gates(comparison, name)
        _against_controls(comparison, name, causal="not causal" not in wearing)
        _beside_another(comparison, name, names)


def _own(name: str, cards: pd.DataFrame) -> bool:
    """Return whether a router is neither the model's own nor a control."""
    return name != NATIVE and cards.loc[name, "family"] != "control"


def _spanning(comparison: Comparison, name: str) -> None:
    rows = comparison.table.query("router == @name and layer.isna() and spanning_rate.notna()")
    if not rows.empty:
        st.markdown(
            f"{rows['spanning_rate'].mean():.1%} of the recorded tokens lie between clusters: no "
            "cluster's share in them reaches 0.7."
        )
    rows = comparison.rows("spanning").query("router == @name").fillna({"seed": -1})
    # layers where some tokens lie between clusters, and some do not
    both = rows.pivot(index=["layer", "site", "seed"], columns="spanning", values="loss_change")
    both = both.dropna()
    if len(both) and len(both.columns) == 2:
        change = both.mean()
        st.markdown(
            "With one layer swapped, mean of the layers, the loss of tokens between clusters "
            f"changes by {change[True]:+.4f} nats, that of the others by {change[False]:+.4f}."
        )


def _gates(comparison: Comparison, name: str) -> None:
    rows = comparison.rows("gate_values").query("router == @name")
    if rows.empty:
        return
    between = rows[(rows["low"] > 0) & (rows["high"] < 1)]["gates"].sum() / rows["gates"].sum()
    chart(
        gate_histogram(rows, dark=is_dark()),
        key="gates",
        alt=f"Heatmap: how often the gates of each of {rows['layer'].nunique()} layers had which "
        f"value; {between:.0%} of them lie between 0.05 and 0.95.",
        table=rows,
    )


def _against_controls(comparison: Comparison, name: str, *, causal: bool) -> None:
    told = {
        "better": "better than chance" if causal else "not causal, so that it proves nothing",
        "worse": "worse than chance",
        "not told apart": "not to be told from chance",
    }
    for row in against_controls(comparison, name).to_dict("records"):
        kind = CONTROLS[row["control"]]
        hard = ", the harder control" if row.pop("harder") else ""
        found = Paired(**{field: row[field] for field in Paired._fields})
        st.markdown(
            f"Chance, as much {kind}{hard}: this router's loss minus chance's "
            f"{_said(found)}: **{told[found.verdict]}**."
        )


def _said(found: Paired) -> str:
    """Return a difference with its interval, and with what else is known of its chance."""
    seeds = f"{found.seeds} seeds" if found.seeds > 1 else "one draw"
    unit = counted(found.texts, "text") + ("" if pd.isna(found.seed_error) else f" and {seeds}")
    parts = [f"{found.difference:+.4f} ± {found.standard_error:.4f} nats a token (by text"]
    if not pd.isna(found.domain_error):
        parts.append(f", by domain ± {found.domain_error:.4f}")
    if not pd.isna(found.seed_error):
        parts.append(f", by seed ± {found.seed_error:.4f}")
    parts.append(f"; 95% interval over {unit}: ± {found.margin:.4f}")
    return "".join(parts) + ("" if found.steady else "; its sign changes from seed to seed") + ")"


def _beside_another(comparison: Comparison, name: str, names: list[str]) -> None:
    """Show the paired difference to a router that the reader picks."""
    others = ["", *(other for other in names if other != name)]
    other = address.choose(
        st.selectbox,
        "beside",
        "Beside another router",
        others,
        default="",
        show=lambda value: value or "none",
    )
    if not other:
        return
    found = paired(comparison, name, other)
    told = {"better": "better", "worse": "worse", "not told apart": "not to be told apart"}
    st.markdown(
        f"This router's loss minus that of {plain(other)}, on the same texts: "
        f"{_said(found)}: **{told[found.verdict]}**."
    )
