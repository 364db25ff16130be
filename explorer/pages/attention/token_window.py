"""One head, token by token: the text, what the chosen token attends to, and the map."""

import numpy as np
import numpy.typing as npt
import pandas as pd
import streamlit as st

from explorer.metrics.coactivation import routing_change
from explorer.pages.attention.data import (
    HeadMap,
    PromptRouting,
    attended_keys,
    head_map,
    prompt_keys,
    prompt_routing,
)
from explorer.pages.attention.figures import MAX_WINDOW, head_name, token_window
from explorer.text import one_line, plain, visible
from explorer.ui import address
from explorer.ui.chart import chart
from explorer.ui.problems import instead
from explorer.ui.state import View, ask, is_dark
from explorer.ui.token_strip import Legend, Token, token_strip
from explorer.ui.wording import Scope, token_name, unnamed
from explorer.ui.wording import listed as joined

SIZES = ("64", "128", str(MAX_WINDOW))
_SHOWN = {"map": "The map", "keys": "Heaviest keys"}
# fewer blocks in a window say nothing
_MIN_BLOCKS = 4


def window_of(position: int, prompt: pd.Series) -> range:
    """Return the page of tokens around a position, from the beginning of a block on."""
    size = int(address.pick("window", SIZES, default=SIZES[0], what="Tokens shown"))
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
        A row of ``data.attention_prompts``.
    head : (layer, head)
    listed : DataFrame
        The prompt's tokens, from ``explorer.pages.tokens.data.tokens``.
    position : int
        Of the chosen token.
    show : {"map", "keys"}
    """
    prompt_id, n_tokens = int(prompt["prompt_id"]), int(prompt["tokens"])
    found = ask(view, head_map, prompt_id=prompt_id, layer=head[0], head=head[1])
    shown = listed.iloc[window.start : window.stop]
    change = np.full(len(window), np.nan)
    if view.run.records_ids:
        routing = ask(view, prompt_routing, prompt_id=prompt_id, n_tokens=n_tokens, **view.place)
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
                help="The page of the prompt that holds the chosen token.",
            )
        if bin_width == 1:
            return "map"
        coarse = bin_width * _MIN_BLOCKS > int(size)
        return address.choose(
            st.segmented_control,
            "show",
            "Show",
            _SHOWN,
            default="keys" if coarse else "map",
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
        text = row["text"] if row["text"] is not None else unnamed(row["token"], at)
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
    names = [
        "" if text is None else visible(text, running=True) for text in shown["text"].iloc[::width]
    ]
    table.insert(0, "query", list(range(window.start, window.stop, width)))
    table.insert(1, "text", names)
    if width == 1:
        table.insert(2, "routing change", change)
    return table


# stored weights are rounded
_WHOLE = 0.995


def attended_keys_panel(
    view: View, prompt: pd.Series, head: tuple[int, int], listed: pd.DataFrame, position: int
) -> None:
    """Draw the panel of the token at a position; ``listed`` has the prompt's tokens."""
    token = listed.iloc[position]
    st.subheader(f"Token {position:,}: “{plain(token_name(token['text']))}”", anchor=False)
    keys = ask(view, attended_keys, token_id=int(token["token_id"]), layer=head[0], head=head[1])
    if keys.empty:
        instead(
            "The heaviest keys of this token were not recorded: they are kept for the first "
            "queries of a prompt, of the blocks that `--attention-every` uses, and with "
            "`--attention-top-keys` above 0."
        )
        return
    routing = None
    if view.run.records_ids:
        routing = ask(
            view,
            prompt_routing,
            prompt_id=int(prompt["prompt_id"]),
            n_tokens=int(prompt["tokens"]),
            **view.place,
        )
    st.markdown(_attends(keys, head, position))
    if routing is not None:
        st.markdown(_shares(view, keys, routing, position))
    _keys_table(keys, routing, position, view.site_name)
    st.page_link(
        "explorer/pages/tokens/page.py",
        label="This token on the Tokens page",
        icon=":material/notes:",
        query_params=_tokens_address(view, prompt, token),
    )


def _tokens_address(view: View, prompt: pd.Series, token: pd.Series) -> dict[str, str]:
    kept = {name: address.read(name) for name in ("phase", "domain", "layer")}
    there = {"run": view.name, "prompt": str(prompt["prompt_id"]), "token": str(token["token_id"])}
    return there | {name: value for name, value in kept.items() if value}


def _attends(keys: pd.DataFrame, head: tuple[int, int], position: int) -> str:
    first = keys.iloc[0]
    itself = int(first["position"]) == position
    name = plain(one_line(token_name(first["text"]), 40))
    target = "itself" if itself else f"token {int(first['position']):,} “{name}”"
    text = (
        f"Head **{head_name(*head)}** lets this token look most at {target} "
        f"(**{first['weight']:.0%}** of its attention)."
    )
    if position == 0:
        return text + " There is nothing before it."
    held = min(1.0, float(keys["weight"].sum()))
    number = "one key holds" if len(keys) == 1 else f"{len(keys)} heaviest keys hold"
    rest = "" if held > _WHOLE else "; the rest was not recorded key by key"
    return f"{text} Its {number} {held:.0%}{rest}."


def _shares(view: View, keys: pd.DataFrame, routing: PromptRouting, position: int) -> str:
    """Say how many of the keys share an expert with the token, against chance."""
    at = keys["position"].to_numpy(dtype=np.int64)
    # the token itself shares all its experts, and the first token is looked at whatever it is
    counted = at[(at != position) & (at > 0)]
    if not len(counted):
        return (
            "Whether keys share its experts is not asked of the token itself nor of the prompt's "
            "first token, which is all it has here."
        )
    mine = set(routing.expert_ids[position].tolist()) - {-1}
    sharing = sum(bool(mine & set(routing.expert_ids[key].tolist())) for key in counted)
    chance = float(np.mean(routing.by_distance[position - counted]))
    return (
        f"In layer {view.site_name}, **{sharing} of {len(counted)}** of these keys share an expert "
        f"with it; tokens of this prompt at the same distances do in {chance:.0%} of cases. (The "
        "token itself and the prompt's first token are not counted.)"
    )


def _keys_table(
    keys: pd.DataFrame, routing: PromptRouting | None, position: int, site_name: str
) -> None:
    rows = []
    mine = [] if routing is None else [e for e in routing.expert_ids[position].tolist() if e >= 0]
    for key in keys.itertuples():
        row: dict[str, object] = {
            "key": token_name(key.text),
            "position": int(key.position),
            "weight": float(key.weight),
        }
        if routing is not None:
            theirs = [e for e in routing.expert_ids[int(key.position)].tolist() if e >= 0]
            row["shared"] = ", ".join(str(e) for e in theirs if e in mine) or "none"
            row["experts"] = ", ".join(map(str, theirs))
        rows.append(row)
    st.dataframe(
        pd.DataFrame(rows),
        hide_index=True,
        alt="The keys that this token attends to, with their weights and experts",
        column_config={
            "key": st.column_config.TextColumn("Key", width=80),
            "position": st.column_config.NumberColumn("At", width=50),
            "weight": st.column_config.NumberColumn("Attention", format="percent", width=75),
            "shared": st.column_config.TextColumn("Shared", width=70),
            "experts": st.column_config.TextColumn("Its experts"),
        },
    )
    if routing is not None:
        st.caption(
            f"This token's own experts in layer {site_name}: "
            f"{joined([str(e) for e in mine]) or 'none'}."
        )
