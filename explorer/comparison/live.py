"""Run the model with any rule in place on the report texts, and watch what it chooses."""

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from capture.model import inputs
from capture.model.flops import counted_flops, model_flops
from capture.model.inputs import plain_forward
from capture.model.load import LoadedModel
from capture.model.sites import Site
from capture.store.records import Place
from capture.swap.losses import SequenceLosses
from capture.swap.measure import Kept, Latency, latency, summed, token_losses
from capture.swap.part_gates import gate_parts
from capture.swap.routers import SiteCount, swap
from capture.swap.rules import Choice, NativeRule, RouterInputs, Rule, reads_of
from explorer.comparison.cost import TokenCost, Usage, cost_of, memory_reads
from explorer.comparison.fit import FitData, Fitted, LivePart
from explorer.comparison.text_split import FitAndReport, TokenTexts, shared_texts
from explorer.errors import ComparisonCancelled
from explorer.metrics.agreement import MEASURES, agreement
from explorer.routers import Router, TrainingSession
from explorer.routers.live_rule import Convention, LiveRule
from explorer.routers.native import NativeRouter

Floats = npt.NDArray[np.float64]


@dataclass
class WatchedChoice:
    """What one site chose in one forward pass, heaviest expert first.

    Attributes
    ----------
    expert_ids : array [T, K], int16
        -1 in empty slots.
    weights : array [T, K], float32
    sequences, positions : array [T]
        Number of the sequence, and the token's place in it.
    """

    expert_ids: npt.NDArray[np.int16]
    weights: npt.NDArray[np.float32]
    sequences: npt.NDArray[np.int64]
    positions: npt.NDArray[np.int64]


@dataclass
class SiteSums:
    """Sums over the tokens of each of ``N`` sequences at one site.

    Attributes
    ----------
    tokens : array [N]
    experts : array [N]
        Assignments.
    measures : dict of str to array [N]
        By the names in ``MEASURES``, and ``entropy``, of the tokens that have it.
    defined : dict of str to array [N]
        How many tokens those are: a token without an expert has no
        weights to overlap, one without scores no entropy.
    counts : array [K + 1], int64
        Tokens with 0, 1, 2, ... experts.
    """

    tokens: Floats
    experts: Floats
    measures: dict[str, Floats]
    counts: npt.NDArray[np.int64] = field(default_factory=lambda: np.zeros(1, np.int64))
    defined: dict[str, Floats] = field(default_factory=dict)

    def mean(self, name: str, here: Any = slice(None)) -> float:
        """Return a measure's mean over the tokens that have it, nan where none has.

        Parameters
        ----------
        name : str
        here : array of bool [N], optional
            Sequences that count.
        """
        if name not in self.measures:
            return float("nan")
        tokens = float(self.defined[name][here].sum())
        return float(self.measures[name][here].sum()) / tokens if tokens else float("nan")


