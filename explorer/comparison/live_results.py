"""From a live run to the rows of a comparison's tables."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from capture.store.records import Place
from capture.swap.losses import SequenceLosses, loss_change
from capture.swap.measure import Latency
from explorer.comparison.causality import Badges
from explorer.comparison.fit import Fitted
from explorer.comparison.live import LiveModel, Outcome, WatchedChoice, mean_of_known
from explorer.comparison.results_file import TableRows
from explorer.comparison.text_split import SHARED_TOKENS
from explorer.metrics.load import balance
from explorer.routers import Router, RouterInfo

GATE_BINS = 20
_MEANS = (
    *("agreement", "jaccard", "exact_set", "top_1", "weighted_overlap", "entropy"),
    *("max_violation", "max_violation_floor", "cv", "gini", "dead_experts", "load_entropy"),
    *("hit_rate", "draft_experts"),
)


class RowSubject(NamedTuple):
    """Whose rows they are.

    Attributes
    ----------
    label : str
    seed : int or None
    fitted : Fitted
    badges : Badges
    control, control_of : str or None
    """

    label: str
    seed: int | None
    fitted: Fitted
    badges: Badges
    control: str | None = None
    control_of: str | None = None

    @property
    def unit(self) -> dict[str, Any]:
        """Router and seed."""
        return {"router": self.label, "seed": self.seed}


def source_of(info: RouterInfo) -> str:
    """Return the paper of a rule, and how the rule differs from it."""
    if not info.paper:
        return ""
    how = f". It differs: {info.differs}" if info.differs else ", as published"
    return info.paper + how


def card(label: str, router: Router, *, control: str | None = None, of: str | None = None) -> Any:
    """Return the row of table ``routers``."""
    info = router.info
    return {
        "router": label,
        "name": info.name,
        "family": info.family,
        "title": info.title,
        "summary": info.summary,
        "formula": info.formula,
        "paper": source_of(info),
        "fits": info.fits,
        "part": getattr(router, "part", "expert"),
        "causal_declared": info.causal,
        "batch_dependent_declared": info.batch_dependent,
        "variable_k": info.variable_k,
        "control": control,
        "control_of": of,
    }


def live_rows(
    rows: TableRows,
    live: LiveModel,
    subject: RowSubject,
    outcome: Outcome,
    *,
    timed: Latency | None = None,
    counted: float | None = None,
) -> None:
    """Add what was measured with all layers swapped."""
    whole = _row(live, subject, outcome, "live", None)
    layers = [_layer_row(whole, key, outcome) for key in sorted(outcome.sums or outcome.load)]
    for name in _MEANS:
        whole[name] = mean_of_known([row.get(name) for row in layers])
    whole |= _measured(timed, counted)
    rows["results"] += [whole, *layers]
    rows["domains"] += _domains(live, subject, outcome)
    rows["sequences"] += _sequences(live, subject, outcome, "live", None)
    rows["gate_values"] += _gate_values(subject, outcome)
    rows["choices"] += choices(live, subject.unit | {"mode": "live"}, outcome)
    rows["token_losses"] += token_losses(live, subject.unit | {"mode": "live"}, outcome)


def layer_rows(
    rows: TableRows,
    live: LiveModel,
    subject: RowSubject,
    outcome: Outcome,
    key: Place,
    *,
    timed: Latency | None = None,
    counted: float | None = None,
) -> None:
    """Add what was measured with one layer swapped."""
    row = _row(live, subject, outcome, "live-layer", key)
    row |= _site(outcome, key) | _measured(timed, counted)
    rows["results"].append(row)
    if key in outcome.between:
        rows["spanning"] += _spanning(live, subject, outcome, key)
    rows["sequences"] += _sequences(live, subject, outcome, "live-layer", key[0])


def _measured(timed: Latency | None, counted: float | None) -> dict[str, Any]:
    """Return times and operations that were measured."""
    if timed is None:
        return {"counted_flops_ratio": counted}
    return {
        "counted_flops_ratio": counted,
        "latency_ms": timed.swapped_ms,
        "latency_ratio": timed.ratio,
        "latency_low": timed.low,
        "latency_high": timed.high,
    }


def _row(
    live: LiveModel, subject: RowSubject, outcome: Outcome, mode: str, key: Place | None
) -> dict[str, Any]:
    fitted = subject.fitted
    pair = live.native.per_sequence, outcome.per_sequence
    change = loss_change(*pair)
    # texts of a domain may be alike; a rule judged on one kind of text is judged on few
    by_domain = loss_change(*(losses.by(live.report.domains) for losses in pair))
    only = None if key is None else [key]
    cost, native = live.cost(outcome, fitted, only), live.cost(live.native, None)
    shares = list(outcome.shares.values())
    parts: dict[str, Any] = {}
    if shares:
        columns = next((g.shape[-1] for g in outcome.gates.values()), 1)
        parts = {"parts_per_token": sum(shares) * columns, "parts_share": mean_of_known(shares)}
    return {
        **subject.unit,
        "mode": mode,
        "family": "control" if subject.control else fitted.router.info.family,
        "layer": None if key is None else key[0],
        "site": None if key is None else key[1],
        "condition": "base",
        "control": subject.control,
        "control_of": subject.control_of,
        "part": fitted.part,
        "loss": outcome.per_sequence.mean,
        "loss_change": change.change,
        "loss_se": change.standard_error,
        "loss_margin": change.margin,
        "loss_se_domain": by_domain.standard_error,
        "perplexity_ratio": change.perplexity_ratio,
        "experts_per_token": float(np.mean(list(outcome.experts.values()))),
        **parts,
        "distinct_experts": float(np.mean(list(outcome.distinct.values()))),
        "flops_per_token": cost.flops,
        "flops_ratio": cost.flops / native.flops,
        "expert_flops_ratio": cost.expert_flops / native.expert_flops,
        "router_flops": cost.router_flops,
        "bytes_ratio": cost.moved / native.moved,
        "energy_ratio": cost.energy / native.energy,
        "causal": subject.badges.causal,
        "batch_dependent": subject.badges.batch_dependent,
        "simulated": fitted.part == "head",
        "fit_tokens": fitted.fit_tokens,
        "tokens": live.report.n_tokens,
        "sequences": len(live.report.sequences),
        "fit_seconds": fitted.seconds,
        "seconds": outcome.seconds,
    }


def _layer_row(whole: dict[str, Any], key: Place, outcome: Outcome) -> dict[str, Any]:
    """Return the row of one layer in a run with all layers swapped; its loss is not its own."""
    same = ("router", "seed", "mode", "family", "condition", "control", "control_of", "part")
    flags = ("causal", "batch_dependent", "simulated", "fit_tokens", "tokens", "sequences")
    shared = {name: whole[name] for name in (*same, *flags)}
    share = {"parts_share": outcome.shares[key[0]]} if key[0] in outcome.shares else {}
    return {**shared, "layer": key[0], "site": key[1], **share, **_site(outcome, key)}


def _site(outcome: Outcome, key: Place) -> dict[str, Any]:
    """Return balance at one site, and agreement where its choices were another rule's."""
    sums = outcome.sums.get(key)
    found = {} if sums is None else {name: sums.mean(name) for name in sums.measures}
    return {
        **found,
        "experts_per_token": outcome.experts[key],
        "distinct_experts": outcome.distinct[key],
        **outcome.reads.get(key, {}),
        **balance(outcome.load[key], outcome.reached[key], n_draws=50),
    }


