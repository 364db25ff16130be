"""Flow: which experts follow each other from layer to layer, and which serve the same token."""

import math
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import pandas as pd
import streamlit as st
from streamlit.delta_generator import DeltaGenerator

from explorer.errors import RunError
from explorer.metrics.coactivation import MIN_EXPECTED, pair_uplift, transition_uplift
from explorer.pages.flow.data import (
    PairCounts,
    Place,
    both_count,
    coactivation,
    last_sites,
    tokens_of_both,
    transitions,
)
from explorer.pages.flow.figures import Pairs, pair_heatmap, sankey
from explorer.text import counted, plain
from explorer.ui import address
from explorer.ui.chart import chart, listing
from explorer.ui.concordance import concordance, lines_of
from explorer.ui.problems import instead, section, without_ids
from explorer.ui.shell import current_view
from explorer.ui.state import View, ask, is_dark
from explorer.ui.wording import expert_label, ordinal

MAX_STEPS = 6
_FLOWS = ("6", "12", "24", "48")
_LISTED = 60  # pairs in a list to choose from
_BESIDE = 48  # experts whose cells can be clicked on half a page


class Hop(NamedTuple):
    """A layer's last router and the next layer's."""

    first: tuple[int, int]
    second: tuple[int, int]
    first_name: str
    second_name: str


def render() -> None:
    """Draw the page."""
    view = current_view()
    address.follow_jump()
    st.markdown(
        "A token visits experts in every layer. If the choice in one layer said nothing about the "
        "next, each pair of experts would meet as often as the product of their loads: "
        "**chance**. Here is where tokens flow, and which pairs meet more or less often than that."
    )
    hops = _hops(view)
    try:
        if hops:
            _sankey(view, hops)
            _transitions(view, hops)
        else:
            instead("This run has one MoE layer, so there is no flow from layer to layer.")
        _coactivation(view)
    except RunError as error:
        instead(plain(str(error)))


def _hops(view: View) -> list[Hop]:
    sites = [site for site in last_sites(view.run) if view.shows(site.layer)]
    names = [view.named(s.layer, s.site) for s in sites]
    return [
        Hop((a.layer, a.site), (b.layer, b.site), names[i], names[i + 1])
        for i, (a, b) in enumerate(pairwise(sites))
    ]


def _start(view: View, hops: list[Hop]) -> int:
    """Return the number of the hop that starts at the chosen layer; the last one at its end."""
    return next((i for i, hop in enumerate(hops) if hop.first[0] >= view.layer), len(hops) - 1)


def _pairs(view: View, hop: Hop) -> tuple[Pairs, PairCounts]:
    counts = ask(view, transitions, layer=hop.first[0], **view.filters)
    uplift = transition_uplift(counts.tokens)
    return Pairs(counts.tokens, uplift, hop.first_name, hop.second_name), counts


@section("Flow", passing=(RunError,))
def _sankey(view: View, hops: list[Hop]) -> None:
    start = _start(view, hops)
    with st.container(horizontal=True, vertical_alignment="bottom", gap="medium"):
        most = min(MAX_STEPS, len(hops))
        steps = address.choose(
            st.segmented_control,
            "steps",
            f"Steps from layer {hops[start].first_name} on",
            [str(n) for n in range(1, most + 1)],
            default=str(min(3, most)),
            help="How many layers to follow; the first one is the layer at the side.",
        )
        flows = address.choose(
            st.segmented_control,
            "flows",
            "Flows per step",
            _FLOWS,
            default="12",
            help="The largest flows are drawn one by one.",
        )
    shown = hops[start : start + int(steps)]
    if len(shown) < int(steps):
        st.caption(f"From this layer to the last one: {counted(len(shown), 'step')}.")
    found = [_pairs(view, hop) for hop in shown]
    counts = found[0][1]
    if not any(pairs.tokens.any() for pairs, _ in found):
        instead("No token of this selection was recorded. Change the filters at the side.")
        return
    chart(
        sankey(
            [pairs for pairs, _ in found],
            n_flows=int(flows),
            scope=view.scope(counts.n_tokens),
            dark=is_dark(),
        ),
        key="sankey",
        alt=f"Sankey diagram of the {flows} largest flows of tokens between the experts of each "
        f"of {len(shown) + 1} layers, from layer {shown[0].first_name} to layer "
        f"{shown[-1].second_name}.",
        table=pd.concat([_strongest(pairs, "tokens", int(flows)) for pairs, _ in found]),
    )
    _say_sampled(counts)


