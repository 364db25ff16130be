"""Attention: which heads look where, one head on one prompt, and whether routing follows it."""

import math

import pandas as pd
import streamlit as st

from explorer import writing
from explorer.metrics.attention import MIN_PROMPTS, uniform_head
from explorer.pages.attention.data import (
    HAS_MAP,
    HeadsTogether,
    attention_layers,
    attention_prompts,
    head_map,
    head_stats,
    routing_together,
)
from explorer.pages.attention.figures import (
    MEASURES,
    head_heatmap,
    head_name,
    head_overview,
    together_figure,
)
from explorer.pages.attention.token_window import (
    attended_keys_panel,
    window_controls,
    window_map,
    window_of,
    window_text,
)
from explorer.pages.tokens.data import tokens
from explorer.text import counted, plain
from explorer.ui import address
from explorer.ui.chart import chart
from explorer.ui.problems import instead, section, without_ids
from explorer.ui.shell import current_view
from explorer.ui.state import View, ask, is_dark
from explorer.ui.wording import Scope, prompt_name, span

_MEASURES = {
    "entropy": "Entropy",
    "sink_mass": "First token",
    "mean_distance": "Distance",
    "window_mass": "Nearby",
}
# a prompt of so many tokens is worth a first look
_WORTH = 24


def render() -> None:
    """Draw the page."""
    view = current_view()
    if ask(view, attention_prompts).empty:
        _not_recorded()
        return
    prompts = ask(view, attention_prompts, **view.prompt_filters)
    st.markdown(
        "Before a layer's router chooses experts, the layer's attention **heads** gather "
        "information from earlier tokens. Below is where each head looks; click one for its map."
    )
    if view.phase == "generated":
        st.caption(
            "Attention is recorded while a prompt is read: the filter *Generated* does not apply "
            "to this page."
        )
    if prompts.empty:
        instead("No prompt of these filters has attention recorded. Change them at the side.")
        return
    head = _chosen_head(view)
    left, right = st.columns(2, gap="large")
    with left:
        _overview(view, prompts, head)
    with right:
        prompt = _pick_prompt(prompts)
        listed = _prompt_tokens(view, prompt)
        token_id = _pick_token(listed)
        position = int((listed["token_id"] == token_id).to_numpy().argmax())
        window = window_of(position, prompt)
        _whole_map(view, prompt, head, listed, window)
    st.caption(
        ":material/info: Attention is not an explanation: it says which tokens a head read from, "
        "not what it took from them, nor whether that changed the model's answer."
    )
    _head_on_prompt(view, prompt, head, listed, position, window)
    routing_together_section(view, head)


def _not_recorded() -> None:
    instead(
        "This run holds no attention maps: record them with "
        "`python -m capture MODEL --prompts FILE --out RUN --level attention`, or on the Capture "
        "page with the level *attention*."
    )
    if writing.may_write():
        st.page_link(
            "explorer/pages/capture/page.py",
            label="Capture with attention",
            icon=":material/arrow_forward:",
        )


def _chosen_head(view: View) -> tuple[int, int]:
    """Return the head of the address; by default the first one of the layer at the side."""
    stats = view.of_layers(ask(view, head_stats))
    names = {
        f"{layer}.{head}": (int(layer), int(head))
        for layer, head in zip(stats["layer"], stats["head"], strict=True)
    }
    here = [name for name, (layer, _) in names.items() if layer == view.layer]
    default = (here or list(names))[0]
    return names[address.pick("head", list(names), default=default, what="Head")]