def _domains(live: LiveModel, subject: RowSubject, outcome: Outcome) -> list[dict[str, Any]]:
    domains = np.array(live.report.domains)
    native, found = live.native.per_sequence, outcome.per_sequence
    rows = []
    for domain in sorted(set(live.report.domains)):
        here = domains == domain
        change = loss_change(
            SequenceLosses(native.sums[here], native.tokens[here]),
            SequenceLosses(found.sums[here], found.tokens[here]),
        )
        tokens = sum(len(s) for s, is_in in zip(live.report.sequences, here, strict=True) if is_in)
        sums = list(outcome.sums.values())
        experts = [s.experts[here].sum() for s in sums]
        rows.append(
            {
                **subject.unit,
                "mode": "live",
                "domain": domain,
                "loss_change": change.change,
                "loss_se": change.standard_error,
                "experts_per_token": float(np.mean(experts)) / tokens if experts else None,
                "agreement": mean_of_known([one.mean("agreement", here) for one in sums]),
                "tokens": tokens,
                "sequences": int(here.sum()),
            }
        )
    return rows


def _sequences(
    live: LiveModel, subject: RowSubject, outcome: Outcome, mode: str, layer: int | None
) -> list[dict[str, Any]]:
    native, found = live.native.per_sequence, outcome.per_sequence
    return [
        {
            **subject.unit,
            "mode": mode,
            "layer": layer,
            "sequence": number,
            "domain": domain,
            "tokens": int(found.tokens[number]),
            "loss": float(found.per_token[number]),
            "loss_change": float(found.per_token[number] - native.per_token[number]),
        }
        for number, domain in enumerate(live.report.domains)
    ]


