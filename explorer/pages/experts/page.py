"""Experts: what one expert is for, how specialised all of them are, and who takes a text."""

import math

import pandas as pd
import streamlit as st

from explorer.errors import RunError
from explorer.metrics.coactivation import pair_uplift
from explorer.metrics.specialization import MIN_COUNT, MIN_PROMPTS, wilson
from explorer.pages.experts.atlas import atlas_section, expert_section
from explorer.pages.experts.by_domain import domain_section
from explorer.pages.experts.data import (
    MIN_HITS,
    divergences,
    experts_of_text,
    layers_of,
    shares_of,
    vocabulary_of,
)
from explorer.pages.experts.figures import DotsAxis, divergence_heatmap, interval_dots, layer_lines
from explorer.pages.experts.weights import weights_section
from explorer.pages.flow.data import coactivation
from explorer.queries.load import expert_load
from explorer.queries.routed import NOTHING, left_out
from explorer.text import ABSENT, counted, plain, visible
from explorer.ui import address
from explorer.ui.chart import chart, tile
from explorer.ui.concordance import expert_lines
from explorer.ui.glossary import help_text
from explorer.ui.problems import instead, section, without_ids
from explorer.ui.saved import save_slice
from explorer.ui.shell import current_view
from explorer.ui.state import View, ask, is_dark
from explorer.ui.wording import domain_labels, expert_label, labels, number, span

_ABOUT = {
    "expert": "One expert",
    "all": "All experts",
    "text": "Find by text",
    "domain": "Find by domain",
}
_LISTED = 30  # domains in a figure
_WORDS = 18
_PARTNERS = 12


def render() -> None:
    """Draw the page."""
    view = current_view()
    address.follow_jump()
    st.markdown(
        "An expert that takes one kind of token more often than others is **specialised**. Few "
        "tokens make any expert look so: every share comes with its interval, or with what chance "
        "alone would give."
    )
    about = address.choose(
        st.segmented_control, "about", "Show", _ABOUT, label_visibility="collapsed"
    )
    if about == "all":
        all_experts_section(view)
    elif about == "text":
        text_section(view)
    elif about == "domain":
        domain_section(view)
    else:
        _one_expert(view)


def _one_expert(view: View) -> None:
    load = ask(view, expert_load, **view.place, **view.filters)
    expert = _choose_expert(view, load)
    name = expert_label(view.site_name, expert)
    nothing = _idle_kinds(view).get(expert)
    if nothing:
        every = ask(view, shares_of, expert_id=expert, by="phase", **view.place, **view.filters)
        hits = int(every["hits"].iloc[-1])
        st.info(
            f"{name} computes nothing: it {nothing}. {counted(hits, 'token')} of "
            f"{view.scope().n_tokens:,} chose it; it is in no load and never dead."
        )
    else:
        row = load[load["expert_id"] == expert].iloc[0]
        _tiles(view, load, row)
        hits = int(row["assignments"])
    if not hits:
        instead(f"None of these tokens went to {name}. Change the filters, or choose another one.")
        if not nothing:
            expert_section(view, expert)
            weights_section(view, expert)
        return
    left, right = st.columns(2, gap="large")
    with left:
        _shares(view, expert, "domain")
        _shares(view, expert, "phase")
    # under a filter of the domain there are no shares to compare
    with right if view.domain is None else left:
        _vocabulary(view, expert, name)
    with right:
        _partners(view, expert)
    if not nothing:
        expert_section(view, expert)
    st.subheader(f"Tokens of {name} in their contexts", anchor=False)
    if not without_ids(view.run, "This list"):
        expert_lines(view, expert, name, address.jump_to_token, shown=30)
    if not nothing:
        weights_section(view, expert)


def _idle_kinds(view: View) -> dict[int, str]:
    """Return what the experts do that compute nothing."""
    kinds = view.run.site_info(view.layer, view.site).expert_kinds or ()
    return {expert: NOTHING[kind].one for expert, kind in enumerate(kinds) if kind in NOTHING}


