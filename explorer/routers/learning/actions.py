"""What a reinforcement-learning router sees and may do: states, actions, and what actions cost."""

import itertools
import statistics
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch

from capture.store.records import Place
from capture.swap.rules import RouterInputs, Routing
from explorer.errors import RouterError
from explorer.routers.native import choose
from explorer.routers.scores import host_scores, slots, weigh

if TYPE_CHECKING:
    from explorer.routers.learning.training import TrainingSession

ActionKind = Literal["count", "subset", "skip"]
StateKind = Literal["full", "gate"]
CostKind = Literal["experts", "flops", "ms"]

STATISTICS = ("p1", "p2", "margin", "entropy")
MOST_SUBSETS = 256
TIMED_PASSES = 7


@dataclass(frozen=True, eq=False)
class Actions:
    """The actions of one layer: which of a token's ``M`` best experts run.

    Attributes
    ----------
    used : Tensor [A, M], bool
        Ascending by the number of experts. The best experts are those of the model's own rule.
    native : int
        The action that runs what the model's own rule runs.
    """

    used: torch.Tensor
    native: int

    @property
    def n_experts(self) -> torch.Tensor:
        """Experts that each action runs, [A] int64."""
        return self.used.sum(dim=-1)

    def best(self, scores: torch.Tensor, inputs: RouterInputs) -> torch.Tensor:
        """Return the experts that actions choose among, best first, [T, M] int64, -1 = none."""
        return choose(scores, inputs, k=self.used.shape[1])

    def allowed(self, best: torch.Tensor) -> torch.Tensor:
        """Return which actions a token may take, [T, A] bool: those whose experts are there."""
        used = self.used.to(best.device)
        return ~(used & (best < 0).unsqueeze(1)).any(dim=-1)

    def routing(
        self, scores: torch.Tensor, best: torch.Tensor, actions: torch.Tensor, inputs: RouterInputs
    ) -> Routing:
        """Return the routing of the actions [T], weighed as the model weighs its experts."""
        ids = best.where(self.used.to(best.device)[actions], -1)
        return slots(scores, ids, weigh(scores, ids, inputs))


def make_actions(kind: ActionKind, top_k: int, *, most: int | None, least: int | None) -> Actions:
    """Make the actions of a layer.

    Parameters
    ----------
    kind : {"count", "subset", "skip"}
        How many of the best experts run, which of them run, or whether all or none do.
    top_k : int
        Experts that the model's own rule takes.
    most : int, optional
        Experts that actions choose among; None = ``top_k``.
    least : int, optional
        Actions with fewer experts do not exist; None = 1, or 0 for ``"skip"``.

    Raises
    ------
    RouterError
        If no such set of actions holds the model's own.
    """
    wide = top_k if most is None else most
    least = int(kind != "skip") if least is None else least
    if wide < top_k or not 0 <= least <= top_k:
        raise RouterError(
            f"Expected most >= {top_k} and 0 <= least <= {top_k}, so that the model's own choice "
            f"is among the actions, got most={most}, least={least}."
        )
    if kind == "count":
        rows = [tuple(slot < n for slot in range(wide)) for n in range(wide + 1)]
    elif kind == "subset":
        if 2**wide > MOST_SUBSETS:
            raise RouterError(
                f"{wide} experts have {2**wide} subsets, more than {MOST_SUBSETS}. "
                "Use actions='count', or a smaller `most`."
            )
        rows = sorted(itertools.product((False, True), repeat=wide), key=lambda r: (sum(r), r))
    elif kind == "skip":
        rows = [(False,) * wide, tuple(slot < top_k for slot in range(wide))]
    else:
        raise RouterError(f"Expected actions 'count', 'subset' or 'skip', got {kind!r}.")
    rows = [row for row in rows if sum(row) >= least]
    own = tuple(slot < top_k for slot in range(wide))
    return Actions(torch.tensor(rows), rows.index(own))


def statistics_of(scores: torch.Tensor) -> torch.Tensor:
    """Return what is known of a token from its gate's scores [T, E], named in ``STATISTICS``.

    The two largest shares, their difference, and the entropy of the shares in nats.
    """
    shares = scores / scores.sum(dim=-1, keepdim=True).clamp_min(1e-20)
    first, second = shares.topk(min(2, shares.shape[-1]), dim=-1).values[:, [0, -1]].unbind(-1)
    entropy = -(shares * shares.clamp_min(1e-20).log()).sum(dim=-1)
    return torch.stack([first, second, first - second, entropy], dim=-1)


def state_of(inputs: RouterInputs, scores: torch.Tensor, kind: StateKind) -> torch.Tensor:
    """Return a token's state, float32: [hidden, p1, p2, p1 - p2, H(p)], or the last four only.

    Parameters
    ----------
    inputs : RouterInputs
    scores : Tensor [T, E]
        On the host's scale.
    kind : {"full", "gate"}
        ``"gate"`` leaves the hidden state out: the ablation of what it adds.

    Returns
    -------
    Tensor [T, D + 4] or [T, 4]
    """
    known = statistics_of(scores)
    return known if kind == "gate" else torch.cat([inputs.tensor("hidden").float(), known], -1)