def _say_sampled(counts: PairCounts) -> None:
    if counts.n_tokens < counts.n_all:
        st.caption(
            "The run's totals do not know this filter, so pairs were counted from every "
            f"{ordinal(-(-counts.n_all // counts.n_tokens))} token: {counts.n_tokens:,} of "
            f"{counts.n_all:,}."
        )


@section("Transitions", passing=(RunError,))
def _transitions(view: View, hops: list[Hop]) -> None:
    hop = hops[_start(view, hops)]
    st.subheader(f"From layer {hop.first_name} to layer {hop.second_name}", anchor=False)
    if hop.first[0] < view.layer:
        st.caption(f"Layer {view.site_name} is the last one, so this is the step that leads to it.")
    pairs, counts = _pairs(view, hop)
    _map_with_list(view, pairs, counts, hop.first, hop.second, "flow")


@section("Co-activation", passing=(RunError,))
def _coactivation(view: View) -> None:
    st.subheader(f"Together in layer {view.site_name}", anchor=False)
    if view.run.site_info(view.layer, view.site).top_k < 2:
        instead("This router chooses one expert per token, so no two experts serve the same one.")
        return
    counts = ask(view, coactivation, **view.place, **view.filters)
    pairs = Pairs(counts.tokens, pair_uplift(counts.tokens), view.site_name, view.site_name)
    place = view.layer, view.site
    _map_with_list(view, pairs, counts, place, place, "together")


def _map_with_list(
    view: View,
    pairs: Pairs,
    counts: PairCounts,
    first: tuple[int, int],
    second: tuple[int, int],
    kind: str,
) -> None:
    """Draw a heatmap, the strongest pairs beside it, and the tokens of the chosen pair below."""
    prefix = f"{kind}.{first[0]}.{first[1]}."
    chosen = _chosen(prefix, pairs)
    left, right = _places(max(pairs.tokens.shape))
    with left:
        chart(
            pair_heatmap(pairs, scope=view.scope(counts.n_tokens), chosen=chosen, dark=is_dark()),
            key=f"{kind} map",
            alt=_alt(pairs),
            table=_strongest(pairs, "tokens", pairs.tokens.size),
            on_click=lambda data: address.write("pair", f"{prefix}{int(data[0])}.{int(data[1])}"),
        )
        _say_sampled(counts)
    with right:
        _list(pairs, prefix, chosen, kind)
    if chosen is not None:
        pair_tokens_section(
            view,
            Pair((*first, chosen[0]), (*second, chosen[1]), _pair_name(pairs, *chosen)),
            int(pairs.tokens[chosen]),
            float(pairs.uplift.ratio[chosen]),
        )


def _places(n_experts: int) -> tuple[DeltaGenerator, DeltaGenerator]:
    """Return where the figure and the list go: beside each other while cells are wide enough."""
    if n_experts <= _BESIDE:
        left, right = st.columns([3, 2], gap="large")
        return left, right
    return st.container(), st.container()


def _chosen(prefix: str, pairs: Pairs) -> tuple[int, int] | None:
    """Return the pair of the address when it is one of this figure."""
    value = address.read("pair")
    if not value.startswith(prefix):
        return None
    parts = value.removeprefix(prefix).split(".")
    if len(parts) == 2 and all(p.isascii() and p.isdecimal() and len(p) < 6 for p in parts):
        a, b = int(parts[0]), int(parts[1])
        if a < pairs.tokens.shape[0] and b < pairs.tokens.shape[1]:
            return a, b
    address.note("The link names a pair of experts that is not here; showing none.")
    address.write("pair", "")
    return None


def _pair_name(pairs: Pairs, a: int, b: int) -> str:
    sign = "with" if pairs.within else "→"
    return f"{expert_label(pairs.first, a)} {sign} {expert_label(pairs.second, b)}"