def _choose_expert(view: View, load: pd.DataFrame) -> int:
    ratios = dict(zip(load["expert_id"], load["ratio"], strict=True))
    names = {
        str(expert): expert_label(view.site_name, expert)
        + ("" if math.isnan(ratio) else f" · {ratio:.2f}× fair share")
        for expert, ratio in ratios.items()
    }
    names |= {
        str(expert): f"{expert_label(view.site_name, expert)} · {does}"
        for expert, does in _idle_kinds(view).items()
    }
    busiest = str(load.loc[load["assignments"].idxmax(), "expert_id"])
    chosen = address.choose(
        st.selectbox,
        "id",
        f"Expert of layer {view.site_name}",
        names,
        default=busiest,
        help="Choose the layer at the side. Type a number to search.",
    )
    return int(chosen)


@section("Key figures")
def _tiles(view: View, load: pd.DataFrame, row: pd.Series) -> None:
    n_tokens = view.scope().n_tokens
    hits, top_k = int(row["assignments"]), int(row["top_k"])
    share = hits / n_tokens if n_tokens else float("nan")
    low, high = wilson(min(hits, n_tokens), n_tokens)
    tiles = st.columns(4)
    tile(
        tiles[0],
        "Tokens that chose it",
        f"{hits:,}",
        f"of {n_tokens:,}",
        about="Tokens of the filters at the side; padding is never recorded.",
    )
    tile(
        tiles[1],
        "Share of the tokens",
        number(share, ".2%"),
        f"{number(float(low), '.2%')} to {number(float(high), '.2%')}; "
        f"uniform {top_k / len(load):.2%}",
        about="With the 90% interval of Wilson, for tokens taken as independent. A router that "
        "chose at random would give every expert top-k / experts of the tokens.",
    )
    tile(
        tiles[2],
        "Load",
        ABSENT if math.isnan(row["ratio"]) else f"{row['ratio']:.2f}× fair share",
        f"rank {int((load['assignments'] > hits).sum()) + 1} of {len(load)}",
        about=help_text("load") + "  \nRank 1 = busiest.",
    )
    tile(
        tiles[3],
        "Mean combine weight",
        number(row["weight_sum"] / hits, ".3f") if hits else ABSENT,
        f"of {top_k} chosen" if top_k > 1 else "the only one chosen",
        about=help_text("combine_weight") + "  \nHere the mean over its tokens.",
    )


@section("Specialisation")
def _shares(view: View, expert: int, by: str) -> None:
    """Draw the share of every domain's (or phase's) tokens that choose the expert."""
    kinds, chosen = {
        "domain": (view.run.domains, view.domain),
        "phase": (view.run.phases, view.phase),
    }[by]
    if len(kinds) < 2 or chosen is not None:
        return
    table = ask(view, shares_of, expert_id=expert, by=by, **view.place, **view.filters)
    rows, every = table.iloc[:-1].head(_LISTED), table.iloc[-1]
    if rows.empty:
        return
    names = domain_labels(list(rows[by])) if by == "domain" else list(rows[by].map(str))
    shown = rows.assign(
        label=names,
        value=rows["share"],
        hover=[
            f"{n}: {row.hits:,} of {row.tokens:,} tokens = {row.share:.1%}<br>90% interval "
            f"{row.low:.1%} to {row.high:.1%}, from {row.interval}"
            for n, row in zip(names, rows.itertuples(), strict=True)
        ],
    )
    few = (rows["interval"] == "tokens").any()
    how = f"90% intervals from {'tokens where prompts are few' if few else 'prompts'}"
    more = len(table) - 1 - len(rows)
    chart(
        interval_dots(
            shown,
            DotsAxis(
                f"share of the {by}'s tokens",
                float(every["share"]),
                f"all tokens {number(every['share'], '.1%')}",
            ),
            title=f"{by.capitalize()} specialisation (share of the {by}'s tokens)",
            scope=view.scope(),
            notes=[how, *([f"{more} more {by}s in the table"] if more else [])],
            dark=is_dark(),
        ),
        key=f"shares by {by}",
        alt=f"Dots with intervals: the share of each {by}'s tokens that choose the expert, "
        f"{span(rows['share'], '.1%')}; of all tokens {number(every['share'], '.1%')}.",
        table=table,
        made=view.recipe(shares_of, expert_id=expert, by=by, **view.place, **view.filters),
    )
    if few and by == "domain":
        st.caption(
            f"Tokens of a prompt are alike, so intervals come from drawing prompts; with fewer "
            f"than {MIN_PROMPTS} prompts, tokens are taken as independent, which is too narrow."
        )


