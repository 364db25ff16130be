"""Several runs of one model: how its routing changed over checkpoints."""

import re
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pandas as pd

from capture.store import SiteInfo
from explorer.errors import RunError
from explorer.metrics import agreement
from explorer.metrics.load import max_violation, normalized_entropy
from explorer.metrics.specialization import information
from explorer.pages.compare_runs.data import (
    ChosenExperts,
    chosen,
    common_prompts,
    common_tokens,
    mean,
)
from explorer.pages.experts.data import loads_by_domain
from explorer.queries.load import expert_load, expert_load_by_step
from explorer.queries.overview import token_count
from explorer.run import Run

# tokens of two runs whose experts are compared one by one
MAX_TOKENS = 3_000
_STEP = re.compile(r"step[-_]?(\d+)")
_STAGE = re.compile(r"stage[-_]?(\d+)")


class Checkpoint(NamedTuple):
    """A run of one checkpoint.

    Attributes
    ----------
    name : str
    step : int or None
        Of the training, as the name says: ``step_01085`` is step 1085.
    stage : int
        Of a training in several stages, each of which counts its steps from 0: ``stage2_step_240``.
    run : Run
    """

    name: str
    step: int | None
    stage: int
    run: Run


def in_order(runs: Sequence[tuple[str, Run]]) -> list[Checkpoint]:
    """Put runs in the order of their training steps; those without one come first.

    Raises
    ------
    RunError
        If the runs are not of one model.
    """
    shapes = {tuple((s.layer, s.site, s.n_experts, s.top_k) for s in run.sites) for _, run in runs}
    if len(shapes) > 1:
        raise RunError(
            "Expected checkpoints of one model, got runs with other layers or experts. "
            "Choose runs of one model."
        )
    found = []
    for name, run in runs:
        step, stage = _STEP.search(name), _STAGE.search(name)
        found.append(
            Checkpoint(name, int(step[1]) if step else None, int(stage[1]) if stage else 1, run)
        )
    return sorted(found, key=lambda one: (one.step is not None, one.stage, one.step or 0, one.name))


def trend_table(
    checkpoints: Sequence[Checkpoint], *, domain: str | None = None, phase: str | None = None
) -> pd.DataFrame:
    """Measure every site of every checkpoint.

    Parameters
    ----------
    checkpoints : sequence of Checkpoint
        From :func:`in_order`.
    domain, phase : str, optional
        Of the tokens that count. Saturation is of prompt tokens, whatever the phase.

    Returns
    -------
    DataFrame
        One row per checkpoint and site: ``name, stage, step`` (NA = none), ``layer, site``;
        ``tokens`` of the checkpoint, and ``shared``, those that it has in common with the last
        one and that were compared (NA = experts per token were not recorded); ``saturation`` =
        share of the last checkpoint's experts that the checkpoint chose for the same tokens, with
        ``chance`` = top_k / E; ``max_violation``, ``normalized_entropy`` (of the load);
        ``domain_information`` = mutual information of domain and expert, nats; NaN where it
        cannot be measured.

    References
    ----------
    Muennighoff et al. 2024, arXiv:2409.02060, section 5.1 (router saturation).
    """
    last = _Experts(checkpoints[-1].run)
    rows = []
    for one in checkpoints:
        n_tokens = token_count(one.run, domain=domain, phase=phase)
        saturation, shared = _saturation(one.run, last, domain)
        load = loads_by_domain(one.run, domain=domain, phase=phase)
        for site in one.run.sites:
            counts = _counts(load, site)
            total = counts.sum(axis=0)
            rows.append(
                {
                    "name": one.name,
                    "stage": one.stage,
                    "step": one.step,
                    "layer": site.layer,
                    "site": site.site,
                    "tokens": n_tokens,
                    "shared": shared,
                    "saturation": saturation.get((site.layer, site.site), float("nan")),
                    "chance": site.top_k / site.n_experts,
                    "max_violation": max_violation(total),
                    "normalized_entropy": normalized_entropy(total),
                    "domain_information": information(counts) if len(counts) > 1 else float("nan"),
                }
            )
    return pd.DataFrame(rows).astype({"step": "Int64", "shared": "Int64"})


def expert_loads(
    checkpoints: Sequence[Checkpoint],
    layer: int,
    *,
    site: int = 0,
    domain: str | None = None,
    phase: str | None = None,
) -> pd.DataFrame:
    """Return the load of one site's experts at every checkpoint.

    Returns
    -------
    DataFrame
        As ``queries.load.expert_load`` has it, ``checkpoint`` = its name.
    """
    loads = [
        expert_load(one.run, layer=layer, site=site, domain=domain, phase=phase)
        for one in checkpoints
    ]
    names = [one.name for one in checkpoints]
    return pd.concat(loads, keys=names, names=["checkpoint"]).reset_index("checkpoint")


def steps_table(run: Run, *, most: int = 48) -> pd.DataFrame:
    """Measure every site of a run of counts over the steps of its recorder.

    Returns
    -------
    DataFrame
        As :func:`trend_table`, a window of steps in a checkpoint's place, at most so many; what
        needs tokens or domains is missing.
    """
    rows = []
    for site in run.sites:
        load = expert_load_by_step(run, site.layer, site=site.site, most=most)
        for name, part in load.groupby("step", sort=False):
            counts = part["assignments"].to_numpy()
            rows.append(
                {
                    "name": f"step {name}",
                    "stage": 1,
                    "step": int(str(name).split()[0]),
                    "layer": site.layer,
                    "site": site.site,
                    "tokens": round(counts.sum() / site.top_k),
                    "max_violation": max_violation(counts),
                    "normalized_entropy": normalized_entropy(counts),
                }
            )
    return pd.DataFrame(rows).astype({"step": "Int64"})


def _counts(load: pd.DataFrame, site: SiteInfo) -> npt.NDArray[np.float64]:
    """Return the assignments of every domain and routed expert of a site, [D, E]."""
    here = load[(load["layer"] == site.layer) & (load["site"] == site.site)]
    names, row = np.unique(here["domain"].to_numpy(dtype=str), return_inverse=True)
    counts = np.zeros((len(names), site.n_routed))
    column = site.routed_numbers()[here["expert_id"].to_numpy(dtype=np.int64)]
    counts[row, column] = here["assignments"]
    return counts


class _Experts:
    """The experts of a run's tokens, read once for as long as the tokens stay the same."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self._token_ids: npt.NDArray[np.int64] | None = None
        self._chosen: list[ChosenExperts] = []

    def of(self, token_ids: npt.NDArray[np.int64]) -> list[ChosenExperts]:
        if self._token_ids is None or not np.array_equal(token_ids, self._token_ids):
            self._chosen, self._token_ids = chosen(self.run, token_ids, weights=False), token_ids
        return self._chosen


def _saturation(
    run: Run, last: _Experts, domain: str | None
) -> tuple[dict[tuple[int, int], float], int | None]:
    """Return the saturation of every site, and how many tokens were compared for it."""
    if not (run.records_ids and last.run.records_ids):
        return {}, None
    prompts = common_prompts(run, last.run)
    if domain is not None:
        prompts = prompts[prompts["domain"].fillna("") == domain]
    both = common_tokens(run, last.run, prompts, max_tokens=MAX_TOKENS)
    if both.empty:
        return {}, 0
    sides = chosen(run, both["token_a"], weights=False), last.of(both["token_b"].to_numpy())
    found = {
        (site.layer, site.site): mean(agreement.overlap_at_k(end.expert_ids, now.expert_ids))
        for site, now, end in zip(run.sites, *sides, strict=True)
    }
    return found, len(both)