def _alt(pairs: Pairs) -> str:
    known = pairs.uplift.ratio[~np.isnan(pairs.uplift.ratio)]
    span = f"from {known.min():.2f} to {known.max():.2f} times" if len(known) else "too few tokens"
    what = (
        f"experts of layer {pairs.first} by the same experts"
        if pairs.within
        else f"experts of layer {pairs.first} by experts of layer {pairs.second}"
    )
    return f"Heatmap of {what}: tokens that chose both over chance, {span}. Click: their tokens."


def _strongest(pairs: Pairs, by: str, limit: int) -> pd.DataFrame:
    """Return the pairs with the most tokens, or the highest ratio, as a table."""
    a, b = np.nonzero(np.triu(pairs.tokens, 1) if pairs.within else pairs.tokens)
    table = pd.DataFrame(
        {
            "from" if not pairs.within else "expert": [
                expert_label(pairs.first, e) for e in a.tolist()
            ],
            "to" if not pairs.within else "with": [
                expert_label(pairs.second, e) for e in b.tolist()
            ],
            "tokens": pairs.tokens[a, b],
            "by chance": pairs.uplift.expected[a, b],
            "ratio": pairs.uplift.ratio[a, b],
            "a": a,
            "b": b,
        }
    )
    if by == "ratio":
        table = table.dropna(subset=["ratio"])
    ordered = table.sort_values([by, "tokens"], ascending=False).head(limit)
    return ordered.drop(columns=["a", "b"]) if by == "tokens" else ordered


def _list(pairs: Pairs, prefix: str, chosen: tuple[int, int] | None, kind: str) -> None:
    """Draw the strongest pairs, to read and to choose from without a mouse."""
    strongest = _strongest(pairs, "ratio", _LISTED)
    if strongest.empty:
        instead(
            f"Chance gives fewer than {MIN_EXPECTED:g} tokens for every pair: too few to compare."
        )
        return
    st.markdown("**Most above chance**")
    columns = {name: name.capitalize() for name in strongest.columns[:2]} | {
        "tokens": ("Tokens", "localized"),
        "by chance": ("By chance", "%.0f"),
        "ratio": ("Ratio", "%.2f ×"),
    }
    alt = "The pairs of experts that are furthest above chance"
    listing(strongest.head(10), columns, alt=alt)
    names = {
        f"{a}.{b}": f"{_pair_name(pairs, a, b)}: {ratio:.2f}×"
        for a, b, ratio in zip(strongest["a"], strongest["b"], strongest["ratio"], strict=True)
    }
    current = "" if chosen is None else f"{chosen[0]}.{chosen[1]}"
    if current and current not in names:
        names = {current: _pair_name(pairs, *chosen or (0, 0))} | names
    key = f"choose {kind} {prefix}"
    st.session_state[key] = current or None
    st.selectbox(
        "Tokens of a pair",
        list(names),
        key=key,
        index=None,
        format_func=lambda name: names.get(name, name),
        placeholder="Click a cell, or choose a pair",
        on_change=lambda: address.write("pair", prefix + (st.session_state[key] or "")),
    )


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
        address.closing(f"Tokens of {pair.name}", "pair")
        said = "" if math.isnan(ratio) else f", {ratio:.2f} times as many as by chance"
        st.markdown(f"**{counted:,}** of the counted tokens went to both experts{said}.")
        if not without_ids(view.run, "Their list"):
            _lines(view, pair)


def _lines(view: View, pair: Pair) -> None:
    where = view.filters
    both = {"first": pair.first, "second": pair.second, **where}
    found = ask(view, tokens_of_both, limit=SHOWN, context=14, **both)
    if found.empty:
        return
    total = ask(view, both_count, **both)
    weights = found["first_weight"] * found["second_weight"]
    figures = [
        f"{first:.2f}, {second:.2f}"
        for first, second in zip(found["first_weight"], found["second_weight"], strict=True)
    ]

    def go_to(index: int) -> None:
        address.jump_to_token(
            int(found["prompt_id"].iloc[index]), int(found["token_id"].iloc[index])
        )

    concordance(
        lines_of(found, weights, figures),
        label=f"Tokens of {pair.name}, heaviest weights first. Enter opens the prompt.",
        key=f"concordance {pair.first} {pair.second}",
        on_pick=go_to,
    )
    st.caption(
        f"{len(found):,} of {counted(total, 'token')}, those with the largest combine weights (of "
        "both experts, in this order). Click a line to go to it on the Tokens "
        "page."
    )


render()
