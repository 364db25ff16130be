"""Gates trained on the model's own loss: before blocks, heads and experts, and a recurrent one."""

from collections.abc import Sequence
from dataclasses import replace

from torch import nn

from explorer.routers.base import ROUTERS, Part, RouterInfo
from explorer.routers.gating import Kind
from explorer.routers.learning.gates import BATCH_TOKENS, STEPS, TrainedGate
from explorer.routers.recurrent import GTrXLGate, Recurrence

_INFO = RouterInfo(
    name="layer_gate_trained",
    family="gating",
    title="Layer gate, trained on the loss",
    summary=(
        "A gate decides for each token whether the MoE block of a layer runs. It is trained on "
        "the frozen model's loss, with a price that holds the share of open gates."
    ),
    formula="g = [sigmoid(w h + b) >= theta], d g := d sigmoid;  min CE + price (mean g - keep)",
    paper="2410.13184",
    differs=(
        "The price of an open gate follows the share of open gates, where the source's is fixed; "
        "only MoE blocks are closed."
    ),
    needs=frozenset({"hidden"}),
    fits="trained",
    across_layers=True,
    identity={"keep": 1.0},
)


@ROUTERS.add("layer_gate_trained")
class TrainedLayerGate(TrainedGate):
    """Decide for each token whether the MoE block of a layer runs, by a gate trained on the loss.

    Notes
    -----
    As in the source, but the price of an open gate follows the share of open gates, where the
    source adds a fixed penalty above its target and ends where that leaves it; and the threshold
    is moved at the end until the share is met. Closed blocks do not run, where the source's code
    computes and multiplies. Run it live with ``gate_parts(..., part="block")``.
    """

    part: Part = "layer"
    info = _INFO


@ROUTERS.add("head_gate_trained")
class TrainedHeadGate(TrainedGate):
    """Decide for each token which heads count, by hard-concrete gates trained on the loss."""

    part: Part = "head"
    info = replace(
        _INFO,
        name="head_gate_trained",
        title="Head gates, trained on the loss",
        summary=(
            "A gate for each attention head and token, of a kind that reaches 0 and 1 by itself. "
            "Trained on the frozen model's loss; closed heads are masked, not skipped."
        ),
        formula="g = clip(1.2 sigmoid(w h + b) - 0.1, 0, 1);  min CE + price (P(g > 0) - keep)",
        paper="1905.09418; 1712.01312, eq. 10-13",
        differs="The sources' gates are the same for all tokens; here each token has its own.",
    )

    def __init__(
        self,
        *,
        keep: float = 0.75,
        kind: Kind = "hard_concrete",
        steps: int = STEPS,
        batch_tokens: int = BATCH_TOKENS,
        seed: int = 0,
    ) -> None:
        super().__init__(keep=keep, kind=kind, steps=steps, batch_tokens=batch_tokens, seed=seed)


@ROUTERS.add("expert_gate_trained")
class TrainedExpertGate(TrainedGate):
    """Decide for each chosen expert whether it runs for the token, by a gate trained on the loss.

    Notes
    -----
    ``keep`` is the share of the model's own choices that run. Weights of the experts that are
    left stay what they were.
    """

    part: Part = "expert"
    info = replace(
        _INFO,
        name="expert_gate_trained",
        differs=(
            "The source gates attention and MLPs; here single experts among those that the model "
            "chose."
        ),
        title="Expert gates, trained on the loss",
        summary=(
            "A gate for each expert and token decides which of the chosen experts run. Trained on "
            "the frozen model's loss."
        ),
        formula="g = [sigmoid(W h + b) >= theta];  out = sum_S w_e g_e expert_e(h)",
    )


@ROUTERS.add("gtrxl_gate_trained")
class TrainedGTrXLGate(TrainedGate):
    """The layer gate with a stream from layer to layer, updated by GTrXL's gate.

    Parameters
    ----------
    width : int
        Of the stream.
    """

    part: Part = "layer"
    info = replace(
        _INFO,
        name="gtrxl_gate_trained",
        title="GTrXL layer gate, trained on the loss",
        summary=(
            "A small stream of the token passes from layer to layer through GTrXL's gate and "
            "decides whether each MoE block runs. Trained on the frozen model's loss."
        ),
        formula="x_l = GTrXL(x_{l-1}, P_l h_l);  g = [sigmoid(w_l x_l + b_l) >= theta]",
        paper="1910.06764; 2410.13184",
        differs=(
            "One source's gate replaces residual sums, the other's reads the token alone; here "
            "GTrXL carries a narrow stream that opens and closes MoE blocks."
        ),
    )

    def __init__(
        self,
        *,
        keep: float = 0.75,
        kind: Kind = "sigmoid",
        width: int = 32,
        steps: int = STEPS,
        batch_tokens: int = BATCH_TOKENS,
        seed: int = 0,
    ) -> None:
        super().__init__(keep=keep, kind=kind, steps=steps, batch_tokens=batch_tokens, seed=seed)
        self.width = width

    def make(self, d: int, outputs: Sequence[int]) -> nn.Module:
        """Make a projection and a readout of each layer, and one gate for the stream."""
        return Recurrence(d, outputs, GTrXLGate(self.width), self.width)

    def flops(self, n_experts: int, d: int, top_k: int) -> float:
        """Return the operations of the projection, the gate and the readout."""
        return 2.0 * self.width * (d + 6 * self.width + 1)
