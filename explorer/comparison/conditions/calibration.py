"""What conditions learn from: the routers' inputs and the experts' outputs on a fit split."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from capture.model.adapters.standard import StandardAdapter
from capture.model.sites import Site
from capture.store.records import Place
from capture.swap.measure import sequence_losses
from capture.swap.routers import site_key, swap
from capture.swap.rules import Choice, NativeRule, RouterInputs
from explorer.comparison.conditions.condition import Sequence_, Subject
from explorer.errors import ConditionError
from explorer.routers.live_rule import joined

ROWS = 16_384  # (token, expert) pairs that are computed at a time


@dataclass(frozen=True, eq=False)
class SeenSite:
    """What one router did on ``T`` tokens of the fit split.

    Attributes
    ----------
    site : Site
    inputs : RouterInputs
        On the CPU, with the model's own decision as ``native``.
    """

    site: Site
    inputs: RouterInputs


def collect(
    subject: Subject, sequences: Sequence[Sequence_], *, tokens: int, seed: int = 0
) -> dict[Place, SeenSite]:
    """Run texts through the model and keep what every router saw for the same sampled tokens.

    Parameters
    ----------
    subject : Subject
    sequences : sequence of array [S], int32
        Whole texts are drawn until there are enough tokens.
    tokens : int
        How many to keep; all where there are fewer.
    seed : int
        Draws the texts.

    Raises
    ------
    ConditionError
        If there is no text of two tokens.
    """
    picked = drawn(sequences, tokens, seed)
    parts: dict[Place, list[RouterInputs]] = {site_key(site): [] for site in subject.sites}

    def keep(inputs: RouterInputs, _: Choice) -> None:
        parts[inputs.layer, inputs.site].append(inputs)

    def native() -> object:
        return swap(subject.model, subject.sites, NativeRule(), on_choice=keep)

    sequence_losses(subject.model, picked, swapped=native)  # type: ignore[arg-type]
    return {
        site_key(site): SeenSite(site, _first(parts[site_key(site)], tokens))
        for site in subject.sites
    }


def drawn(sequences: Sequence[Sequence_], tokens: int, seed: int) -> list[Sequence_]:
    """Draw whole texts until there are enough tokens.

    Raises
    ------
    ConditionError
        If there is no text of two tokens.
    """
    usable = [one for one in sequences if len(one) > 1]
    if not usable:
        raise ConditionError("Texts of at least two tokens were expected in the fit split.")
    order = np.random.default_rng(seed).permutation(len(usable))
    ends = np.cumsum([len(usable[i]) for i in order])
    return [usable[i] for i in order[: int(np.searchsorted(ends, tokens)) + 1]]


def _first(parts: Sequence[RouterInputs], tokens: int) -> RouterInputs:
    """Return the first tokens of the passes of one router, on the CPU."""
    kept = joined(parts).take(slice(tokens)).per_token(torch.Tensor.cpu)
    # a copy, so that the rest of what was seen is freed
    return replace(kept, previous=None).per_token(torch.Tensor.clone)


def expert_outputs(seen: SeenSite, hidden: torch.Tensor) -> torch.Tensor:
    """Run every expert on every token, whatever the router says.

    Parameters
    ----------
    seen : SeenSite
    hidden : Tensor [T, D]

    Returns
    -------
    Tensor [T, E, D], float32
        Before they are weighed.

    Raises
    ------
    ConditionError
        If the family's experts cannot be called one by one.
    """
    site = seen.site
    if type(site.adapter) is not StandardAdapter:
        raise ConditionError(
            f"{site.info.module}: experts that can be called with ids and weights were expected, "
            f"but this family ({site.adapter.name}) does it otherwise. Choose experts by frequency "
            "or at random instead."
        )
    n_experts, weight = site.info.n_experts, next(site.experts.parameters())
    outputs = []
    with torch.inference_mode():
        for rows in torch.split(hidden.to(weight), max(1, ROWS // n_experts)):
            ids = torch.arange(n_experts, device=rows.device).repeat(len(rows))[:, None]
            ones = torch.ones(ids.shape, dtype=rows.dtype, device=rows.device)
            out = site.experts(rows.repeat_interleave(n_experts, dim=0), ids, ones)
            outputs.append(out.reshape(len(rows), n_experts, -1).float().cpu())
    return torch.cat(outputs)
