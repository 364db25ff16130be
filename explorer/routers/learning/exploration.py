"""Exploration: run the frozen model with other actions than its own; what changes, what it costs.

In a pass of :func:`explore` the actions of one layer are drawn at random and all other layers do
what the model does. A token's reward then has one cause, its own action, beside the noise of the
other tokens' actions, which is independent of it. Drawn in all layers at once, as
:class:`Acting` does for the online learners, many actions share one reward.
"""

import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch

from capture.model.flops import model_flops
from capture.model.forward import (
    Head,
    PaddedBatch,
    Runner,
    next_in_prompt,
    pad_batch,
    plan_batches,
    probe_tokens,
)
from capture.model.inputs import input_device, plain_forward
from capture.model.sites import text_config
from capture.store.records import Place
from capture.swap.routers import swap
from capture.swap.rules import Choice, RouterInputs, Rule
from explorer.errors import RouterError
from explorer.routers.learning.actions import Actions, state_and_best
from explorer.routers.learning.training import TrainingSession
from explorer.routers.live_rule import Convention, LiveRule, completed
from explorer.routers.native import TopKRouter

BATCH_TOKENS = 2048
TIMED_PASSES = 7
OTHER_WEIGHT, NATIVE_WEIGHT, EMPTY_WEIGHT = 8.0, 2.0, 1.0

CostKind = Literal["experts", "flops", "ms"]
Pick = Callable[[Place, torch.Tensor, torch.Tensor], torch.Tensor]


@dataclass(frozen=True, eq=False)
class Log:
    """What one layer's exploration found, for ``N`` tokens in ``P`` passes.

    Attributes
    ----------
    states : Tensor [N, D + 4], float32
        As :func:`explorer.routers.learning.actions.state_of` gives them; the same in every pass.
    allowed : Tensor [N, A], bool
    actions : Tensor [P, N], int64
    propensity : Tensor [P, N], float32
        With which probability the action was drawn.
    change : Tensor [P, N], float32, nats
        Loss of the token's next token, minus what it is when the model does what it does.
    """

    states: torch.Tensor
    allowed: torch.Tensor
    actions: torch.Tensor
    propensity: torch.Tensor
    change: torch.Tensor


class NoExperts:
    """A rule that runs no expert."""

    def route(self, inputs: RouterInputs, /) -> Choice:
        """Return one empty slot for each token."""
        weights = inputs.tensor("hidden").new_zeros(inputs.n_tokens, 1)
        return Choice(torch.full_like(weights, -1, dtype=torch.long), weights)


