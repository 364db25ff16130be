"""What one token attends to in a head, and whether those tokens share its experts."""

import numpy as np
import pandas as pd
import streamlit as st

from explorer.pages.attention.data import attended_keys
from explorer.pages.attention.figures import head_name
from explorer.pages.attention.together_data import PromptRouting, prompt_routing
from explorer.ui import address
from explorer.ui.state import View, ask
from explorer.ui.visible import one_line, visible
from explorer.ui.wording import listed as joined

# stored weights are rounded
_WHOLE = 0.995


def attended_keys_panel(
    view: View, prompt: pd.Series, head: tuple[int, int], listed: pd.DataFrame, position: int
) -> None:
    """Draw the panel of the token at a position; ``listed`` has the prompt's tokens."""
    token = listed.iloc[position]
    st.subheader(f"Token {position:,}: “{address.plain(_name(token['text']))}”", anchor=False)
    keys = ask(
        view,
        attended_keys,
        token_id=int(token["token_id"]),
        layer=head[0],
        head=head[1],
    )
    if keys.empty:
        st.info(
            "The heaviest keys of this token were not recorded: they are kept for the first "
            "queries of a prompt, of the blocks that `--attention-every` uses, and with "
            "`--attention-top-keys` above 0.",
            icon=":material/info:",
        )
        return
    routing = None
    if view.run.records_ids:
        routing = ask(
            view,
            prompt_routing,
            prompt_id=int(prompt["prompt_id"]),
            n_tokens=int(prompt["tokens"]),
            layer=view.layer,
            site=view.site,
        )
    st.markdown(_attends(keys, head, position))
    if routing is not None:
        st.markdown(_shares(view, keys, routing, position))
    _table(view, keys, routing, position)
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


def _name(text: str | None) -> str:
    if text is None:
        return "(text not recorded)"
    return "␣" * len(text) if text and not text.strip(" ") else visible(text).replace("\n", "")


def _attends(keys: pd.DataFrame, head: tuple[int, int], position: int) -> str:
    first = keys.iloc[0]
    itself = int(first["position"]) == position
    name = address.plain(one_line(_name(first["text"]), 40))
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


def _table(view: View, keys: pd.DataFrame, routing: PromptRouting | None, position: int) -> None:
    rows = []
    mine = [] if routing is None else [e for e in routing.expert_ids[position].tolist() if e >= 0]
    for key in keys.itertuples():
        row: dict[str, object] = {
            "key": _name(key.text),
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
            f"This token's own experts in layer {view.site_name}: "
            f"{joined([str(e) for e in mine]) or 'none'}."
        )
