"""Tokens in their contexts, one a line, with a number; click a line to go there."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
import streamlit as st

from explorer.queries.experts import (
    expert_token_count,
    expert_token_ids,
    expert_tokens,
    expert_vocabulary,
)
from explorer.queries.load import expert_load
from explorer.text import counted, visible
from explorer.ui import address, token_strip
from explorer.ui.problems import section, without_ids
from explorer.ui.saved import save_slice
from explorer.ui.state import View, ask
from explorer.ui.wording import expert_label

_HERE = Path(__file__).parent

_render = st.components.v2.component(
    "concordance",
    html='<div class="rows" role="group"></div>',
    css=(_HERE / "concordance.css").read_text(encoding="utf-8"),
    js=(_HERE / "concordance.js").read_text(encoding="utf-8"),
)


class ContextLine(NamedTuple):
    """One token with the text around it.

    Attributes
    ----------
    before, token, after : str
        As recorded.
    note : str
        Where it is from, such as the prompt's domain.
    share : float, 0..1
        Length of the bar.
    figure : str
        The number beside the bar.
    """

    before: str
    token: str
    after: str
    note: str
    share: float
    figure: str


def lines_of(
    found: pd.DataFrame, weights: "pd.Series[float]", figures: Sequence[str]
) -> list[ContextLine]:
    """Return the lines of tokens in their contexts, each with a bar as long as its weight."""
    longest = float(weights.max() or 1)
    return [
        ContextLine(
            row.before or "",
            f"position {row.position}" if row.text is None else row.text,
            row.after or "",
            f"{visible(row.domain) if row.domain else 'prompt'} {row.prompt_id}",
            float(weight) / longest,
            figure,
        )
        for row, weight, figure in zip(found.itertuples(), weights, figures, strict=True)
    ]


def concordance(
    lines: Sequence[ContextLine], *, label: str, key: str, on_pick: Callable[[int], None]
) -> None:
    """Draw the lines; ``on_pick`` gets the number of a picked line before the rerun."""

    def picked() -> None:
        state: Any = st.session_state.get(key)
        index = state.get("pick") if state is not None and hasattr(state, "get") else None
        if isinstance(index, int) and 0 <= index < len(lines):
            on_pick(index)

    rows = [
        [
            _flat(line.before),
            visible(line.token, running=True).replace("\n", ""),
            _flat(line.after),
            line.note,
            min(max(line.share, 0.0), 1.0),
            line.figure,
        ]
        for line in lines
    ]
    _render(data={"rows": rows, "label": label}, key=key, on_pick_change=picked)


def _flat(text: str) -> str:
    return visible(text) if text else ""


SHOWN = 60


@section("Tokens of the expert")
def expert_tokens_section(view: View) -> None:
    """Draw the section, or nothing where no expert is chosen."""
    info = view.run.site_info(view.layer, view.site)
    expert = address.number("expert", range(info.n_experts), default=None, what="Expert")
    if expert is None:
        return
    name = expert_label(view.site_name, expert)
    with st.container(border=True, key="expert tokens"):
        address.closing(f"Tokens of {name}", "expert")
        st.markdown(_sentence(view, expert, name))
        if without_ids(view.run, "Their list"):
            return

        def go_to(prompt_id: int, token_id: int) -> None:
            address.write("prompt", str(prompt_id))
            address.write("token", str(token_id))
            token_strip.reveal()

        _typical_tokens(view, expert)
        expert_lines(view, expert, name, go_to)


def _sentence(view: View, expert: int, name: str) -> str:
    load = ask(view, expert_load, **view.place, **view.filters)
    row = load[load["expert_id"] == expert].iloc[0]
    if not row["assignments"]:
        return f"None of these tokens went to **{name}**."
    return (
        f"**{name}** took {int(row['assignments']):,} of {int(load['assignments'].sum()):,} "
        f"assignments in layer {view.site_name}: {row['share']:.1%}, which is "
        f"{row['ratio']:.2f} times a fair share (1 of {len(load)} experts: {1 / len(load):.1%})."
    )


def _typical_tokens(view: View, expert: int) -> None:
    where = view.place | view.filters
    words = ask(view, expert_vocabulary, expert_id=expert, limit=12, **where)
    if len(words):
        typical = [
            f"`{_typical(word.text, word.token)}` {word.share:.0%}" for word in words.itertuples()
        ]
        st.markdown("Typical tokens (share of their occurrences): " + " · ".join(typical))


def expert_lines(
    view: View, expert: int, name: str, on_pick: Callable[[int, int], None], *, shown: int = SHOWN
) -> None:
    """Draw the tokens with the largest weight in their contexts.

    Parameters
    ----------
    name : str
        Of the expert.
    on_pick : callable
        Called before the rerun with the prompt and the token of a line that was picked.
    """
    where = view.place | view.filters
    found = ask(view, expert_tokens, expert_id=expert, limit=shown, context=14, **where)
    total = ask(view, expert_token_count, expert_id=expert, **where)
    if found.empty:
        return
    concordance(
        lines_of(found, found["weight"], [f"{weight:.3f}" for weight in found["weight"]]),
        label=f"Tokens that went to {name}, heaviest weight first. Enter opens the prompt.",
        key="concordance",
        on_pick=lambda index: on_pick(
            int(found["prompt_id"].iloc[index]), int(found["token_id"].iloc[index])
        ),
    )
    st.caption(
        f"{len(found):,} of {counted(total, 'token')}, those with the largest combine weight. "
        "Click a line to go to it in its prompt."
    )
    save_slice(
        view,
        lambda: expert_token_ids(view.run, expert_id=expert, **where),
        key="of an expert",
        fold=True,
    )


def _typical(text: str | None, token: int) -> str:
    """Return a token for a code span, where all shows as it is but a backtick."""
    shown = f"id {token}" if text is None else visible(text, spaces=True)
    return shown.replace("`", "ˋ")