class Acting:
    """A rule that takes an action at some sites, and the model's own elsewhere.

    Parameters
    ----------
    actions : mapping of (layer, site) to Actions
    pick : callable
        Takes site, states [T, F] and allowed actions [T, A], and returns actions [T].
    only : collection of (layer, site), optional
        Sites that act; all of them are seen.

    Attributes
    ----------
    seen : dict of (layer, site) to (states, allowed, taken)
        Of the latest pass; ``taken`` [T] is the model's own action where the site did not act.
    """

    def __init__(self, actions: Mapping[Place, Actions], pick: Pick) -> None:
        self.actions = actions
        self.pick = pick
        self.only: Sequence[Place] | None = None
        self.seen: dict[Place, tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = {}
        self._conventions: dict[Place, Convention] = {}

    def route(self, inputs: RouterInputs, /) -> Any:
        """Act on the tokens of one layer in one pass."""
        place = (inputs.layer, inputs.site)
        known = self._known(place, inputs)
        own = self.actions[place]
        states, scores, best = state_and_best(known, own, "full")
        allowed = own.allowed(best)
        if self.only is not None and place not in self.only:
            self.seen[place] = states, allowed, torch.full((len(states),), own.native)
            return inputs.native
        taken = self.pick(place, states, allowed)
        self.seen[place] = states, allowed, taken
        return own.routing(scores, best, taken, known)

    def _known(self, place: Place, inputs: RouterInputs) -> RouterInputs:
        known = completed(inputs, self._conventions.get(place))
        # found once, in a pass with many tokens
        self._conventions.setdefault(place, Convention(known.renormalize, known.scaling))
        return known


class TextPasses:
    """Forward passes over the session's texts, with losses token by token.

    Parameters
    ----------
    session : TrainingSession
    n_tokens : int or None
        About so many tokens of the session's texts, drawn by its seed; None = all.
    batch_tokens : int

    Attributes
    ----------
    batches : list of arrays
        Numbers of each batch's sequences, in random order.
    """

    def __init__(
        self,
        session: TrainingSession,
        *,
        n_tokens: int | None,
        batch_tokens: int = BATCH_TOKENS,
    ) -> None:
        generator = np.random.default_rng(session.seed)
        self.session = session
        self.ids = [np.asarray(sequence, dtype=np.int32) for sequence in session.sequences]
        longest = np.array([len(one) for one in self.ids])
        order = generator.permutation(np.flatnonzero(longest >= 2))
        if not len(order):
            raise RouterError("Texts of at least two tokens were expected, so that one has a next.")
        if n_tokens is not None:
            total = np.cumsum(longest[order])
            order = order[: int(np.searchsorted(total, n_tokens)) + 1]
        lengths = longest[order].tolist()
        planned = plan_batches(lengths, batch_tokens)
        self.batches = [np.sort(order[planned[at]]) for at in generator.permutation(len(planned))]
        self._pad = int(getattr(text_config(session.model), "pad_token_id", None) or 0)
        self._runner: Runner | None = None

    @contextmanager
    def open(self, rule: Rule) -> Iterator["TextPasses"]:
        """Put a rule into the model until the block is left."""
        model = self.session.model
        with torch.no_grad(), Head(model).open(probe_tokens(model)[:1]) as head:
            self._runner = Runner(model, head)
            with swap(model, self.session.sites, rule, checked=False):
                yield self
            self._runner = None

    def losses(self, numbers: npt.NDArray[np.int64]) -> torch.Tensor:
        """Run a batch and return the loss of its tokens [M] that have a next one, nats."""
        if self._runner is None:
            raise RouterError("Losses are known while the passes are open: with passes.open(rule).")
        return self._runner.prompts(self._padded(numbers)).loss

    def model_loss(self, numbers: npt.NDArray[np.int64]) -> torch.Tensor:
        """Run a batch on the model as it is and return its mean loss, with its gradient, nats."""
        batch = self._padded(numbers)
        device = input_device(self.session.model)
        ids = torch.from_numpy(batch.input_ids).to(device)
        mask = torch.from_numpy(batch.mask).to(device) if batch.is_padded else None
        with plain_forward(self.session.model):
            output = self.session.model(input_ids=ids, attention_mask=mask, use_cache=False)
        rows = torch.from_numpy(batch.rows[next_in_prompt(batch)]).to(device)
        logits = output.logits.flatten(0, 1)[rows.to(output.logits.device)].float()
        targets = ids.flatten()[rows + 1].to(logits.device)
        return torch.nn.functional.cross_entropy(logits, targets)

    def kept(self, numbers: npt.NDArray[np.int64]) -> torch.Tensor:
        """Return which of a batch's real tokens [T] have a next one."""
        return torch.from_numpy(next_in_prompt(self._padded(numbers)))

    def _padded(self, numbers: npt.NDArray[np.int64]) -> PaddedBatch:
        return pad_batch(numbers, self.ids, side="right", pad_id=self._pad)


def explore(
    session: TrainingSession,
    actions: Mapping[Place, Actions],
    *,
    n_tokens: int,
    passes: int,
    seed: int,
) -> dict[Place, Log]:
    """Randomise one layer's actions at a time and log states, actions, propensities and changes.

    Parameters
    ----------
    session : TrainingSession
    actions : mapping of (layer, site) to Actions
    n_tokens : int
        About so many tokens of the fit split.
    passes : int
        Random actions of each token and layer, see :func:`exploration_weights`. The random
        numbers of a token's passes are spread evenly, so that its actions differ.
    seed : int
        Of the random actions.

    Notes
    -----
    ``(1 + layers * passes) * n_tokens`` tokens run through the model.
    """
    generator = torch.Generator().manual_seed(seed)
    weights = {place: exploration_weights(each) for place, each in actions.items()}
    drawn: dict[str, torch.Tensor] = {}

    def pick(place: Place, states: torch.Tensor, allowed: torch.Tensor) -> torch.Tensor:
        taken, drawn["propensity"] = drawn_action(weights[place], allowed, drawn["uniform"])
        return taken

    rule = Acting(actions, pick)
    runs = TextPasses(session, n_tokens=n_tokens)
    logs: dict[Place, list[list[torch.Tensor]]] = {place: [] for place in actions}
    with runs.open(rule):
        for done, numbers in enumerate(runs.batches):
            rule.only = ()
            keep = runs.kept(numbers)
            native = runs.losses(numbers)
            seen = dict(rule.seen)
            for at, place in enumerate(actions):
                session.report(
                    (done + at / len(actions)) / len(runs.batches), "exploring one layer at a time"
                )
                rule.only = (place,)
                first = torch.rand(len(keep), generator=generator)
                found = []
                for number in range(passes):
                    drawn["uniform"] = (first + number / passes) % 1.0
                    change = runs.losses(numbers) - native
                    taken = _kept(rule.seen[place][2], keep)
                    found.append((taken, _kept(drawn["propensity"], keep), change))
                states, allowed, _ = (_kept(each, keep) for each in seen[place])
                by_pass = [torch.stack(each) for each in zip(*found, strict=True)]
                logs[place].append([states, allowed, *by_pass])
    return {place: _log(parts) for place, parts in logs.items()}


def _kept(values: torch.Tensor, keep: torch.Tensor) -> torch.Tensor:
    return values[keep.to(values.device)]


def exploration_weights(actions: Actions) -> torch.Tensor:
    """Return how often each action is explored, [A], as weights that sum to 1.

    Eight to two to one: what the model does is known to change nothing but by the other tokens'
    actions, and a token that runs no expert spoils what the tokens after it see, and so all
    rewards of the pass.
    """
    weights = torch.full((len(actions.used),), OTHER_WEIGHT)
    weights[actions.native] = NATIVE_WEIGHT
    weights[actions.n_experts == 0] = EMPTY_WEIGHT
    return weights / weights.sum()


def drawn_action(
    weights: torch.Tensor, allowed: torch.Tensor, uniform: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return actions [T] drawn by their weights from the allowed ones, and their probabilities.

    Parameters
    ----------
    weights : Tensor [A]
    allowed : Tensor [T, A], bool
    uniform : Tensor [T]
        Random numbers in [0, 1).
    """
    shares = weights.to(allowed.device) * allowed
    shares = shares / shares.sum(dim=-1, keepdim=True)
    # an action is passed by when its whole share lies below the number; rounding may leave the
    # last cumulative share below 1
    taken = (uniform.to(allowed.device).unsqueeze(-1) >= shares.cumsum(dim=-1)).sum(dim=-1)
    last = torch.where(allowed, torch.arange(allowed.shape[-1], device=allowed.device), 0)
    taken = torch.minimum(taken, last.amax(dim=-1))
    return taken, shares.gather(-1, taken.unsqueeze(-1)).squeeze(-1)


def _log(parts: Sequence[Sequence[torch.Tensor]]) -> Log:
    """Join the batches' states, allowed actions, and what was drawn in each pass."""
    states, allowed = (torch.cat([part[at] for part in parts]) for at in (0, 1))
    drawn = (torch.cat([part[at] for part in parts], dim=1) for at in (2, 3, 4))
    return Log(states, allowed, *drawn)


def action_costs(
    session: TrainingSession, actions: Mapping[Place, Actions], kind: CostKind
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
    session: TrainingSession, actions: Mapping[Place, Actions], *, batch_tokens: int = 2048
) -> dict[Place, list[float]]:
    """Return the milliseconds that a site's experts take with 0, 1, 2, ... experts a token."""
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
                session.model(input_ids=ids.to(input_device(session.model)), use_cache=False)
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


def _rectangle(sequences: Sequence[Any], n_tokens: int) -> torch.Tensor:
    """Return about ``n_tokens`` token ids [B, S] without padding."""
    flat = torch.cat([torch.as_tensor(each, dtype=torch.int64) for each in sequences])[:n_tokens]
    width = min(128, len(flat))
    return flat[: len(flat) // width * width].view(-1, width)
