"""Compare runs: the same model twice, or two models on the same text."""

import functools
from collections.abc import Callable, Hashable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import streamlit as st
from streamlit.runtime.scriptrunner import add_script_run_ctx, get_script_run_ctx

from capture.errors import CaptureError
from explorer.errors import ExplorerError
from explorer.metrics.load import max_violation
from explorer.metrics.parting import VERDICTS
from explorer.pages.compare_runs.data import (
    MAX_SEGMENTS,
    TwoModels,
    common_prompts,
    differences,
    load_change,
    prompt_divergence,
    relation,
    token_divergence,
    two_models,
)
from explorer.pages.compare_runs.figures import (
    against,
    change_heatmap,
    divergence_over_layers,
    mismatch_over_layers,
    over_layers,
)
from explorer.pages.compare_runs.two_sides import TwoSides, two_sides
from explorer.pages.load_balance.figures import METRIC_TEXTS, load_heatmap
from explorer.queries.load import expert_load
from explorer.queries.overview import gate_means
from explorer.queries.where import Part
from explorer.run import Run
from explorer.text import counted, one_line
from explorer.ui import address, problems, state
from explorer.ui.chart import chart, tile
from explorer.ui.glossary import help_text
from explorer.ui.problems import instead, section, without_ids
from explorer.ui.shell import current_view
from explorer.ui.state import View, ask, is_dark
from explorer.ui.token_strip import Legend, Token, reveal, token_strip
from explorer.ui.wording import Caption, number


def render() -> None:
    """Draw the page."""
    view = current_view()
    address.follow_jump()
    st.markdown(
        "**A** is the run at the side; choose **B** here. Two recordings of one model (other "
        "prompts, a later checkpoint, another precision) are compared expert by expert; two "
        "different models only by what does not depend on the names of their experts."
    )
    other = _other(view)
    if other is None:
        return
    kind = relation(view.run, other.run)
    _differences(view, other)
    if _same_experts(kind.same_shape, kind.same_model):
        _same_model(view, other)
    else:
        _two_models(view, other)


def _other(view: View) -> View | None:
    names = [name for name in state.run_names() if name != view.name]
    if not names:
        instead(
            "There is one run only. Record the same model on other prompts, or another model on "
            "the same prompts, on the page Capture."
        )
        return None
    newest = state.default_run(names)
    if address.read("against") == view.name:
        address.write("against", newest)  # B became A at the side
    name = address.choose(
        st.selectbox,
        "against",
        "B",
        names,
        default=newest,
        # by name even if it is the default, which changes with the runs of the folder; and an
        # address without it would be a step of the browser's history that leads to the newest
        on_write=lambda chosen: address.write("against", chosen),
    )
    address.write("against", name)
    try:
        run, key = state.opened(name)
    except (CaptureError, ExplorerError) as error:
        problems.show(error)
        return None
    layer, site = run.sites[0].layer, run.sites[0].site
    there = View(run, name, key, view.domain, view.phase, layer, site, view.part, view.layers)
    return _applicable(there).sampled()


def _applicable(other: View) -> View:
    """Take off the filters of A that cannot act on the loads of B, and say so."""
    run, said = other.run, []
    if other.domain is not None and other.domain not in run.domains:
        said.append("B has no prompts of the chosen domain: its loads are of all its prompts.")
        other = replace(other, domain=None)
    part = other.part
    if part is not None and part.slice is not None:
        # a slice holds tokens of one run, so that it says nothing of the other
        said.append("The slice at the side is of A alone: loads of B are counted without it.")
        part = Part(search=part.search) if part.search else None
    if part is not None and not run.records_ids:
        said.append("B keeps no experts of tokens: its loads are counted without the search.")
        part = None
    if other.layers is not None and not any(other.shows(site.layer) for site in run.sites):
        said.append("B has no router in the range of layers: all of its layers are shown.")
        other = replace(other, layers=None)
    if said:
        st.caption(" ".join(said))
    return replace(other, part=part)


@section("What differs between the recordings")
def _differences(view: View, other: View) -> None:
    table = differences(view.run, other.run)
    with st.expander(f"What differs between the recordings ({len(table)})"):
        st.dataframe(table, hide_index=True, alt="What differs between the two recordings")