@section("Vocabulary")
def _vocabulary(view: View, expert: int, name: str) -> None:
    if without_ids(view.run, "The vocabulary of an expert"):
        return
    table, floor = ask(view, vocabulary_of, expert_id=expert, **view.place, **view.filters)
    if table.empty:
        instead(
            f"No vocabulary entry of its tokens occurs {MIN_COUNT} times here: too few to say "
            "anything of."
        )
        return
    rows = table.head(_WORDS)
    # of one text there may be several entries, such as the bytes of a character
    names = labels(
        [
            f"id {token}" if text is None else text
            for text, token in zip(rows["text"], rows["token"], strict=True)
        ],
        limit=18,
        spaces=True,
        of=rows["token"].tolist(),
    )
    shown = rows.assign(
        label=names,
        value=rows["share"],
        hover=[
            f"“{n}”: {row.assignments:,} of {row.occurrences:,} occurrences = {row.share:.0%}"
            for n, row in zip(names, rows.itertuples(), strict=True)
        ],
    )
    chart(
        interval_dots(
            shown,
            DotsAxis(
                "share of the occurrences that choose the expert",
                floor.mean,
                f"largest by chance {number(floor.mean, '.0%')}",
            ),
            title="Vocabulary specialisation (share of an entry's occurrences)",
            scope=view.scope(),
            notes=[f"entries that occur at least {MIN_COUNT} times", "90% intervals from tokens"],
            y_title="vocabulary entry",
            dark=is_dark(),
        ),
        key="vocabulary",
        alt=f"Dots: the {len(rows)} vocabulary entries that choose {name} most often, "
        f"{span(rows['share'], '.0%')} of their occurrences; by chance the luckiest entry has "
        f"{number(floor.mean, '.0%')}.",
        table=table,
        made=view.recipe(vocabulary_of, expert_id=expert, **view.place, **view.filters, first=True),
    )
    above = int((table["share"] > floor.high).sum())
    st.caption(
        "Above what the luckiest entry has when the expert's tokens are drawn at random "
        f"({number(floor.low, '.0%')} to {number(floor.high, '.0%')} in 9 of 10 draws): "
        f"{'' if above < len(table) else 'at least '}{counted(above, 'entry', 'entries')}."
    )


