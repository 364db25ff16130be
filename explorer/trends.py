"""Several runs of one model: how its routing changed over checkpoints."""

import re
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd

from explorer.balance import balance_table
from explorer.errors import RunError
from explorer.metrics import agreement
from explorer.metrics.specialization import information
from explorer.queries.load import expert_load
from explorer.queries.overview import token_count
from explorer.queries.specialization import loads_by_domain
from explorer.queries.two_runs import chosen, common_prompts, common_tokens
from explorer.run import Run

# tokens of two runs whose experts are compared one by one
MAX_TOKENS = 5_000
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
        Of a training in several stages, each of which counts its steps anew: ``stage2_step_240``.
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
        One row per checkpoint and site: ``name, stage, step`` (NA = none), ``layer, site, tokens``;
        ``saturation`` = share of the last checkpoint's experts that the checkpoint chose for the
        same tokens, with ``chance`` = top_k / E; ``max_violation``, ``normalized_entropy`` (of the
        load); ``domain_information`` = mutual information of domain and expert, nats; NaN where it
        cannot be measured.

    References
    ----------
    Muennighoff et al. 2024, arXiv:2409.02060, section 5.1 (router saturation).
    """
    last = checkpoints[-1].run
    rows = []
    for one in checkpoints:
        n_tokens = token_count(one.run, domain=domain, phase=phase)
        balance = balance_table(expert_load(one.run, domain=domain, phase=phase), n_tokens=n_tokens)
        kept = _saturation(one.run, last, domain)
        about = _domain_information(one.run, domain, phase)
        for site, row in zip(one.run.sites, balance.itertuples(), strict=True):
            rows.append(
                {
                    "name": one.name,
                    "stage": one.stage,
                    "step": one.step,
                    "layer": site.layer,
                    "site": site.site,
                    "tokens": n_tokens,
                    "saturation": kept.get((site.layer, site.site), float("nan")),
                    "chance": site.top_k / site.n_experts,
                    "max_violation": row.max_violation,
                    "normalized_entropy": row.normalized_entropy,
                    "domain_information": about.get((site.layer, site.site), float("nan")),
                }
            )
    return pd.DataFrame(rows).astype({"step": "Int64"})


def _saturation(run: Run, last: Run, domain: str | None) -> dict[tuple[int, int], float]:
    if not (run.records_ids and last.records_ids):
        return {}
    prompts = common_prompts(run, last)
    if domain is not None:
        prompts = prompts[prompts["domain"].fillna("") == domain]
    both = common_tokens(run, last, prompts, max_tokens=MAX_TOKENS)
    found = {}
    for site in run.sites if len(both) else []:
        a = chosen(run, both["token_a"], site.layer, site=site.site)
        b = chosen(last, both["token_b"], site.layer, site=site.site)
        overlap = agreement.overlap_at_k(b.expert_ids, a.expert_ids)
        found[site.layer, site.site] = float(np.nanmean(overlap))
    return found


def _domain_information(
    run: Run, domain: str | None, phase: str | None
) -> dict[tuple[int, int], float]:
    if domain is not None or len(run.domains) < 2:
        return {}
    load = loads_by_domain(run, phase=phase)
    names = sorted(set(load["domain"]))
    found = {}
    for site in run.sites:
        here = load[(load["layer"] == site.layer) & (load["site"] == site.site)]
        counts = np.zeros((len(names), site.n_experts))
        rows = np.searchsorted(names, here["domain"].to_numpy(dtype=str))
        counts[rows, here["expert_id"].to_numpy(dtype=np.int64)] = here["assignments"]
        found[site.layer, site.site] = information(counts)
    return found
