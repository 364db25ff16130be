"""The bound of the last layer: what choosing by the answer would give."""

import streamlit as st

from explorer.comparison.results_file import Comparison
from explorer.pages.compare.oracle_figures import oracle_bound
from explorer.ui.chart import chart
from explorer.ui.part import part
from explorer.ui.state import is_dark


@part("Oracle")
def oracle_section(comparison: Comparison) -> None:
    """Draw what the comparison holds of the last layer's oracle."""
    rows = comparison.rows("oracle")
    if rows.empty:
        return
    loss = rows.drop_duplicates("kind").set_index("kind")["loss"]
    first = rows.iloc[0]
    st.subheader("How far a router could go: a bound", anchor=False)
    st.markdown(
        "In the last layer a token's experts change its own prediction only, so every set of "
        "experts was tried, and the token that follows chose among them. "
        f"That gives {loss['best']:.4f} nats a token in place of {loss['model']:.4f}; a random set "
        f"gives {loss['random']:.4f}, the worst {loss['worst']:.4f}. The model's own set is the "
        f"best for {first['native_best']:.1%} of the tokens (chance: {1 / first['sets']:.1%}), at "
        f"a mean rank of {first['native_rank']:.1f} of {first['sets']:,}."
    )
    chart(
        oracle_bound(rows, dark=is_dark()),
        key="oracle",
        alt="Loss of the best of n random sets of experts in the last layer, over n, with the "
        "loss of the model's own router as a line.",
        table=rows,
    )
    st.caption(
        ":material/warning: **bound**: it reads the next token. That few random sets already beat "
        "the router says that the loss chose, not that a router could."
    )
