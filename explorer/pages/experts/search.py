"""Find the experts that fire on a word or a phrase."""

import streamlit as st

from explorer.pages.experts.figures import Axis, interval_dots
from explorer.pages.experts.specialization import MIN_HITS, experts_of_text
from explorer.ui import address, jump
from explorer.ui.chart import chart
from explorer.ui.save_slice import save_slice
from explorer.ui.state import View, ask, is_dark, several_sites
from explorer.ui.text import visible
from explorer.ui.wording import expert_label

_MAX_TEXT = 100
_SHOWN = 20


def text_section(view: View) -> None:
    """Draw the search and the experts that take what it finds."""
    if not view.run.records_ids:
        st.info(
            "Which experts a token went to is not recorded at level `stats`; capture with "
            "`--level ids`.",
            icon=":material/info:",
        )
        return
    text = _text()
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
        st.info("This text does not occur among the tokens of the filters.")
        return
    pieces = " · ".join(
        f"**{address.plain(visible(row.text, spaces=True))}** {row.tokens:,}"
        for row in found.pieces.head(8).itertuples()
    )
    st.markdown(
        f"**{found.occurrences:,}** occurrences, made of **{len(found.token_ids):,}** tokens: "
        f"{pieces}" + (" · and others" if len(found.pieces) > 8 else "")
    )
    if found.n_prompts < found.n_all:
        st.caption(f"Looked for in the first {found.n_prompts:,} of {found.n_all:,} prompts.")
    save_slice(view, lambda: found.token_ids, key="of a text", fold=True)
    shown = view.of_layers(table).head(_SHOWN)
    if shown.empty:
        st.info(f"No expert of these layers took {MIN_HITS} of these tokens: too few to compare.")
        return
    several = several_sites(view.run)
    names = [
        expert_label(f"{row.layer}.{row.site}" if several else str(row.layer), row.expert_id)
        for row in shown.itertuples()
    ]
    rows = shown.assign(
        label=names,
        value=shown["lift"],
        hover=[
            f"{name}: {row.hits:,} of {row.tokens:,} tokens = {row.share:.1%}<br>of all tokens "
            f"{row.base:.1%}: {row.lift:.2f}× as often<br>click for this expert"
            for name, row in zip(names, shown.itertuples(), strict=True)
        ],
    )
    chart(
        interval_dots(
            rows,
            Axis("times as often as of all tokens", 1.0, "1 = as of all tokens", percent=False),
            title="Experts of the text (share of its tokens / share of all tokens)",
            scope=view.scope(len(found.token_ids), over_layers=True),
            notes=[
                f"experts with at least {MIN_HITS} of the tokens",
                "90 % intervals from tokens, surest first",
            ],
            y_title="expert",
            dark=is_dark(),
        ),
        key="experts of text",
        alt=f"Dots with intervals: the {len(rows)} experts that take the text's tokens most above "
        f"their share of all tokens, up to {rows['lift'].max():.1f} times. Click: the expert.",
        table=table,
        on_click=lambda data: jump.aim(
            view, shown[["layer", "site", "expert_id"]].iloc[int(data[0])].tolist()
        ),
    )


def _text() -> str:
    key = "address:find"
    st.session_state[key] = address.read("find")[:_MAX_TEXT]
    st.text_input(
        "Which experts fire on this word or phrase?",
        key=key,
        max_chars=_MAX_TEXT,
        placeholder="such as: return, der, therefore",
        help="Upper or lower case; spaces count. Press Enter.",
        on_change=lambda: address.write("find", st.session_state[key]),
    )
    return str(st.session_state[key])