class Watcher:
    """Follows the choices of a swap: give ``before_batch`` and ``on_choice`` to the run.

    Parameters
    ----------
    n_sequences : int
    native : mapping of (layer, site) to list of WatchedChoice, optional
        The unchanged model's choices in the same batches, to agree with.
    keep : collection of int
        Sequences whose choices are kept; None = all.
    spanning : bool
        Also note which tokens lie between the clusters of a rule that has clusters.
    """

    def __init__(
        self,
        n_sequences: int,
        native: Mapping[Place, Sequence[WatchedChoice]] | None = None,
        *,
        keep: Sequence[int] | None = None,
        spanning: bool = False,
    ) -> None:
        self.n_sequences = n_sequences
        self.native = native
        self.keep = None if keep is None else np.array(sorted(keep), dtype=np.int64)
        self.sums: dict[Place, SiteSums] = {}
        self.chosen: dict[Place, list[WatchedChoice]] = {}
        self.spies: dict[Place, Spy] = {}
        self.between: dict[Place, dict[int, npt.NDArray[np.bool_]]] = {}
        # of every pass the experts of all tokens, their texts and positions
        self.reads: dict[Place, list[tuple[npt.NDArray[Any], ...]]] = {}
        self._spanning = spanning
        self._batch: npt.NDArray[np.int64] = np.zeros(0, dtype=np.int64)
        self._passes: dict[Place, int] = {}

    def before_batch(self, numbers: npt.NDArray[np.int64]) -> None:
        """Take note of which sequences come next."""
        self._batch = numbers

    def spy(self, key: Place, rule: Rule) -> "Spy":
        """Return the rule, so that its scores can be read too."""
        self.spies[key] = Spy(rule, spanning=self._spanning)
        return self.spies[key]

    def on_choice(self, inputs: RouterInputs, choice: Choice) -> None:
        """Count what one site chose."""
        key = (inputs.layer, inputs.site)
        found = _sorted(choice, self._batch[inputs.tensor("sequences").cpu().numpy()], inputs)
        number = self._passes.get(key, 0)
        self._passes[key] = number + 1
        sums = self.sums.setdefault(key, self._empty())
        self._add(sums, found, None if self.native is None else self.native[key][number])
        if key in self.spies and self.spies[key].entropy is not None:
            self._sum(sums, "entropy", found.sequences, self.spies[key].entropy)
        if key in self.spies and self.spies[key].between is not None:
            self._note_between(key, found, self.spies[key].between)
        self.chosen.setdefault(key, []).append(self._kept(found))
        self.reads.setdefault(key, []).append((found.expert_ids, found.sequences, found.positions))

    def memory_reads(self, key: Place, n_experts: int) -> dict[str, float]:
        """Return what the choices of one site ask of memory."""
        chosen, texts, positions = zip(*self.reads[key], strict=True)
        width = max(ids.shape[1] for ids in chosen)  # passes of a rule with a variable k differ
        ids = np.concatenate(
            [np.pad(i, ((0, 0), (0, width - i.shape[1])), constant_values=-1) for i in chosen]
        )
        of = np.concatenate(texts)
        order = np.lexsort((np.concatenate(positions), of))
        return memory_reads(ids[order], of[order], n_experts)

    def _note_between(self, key: Place, found: WatchedChoice, between: Any) -> None:
        """Keep the flags of each sequence, in the order of its tokens."""
        for number in np.unique(found.sequences).tolist():
            rows = np.flatnonzero(found.sequences == number)
            rows = rows[found.positions[rows].argsort(kind="stable")]
            self.between.setdefault(key, {})[number] = between[rows]

    def _empty(self) -> SiteSums:
        zeros = np.zeros(self.n_sequences)
        return SiteSums(zeros, zeros.copy(), {})

    def _sum(self, sums: SiteSums, name: str, sequences: Any, values: Any) -> None:
        known = ~np.isnan(values)
        for sums_of, weights in ((sums.measures, values[known]), (sums.defined, None)):
            total = sums_of.setdefault(name, np.zeros(self.n_sequences))
            total += np.bincount(sequences[known], weights, minlength=self.n_sequences)

    def _add(self, sums: SiteSums, found: WatchedChoice, native: WatchedChoice | None) -> None:
        filled = (found.expert_ids >= 0).sum(axis=1)
        sums.tokens += np.bincount(found.sequences, minlength=self.n_sequences)
        sums.experts += np.bincount(found.sequences, filled, minlength=self.n_sequences)
        counts = np.bincount(filled)
        longer = max(len(counts), len(sums.counts))
        sums.counts = np.pad(sums.counts, (0, longer - len(sums.counts))) + np.pad(
            counts, (0, longer - len(counts))
        )
        if native is None:
            return
        values = agreement(native.expert_ids, native.weights, found.expert_ids, found.weights)
        for name in MEASURES:
            self._sum(sums, name, found.sequences, values[name])

    def _kept(self, found: WatchedChoice) -> WatchedChoice:
        if self.keep is None:
            return found
        rows = np.isin(found.sequences, self.keep)
        return WatchedChoice(
            found.expert_ids[rows],
            found.weights[rows],
            found.sequences[rows],
            found.positions[rows],
        )


class Spy:
    """Passes a rule's answer on and looks at its scores.

    Attributes
    ----------
    entropy : array [T] or None, nats
        Of the scores of the last pass, as shares of their sum.
    between : array [T] or None, bool
        Tokens of the last pass that lie between clusters, where that is asked.
    """

    def __init__(self, rule: Rule, *, spanning: bool = False) -> None:
        self.rule = rule
        self.entropy: Floats | None = None
        self.between: npt.NDArray[np.bool_] | None = None
        self._spanning = getattr(rule, "spanning", None) if spanning else None
        self.gates: list[torch.Tensor] = []

    @property
    def reads(self) -> frozenset[str]:
        """What the rule reads of the model's own router."""
        return reads_of(self.rule)

    def route(self, inputs: RouterInputs, /) -> Any:
        """Answer as the rule does."""
        answer = self.rule.route(inputs)
        scores = getattr(answer, "scores", None)
        self.entropy = None if scores is None else entropy_of(scores)
        found = None if self._spanning is None else self._spanning(inputs)
        self.between = None if found is None else found.cpu().numpy()
        if getattr(answer, "gate", None) is not None:
            self.gates.append(answer.gate.detach().float().cpu())
        return answer