def _same_experts(same_shape: bool, same_model: bool) -> bool:
    """Return whether experts are compared by their ids, and say why not."""
    if not same_shape:
        instead(
            "These are different models: expert 3 of one has nothing to do with expert 3 of the "
            "other, so that no figure here compares experts by their ids."
        )
        return False
    wanted = address.choose(
        st.segmented_control,
        "ids",
        "Expert ids",
        {"same": "Mean the same in A and B", "unrelated": "Unrelated"},
        default="same" if same_model else "unrelated",
        help="The same in runs of one model and of checkpoints of one training; unrelated in "
        "models that were trained apart, even if they are of one shape.",
    )
    return wanted == "same"


def _same_model(view: View, other: View) -> None:
    # each takes a while in large runs; a link to a token shows its tokens
    by = address.choose(
        st.segmented_control,
        "by",
        "Compare",
        {"experts": "Expert by expert", "tokens": "Token by token"},
        default="tokens" if address.read("spot") or address.read("shared") else "experts",
    )
    if by == "tokens":
        _same_tokens(view, other)
    else:
        _expert_by_expert(view, other)


def _expert_by_expert(view: View, other: View) -> None:
    sides = {"a": view.sampled(), "b": other}
    both = loads_and_gates(sides)
    loads = both.loads
    if not all(load["assignments"].sum() for load in loads.values()):
        instead("No token of this selection is in both runs. Change the filters at the side.")
        return
    change = load_change(loads["a"], loads["b"])
    chart(
        change_heatmap(
            change,
            caption=caption_of(sides, "1× = unchanged"),
            dark=is_dark(),
        ),
        key="load change",
        alt=f"Heatmap: share of each of {len(change)} experts in B over its share in A; "
        f"{int((change['change'].abs() >= 1).sum())} at least doubled or halved.",
        table=change,
        on_click=functools.partial(address.jump_to_expert, view),
    )
    for column, (name, load) in zip(st.columns(2, gap="medium"), loads.items(), strict=True):
        figure = load_heatmap(
            load, scope=sides[name].scope(over_layers=True), caption_width=60, dark=is_dark()
        )
        figure.update_layout(title_text=f"{name.upper()}: load (× uniform share)")
        with column:
            chart(
                figure,
                key=f"load {name}",
                alt=f"Load of every expert in {name.upper()}, on the scale of the other.",
                table=load,
                on_click=functools.partial(address.jump_to_expert, sides[name]),
            )
    lines_section(both, caption_of(sides))


@section("Where the two sides part")
def _sides(view: View, other: View) -> None:
    """Say where the runs first differ, and what the pattern looks like."""
    if without_ids(view.run, "Where two sides part") or without_ids(other.run, "That of B"):
        return
    sides: TwoSides | None = _of_two(view, other, "sides")
    if sides is None:
        return  # that no prompt is in both is said below
    found = sides.found
    if not found.compared:
        instead("No token has experts in both runs.")
        return
    st.markdown(f"Looks like **{found.verdict}**: {_meaning(view, sides)}.")
    tiles = st.columns(4)
    tile(
        tiles[0],
        "Experts differ",
        f"{found.mismatched:.2%}",
        f"of {found.compared:,} (token, layer)",
        about="Sets of experts, whatever their order.",
    )
    where = "nowhere"
    if found.first is not None:
        where = f"layer {view.named(*sides.layers[found.first[1]])}"
    tile(
        tiles[1],
        "First difference",
        where,
        "" if sides.position is None else f"token {sides.position} of sequence {sides.prompt_a}",
        about="Sequences in the order of A, then tokens, then layers.",
    )
    rank = found.margin_rank
    tile(
        tiles[2],
        "Margin there",
        number(found.margin, ".3g"),
        "not recorded in A" if np.isnan(rank) else f"quantile of all that part: {rank:.2f}",
        about=help_text("margin") + "  \nA quantile of 0.5 is any token's, near 0 are near-ties.",
    )
    tile(
        tiles[3],
        "One expert swapped",
        number(found.one_swapped, ".0%"),
        "of the tokens that part, where they first do",
    )
    of = f" of {sides.common:,}" if sides.tokens < sides.common else ""
    said = f"{counted(sides.sequences, 'sequence')}, matched by {sides.matched_by}"
    said += f"; n = {sides.tokens:,}{of} tokens"
    if sides.one_sided:
        said += f"; {sides.one_sided:,} (token, layer) recorded in one run only, left out"
    said += "; no filters"
    if view.layers is not None:
        said += f" but layers {view.layers[0]} to {view.layers[1]}"
    table = pd.DataFrame(sides.layers, columns=["layer", "site"]).assign(mismatched=found.by_layer)
    chart(
        mismatch_over_layers(view.of_layers(table), caption=Caption(said, {}), dark=is_dark()),
        key="divergence of sides",
        alt=f"Share of tokens whose experts differ over {counted(len(table), 'layer')}, "
        f"{number(table['mismatched'].max(), '.1%')} at most.",
        table=table,
    )