def _gate_values(subject: RowSubject, outcome: Outcome) -> list[dict[str, Any]]:
    """Count the gates of each layer by their value, in bins of which the last holds 1."""
    rows = []
    for layer, gates in sorted(outcome.gates.items()):
        counts, edges = np.histogram(gates.numpy(), bins=GATE_BINS, range=(0.0, 1.0))
        rows += [
            {**subject.unit, "mode": "live", "layer": layer, "low": low, "high": high, "gates": n}
            for low, high, n in zip(
                edges[:-1].tolist(), edges[1:].tolist(), counts.tolist(), strict=True
            )
        ]
    return rows


def _spanning(
    live: LiveModel, subject: RowSubject, outcome: Outcome, key: Place
) -> list[dict[str, Any]]:
    """Return the loss of the tokens that lie between clusters, and of the others."""
    rows = []
    for between in (True, False):
        # a token's route shows in the loss of the next one
        chosen = [flags[:-1] == between for flags in outcome.between[key]]
        native, found = (_some(losses, chosen) for losses in (live.native.losses, outcome.losses))
        if not len(native.tokens):
            continue
        change = loss_change(native, found)
        rows.append(
            {
                **subject.unit,
                "mode": "live-layer",
                "layer": key[0],
                "site": key[1],
                "spanning": between,
                "loss_change": change.change,
                "loss_se": change.standard_error,
                "tokens": int(native.tokens.sum()),
                "sequences": len(native.tokens),
            }
        )
    return rows


def _some(
    losses: Sequence[npt.NDArray[np.float32]], chosen: Sequence[npt.NDArray[np.bool_]]
) -> SequenceLosses:
    """Sum the chosen tokens' losses over each text that has some."""
    pairs = zip(losses, chosen, strict=True)
    parts = [one[some].astype(np.float64) for one, some in pairs if some.any()]
    return SequenceLosses(
        np.array([part.sum() for part in parts]), np.array([len(part) for part in parts], np.int64)
    )


def text_rows(live: LiveModel) -> list[dict[str, Any]]:
    """Return the tokens of the shared texts."""
    rows = []
    for text_id, number in enumerate(live.shared):
        ids, pieces = live.report.sequences[number], live.report.pieces[number]
        for position, token in enumerate(ids[:SHARED_TOKENS].tolist()):
            rows.append(
                {
                    "text_id": text_id,
                    "mode": "live",
                    "domain": live.report.domains[number],
                    "position": position,
                    "token": token,
                    "text": None if pieces is None else pieces[position],
                }
            )
    return rows


def choices(live: LiveModel, unit: dict[str, Any], outcome: Outcome) -> list[dict[str, Any]]:
    """Return what every site chose for the tokens of the shared texts."""
    text_of = {number: text_id for text_id, number in enumerate(live.shared)}
    rows = []
    for (layer, site), passes in sorted(outcome.chosen.items()):
        for found in passes:
            rows += [
                {**unit, "layer": layer, "site": site, **row} for row in _tokens(found, text_of)
            ]
    return rows


def _tokens(found: WatchedChoice, text_of: dict[int, int]) -> list[dict[str, Any]]:
    wanted = np.isin(found.sequences, list(text_of)) & (found.positions < SHARED_TOKENS)
    rows = []
    for at in np.flatnonzero(wanted).tolist():
        filled = found.expert_ids[at] >= 0
        rows.append(
            {
                "text_id": text_of[int(found.sequences[at])],
                "position": int(found.positions[at]),
                "expert_ids": found.expert_ids[at][filled].tolist(),
                "weights": found.weights[at][filled].tolist(),
            }
        )
    return rows


def token_losses(live: LiveModel, unit: dict[str, Any], outcome: Outcome) -> list[dict[str, Any]]:
    """Return the loss of every token of the shared texts from the second on."""
    return [
        {**unit, "text_id": text_id, "position": position, "loss": loss}
        for text_id, number in enumerate(live.shared)
        for position, loss in enumerate(outcome.losses[number][: SHARED_TOKENS - 1].tolist(), 1)
    ]
