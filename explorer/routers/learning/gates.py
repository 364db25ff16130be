"""Gates that learn on the model's own loss: before blocks, heads and experts, and a recurrent one.

Gradients go straight through. In training every part is computed and multiplied by its gate, so
that a closed gate still learns what it keeps away. Afterwards closed parts do not run (heads do;
they are masked).
"""

import statistics
from collections.abc import Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn

from capture.model.flops import head_count
from capture.model.inputs import input_device
from capture.model.sites import text_config
from capture.store.records import Place
from capture.swap.part_gates import gate_parts, part_modules
from capture.swap.routers import swap
from capture.swap.rules import Choice, Part, PartMask, RouterInputs, Routing
from explorer.errors import RouterError
from explorer.routers.contract import PartRouter, registered
from explorer.routers.gating import HIGH, LOW, TEMPERATURE, Kind, hard_concrete, straight_through
from explorer.routers.heads_and_layers import check_keep, quantile_threshold
from explorer.routers.learning.exploration import TextPasses
from explorer.routers.learning.imitation import seeded
from explorer.routers.learning.objectives import is_point
from explorer.routers.learning.training import TrainedRouter, TrainingSession
from explorer.routers.recurrent import GTrXLGate, Recurrence

if TYPE_CHECKING:
    from collections.abc import Iterator


STEPS, BATCH_TOKENS, LEARNING_RATE = 250, 1024, 1e-2
PRICE_RATE = 0.05  # how fast the price of an open gate follows the rate
OPEN = 1.0  # logit at the start
CALIBRATIONS, CALIBRATION_TOKENS = 3, 8192