def state_and_best(
    inputs: RouterInputs, actions: Actions, kind: StateKind
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return state [T, F], the host's scores [T, E] and the best experts [T, M] of tokens."""
    scores = host_scores(inputs.tensor("logits"), inputs)
    return state_of(inputs, scores, kind), scores, actions.best(scores, inputs)


def action_costs(
    session: "TrainingSession", actions: Mapping[Place, Actions], kind: CostKind
) -> dict[Place, torch.Tensor]:
    """Return what each action costs at each site, [A] float32, in experts.

    Parameters
    ----------
    session : TrainingSession
    actions : mapping of (layer, site) to Actions
    kind : {"experts", "flops", "ms"}
        ``"flops"`` and ``"ms"`` are divided by what one expert costs in the mean layer, so that a
        price means the same with each of them. Milliseconds are measured here, on this machine,
        with all tokens of a batch taking the same action.
    """
    if kind == "experts":
        return {place: each.n_experts.float() for place, each in actions.items()}
    if kind == "flops":
        from capture.model.flops import model_flops

        layers = model_flops(session.model, session.sites).layers
        one = {place: cost for layer in layers for place, cost in layer.expert.items()}
        mean = statistics.fmean(one[place] for place in actions)
        return {place: each.n_experts * (one[place] / mean) for place, each in actions.items()}
    if kind != "ms":
        raise RouterError(f"Expected cost 'experts', 'flops' or 'ms', got {kind!r}.")
    by_count = session.once(("expert_ms", *actions), lambda: expert_milliseconds(session, actions))
    top_k = {place: int(each.n_experts[each.native]) for place, each in actions.items()}
    # above running none at all
    unit = statistics.fmean(
        (by_count[p][top_k[p]] - by_count[p][0]) / max(1, top_k[p]) for p in actions
    )
    if unit <= 0:
        raise RouterError(
            "Running experts took no longer than running none, so milliseconds cannot price them "
            "on this machine. Use cost='flops'."
        )
    return {
        place: torch.tensor([(by_count[place][n] - by_count[place][0]) / unit for n in counts])
        for place, counts in ((p, each.n_experts.tolist()) for p, each in actions.items())
    }


def expert_milliseconds(
    session: "TrainingSession", actions: Mapping[Place, Actions], *, batch_tokens: int = 2048
) -> dict[Place, list[float]]:
    """Return the milliseconds that a site's experts take with 0, 1, 2, ... experts a token."""
    from capture.model.inputs import plain_forward
    from capture.swap.routers import swap
    from explorer.routers.learning.exploration import NoExperts
    from explorer.routers.live import LiveRule
    from explorer.routers.native import TopKRouter

    widest = max(each.used.shape[1] for each in actions.values())
    ids = _rectangle(session.sequences, batch_tokens)
    found: dict[Place, list[float]] = {place: [] for place in actions}
    for count in range(widest + 1):
        rule = LiveRule(TopKRouter(k=count)) if count else NoExperts()
        with ExitStack() as stack, torch.no_grad():
            stack.enter_context(plain_forward(session.model))
            stack.enter_context(swap(session.model, session.sites, rule, checked=False))
            clocks = [(site, _Clock(site.experts, stack)) for site in session.sites]
            for number in range(TIMED_PASSES):
                session.report(number / TIMED_PASSES, f"timing {count} experts a token")
                session.model(input_ids=ids.to(_device(session)), use_cache=False)
        for site, clock in clocks:
            place = (site.info.layer, site.info.site)
            if place in found:
                found[place].append(1e3 * statistics.median(clock.seconds[1:]))
    # noise must not make more experts cheaper
    return {p: torch.tensor(times).cummax(dim=0).values.tolist() for p, times in found.items()}


class _Clock:
    """Times every call of a module."""

    def __init__(self, module: torch.nn.Module, stack: ExitStack) -> None:
        self.seconds: list[float] = []
        self._start = 0.0
        stack.callback(module.register_forward_pre_hook(self._before).remove)
        stack.callback(module.register_forward_hook(self._after).remove)

    def _before(self, *_: Any) -> None:
        _wait()
        self._start = time.perf_counter()

    def _after(self, *_: Any) -> None:
        _wait()
        self.seconds.append(time.perf_counter() - self._start)


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _device(session: "TrainingSession") -> torch.device:
    from capture.model.inputs import input_device

    return input_device(session.model)


def _rectangle(sequences: Sequence[Any], n_tokens: int) -> torch.Tensor:
    """Return about ``n_tokens`` token ids [B, S] without padding."""
    flat = torch.cat([torch.as_tensor(each, dtype=torch.int64) for each in sequences])[:n_tokens]
    width = min(128, len(flat))
    return flat[: len(flat) // width * width].view(-1, width)
