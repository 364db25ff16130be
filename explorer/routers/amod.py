"""A-MoD as published: a layer runs for the tokens that received attention in the layer before."""

from dataclasses import replace

from explorer.routers.base import ROUTERS
from explorer.routers.parts import AttentionReceivedRouter


@ROUTERS.add("a_mod")
class AModRouter(AttentionReceivedRouter):
    """Run a layer for the tokens that receive most attention in the layer before it.

    Parameters
    ----------
    keep : float
        Share of each sequence's tokens, rounded up.
    selector : Selector, optional
        As of :class:`AttentionReceivedRouter`.

    Notes
    -----
    Layers without a map before them run for all tokens: the first one, and where whole layers are
    gated every second one, as in the source, since a layer that some tokens skip has no map. A
    comparison leaves them alone.
    """

    preceding = True
    info = replace(
        AttentionReceivedRouter.info,
        name="a_mod",
        title="Attention received in the layer before (A-MoD)",
        summary=(
            "Runs a layer for the tokens that received most attention in the layer before; the "
            "first layer runs for all. Later tokens decide about earlier ones."
        ),
        formula="s_t = sum over queries of a_(l-1)[query, t];  run l for t if s_t in TopC(s)",
        differs=(
            "Made for images, and trained with; here a trained language model skips its MoE "
            "blocks, or with --skip layer whole layers as in the source."
        ),
    )
