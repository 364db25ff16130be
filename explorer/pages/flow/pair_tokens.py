"""The tokens that two experts served both, in their contexts."""

import math
from typing import NamedTuple

import streamlit as st

from explorer.pages.flow.data import Place, both_count, tokens_of_both
from explorer.ui import address, jump
from explorer.ui.concordance import Line, concordance
from explorer.ui.state import View, ask
from explorer.ui.text import visible as visible_name

SHOWN = 60


class Pair(NamedTuple):
    """Two experts and how they are called together."""

    first: Place
    second: Place
    name: str


def pair_tokens_section(view: View, pair: Pair, counted: int, ratio: float) -> None:
    """Draw the tokens of a pair.

    Parameters
    ----------
    counted : int
        Tokens of the pair in the figure.
    ratio : float
        Measured over chance; nan where chance gives too few.
    """
    with st.container(border=True, key=f"tokens of {pair.first} {pair.second}"):
        title, close = st.columns([6, 1], vertical_alignment="center")
        title.subheader(f"Tokens of {pair.name}", anchor=False)
        close.button(
            "Close",
            key=f"close pair {pair.first} {pair.second}",
            on_click=lambda: address.write("pair", ""),
            width="stretch",
        )
        said = "" if math.isnan(ratio) else f", {ratio:.2f} times as many as by chance"
        st.markdown(f"**{counted:,}** of the counted tokens went to both experts{said}.")
        if not view.run.records_ids:
            st.info(
                "Which tokens they were is not recorded at level `stats`; capture with "
                "`--level ids`.",
                icon=":material/info:",
            )
            return
        _lines(view, pair)


def _lines(view: View, pair: Pair) -> None:
    where = view.filters
    both = {"first": pair.first, "second": pair.second, **where}
    found = ask(view, tokens_of_both, limit=SHOWN, context=14, **both)
    if found.empty:
        return
    total = ask(view, both_count, **both)
    weights = found["first_weight"] * found["second_weight"]
    lines = [
        Line(
            row.before or "",
            f"position {row.position}" if row.text is None else row.text,
            row.after or "",
            f"{visible_name(row.domain) if row.domain else 'prompt'} {row.prompt_id}",
            float(weight) / float(weights.max() or 1),
            f"{row.first_weight:.2f}, {row.second_weight:.2f}",
        )
        for row, weight in zip(found.itertuples(), weights, strict=True)
    ]

    def go_to(index: int) -> None:
        jump.aim_at_token(int(found["prompt_id"].iloc[index]), int(found["token_id"].iloc[index]))

    concordance(
        lines,
        label=f"Tokens of {pair.name}, heaviest weights first. Enter opens the prompt.",
        key=f"concordance {pair.first} {pair.second}",
        on_pick=go_to,
    )
    st.caption(
        f"The {len(found):,} of {total:,} tokens with the largest combine weights (of both "
        "experts, in this order); padding excluded. Click a line to go to it on the Tokens page."
    )