def _meaning(view: View, sides: TwoSides) -> str:
    found = sides.found
    if found.layer is not None:
        return f"layer {view.named(*sides.layers[found.layer])}; {VERDICTS[found.verdict]}"
    if found.shift is not None:
        return f"by {counted(abs(found.shift), 'token')}; {VERDICTS[found.verdict]}"
    return VERDICTS[found.verdict]


def _same_tokens(view: View, other: View) -> None:
    _sides(view, other)
    st.subheader("The same tokens in both runs", anchor=False)
    _phase_note(view)
    prompts = _of_two(view, other, "prompts", **view.prompt_filters)
    if _none_matches(view, len(prompts)):
        return
    if prompts.empty and view.run.records_ids and other.run.records_ids:
        instead("No prompt's text is in both runs, so that none can be shown token by token.")
        return
    if prompts.empty or not (view.run.records_ids and other.run.records_ids):
        instead(
            "The runs have no prompt in common whose tokens were recorded, so that their tokens "
            "cannot be compared. Record the same prompts, at level `ids` or above."
        )
        return
    read = address.choose(
        st.segmented_control,
        "read",
        "What of a token is compared",
        {"experts": "Experts", "weights": "Experts and weights"},
        help="Combine weights are half of what a run holds: with them it takes longer.",
    )
    reading = {"weights": read == "weights", **view.prompt_filters}
    table = _of_two(view, other, "divergence", prompts, **reading)
    if table.empty:
        instead(
            "The common prompts were split into other tokens: these are not the same model."
            if view.part is None or view.part.slice is None
            else "No prompt token of the slice is in both runs."
        )
        return
    table = view.of_layers(table)
    scope = view.scope(int(table["tokens"].max()), over_layers=True)._replace(phase="prompt")
    chart(
        divergence_over_layers(table, scope=scope, dark=is_dark()),
        key="divergence",
        alt=f"Agreement of the experts of {counted(table['tokens'].max(), 'common token')} over "
        f"layers: mean Jaccard {number(table['jaccard'].mean(), '.3f')}.",
        table=table,
    )
    rows = {str(row["prompt_a"]): row for row in prompts.to_dict("records")}
    key = address.choose(
        st.selectbox,
        "shared",
        "Prompt in both runs",
        list(rows),
        show=lambda key: f"{rows[key]['domain'] or ''} · {one_line(rows[key]['text'], 90)}",
    )
    if view.part is not None and view.part.slice is not None:
        st.caption("The prompt is shown whole, with tokens that are not of the slice.")
    _strip(view, other, rows[key])


def _phase_note(view: View) -> None:
    if view.phase == "generated":
        st.caption(
            "Only tokens of prompts are compared with each other, as what was generated need not "
            "be the same text: the phase at the side does not act on them."
        )


def _none_matches(view: View, n_prompts: int) -> bool:
    """Say that no prompt of both runs is of the view, if there are some that are not."""
    if n_prompts or (view.domain is None and view.part is None):
        return False
    instead("No prompt that both runs hold matches the filters at the side.")
    return True


