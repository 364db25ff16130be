"""The same text under two routers: where they agree, where they part, and what that costs."""

import numpy as np
import numpy.typing as npt
import pandas as pd
import streamlit as st

from explorer.comparison.results_file import Comparison
from explorer.comparison.verdicts import NATIVE
from explorer.pages.compare.figures import marked
from explorer.text import counted
from explorer.ui import address
from explorer.ui.chart import listing
from explorer.ui.problems import instead, section
from explorer.ui.token_strip import Legend, Token, reveal, token_strip

_ALL = "all"
_MODES = ("live", "replay")


@section("Two routers, token by token")
def two_routers(comparison: Comparison) -> None:
    """Draw a text of the comparison, tinted by how far two routers disagree about its tokens."""
    choices, texts = comparison.rows("choices"), comparison.rows("texts")
    texts["mode"] = texts["mode"].fillna("live")  # of files from before replay had texts
    modes = [mode for mode in _MODES if _routers_of(choices, mode).size > 1]
    if not modes or texts.empty:
        return
    st.subheader("The same text under two routers", anchor=False)
    mode = modes[0]
    if len(modes) > 1:
        mode = address.choose(
            st.segmented_control,
            "told",
            "Routed",
            modes,
            default=mode,
            show=str.capitalize,
            help="live: each router runs in the model, which goes its own way from the first "
            "other choice on; replay: each decides about the inputs that this run recorded",
        )
    choices, texts = (rows[rows["mode"] == mode] for rows in (choices, texts))
    names = _routers_of(choices, mode).tolist()
    first, second, text_id, layer = _controls(comparison, names, choices, texts)
    if first == second:
        instead("Choose two different routers.")
        return
    here = choices[choices["text_id"] == text_id]
    pairs = jaccard_of(here, first, second)
    if layer != _ALL:
        pairs = pairs[pairs["layer"] == int(layer)]
    per_token = pairs.groupby("position")["jaccard"].mean()
    text = texts[texts["text_id"] == text_id].sort_values("position")
    chosen = _chosen(text, per_token)
    token_strip(
        [
            Token(
                int(row["position"]),
                "" if pd.isna(row["text"]) else str(row["text"]),
                1 - float(per_token[row["position"]]) if row["position"] in per_token else None,
                f"Jaccard {per_token[row['position']]:.2f}"
                if row["position"] in per_token
                else "not measured",
            )
            for _, row in text.iterrows()
        ],
        selected=chosen,
        legend=Legend("1 - Jaccard of the two sets of experts", "same experts", "none shared"),
        label=f"Text {text_id} tinted by disagreement of {first} and {second}",
        key="two routers",
        on_pick=lambda position: address.write("at", str(position)),
    )
    _say(per_token, pairs)
    _token(comparison, pairs, text, text_id, chosen, first, second)


def _routers_of(choices: pd.DataFrame, mode: str) -> "npt.NDArray[np.object_]":
    found: npt.NDArray[np.object_] = choices[choices["mode"] == mode]["router"].unique()
    return found


def _controls(
    comparison: Comparison, names: list[str], choices: pd.DataFrame, texts: pd.DataFrame
) -> tuple[str, str, int, str]:
    a, b, c, d = st.columns([3, 3, 3, 2])
    marks = marked(comparison.table)

    def called(name: str) -> str:
        # the model's own choices are there though nobody asked for a row of it
        return marks.get(name, name)

    others = [name for name in names if name != NATIVE]
    with a:
        first = address.choose(st.selectbox, "a", "Router A", names, show=called)
    with b:
        wanted = address.read("router")
        default = wanted if wanted in others else others[0]
        second = address.choose(st.selectbox, "b", "Router B", names, default=default, show=called)
    heads = texts.sort_values("position").groupby("text_id").first()
    starts = {
        str(number): f"{heads.loc[number, 'domain'] or 'text'} {number}" for number in heads.index
    }
    with c:
        text_id = address.choose(st.selectbox, "text", "Text", starts)
    layers = [str(layer) for layer in sorted(choices["layer"].dropna().unique())]
    with d:
        layer = address.choose(
            st.selectbox,
            "swapped",
            "Layers",
            [_ALL, *layers],
            show=lambda key: "All" if key == _ALL else f"Layer {key}",
        )
    return first, second, int(text_id), layer