@section("Co-activation")
def _partners(view: View, expert: int) -> None:
    """Draw the experts that are chosen together with this one."""
    if view.run.site_info(view.layer, view.site).top_k < 2:
        return
    try:
        counts = ask(view, coactivation, **view.place, **view.filters)
    except RunError as error:
        instead(plain(str(error)))
        return
    uplift = pair_uplift(counts.tokens)
    mine = int(counts.tokens[expert, expert])
    low, high = wilson(counts.tokens[expert], mine)
    table = pd.DataFrame(
        {
            "expert": range(len(counts.tokens)),
            "tokens": counts.tokens[expert],
            "value": counts.tokens[expert] / max(1, mine),
            "low": low,
            "high": high,
            "expected": uplift.expected[expert] / max(1, mine),
            "ratio": uplift.ratio[expert],
        }
    ).drop(index=expert)
    rows = table.sort_values(["value", "expert"], ascending=[False, True]).head(_PARTNERS)
    rows = rows.assign(
        label=[expert_label(view.site_name, e) for e in rows["expert"]],
        hover=[
            f"{expert_label(view.site_name, row.expert)}: {row.tokens:,} of {mine:,} tokens = "
            f"{row.value:.1%}"
            + ("" if math.isnan(row.ratio) else f"<br>{row.ratio:.2f}× what the loads give")
            for row in rows.itertuples()
        ],
    ).reset_index(drop=True)
    scope = view.scope(counts.n_tokens)
    chart(
        interval_dots(
            rows,
            DotsAxis("share of its tokens that also choose the other", math.nan, ""),
            title="Co-activation (share of its tokens)",
            scope=scope,
            notes=["diamonds: what the loads alone give"],
            dark=is_dark(),
        ),
        key="partners",
        alt=f"Dots: the {len(rows)} experts that most often serve the same tokens, "
        f"{span(rows['value'], '.1%')} of them. Click: that expert.",
        table=table,
        on_click=lambda data: address.write("id", str(int(rows["expert"].iloc[int(data[0])]))),
    )
    if counts.n_tokens < counts.n_all:
        st.caption(f"Counted from {counts.n_tokens:,} of {counts.n_all:,} tokens.")


def all_experts_section(view: View) -> None:
    """Draw the section."""
    if len(view.run.domains) < 2 or view.domain is not None:
        instead(
            "Domain specialisation compares domains: "
            + (
                "take the domain filter off to see it."
                if view.domain is not None
                else "the prompts of this run are labelled with fewer than two."
            )
        )
    else:
        _divergence_map(view)
    if said := ask(view, left_out):
        st.caption(said)
    atlas_section(view)
    if without_ids(view.run, "Vocabulary specialisation"):
        return
    with st.spinner("Reading the routes of all layers"):
        table, step = ask(view, layers_of, **view.filters)
    shown = view.of_layers(table)
    left, right = st.columns(2, gap="large")
    with left:
        _vocabulary_of_layers(view, shown, step)
    with right:
        _information_of_layers(view, shown, step)


@section("Domain specialisation")
def _divergence_map(view: View) -> None:
    sampled = view.sampled()
    found = view.of_layers(ask(sampled, divergences, **sampled.filters))
    if found.empty:
        instead("These tokens are of one domain. Change the filters at the side.")
        return
    chart(
        divergence_heatmap(found, scope=sampled.scope(over_layers=True), dark=is_dark()),
        key="divergence map",
        alt=f"Heatmap of {counted(found['layer'].nunique(), 'layer')} by experts: how far the "
        "domains of each expert's tokens are from those of all, "
        f"{span(found['divergence'], '.3f')} nats. Click: the expert.",
        table=found,
        made=view.recipe(divergences, **sampled.filters, over_layers=True),
        on_click=lambda data: address.jump_to_expert(view, data),
    )


@section("Vocabulary specialisation")
def _vocabulary_of_layers(view: View, table: pd.DataFrame, step: int) -> None:
    if table["vocabulary"].isna().all():
        instead(f"No vocabulary entry occurs {MIN_COUNT} times among these tokens: too few.")
        return
    scope = view.scope(over_layers=True)._replace(step=step)
    uniform = table["top_k"] / table["n_experts"]
    chart(
        layer_lines(
            table,
            "vocabulary",
            title="Vocabulary specialisation (share of an entry's tokens)",
            y_title="share of the favourite expert",
            percent=True,
            scope=scope,
            notes=[
                "mean over entries",
                f"entries that occur at least {MIN_COUNT} times",
                f"uniform routing: top-k / experts = {uniform.min():.1%}",
            ],
            dark=is_dark(),
        ),
        key="vocabulary of layers",
        alt=f"Lines over {len(table)} routers: the mean share of a vocabulary entry's tokens that "
        f"go to its favourite expert, {span(table['vocabulary'], '.0%')}; with shuffled labels "
        f"{number(table['vocabulary_floor'].mean(), '.0%')}.",
        table=table,
        made=view.recipe(layers_of, **view.filters, first=True, over_layers=True),
    )