@section("The prompt, token by token")
def _strip(view: View, other: View, prompt: dict[Hashable, Any]) -> None:
    prompts = int(prompt["prompt_a"]), int(prompt["prompt_b"])
    tokens = _divergence_of(view.key, other.key, view.run, other.run, *prompts, view.layers)
    of_range = "" if view.layers is None else f" from {view.layers[0]} to {view.layers[1]}"
    if tokens.empty:
        instead("No token of this prompt is in both runs.")
        return
    differing = tokens[tokens["jaccard"] < 1]
    wanted = address.read("spot")
    positions = set(tokens["position"])
    first = int((differing if len(differing) else tokens)["position"].iloc[0])
    here = int(wanted) if wanted.isdecimal() and int(wanted) in positions else first
    token_strip(
        [
            Token(
                int(row.position),
                "" if row.text is None else str(row.text),
                1 - float(row.jaccard),
                f"Jaccard {number(row.jaccard, '.2f')}",
            )
            for row in tokens.itertuples()
        ],
        selected=here,
        legend=Legend(f"1 - Jaccard, mean of layers{of_range}", "same experts", "none shared"),
        label="The prompt, tinted by how far the experts of its tokens differ",
        key="two runs strip",
        on_pick=lambda position: address.write("spot", str(position)),
    )
    row = tokens[tokens["position"] == here].iloc[0]
    where = (
        f"its experts are the same in all layers{of_range}"
        if np.isnan(row["first_layer"])
        else f"its experts differ from layer {int(row['first_layer'])} on"
    )
    losses = ", ".join(
        f"{value:.3f} nats in {name}"
        for name, value in (("A", row["loss_a"]), ("B", row["loss_b"]))
        if not pd.isna(value)
    )
    known = f" Loss of the next token: {losses}." if losses else ""
    st.markdown(f"Token {here}: Jaccard {number(row['jaccard'], '.2f')}; {where}." + known)
    if len(differing) and st.button("Go to the first divergence", icon=":material/first_page:"):
        address.write("spot", str(first))
        reveal()
        st.rerun()


def _two_models(view: View, other: View) -> None:
    _phase_note(view)
    with st.spinner("Aligning the texts by their characters…"):
        layers = (view.layers, other.layers)
        found: TwoModels = _of_two(view, other, "models", layers=layers, **view.prompt_filters)
    if found.stretches.empty and _none_matches(view, found.common):
        return
    if found.stretches.empty:
        instead(
            "The runs have no prompt in common whose text was recorded, so that the models cannot "
            "be compared on the same text. Record the same prompts with both."
        )
        return
    stretches_section(view, found)
    sides = {"a": view.sampled(), "b": other}
    lines_section(loads_and_gates(sides), caption_of(sides))


def _of_two(
    view: View, other: View, question: str, prompts: pd.DataFrame | None = None, **arguments: Any
) -> Any:
    """Return an answer, remembered until one of the files changes."""
    return _answer(view.key, other.key, question, arguments, view.run, other.run, prompts)


@st.cache_data(max_entries=20, show_spinner=False, hash_funcs={Part: lambda part: part.key})
def _answer(
    key_a: state.Key,
    key_b: state.Key,
    question: str,
    arguments: dict[str, Any],
    _a: Run,
    _b: Run,
    _prompts: pd.DataFrame | None,
) -> Any:
    if question == "sides":
        return two_sides(_a, _b)
    if question == "divergence":
        return token_divergence(_a, _b, prompts=_prompts, **arguments)
    return {"prompts": common_prompts, "models": two_models}[question](_a, _b, **arguments)


@st.cache_data(max_entries=50, show_spinner=False)
def _divergence_of(
    key_a: state.Key,
    key_b: state.Key,
    _a: Run,
    _b: Run,
    prompt_a: int,
    prompt_b: int,
    layers: tuple[int, int] | None,
) -> pd.DataFrame:
    return prompt_divergence(_a, _b, prompt_a, prompt_b, layers=layers)


Options = dict[str, Any]


class Both(NamedTuple):
    """Answers about both runs, of the layers shown, by the name of the side."""

    loads: dict[str, pd.DataFrame]
    gates: dict[str, pd.DataFrame]


def loads_and_gates(sides: dict[str, View]) -> Both:
    """Return the load of every expert and the mean gate entropy, asked for at the same time."""

    def answer(side: View, question: Callable[..., pd.DataFrame], options: Options) -> pd.DataFrame:
        return side.of_layers(ask(side, question, **options, **side.filters))

    # the cache of answers asks which page run a thread belongs to
    context = (None, get_script_run_ctx())
    with ThreadPoolExecutor(4, initializer=add_script_run_ctx, initargs=context) as pool:
        loads, gates = (
            {name: pool.submit(answer, side, question, options) for name, side in sides.items()}
            for question, options in (
                (expert_load, {"weights": False}),
                (gate_means, {"statistics": ("entropy",)}),
            )
        )
    return Both(*({name: one.result() for name, one in some.items()} for some in (loads, gates)))