def mean_of_known(values: Sequence[float | None]) -> float:
    """Return the mean of what is known, nan of nothing: a layer without a choice has no balance."""
    known = [value for value in values if value is not None and value == value]
    return float(np.mean(known)) if known else float("nan")


def entropy_of(scores: torch.Tensor) -> Floats:
    """Return the entropy of scores [T, E] as shares of their sum, nats; nan without any score."""
    return np.asarray(entropy_of_shares(shares_of(scores)).cpu().numpy(), dtype=np.float64)


def shares_of(scores: torch.Tensor) -> torch.Tensor:
    """Return scores [T, E] as shares of their sum, none below 0; nan for tokens without any."""
    positive = scores.detach().float().clamp_min(0)
    total = positive.sum(-1, keepdim=True)
    return positive / total.where(total > 0, torch.nan)


def entropy_of_shares(shares: torch.Tensor) -> torch.Tensor:
    """Return the entropy of shares [T, E], [T], nats."""
    entropy: torch.Tensor = torch.special.entr(shares).sum(-1)
    return entropy


def _sorted(
    choice: Choice, sequences: npt.NDArray[np.int64], inputs: RouterInputs
) -> WatchedChoice:
    """Return a choice heaviest expert first, empty slots last."""
    ids = choice.expert_ids
    weights = choice.weights.detach().float()
    order = weights.masked_fill(ids < 0, -torch.inf).argsort(dim=-1, descending=True, stable=True)
    return WatchedChoice(
        ids.gather(-1, order).to(torch.int16).cpu().numpy(),
        weights.gather(-1, order).cpu().numpy(),
        sequences,
        inputs.tensor("positions").cpu().numpy(),
    )


TIMED_TOKENS = 256  # of the batch for timings, in rows of at most half of it


@dataclass
class Outcome:
    """One run over the report texts.

    Attributes
    ----------
    losses : list of array [S - 1], nats
        Of each text's tokens from the second on.
    sums : dict of (layer, site) to SiteSums
        Of the sites that were swapped; empty where parts were gated.
    chosen : dict of (layer, site) to list of WatchedChoice
        What the swapped sites chose for the shared texts, for all texts in the native run.
    load : dict of (layer, site) to array [E]
        Assignments of real tokens, at all sites.
    reached : dict of (layer, site) to int
        Tokens that came to the site: fewer than there are where some skip it.
    experts, distinct : dict of (layer, site) to float
        Experts with weights that ran, a token of the texts; different ones that ran, a pass.
    shares : dict of layer to float, 0..1
        Share of the gated part that ran.
    gates : dict of layer to Tensor [T, P]
        Of a router that has gates, as they were applied.
    seconds : float
    reads : dict of (layer, site) to dict of str to float
        What choices ask of memory, see ``cost.memory_reads``; empty where parts were gated.
    between : dict of (layer, site) to list of array [S], bool
        Tokens of each text that lie between clusters, where one site alone was swapped for a
        router that has clusters.
    """

    losses: list[npt.NDArray[np.float32]]
    sums: dict[Place, SiteSums]
    chosen: dict[Place, list[WatchedChoice]]
    load: dict[Place, npt.NDArray[np.int64]]
    reached: dict[Place, int]
    experts: dict[Place, float]
    distinct: dict[Place, float]
    shares: dict[int, float]
    gates: dict[int, torch.Tensor]
    seconds: float
    reads: dict[Place, dict[str, float]] = field(default_factory=dict)
    between: dict[Place, list[npt.NDArray[np.bool_]]] = field(default_factory=dict)

    @cached_property
    def per_sequence(self) -> SequenceLosses:
        """Sums over each text."""
        return summed(self.losses)


