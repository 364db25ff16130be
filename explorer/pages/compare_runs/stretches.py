"""The part of the page Compare runs for two models: the same stretches of text in both."""

import numpy as np
import streamlit as st

from explorer.pages.compare_runs.figures import against
from explorer.pages.compare_runs.two_runs import MAX_SEGMENTS, TwoModels
from explorer.ui import address
from explorer.ui.chart import chart
from explorer.ui.part import part
from explorer.ui.state import View, is_dark

_QUANTITIES = {
    "entropy": "normalised gate entropy",
    "margin": "margin",
    "loss": "loss of the stretch (nats)",
}


@part("The same text in both models")
def stretches_section(view: View, found: TwoModels) -> None:
    """Draw how two models route the same stretches of text; there must be some."""
    routed, longest = found.co_routing, found.stretches.groupby("prompt").size().max()
    first = f" (the first {MAX_SEGMENTS} of each prompt)" if longest > MAX_SEGMENTS else ""
    prompts = f"{found.prompts:,} prompts"
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
        f"{len(found.stretches):,} stretches of {prompts}: the shortest pieces of text that end "
        "at a token of both models."
        + (f" {found.cut:,} more were cut short in one of the runs." if found.cut else "")
    )
    quantity = address.choose(
        st.segmented_control,
        "quantity",
        "Quantity",
        list(_QUANTITIES),
        default="entropy",
        show=lambda name: name.capitalize(),
    )
    if quantity == "margin":
        st.caption("Margins are on each router's own scale of scores; compare their order only.")
    _figure(view, found, quantity, prompts)


def _figure(view: View, found: TwoModels, quantity: str, prompts: str) -> None:
    title = _QUANTITIES[quantity]
    if found.stretches[[f"{quantity}_a", f"{quantity}_b"]].isna().any(axis=1).all():
        st.info(
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