@section("Domain and expert")
def _information_of_layers(view: View, table: pd.DataFrame, step: int) -> None:
    if table["information"].isna().all():
        return
    scope = view.scope(over_layers=True)._replace(step=step)
    chart(
        layer_lines(
            table,
            "information",
            title="Domain and expert (mutual information, nats)",
            y_title="nats",
            percent=False,
            scope=scope,
            notes=["shuffled labels: prompts swap their domains"],
            dark=is_dark(),
        ),
        key="information of layers",
        alt=f"Lines over {len(table)} routers: mutual information of domain and expert, "
        f"{span(table['information'], '.3f')} nats; with shuffled labels "
        f"{number(table['information_floor'].mean(), '.3f')}.",
        table=table,
        made=view.recipe(layers_of, **view.filters, first=True, over_layers=True),
    )


_MAX_TEXT = 100
_SHOWN = 20


def text_section(view: View) -> None:
    """Draw the search and the experts that take what it finds."""
    if without_ids(view.run, "Finding a text"):
        return
    text = address.typed(
        "find",
        "Which experts fire on this word or phrase?",
        _MAX_TEXT,
        placeholder="such as: return, der, therefore",
        help="Upper or lower case; spaces count. Press Enter.",
    )
    if not text:
        st.info(
            "Type a word, a part of one, or a phrase. It is looked for in the prompts and in what "
            "the model wrote, and the experts of the tokens that it is made of are compared with "
            "those of all tokens.",
            icon=":material/search:",
        )
        return
    with st.spinner("Looking through the prompts"):
        table, found = ask(view, experts_of_text, text=text, **view.filters)
    if not found.occurrences:
        instead("This text does not occur among the tokens of the filters.")
        return
    pieces = " · ".join(
        f"**{plain(visible(row.text, spaces=True))}** {row.tokens:,}"
        for row in found.pieces.head(8).itertuples()
    )
    st.markdown(
        f"**{counted(found.occurrences, 'occurrence')}**, made of "
        f"**{counted(len(found.token_ids), 'token')}**: {pieces}"
        + (" · and others" if len(found.pieces) > 8 else "")
    )
    if found.n_prompts < found.n_all:
        st.caption(f"Looked for in the first {found.n_prompts:,} of {found.n_all:,} prompts.")
    save_slice(view, lambda: found.token_ids, key="of a text", fold=True)
    shown = view.of_layers(table).head(_SHOWN)
    if shown.empty:
        instead(f"No expert of these layers took {MIN_HITS} of these tokens: too few to compare.")
        return
    names = [
        expert_label(view.named(row.layer, row.site), row.expert_id) for row in shown.itertuples()
    ]
    rows = shown.assign(
        label=names,
        value=shown["lift"],
        hover=[
            f"{name}: {row.hits:,} of {row.tokens:,} tokens = {row.share:.1%}<br>of all tokens "
            f"{row.base:.1%}: {row.lift:.2f}× as often"
            for name, row in zip(names, shown.itertuples(), strict=True)
        ],
    )
    chart(
        interval_dots(
            rows,
            DotsAxis("times as often as of all tokens", 1.0, "1 = as of all tokens", percent=False),
            title="Experts of the text (share of its tokens / share of all tokens)",
            scope=view.scope(len(found.token_ids), over_layers=True),
            notes=[
                f"experts with at least {MIN_HITS} of the tokens",
                "90% intervals from tokens, surest first",
            ],
            y_title="expert",
            dark=is_dark(),
        ),
        key="experts of text",
        alt=f"Dots with intervals: the {len(rows)} experts that take the text's tokens most above "
        f"their share of all tokens, up to {rows['lift'].max():.1f} times. Click: the expert.",
        table=table,
        made=view.recipe(experts_of_text, text=text, **view.filters, first=True),
        on_click=lambda data: address.jump_to_expert(
            view, shown[["layer", "site", "expert_id"]].iloc[int(data[0])].tolist()
        ),
    )


render()