@section("All heads")
def _overview(view: View, prompts: pd.DataFrame, head: tuple[int, int]) -> None:
    measure = address.choose(
        st.segmented_control,
        "measure",
        "Of every head",
        _MEASURES,
        help="  \n".join(f"**{_MEASURES[m]}**: {MEASURES[m].meaning}" for m in _MEASURES),
    )
    stats = view.of_layers(ask(view, head_stats, **view.prompt_filters))
    layers = view.of_layers(ask(view, attention_layers))
    queries = int(stats["queries"].max())
    figure = head_overview(
        stats,
        layers,
        measure,
        baseline=uniform_head(zip(prompts["tokens"], prompts["every"], strict=True)),
        scope=_scope(view, queries)._replace(layers=view.layers),
        n_prompts=len(prompts),
        chosen=head,
        dark=is_dark(),
    )
    chart(
        figure,
        key="heads",
        alt=f"Heatmap of {counted(len(layers), 'layer')} by attention heads: "
        f"{MEASURES[measure].label}, {span(stats[measure])}. Click: the head's map.",
        table=stats,
        on_click=lambda data: _go_to_head(view, int(data[0]), int(data[1])),
    )
    without = layers[layers["kind"] != HAS_MAP]
    if len(without):
        kinds = ", ".join(sorted({plain(kind) for kind in without["kind"]}))
        st.caption(
            f"Without an attention map, as tokens are mixed by {kinds}: {len(without)} of "
            f"{counted(len(layers), 'layer')}."
        )


def _go_to_head(view: View, layer: int, head: int) -> None:
    address.write("head", f"{layer}.{head}")
    # the experts shown beside a head are those of its own layer, where that has a router
    if layer in view.run.layers:
        address.write("layer", view.named(layer, 0))


def _scope(view: View, n_tokens: int) -> Scope:
    phase = "prompt" if len(view.run.phases) > 1 else None
    return view.scope(n_tokens)._replace(phase=phase)


def _pick_prompt(prompts: pd.DataFrame) -> pd.Series:
    rows = {str(row["prompt_id"]): row for _, row in prompts.iterrows()}
    wanted = address.read("prompt")
    if wanted and wanted not in rows:
        address.note(
            f"Attention was not recorded for the prompt “{wanted[:20]}”; showing another one."
        )
        address.write("prompt", "")
        address.write("token", "")
    first = _default_prompt(prompts)
    key = address.choose(
        st.selectbox,
        "prompt",
        "Prompt (those with attention)",
        list(rows),
        default=str(first),
        show=lambda key: prompt_name(rows[key]),
        resets=("token",),
    )
    return rows[key]


def _default_prompt(prompts: pd.DataFrame) -> int:
    """Return the longest prompt whose map is exact, else one that has something to look at."""
    worth = prompts[prompts["tokens"] >= _WORTH]
    exact = worth[worth["bin_width"] == 1]
    if len(exact):
        return int(exact.loc[exact["tokens"].idxmax(), "prompt_id"])
    return int((worth if len(worth) else prompts)["prompt_id"].iloc[0])


def _prompt_tokens(view: View, prompt: pd.Series) -> pd.DataFrame:
    listed = ask(view, tokens, prompt_id=int(prompt["prompt_id"]))
    return listed[listed["phase"] == "prompt"].reset_index(drop=True)


def _pick_token(listed: pd.DataFrame) -> int:
    """Return the token of the address, by default one that has a few tokens before it."""
    default = str(listed["token_id"].iloc[min(len(listed) - 1, 12)])
    known = set(listed["token_id"].astype(str))
    return int(address.pick("token", sorted(known), default=default, what="Token of this prompt"))


@section("Map of the head")
def _whole_map(
    view: View, prompt: pd.Series, head: tuple[int, int], listed: pd.DataFrame, window: range
) -> None:
    found = ask(view, head_map, prompt_id=int(prompt["prompt_id"]), layer=head[0], head=head[1])
    ids = listed["token_id"].tolist()
    chart(
        head_heatmap(
            found,
            name=head_name(*head),
            scope=_prompt_scope(view, prompt),
            window=window,
            dark=is_dark(),
        ),
        key="head map",
        alt=f"Heatmap of {len(found.weights)} blocks of queries by as many blocks of keys: the "
        f"share of attention of {head_name(*head)} on prompt {prompt['prompt_id']}. Click: the "
        "token.",
        table=pd.DataFrame(found.weights),
        on_click=lambda data: address.write("token", str(ids[int(data[0])])),
    )