class Gates(nn.Module):
    """A linear gate of each layer; the stateless counterpart of ``Recurrence``.

    Parameters
    ----------
    d : int
        Width of the token.
    outputs : sequence of int
        How many parts each layer has.
    """

    def __init__(self, d: int, outputs: Sequence[int]) -> None:
        super().__init__()
        self.readout = nn.ModuleList(nn.Linear(d, n) for n in outputs)

    def forward(
        self, hidden: torch.Tensor, state: torch.Tensor | None, layer: int
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return the layer's logits [T, P] and no state."""
        return self.readout[layer](hidden), None


@dataclass(kw_only=True, eq=False)
class TrainedGate(TrainedRouter, PartRouter):
    """What all trained gates share.

    Parameters
    ----------
    keep : float
        Share of (token, part) pairs that run, over all layers together.
    kind : {"sigmoid", "hard_concrete"}
        A sigmoid that is rounded, with the gradient straight through; or a gate with noise that
        reaches 0 and 1 by itself.
    steps, batch_tokens : int
        Of the training; a step is one pass forwards and backwards.
    seed : int
    """

    keep: float = 0.75
    kind: Kind = "sigmoid"
    steps: int = STEPS
    batch_tokens: int = BATCH_TOKENS
    seed: int = 0

    def __post_init__(self) -> None:
        """Check what was given."""
        if self.kind not in ("sigmoid", "hard_concrete"):
            raise RouterError(f"Expected kind 'sigmoid' or 'hard_concrete', got {self.kind!r}.")
        self.keep = check_keep(self.keep)

    def make(self, d: int, outputs: Sequence[int]) -> nn.Module:
        """Make the network: (hidden [T, D], state, layer) to (logits [T, P], state)."""
        return Gates(d, outputs)

    def _train(self, session: TrainingSession) -> None:
        widths = _widths(session, self.part)
        self.places_ = sorted(widths)
        config: Any = text_config(session.model)
        d = int(config.hidden_size)
        network = seeded(lambda: self.make(d, [widths[p] for p in self.places_]), self.seed)
        for readout in cast(Any, network).readout:
            nn.init.normal_(readout.weight, std=0.01, generator=_generator(self.seed))
            nn.init.constant_(readout.bias, OPEN)
        network.to(input_device(session.model))
        self.curves_ = []
        with _frozen(session.model):
            self._descend(session, network)
        network.requires_grad_(False)
        for parameter in network.parameters():
            parameter.grad = None
        self.network_, self.cut_ = network, 0.0
        self._calibrate(session)

    def _descend(self, session: TrainingSession, network: nn.Module) -> None:
        """Take gradient steps on the loss, with a price of open gates that holds the rate."""
        rule = _Learning(network, self.places_, self.part, self.kind, _generator(self.seed + 1))
        runs = TextPasses(session, n_tokens=None, batch_tokens=self.batch_tokens)
        optimizer = torch.optim.Adam(network.parameters(), lr=LEARNING_RATE)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(1, self.steps))
        order = torch.randperm(len(runs.batches), generator=_generator(self.seed + 2)).tolist()
        price = 0.0
        with torch.enable_grad(), _masked(session, self.part, rule):
            for step in range(self.steps):
                session.report(step / self.steps, "training gates")
                rule.seen.clear()
                loss = runs.model_loss(runs.batches[order[step % len(order)]])
                gates = [gate for _, gate in rule.seen.values()]
                rate = torch.cat([each.flatten() for each in gates]).mean()
                if is_point(step, self.steps):
                    self._note(step, price, float(loss.detach()), rule)
                optimizer.zero_grad()
                (loss + price * rate).backward()  # type: ignore[no-untyped-call]
                optimizer.step()
                schedule.step()
                price = max(0.0, price + PRICE_RATE * (float(rate.detach()) - self.keep))

    def _note(self, step: int, price: float, loss: float, rule: "_Learning") -> None:
        """Keep a point of the curves of each layer; the loss belongs to all."""
        for place, (logits, gate) in rule.seen.items():
            p = logits.detach().sigmoid().clamp(1e-7, 1 - 1e-7)
            entropy = -(p * p.log() + (1 - p) * (1 - p).log()).mean()
            rate = float(gate.detach().mean())
            self.curves_.append(
                {
                    "router": self.info.name,
                    "seed": self.seed,
                    "lambda": price,
                    "step": step,
                    "layer": place[0],
                    "reward": -loss - price * rate,
                    "policy_entropy": float(entropy),
                    "gate_rate": rate,
                }
            )

    def _calibrate(self, session: TrainingSession) -> None:
        """Move the threshold until the share of open gates is as asked for.

        Closed gates change what later layers see, so the share is met in a few rounds.
        """
        runs = TextPasses(session, n_tokens=CALIBRATION_TOKENS, batch_tokens=self.batch_tokens)
        for number in range(CALIBRATIONS):
            found: list[torch.Tensor] = []
            rule = _Deciding(self, found)
            with torch.no_grad(), _masked(session, self.part, rule):
                for at, numbers in enumerate(runs.batches):
                    done = (number + at / len(runs.batches)) / CALIBRATIONS
                    session.report(done, "calibrating gates")
                    runs.model_loss(numbers)
            self.cut_ = quantile_threshold(torch.cat(found), self.keep)

    def logits(self, inputs: RouterInputs) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return the gates' logits [T, P] and the state after the layer."""
        if inputs.place not in self.places_:
            raise RouterError(
                f"Router {self.info.name!r} was not trained on layer {inputs.layer}, site "
                f"{inputs.site}. Train it on the model that it gates."
            )
        at, hidden = self.places_.index(inputs.place), inputs.tensor("hidden").float()
        logits, state = self.network_(hidden, inputs.previous_state, at)
        return logits, state

    def _route(self, inputs: RouterInputs) -> PartMask:
        logits, state = self.logits(inputs)
        return PartMask(self.part, (logits >= self.cut_).float(), state)

    def flops(self, n_experts: int, d: int, top_k: int) -> float:
        """Return the operations of one logit per part, in the mean layer.

        Heads are taken as four before the training.
        """
        parts = float({"layer": 1, "head": 4, "expert": n_experts}[self.part])
        if self.fitted:
            readout = cast(Any, self.network_).readout
            parts = statistics.fmean(each.out_features for each in readout)
        return 2.0 * d * parts


class _Learning:
    """The rule that is in the model while gates learn: gates with gradients."""

    def __init__(
        self,
        network: nn.Module,
        places: Sequence[Place],
        part: Part,
        kind: Kind,
        generator: torch.Generator,
    ) -> None:
        self.network, self.places, self.part, self.kind = network, list(places), part, kind
        self.generator = generator
        self.seen: dict[Place, tuple[torch.Tensor, torch.Tensor]] = {}

    def route(self, inputs: RouterInputs, /) -> PartMask | Choice:
        """Return the gates of one layer; for experts, the model's choice weighed by them."""
        place = (inputs.layer, inputs.site)
        at = self.places.index(place)
        logits, state = self.network(inputs.tensor("hidden"), inputs.previous_state, at)
        if self.kind == "sigmoid":
            gate = counted = straight_through(logits.sigmoid())
        else:
            drawn = torch.rand(logits.shape, generator=self.generator).to(logits.device)
            gate = hard_concrete(logits, uniform=drawn)
            counted = open_probability(logits)
        if self.part == "expert":
            gated = weighed(inputs, gate)
            chosen = _own(inputs).expert_ids
            counted = counted.gather(-1, chosen.clamp_min(0))[chosen >= 0].unsqueeze(-1)
            logits = logits.gather(-1, chosen.clamp_min(0))[chosen >= 0].unsqueeze(-1)
            self.seen[place] = logits, counted
            return gated
        self.seen[place] = logits, counted
        return PartMask(self.part, gate, state)