def jaccard_of(choices: pd.DataFrame, first: str, second: str) -> pd.DataFrame:
    """Return how alike two routers' sets of experts are for every token and layer.

    Parameters
    ----------
    choices : DataFrame
        ``router, seed, position, layer, site, expert_ids, weights`` of one text; the smallest
        seed of a router counts.

    Returns
    -------
    DataFrame
        ``position, layer, site, expert_ids_a, weights_a, expert_ids_b, weights_b, jaccard``
        (0..1; 1 where neither chose an expert).
    """
    sides = []
    for name in (first, second):
        rows = choices[choices["router"] == name]
        seeds = rows["seed"].dropna()
        rows = rows[rows["seed"] == seeds.min()] if len(seeds) else rows
        sides.append(rows[["position", "layer", "site", "expert_ids", "weights"]])
    pairs = sides[0].merge(sides[1], on=["position", "layer", "site"], suffixes=("_a", "_b"))
    sets = zip(pairs["expert_ids_a"], pairs["expert_ids_b"], strict=True)
    return pairs.assign(jaccard=[_jaccard(set(a), set(b)) for a, b in sets])


def _jaccard(first: set[int], second: set[int]) -> float:
    union = len(first | second)
    return len(first & second) / union if union else 1.0


def _chosen(text: pd.DataFrame, per_token: "pd.Series[float]") -> int:
    """Return the token of the address, else the first one about which the routers differ."""
    wanted = address.read("at")
    positions = {int(position) for position in text["position"]}
    if wanted.isdecimal() and int(wanted) in positions:
        return int(wanted)
    differing = per_token[per_token < 1]
    return int(differing.index[0]) if len(differing) else min(positions)


def _say(per_token: "pd.Series[float]", pairs: pd.DataFrame) -> None:
    if per_token.empty:
        st.markdown("No token of this text was routed by both.")
        return
    differing = per_token[per_token < 1]
    if differing.empty:
        st.markdown(
            "The two routers choose the same experts wherever both routed this text: for "
            f"{counted(len(per_token), 'token')}."
        )
        return
    first = int(differing.index[0])
    layers = pairs[(pairs["position"] == first) & (pairs["jaccard"] < 1)]["layer"]
    st.markdown(
        f"Mean Jaccard **{per_token.mean():.3f}** over {counted(len(per_token), 'token')}; "
        f"{(per_token < 1).mean():.1%} of them differ somewhere. **First divergence** at token "
        f"{first}, in layer {int(layers.min())}."
    )
    if st.button("Go to the first divergence", icon=":material/first_page:"):
        address.write("at", str(first))
        reveal()
        st.rerun()


def _token(
    comparison: Comparison,
    pairs: pd.DataFrame,
    text: pd.DataFrame,
    text_id: int,
    position: int,
    first: str,
    second: str,
) -> None:
    here = pairs[pairs["position"] == position].sort_values(["layer", "site"])
    losses = comparison.rows("token_losses")
    losses = losses[(losses["text_id"] == text_id) & (losses["position"] == position)]
    known = [losses[losses["router"] == name]["loss"] for name in (first, second)]
    a, b = ("–" if found.empty else f"{found.mean():.3f}" for found in known)
    said = f"loss {a} nats under A, {b} under B."
    if (text["mode"] == "replay").any():
        said = "replay knows no loss."
    elif position == 0:
        said = "the first token has no loss."
    st.markdown(f"Token {position}: {said}")
    listing(
        here.assign(
            A=[_listed(*row) for row in _pairs_of(here, "a")],
            B=[_listed(*row) for row in _pairs_of(here, "b")],
        ),
        {
            "layer": "Layer",
            "A": f"A: {first} (expert × weight)",
            "B": f"B: {second} (expert × weight)",
            "jaccard": ("Jaccard", "%.2f"),
        },
        alt=f"Experts of token {position} in each layer under the two routers",
    )


def _pairs_of(rows: pd.DataFrame, side: str) -> "zip[tuple[list[int], list[float]]]":
    return zip(rows[f"expert_ids_{side}"], rows[f"weights_{side}"], strict=True)


def _listed(experts: list[int], weights: list[float]) -> str:
    shown = (f"{expert} × {weight:.2f}" for expert, weight in zip(experts, weights, strict=True))
    return ", ".join(shown) or "none"
