"""A head's attention among the tokens of a window: the text, and the map with the tokens."""

import numpy as np
import numpy.typing as npt
import pandas as pd
import streamlit as st

from explorer.metrics.coactivation import routing_change
from explorer.pages.attention.data import HeadMap, attended_keys, head_map, prompt_keys
from explorer.pages.attention.figures import head_name
from explorer.pages.attention.together_data import prompt_routing
from explorer.pages.attention.window_figure import MAX_WINDOW, token_window
from explorer.ui import address
from explorer.ui.caption import Scope
from explorer.ui.chart import chart
from explorer.ui.state import View, ask, is_dark
from explorer.ui.token_strip import Legend, Token, token_strip
from explorer.ui.visible import visible

SIZES = ("64", "128", str(MAX_WINDOW))
_SHOWN = {"map": "The map", "keys": "Heaviest keys"}
# fewer blocks in a window say nothing
_MIN_BLOCKS = 4


def window_of(position: int, prompt: pd.Series) -> range:
    """Return the page of tokens around a position, from the beginning of a block on."""
    size = int(address.pick("window", SIZES, default=SIZES[0], what="window"))
    start = position // size * size
    start -= start % max(1, min(size, int(prompt["bin_width"])))
    return range(start, min(int(prompt["tokens"]), start + size))


def window_map(
    view: View,
    prompt: pd.Series,
    head: tuple[int, int],
    listed: pd.DataFrame,
    position: int,
    window: range,
    scope: Scope,
    show: str,
) -> None:
    """Draw the attention among the tokens of the window.

    Parameters
    ----------
    prompt : Series
        A row of ``queries.attention.attention_prompts``.
    head : (layer, head)
    listed : DataFrame
        The prompt's tokens, from ``queries.tokens.tokens``.
    position : int
        Of the chosen token.
    show : {"map", "keys"}
    """
    prompt_id, n_tokens = int(prompt["prompt_id"]), int(prompt["tokens"])
    found = ask(view, head_map, prompt_id=prompt_id, layer=head[0], head=head[1])
    shown = listed.iloc[window.start : window.stop]
    change = np.full(len(window), np.nan)
    if view.run.records_ids:
        routing = ask(
            view,
            prompt_routing,
            prompt_id=prompt_id,
            n_tokens=n_tokens,
            layer=view.layer,
            site=view.site,
        )
        change = routing_change(routing.expert_ids)[window.start : window.stop]
    keys = None
    if show == "keys":
        keys = ask(view, prompt_keys, prompt_id=prompt_id, layer=head[0], head=head[1])
    ids = listed["token_id"].tolist()
    chart(
        token_window(
            found,
            window,
            shown["text"].tolist(),
            change,
            name=head_name(*head),
            routed=view.site_name,
            scope=scope,
            keys=keys,
            token=position,
            dark=is_dark(),
        ),
        key="token window",
        alt=f"Attention of {head_name(*head)} among tokens {window.start} to {window.stop - 1} of "
        f"prompt {prompt_id}, queries as rows and keys as columns; bars below say how many "
        f"experts of layer {view.site_name} change from token to token. Click: the token.",
        table=_table(found, keys, shown, change, window),
        on_click=lambda data: address.write("token", str(ids[int(data[0])])),
    )


def window_controls(n_tokens: int, bin_width: int) -> str:
    """Draw the choice of the window's size and of what it shows; return the latter."""
    with st.container(horizontal=True, vertical_alignment="bottom", gap="medium"):
        size = SIZES[0]
        if n_tokens > int(SIZES[0]):
            size = address.choose(
                st.segmented_control,
                "window",
                "Tokens shown",
                SIZES,
                default=SIZES[0],
                show=lambda size: size,
                help="The page of the prompt that holds the chosen token.",
            )
        if bin_width == 1:
            return "map"
        coarse = bin_width * _MIN_BLOCKS > int(size)
        return address.choose(
            st.segmented_control,
            "show",
            "Show",
            list(_SHOWN),
            default="keys" if coarse else "map",
            show=_SHOWN.__getitem__,
            help=f"**The map**: all attention, as means over blocks of {bin_width} × {bin_width} "
            "tokens.  \n**Heaviest keys**: for each token the few keys that it attends to most, "
            "exactly.",
        )


def window_text(
    view: View,
    prompt: pd.Series,
    head: tuple[int, int],
    listed: pd.DataFrame,
    position: int,
    window: range,
) -> None:
    """Draw the window's text, tinted by what the chosen token attends to."""
    found = ask(view, head_map, prompt_id=int(prompt["prompt_id"]), layer=head[0], head=head[1])
    weights = _row(view, found, head, listed, position)
    shown = weights[window.start : window.stop]
    top = float(np.nanmax(np.append(shown, 0.0)))
    strip = []
    for at in window:
        row = listed.iloc[at]
        weight = float(weights[at])
        text = f"⟨{row['token']}⟩" if row["text"] is None else row["text"]
        said = "after the chosen token" if at > position else f"{weight:.1%} of its attention"
        if np.isnan(weight):
            said = "less than its recorded keys"
        level = weight / top if top and weight == weight else 0.0
        strip.append(Token(int(row["token_id"]), text, level, f"token {at}: {said}"))
    exact = "" if found.bin_width == 1 else " (its heaviest keys)"
    token_strip(
        strip,
        selected=int(listed["token_id"].iloc[position]),
        legend=Legend(f"Attention of token {position}{exact}:", "0", f"{top:.0%}"),
        label="Tokens of the window. Arrow keys step, Enter chooses.",
        key="attention strip",
        on_pick=lambda picked: address.write("token", str(picked)),
    )


def _row(
    view: View, found: HeadMap, head: tuple[int, int], listed: pd.DataFrame, position: int
) -> npt.NDArray[np.float64]:
    """Return the chosen token's attention on every token, nan where it was not recorded."""
    if found.bin_width == 1 and not np.isnan(found.weights[position]).any():
        return np.asarray(found.weights[position])
    row = np.full(len(listed), np.nan)
    row[position + 1 :] = 0.0
    token_id = int(listed["token_id"].iloc[position])
    keys = ask(view, attended_keys, token_id=token_id, layer=head[0], head=head[1])
    row[keys["position"].to_numpy(dtype=np.int64)] = keys["weight"]
    return row


def _table(
    found: HeadMap,
    keys: pd.DataFrame | None,
    shown: pd.DataFrame,
    change: npt.NDArray[np.float64],
    window: range,
) -> pd.DataFrame:
    """Return the numbers of the figure: recorded keys, or the rows of the map with their tokens."""
    if keys is not None:
        return keys[keys["query"].isin(window) & keys["key"].isin(window)]
    width = found.bin_width
    blocks = slice(window.start // width, -(-window.stop // width))
    table = pd.DataFrame(
        found.weights[blocks, blocks],
        columns=[str(first) for first in range(window.start, window.stop, width)],
    )
    names = ["" if text is None else visible(text) for text in shown["text"].iloc[::width]]
    table.insert(0, "query", list(range(window.start, window.stop, width)))
    table.insert(1, "text", names)
    if width == 1:
        table.insert(2, "routing change", change)
    return table