class _Deciding:
    """The rule that is in the model while the threshold is found: gates as they will be."""

    def __init__(self, router: TrainedGate, found: list[torch.Tensor]) -> None:
        self.router, self.found = router, found

    def route(self, inputs: RouterInputs, /) -> PartMask | Choice:
        """Gate by the threshold so far, and keep the logits."""
        logits, state = self.router.logits(inputs)
        gate = (logits >= self.router.cut_).float()
        if self.router.part == "expert":
            chosen = _own(inputs).expert_ids
            self.found.append(logits.gather(-1, chosen.clamp_min(0))[chosen >= 0])
            return weighed(inputs, gate)
        self.found.append(logits.flatten())
        return PartMask(self.router.part, gate, state)


def open_probability(log_alpha: torch.Tensor) -> torch.Tensor:
    """Return with which probability a hard-concrete gate is above 0.

    References
    ----------
    Louizos, Welling and Kingma 2018, arXiv:1712.01312, eq. 12.
    """
    shift = TEMPERATURE * float(torch.tensor(-LOW / HIGH).log())
    return (log_alpha - shift).sigmoid()


def weighed(inputs: RouterInputs, gate: torch.Tensor) -> Choice:
    """Return the model's own choice with weights multiplied by gates [T, E]; all of it runs."""
    own = _own(inputs)
    ids, weights = own.expert_ids, own.weights
    return Choice(ids, weights * gate.gather(-1, ids.clamp_min(0)).to(weights.dtype))


def _own(inputs: RouterInputs) -> Choice | Routing:
    """Return the model's own choice, which a swap gives to rules that read it."""
    return cast(Choice | Routing, inputs.native)


def _masked(session: TrainingSession, part: Part, rule: Any) -> AbstractContextManager[Any]:
    """Put a rule's gates into the model, computing everything."""
    if part == "expert":
        return swap(session.model, session.sites, rule, checked=False)
    where = "block" if part == "layer" else "head"
    return gate_parts(session.model, session.sites, rule, part=where, masked=True)  # type: ignore[arg-type]


def _widths(session: TrainingSession, part: Part) -> dict[Place, int]:
    """Return how many parts each layer has."""
    if part == "expert":
        return {(s.info.layer, s.info.site): s.n_computing for s in session.sites}
    if part == "layer":
        return {(layer, 0): 1 for layer in part_modules(session.model, session.sites, "block")}
    heads = part_modules(session.model, session.sites, "head")
    return {(layer, 0): head_count(module, session.model) for layer, module in heads.items()}


@contextmanager
def _frozen(model: nn.Module) -> "Iterator[None]":
    """Let no weight of the model collect a gradient, until the block is left."""
    learning = [p for p in model.parameters() if p.requires_grad]
    for parameter in learning:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in learning:
            parameter.requires_grad_(True)


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@registered("layer_gate_trained")
class TrainedLayerGate(TrainedGate):
    """Decide for each token whether the MoE block of a layer runs, by a gate trained on the loss.

    Notes
    -----
    As in the source, but the price of an open gate follows the share of open gates, where the
    source adds a fixed penalty above its target and ends where that leaves it; and the threshold
    is moved at the end until the share is met. Closed blocks do not run, where the source's code
    computes and multiplies. Run it live with ``gate_parts(..., part="block")``.
    """

    part = "layer"


@registered("head_gate_trained")
class TrainedHeadGate(TrainedGate):
    """Decide for each token which heads count, by hard-concrete gates trained on the loss."""

    part = "head"
    kind: Kind = "hard_concrete"


@registered("expert_gate_trained")
class TrainedExpertGate(TrainedGate):
    """Decide for each chosen expert whether it runs for the token, by a gate trained on the loss.

    Notes
    -----
    ``keep`` is the share of the model's own choices that run. Weights of the experts that are
    left stay what they were.
    """

    part = "expert"


@registered("gtrxl_gate_trained")
class TrainedGTrXLGate(TrainedGate):
    """The layer gate with a stream from layer to layer, updated by GTrXL's gate.

    Parameters
    ----------
    width : int
        Of the stream.
    """

    part = "layer"
    width: int = 32

    def make(self, d: int, outputs: Sequence[int]) -> nn.Module:
        """Make a projection and a readout of each layer, and one gate for the stream."""
        return Recurrence(d, outputs, GTrXLGate(self.width), self.width)

    def flops(self, n_experts: int, d: int, top_k: int) -> float:
        """Return the operations of the projection, the gate and the readout."""
        return 2.0 * self.width * (d + 6 * self.width + 1)