def caption_of(sides: dict[str, View], *notes: str) -> Caption:
    """Return which tokens of each run are behind a figure over layers, with notes at the end."""
    scopes = {name: side.scope(over_layers=True) for name, side in sides.items()}
    # a line for each run: captions are broken at their semicolons
    said = {name: scope.caption().replace("; ", ", ") for name, scope in scopes.items()}
    parts = [*(f"{name.upper()}: {text}" for name, text in said.items()), *notes]
    filters = {
        f"{what}_{name}": value
        for name, scope in scopes.items()
        for what, value in scope.filter_values().items()
    }
    return Caption("; ".join(parts), filters)


@section("Balance and gate entropy")
def lines_section(both: Both, caption: str) -> None:
    """Draw the balance and the gate entropy of both runs over their layers."""
    balance = {
        name: load.groupby(["layer", "site"], as_index=False).agg(
            busiest_share=("assignments", lambda load: 1 + max_violation(load))
        )
        for name, load in both.loads.items()
    }
    left, right = st.columns(2, gap="medium")
    for column, tables, quantity, title in (
        (left, balance, "busiest_share", METRIC_TEXTS["max_violation"].label.capitalize()),
        (right, both.gates, "normalized_entropy", "Gate entropy (share of ln E)"),
    ):
        with column:
            if all(table[quantity].isna().all() for table in tables.values()):
                instead(
                    f"{title}: not recorded in these runs, or not defined: one expert, "
                    "or no assignment."
                )
                continue
            chart(
                over_layers(tables, quantity, title=title, caption=caption, dark=is_dark()),
                key=f"both {quantity}",
                alt=f"{title} over the layers of A and B.",
                table=pd.concat(
                    [
                        table[["layer", "site", quantity]].assign(run=name.upper())
                        for name, table in tables.items()
                    ]
                ),
            )


_QUANTITIES = {
    "entropy": "normalised gate entropy",
    "margin": "margin",
    "loss": "loss of the stretch (nats)",
}


@section("The same text in both models")
def stretches_section(view: View, found: TwoModels) -> None:
    """Draw how two models route the same stretches of text; there must be some."""
    routed, longest = found.co_routing, found.stretches.groupby("prompt").size().max()
    first = f" (the first {MAX_SEGMENTS} of each prompt)" if longest > MAX_SEGMENTS else ""
    prompts = counted(found.prompts, "prompt")
    if found.prompts < found.common:
        prompts = f"{found.prompts:,} of {found.common:,} prompts in common"
    if np.isfinite(routed.correlation):
        st.markdown(
            f"**Do the models route the same stretches of text together?** Over {routed.pairs:,} "
            f"pairs of stretches{first}, how many experts a pair shares in A and in B has a "
            f"correlation of **{routed.correlation:.3f}**; by chance it would be "
            f"{routed.low:.3f} to {routed.high:.3f}."
        )
    st.caption(
        f"{counted(len(found.stretches), 'stretch', 'stretches')} of {prompts}: the shortest "
        "pieces of text that end at a token of both models."
        + (f" Cut short in one of the runs: {found.cut:,} more." if found.cut else "")
    )
    quantity = address.choose(
        st.segmented_control,
        "quantity",
        "Quantity",
        list(_QUANTITIES),
        show=lambda name: name.capitalize(),
    )
    if quantity == "margin":
        st.caption("Margins are on each router's own scale of scores; compare their order only.")
    _figure(view, found, quantity, prompts)


def _figure(view: View, found: TwoModels, quantity: str, prompts: str) -> None:
    title = _QUANTITIES[quantity]
    if found.stretches[[f"{quantity}_a", f"{quantity}_b"]].isna().any(axis=1).all():
        instead(
            f"{title.capitalize()}: for no stretch in both runs, as it was not recorded, or is not "
            "defined: one expert, or no expert that is left out."
        )
        return
    # prompts are aligned as a whole; a loss is of no layer
    scope = view.scope(0, over_layers=quantity != "loss")
    chart(
        against(
            found.stretches,
            quantity,
            title=title,
            scope=scope._replace(phase="prompt", whole_prompts=True),
            prompts=prompts,
            dark=is_dark(),
        ),
        key="against",
        alt=f"Scatter: {title} of model B over that of model A for the same stretches of text.",
        table=found.stretches,
    )


render()