class LiveModel:
    """A model with its texts, its routers' fits, and the unchanged model's own run.

    Parameters
    ----------
    loaded : LoadedModel
    sites : sequence of Site
        All MoE sites of the model.
    split : FitAndReport
    skip : {"block", "layer"}
        What a rule about layers skips.
    seed : int
    cancelled : callable
        Asked between forward passes, and while routers learn on the model's loss.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        sites: Sequence[Site],
        split: FitAndReport,
        *,
        skip: Any = "block",
        seed: int = 0,
        cancelled: Callable[[], bool] = lambda: False,
    ) -> None:
        self.cancelled = cancelled
        self.model = loaded.model
        self.sites = list(sites)
        self.report: TokenTexts = split.report
        session = None
        if split.fit.sequences:
            session = TrainingSession(
                model=loaded.model,
                sites=sites,
                sequences=split.fit.sequences,
                seed=seed,
                cancelled=cancelled,
            )
        self.data = FitData(loaded.model, sites, split.fit, skip=skip, session=session)
        self.flops = model_flops(loaded.model, sites)
        self.shared = shared_texts(self.report.domains)
        lengths = np.array([len(one) for one in self.report.sequences], dtype=np.float64)
        self.keys = float((lengths**2).sum() / lengths.sum())

    @cached_property
    def native(self) -> Outcome:
        """The unchanged model, through the same swap, so that losses differ by rules only."""
        return self._run(dict.fromkeys(self.data.places, NativeRule()), None, None, everything=True)

    def run(self, fitted: Fitted, *, only: Sequence[Place] | None = None) -> Outcome:
        """Run the model with a router in place, everywhere or at ``only`` some sites."""
        if fitted.part == "expert":
            across = fitted.router.info.across_layers and only is not None
            return self._run(self.rules(fitted), only, self.rules(fitted) if across else None,
                             attention=bool(fitted.attention))  # fmt: skip
        return self._gated(fitted, None if only is None else [layer for layer, _ in only])

    def losses(
        self, rules: Mapping[Place, Rule], *, only: Sequence[Place]
    ) -> list[npt.NDArray[np.float32]]:
        """Run the model with rules at some sites and return the loss of every scored token."""
        kept = Kept(lambda: swap(self.model, self.sites, rules, only=only))
        return self._losses(kept, lambda numbers: None)

    @cached_property
    def conventions(self) -> dict[Place, Convention]:
        """How the model weighs its experts at each site, seen on a few texts."""
        texts = self.data.texts if self.data.texts.sequences else self.report
        return FitData(
            self.model, self.sites, texts.take(range(len(texts.sequences))[:8])
        ).conventions()

    def rules(self, fitted: Fitted) -> dict[Place, Rule]:
        """Return a router's rules for all sites."""
        return {
            place: NativeRule()
            if isinstance(router, NativeRouter)
            else LiveRule(router, self.conventions[place])
            for place, router in fitted.routers.items()
        }

    def _run(
        self,
        rules: Mapping[Place, Rule],
        only: Sequence[Place] | None,
        watch: Mapping[Place, Rule] | None,
        *,
        everything: bool = False,
        attention: bool = False,
    ) -> Outcome:
        begun = time.perf_counter()
        native = None if everything else self.native.chosen
        keep = None if everything else self.shared
        n_texts = len(self.report.sequences)
        watcher = Watcher(n_texts, native, keep=keep, spanning=only is not None)
        spied = {key: watcher.spy(key, rule) for key, rule in rules.items()}
        if everything:
            spied = {}
        kept = Kept(
            lambda: swap(
                self.model,
                self.sites,
                spied or rules,
                only=only,
                watch=watch,
                on_choice=watcher.on_choice,
                attention=attention,
            )
        )
        losses = self._losses(kept, watcher.before_batch)
        counts = kept.values[0].counts
        return Outcome(
            losses=losses,
            sums=watcher.sums,
            chosen=watcher.chosen,
            **_executed(counts, self.report.n_tokens, kept.values[0].passes),
            shares={},
            gates={k[0]: torch.cat(spy.gates) for k, spy in watcher.spies.items() if spy.gates},
            seconds=time.perf_counter() - begun,
            reads={key: watcher.memory_reads(key, len(counts[key].load)) for key in watcher.reads},
            between={
                key: [flags[number] for number in range(n_texts)]
                for key, flags in watcher.between.items()
            },
        )

    def _losses(
        self, context: Kept[Any], before: Callable[[Any], None]
    ) -> list[npt.NDArray[np.float32]]:
        """Run the report texts in a context, unless the caller wants to stop."""

        def before_batch(numbers: npt.NDArray[np.int64]) -> None:
            if self.cancelled():
                raise ComparisonCancelled("Stopped between two forward passes.")
            before(numbers)

        return token_losses(
            self.model, self.report.sequences, swapped=context, before_batch=before_batch
        )

    def _gated(self, fitted: Fitted, only: Sequence[int] | None) -> Outcome:
        begun = time.perf_counter()
        spies = {layer: Spy(LiveRule(router)) for (layer, _), router in fitted.routers.items()}
        kept = Kept(lambda: self._gates(fitted, spies, only))
        losses = self._losses(kept, lambda numbers: None)
        gated = kept.values[0]
        shares = {layer: count.share for layer, count in gated.counts.items()}
        return Outcome(
            losses=losses,
            sums={},
            chosen={},
            **_executed(gated.sites, self.report.n_tokens, gated.passes),
            shares=shares,
            gates={n: torch.cat(spies[n].gates) for n in shares if spies[n].gates},
            seconds=time.perf_counter() - begun,
        )

    def _gates(
        self, fitted: Fitted, rules: Mapping[int, Rule], only: Sequence[int] | None
    ) -> AbstractContextManager[Any]:
        part: LivePart = fitted.part
        assert part != "expert"
        return gate_parts(
            self.model, self.sites, rules, part=part, only=only, attention=fitted.attention
        )

    def cost(
        self, outcome: Outcome, fitted: Fitted | None, only: Sequence[Place] | None = None
    ) -> TokenCost:
        """Return what a token cost in a run; ``fitted`` None = in the unchanged model."""
        tokens = self.report.n_tokens
        usage: dict[str, Any] = {}
        if fitted is not None:
            places = [p for p in fitted.routers if only is None or p in only]
            own = {p: self._operations(fitted.routers[p], p) for p in places}
            if fitted.part != "expert":
                usage["beside"] = {layer: cost for (layer, _), cost in own.items()}
                usage[f"{fitted.part}s"] = outcome.shares
            elif getattr(fitted.router, "part", None) == "expert":
                usage["beside"] = {layer: cost for (layer, _), cost in own.items()}
            else:
                usage["rule"] = own
        used = Usage(
            keys=self.keys,
            experts=outcome.experts,
            load={key: load / tokens for key, load in outcome.load.items()},
            **usage,
        )
        itemsize = next(iter(self.model.parameters())).element_size()
        return cost_of(self.flops, used, itemsize=itemsize)

    def _operations(self, router: Router, place: Place) -> float:
        """Return the operations of deciding for one token at one place."""
        infos = {(s.info.layer, s.info.site): s for s in self.sites}
        info = infos[place].info if place in infos else self.sites[0].info
        width = inputs.width(self.model)
        if isinstance(router, NativeRouter):
            layers = {layer.layer: layer for layer in self.flops.layers}
            return float(layers[place[0]].router[place])
        return router.flops(info.n_experts, width, info.top_k)

    @cached_property
    def timed_ids(self) -> torch.Tensor:
        """A batch without padding, for timings and for counting operations."""
        ids = np.concatenate(self.report.sequences)[:TIMED_TOKENS]
        rows = 2 if len(ids) > 1 else 1
        ids = ids[: len(ids) // rows * rows].reshape(rows, -1).astype(np.int64)
        return torch.from_numpy(ids).to(inputs.input_device(self.model))

    def _context(self, fitted: Fitted, only: Sequence[Place] | None) -> AbstractContextManager[Any]:
        if fitted.part == "expert":
            rules = self.rules(fitted)
            across = fitted.router.info.across_layers and only is not None
            return swap(self.model, self.sites, rules, only=only, watch=rules if across else None,
                        checked=False, attention=bool(fitted.attention))  # fmt: skip
        gates = {place[0]: LiveRule(router) for place, router in fitted.routers.items()}
        return self._gates(fitted, gates, None if only is None else [layer for layer, _ in only])

    def time(
        self,
        fitted: Fitted,
        only: Sequence[Place] | None = None,
        *,
        ids: torch.Tensor | None = None,
        **how: Any,
    ) -> Latency:
        """Time forward passes with and without a router, in turns; see :func:`latency`."""
        ids = self.timed_ids if ids is None else ids
        return latency(self.model, ids, lambda: self._context(fitted, only), **how)

    @cached_property
    def native_count(self) -> int:
        """Operations that torch runs in the unchanged model, on the timed batch."""
        return self._count(nullcontext())

    def count(self, fitted: Fitted, only: Sequence[Place] | None = None) -> float:
        """Return the ratio of operations that torch really runs, with a router and without."""
        return self._count(self._context(fitted, only)) / self.native_count

    def _count(self, context: AbstractContextManager[Any]) -> int:
        # not inference_mode, in which linear layers are not taken apart into products
        with (
            torch.no_grad(),
            plain_forward(self.model),
            context,
            counted_flops(self.model) as counted,
        ):
            self.model(input_ids=self.timed_ids, use_cache=False)
        return counted.total


def _executed(counts: Mapping[Place, SiteCount], tokens: int, passes: int) -> dict[str, Any]:
    """Return what of an outcome is counted where experts run; ``tokens`` and ``passes`` of all."""
    computing = {key: int(c.load[: c.computing].sum()) for key, c in counts.items()}
    return {
        "load": {key: count.load.cpu().numpy() for key, count in counts.items()},
        "reached": {key: count.tokens for key, count in counts.items()},
        "experts": {key: filled / tokens for key, filled in computing.items()},
        "distinct": {key: int(c.calls[: c.computing].sum()) / passes for key, c in counts.items()},
    }
