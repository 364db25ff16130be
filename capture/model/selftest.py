"""Check, with one short forward pass, that every site can be tapped and what its scores mean."""

from collections.abc import Iterable, Sequence
from dataclasses import replace

import torch
from torch import nn

from capture.errors import SiteError
from capture.model.forward import takes_positions
from capture.model.hooks import SiteObservation
from capture.model.inputs import input_device, vocabulary
from capture.model.row_test import check_rows, heeds_left_padding, padded, run
from capture.model.scoring import explains_choice, score_function_of
from capture.model.sites import Site, find_sites, text_config
from capture.model.switches import plain_forward

# enough tokens that a rule which does not explain the choice is caught, few enough to be quick
ROWS, LENGTH = 4, 16
SEED = 0
NO_GROUPS = (None, None)


def attach(model: nn.Module) -> list[Site]:
    """Find a model's sites and self-test them: the way to get sites that are safe to record."""
    return self_test(model, find_sites(model))


def self_test(model: nn.Module, sites: Sequence[Site]) -> list[Site]:
    """Run one short forward pass and return the sites with what it measured.

    Checks that every site ran exactly once, that ids and weights are [tokens, K], ids in range
    and distinct per token, weights finite and not negative, and assignments add up; and that the
    rows of a padded batch are those of each prompt alone, see :mod:`capture.model.row_test`.

    Parameters
    ----------
    model : PreTrainedModel
        In evaluation mode; random generators are left as they are.
    sites : sequence of Site
        All sites of the model.

    Returns
    -------
    list of Site
        The same sites; ``info.score_function`` and ``margin_known`` are now measured.

    Raises
    ------
    SiteError
        If a check fails; the message names the site.

    Notes
    -----
    ``score_function`` is the rule that explains the recorded weights by the recorded scores, up
    to one factor per token (weights that sum to 1) or per site (scaling). A softmax over all
    experts that is renormalised over the chosen equals a softmax over the chosen: both are
    called "softmax". Where no rule fits it is "other", and statistics take the softmax.
    """
    ids = probe_tokens(model)
    with torch.inference_mode(), plain_forward(model):
        mask = padded(ids)
        batch = run(model, sites, ids, mask)
        measured = [
            _measured(site, observation, mask.flatten().bool())
            for site, observation in zip(sites, batch.sites, strict=True)
        ]
        check_rows(model, measured, ids, mask, batch)
    return measured


def heeds_padding(model: nn.Module, sites: Sequence[Site]) -> bool:
    """Whether prompts of unequal length can be decoded together, padded on their left.

    Models of one's own may look at no attention mask, or count positions from the padding.
    """
    ids = probe_tokens(model)[:2]
    with torch.inference_mode(), plain_forward(model):
        return heeds_left_padding(model, sites, ids, position_ids=takes_positions(model))


def probe_tokens(model: nn.Module) -> torch.Tensor:
    """Return token ids [4, 16] that a text model accepts, always the same ones."""
    size = vocabulary(model)
    special = set(_special_ids(model))
    plain = torch.tensor([i for i in range(size) if i not in special] or [*range(size)])
    positions = getattr(text_config(model), "max_position_embeddings", None) or LENGTH
    generator = torch.Generator().manual_seed(SEED)
    chosen = torch.randint(len(plain), (ROWS, min(LENGTH, int(positions))), generator=generator)
    return plain[chosen].to(input_device(model))


def _special_ids(model: nn.Module) -> Iterable[int]:
    """Yield ids that stand for something else than text: padding, images, audio."""
    config = getattr(model, "config", None)
    for owner in (config, text_config(model)):
        for name, value in vars(owner).items() if owner is not None else ():
            if name.endswith(("_token_id", "_token_index")):
                values = value if isinstance(value, list | tuple) else [value]
                yield from (v for v in values if isinstance(v, int))


def _measured(site: Site, seen: SiteObservation, is_real: torch.Tensor) -> Site:
    """Return the site with what its rows of real tokens say; padding may be routed anyhow."""
    ids, weights = seen.expert_ids.cpu(), seen.weights.float().cpu()
    real, n_rows = is_real.cpu(), len(is_real)
    if ids.shape != (n_rows, site.info.top_k):
        raise _refused(
            site, f"ids of shape [{n_rows}, {site.info.top_k}] with padding, got {list(ids.shape)}"
        )
    ids, weights = ids[real], weights[real]
    _check_values(site, ids, weights)
    if seen.scores is None:
        return site
    scores = seen.scores.float().cpu()[real]
    if not bool(scores.isfinite().any(dim=-1).all()) or bool(scores.isnan().any()):
        raise SiteError(
            f"{site.info.module}: finite router scores were expected, got nan or an empty row. "
            "Check the model's weights and dtype."
        )
    label = site.parts.score_function or score_function_of(
        scores, ids, weights, half=seen.weights.dtype != torch.float32
    )
    bias, groups = site.selection_bias, (site.n_groups, site.top_groups)
    # a router may carry a bias or groups that its configuration switches off
    for use_bias, use_groups in ((bias, groups), (bias, NO_GROUPS), (None, NO_GROUPS)):
        if explains_choice(
            scores,
            ids,
            label,
            selection_bias=use_bias,
            groups=use_groups,
            half=seen.scores.dtype != torch.float32,
        ):
            bias, groups, known = use_bias, use_groups, True
            break
    else:
        known = False
    return replace(
        site,
        info=site.info._replace(score_function=label),
        selection_bias=bias,
        n_groups=groups[0],
        top_groups=groups[1],
        margin_known=known,
    )


def _check_values(site: Site, ids: torch.Tensor, weights: torch.Tensor) -> None:
    n_experts = site.info.n_experts
    problem = None
    filled = ids >= 0
    if int(ids.max()) >= n_experts or int(ids.min()) < -1:
        problem = f"ids from 0 to {n_experts - 1}, got {int(ids.min())} to {int(ids.max())}"
    elif bool(_repeated(ids).any()):
        problem = "distinct ids in a token, got one expert twice"
    elif not bool(weights.isfinite().all()) or bool((weights < 0).any()):
        problem = f"finite weights >= 0, got {weights.min().item():g} to {weights.max().item():g}"
    elif bool((weights[~filled] != 0).any()):
        problem = "weight 0 in an empty slot"
    elif int(ids[filled].bincount(minlength=n_experts).sum()) + int((~filled).sum()) != ids.numel():
        problem = "assignments that add up to tokens x top_k"
    if problem:
        raise _refused(site, problem)


def _refused(site: Site, problem: str) -> SiteError:
    return SiteError(
        f"{site.info.module}: the self-test expected {problem}. This architecture routes in a way "
        "that is not supported; please report it with the model's name."
    )


def _repeated(ids: torch.Tensor) -> torch.Tensor:
    """Return where a token's ids [T, K] name one expert twice, [T, K - 1]."""
    ordered = ids.sort(dim=-1).values
    return (ordered.diff(dim=-1) == 0) & (ordered[:, 1:] >= 0)
