"""Which experts of all layers take some domains, one or several together."""

from typing import Any

import pandas as pd
import streamlit as st

from explorer.metrics.specialization import MIN_PROMPTS, MIN_WHOLE
from explorer.pages.experts.data import experts_of_domains
from explorer.pages.experts.figures import DotsAxis, interval_dots
from explorer.text import counted
from explorer.ui import address, printing
from explorer.ui.chart import chart, listing
from explorer.ui.problems import instead, section
from explorer.ui.state import View, ask, is_dark
from explorer.ui.wording import distinct, domain_labels, domain_name, expert_label

_DRAWN = 20  # experts in the figure; the table has all of them
_PILLS = 12  # domains that stand beside each other; more are in a list to search


def domain_section(view: View) -> None:
    """Draw the choice of domains and the experts that take them."""
    if len(view.run.domains) < 2 or view.domain is not None:
        instead(
            "Finding by domain compares domains with all of them: "
            + (
                "take the domain filter off to see it."
                if view.domain is not None
                else "the prompts of this run are labelled with fewer than two."
            )
        )
        return
    keys = {address.domain_key(domain): domain for domain in view.run.domains}
    shown = dict(
        zip(keys, distinct([domain_name(domain) for domain in keys.values()]), strict=True)
    )
    chosen = address.choose_several(
        st.pills if len(keys) <= _PILLS else st.multiselect,
        "among",
        "Which experts take these domains?",
        list(keys),
        default=(),
        format_func=lambda key: shown.get(key, key),
        help="One domain, or several that are looked at together.",
        **({"selection_mode": "multi"} if len(keys) <= _PILLS else {}),
    )
    if not chosen:
        st.info(
            "Choose one domain or several. The experts of all layers are compared: how much more "
            "often they take tokens of these domains than of all.",
            icon=":material/category:",
        )
        return
    if len(chosen) == len(keys):
        instead("These are all domains: there is nothing to compare them with. Take one off.")
        return
    _experts(view, [keys[key] for key in chosen])


@section("Experts of the domains")
def _experts(view: View, domains: list[str]) -> None:
    filters: dict[str, Any] = {"phase": view.phase, "part": view.part}
    with st.spinner("Counting the routes of all layers"):
        table, step = ask(view, experts_of_domains, domains=tuple(domains), **filters)
    found = view.of_layers(table)
    if found.empty:
        instead(
            f"No expert of these layers has {MIN_WHOLE} assignments: too few to compare. Take a "
            "filter off."
        )
        return
    rows = found.head(_DRAWN)
    names = _names(view, rows)
    rows = rows.assign(
        label=names,
        value=rows["lift"],
        hover=[
            f"{name}: {row.share:.1%} of the domains' assignments<br>of all {row.base:.1%}: "
            f"{row.lift:.2f}× as often, 90% interval {row.low:.2f} to {row.high:.2f}"
            for name, row in zip(names, rows.itertuples(), strict=True)
        ],
    )
    scope = view.scope(over_layers=True)._replace(step=step)
    few = (found["interval"] == "tokens").any()
    said = domain_labels(domains)
    chart(
        interval_dots(
            rows,
            DotsAxis("times as often as of all tokens", 1.0, "1 = as of all tokens", percent=False),
            title=f"Experts of {_shortly(said)} (share of the domains / share of all)",
            scope=scope,
            notes=[
                f"experts with at least {MIN_WHOLE} assignments",
                f"90% intervals from {'tokens where prompts are few' if few else 'prompts'}, "
                "surest first",
            ],
            y_title="expert",
            dark=is_dark(),
        ),
        key="experts of domains",
        alt=f"Dots with intervals: the {len(rows)} experts that take these domains most above "
        f"their share of all tokens, up to {rows['lift'].max():.1f} times. Click: the expert.",
        table=found.assign(domains=", ".join(map(domain_name, domains))),
        on_click=lambda data: _go_to(view, rows, int(data[0])),
        made=view.recipe(
            experts_of_domains, domains=tuple(domains), **filters, first=True, over_layers=True
        ),
    )
    if few:
        st.caption(
            f"Tokens of a prompt are alike: with fewer than {MIN_PROMPTS} prompts, or none "
            "recorded, tokens are taken as independent, and intervals are too narrow."
        )
    # a report has the table of the figure
    if not printing.theme():
        _list(view, found)


def _list(view: View, found: pd.DataFrame) -> None:
    key = "experts of domains listed"

    def picked() -> None:
        chosen = st.session_state[key]["selection"]["rows"]
        if chosen:
            _go_to(view, found, int(chosen[0]))

    surely = int((found["low"] > 1).sum())
    st.markdown(
        f"**{counted(surely, 'expert')}** of {len(found):,} {'takes' if surely == 1 else 'take'} "
        "these domains surely more often than all tokens: the whole interval is above 1. By "
        "chance about one in twenty would be."
    )
    listing(
        found.assign(
            name=_names(view, found), share=found["share"] * 100, base=found["base"] * 100
        ),
        {
            "name": "Expert",
            "layer": "Layer",
            "lift": ("Lift", "%.2f ×"),
            "low": ("from", "%.2f"),
            "high": ("to (90%)", "%.2f"),
            "share": ("Share of the domains", "%.1f%%"),
            "base": ("Share of all", "%.1f%%"),
            "hits": ("Assignments", "localized"),
        },
        alt="Table of the experts by lift; click the box of a row for its expert",
        key=key,
        on_select=picked,
        selection_mode="single-row",
        height=380,
    )
    st.caption("Click a title to sort by it, and the box of a row to go to its expert.")


def _names(view: View, rows: pd.DataFrame) -> list[str]:
    return [
        expert_label(view.named(row.layer, row.site), row.expert_id) for row in rows.itertuples()
    ]


def _go_to(view: View, rows: pd.DataFrame, number: int) -> None:
    place = rows[["layer", "site", "expert_id"]].iloc[number]
    address.jump_to_expert(view, place.astype(float).tolist())


def _shortly(names: list[str]) -> str:
    """Return the names of domains for a title; of many, how many there are."""
    return " + ".join(names) if len(names) <= 3 else counted(len(names), "domain")