def _prompt_scope(view: View, prompt: pd.Series) -> Scope:
    scope = _scope(view, int(prompt["tokens"])).without_filters()
    return scope._replace(domain=prompt["domain"] or None)


@section("The head, token by token")
def _head_on_prompt(
    view: View,
    prompt: pd.Series,
    head: tuple[int, int],
    listed: pd.DataFrame,
    position: int,
    window: range,
) -> None:
    st.subheader(f"{head_name(*head)}, token by token", anchor=False)
    show = window_controls(int(prompt["tokens"]), int(prompt["bin_width"]))
    left, right = st.columns([3, 2], gap="large")
    with left:
        window_text(view, prompt, head, listed, position, window)
    with right, st.container(key="token panel"):
        attended_keys_panel(view, prompt, head, listed, position)
    window_map(view, prompt, head, listed, position, window, _prompt_scope(view, prompt), show)


# a difference that two decimals show
_SHOWN = 0.005


@section("Attention and routing")
def routing_together_section(view: View, head: tuple[int, int]) -> None:
    """Draw the section for the heads of the chosen head's layer."""
    st.subheader("Do tokens that attend to each other route together?", anchor=False)
    if without_ids(view.run, "This comparison"):
        return
    found = ask(
        view, routing_together, attention_layer=head[0], **view.place, **view.prompt_filters
    )
    here = found.heads[found.heads["head"] == head[1]]
    if here.empty:
        instead("This run keeps no keys of this head. Capture with `--attention-top-keys 4`.")
        return
    st.markdown(_sentence(view, here.iloc[0], found, head))
    scope = view.scope(found.n_tokens)
    scope = scope._replace(phase="prompt" if len(view.run.phases) > 1 else None, whole_prompts=True)
    chart(
        together_figure(
            found.heads,
            attention_layer=head[0],
            routed=view.site_name,
            chosen=head[1],
            n_prompts=found.n_prompts,
            scope=scope,
            dark=is_dark(),
        ),
        key="together",
        alt=f"For {len(found.heads)} heads of layer {head[0]}: the share of attended keys that "
        f"share an expert of layer {view.site_name} with their query, "
        f"{span(found.heads['share'], '.0%')}, and by chance.",
        table=found.heads,
    )
    if found.n_prompts < found.n_all:
        st.caption(f"Computed from the first {found.n_prompts:,} of {found.n_all:,} prompts.")


def _sentence(view: View, row: pd.Series, found: HeadsTogether, head: tuple[int, int]) -> str:
    if math.isnan(row["share"]):
        return (
            f"**{head_name(*head)}** attends to nothing but the token itself and the prompt's "
            "first token here, so there is no pair to ask about."
        )
    of = f"{counted(row['pairs'], 'pair')} of {counted(row['prompts'], 'prompt')}"
    text = (
        f"Of what **{head_name(*head)}** attends to, **{row['share']:.1%}** (weighted by "
        f"attention, {of}) shares an expert with the query in layer {view.site_name}."
    )
    if math.isnan(row["chance_distance"]):
        return text
    text += (
        " By chance, tokens of the same prompt at the same distance do so in "
        f"{row['chance_distance']:.1%}"
    )
    if math.isnan(row["lift"]):
        return text + "."
    text += f": **{row['lift']:.2f} times** as often"
    if math.isnan(row["lift_low"]):
        return text + f". Fewer than {MIN_PROMPTS} prompts: no interval."
    text += f" ({row['lift_low']:.2f} to {row['lift_high']:.2f} in 9 of 10 draws of prompts)"
    if row["lift_low"] > 1 + _SHOWN:
        return text + ". So they route together more than their distance explains."
    if row["lift_high"] < 1 - _SHOWN:
        return text + ". So they route together less than their distance would suggest."
    return text + ". That is what chance gives."


render()
