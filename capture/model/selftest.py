"""Check, with short forward passes, that every site can be tapped and what its scores mean.

Row ``b * S + s`` of a site has to be token ``s`` of prompt ``b``, padded or not.
"""

import warnings
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import nn

from capture.errors import SiteError
from capture.model import attributes as probe
from capture.model.after_sum import calls_kept, with_factor, with_kinds
from capture.model.forward import (
    ROWS,
    cache_of,
    keeps,
    probe_tokens,
    takes_positions,
    with_cache,
)
from capture.model.hooks import SiteObservation, tap
from capture.model.inputs import (
    decoder_inputs,
    has_two_sides,
    plain_forward,
    without_gradients,
)
from capture.model.scoring import (
    are_all_one,
    are_weights,
    n_renumbered,
    rule_of,
    score_function_of,
)
from capture.model.sites import Site, find_sites

# a row differs from the same row alone by rounding, which may flip a near tie now and then;
# another token's row lies as far away as tokens lie from each other
NEAR = 0.5
ENOUGH = 0.75  # of a prompt's rows
NOTHING = 1e-4  # relative to the largest value
STEPS = 2  # decoded
# of a router's input, relative: what rounding makes of it, in 32 bits and fewer
DRIFT, HALF_DRIFT = 1e-3, 5e-2


def attach(model: nn.Module, *, two_sides: bool = False, alone: bool = False) -> list[Site]:
    """Find a model's sites and self-test them: the way to get sites that are safe to record.

    ``two_sides`` says whether the model may be an encoder-decoder, ``alone`` whether its routing
    may depend on the other texts of a batch: then ``Site.alone`` is set.
    """
    return self_test(model, find_sites(model, two_sides=two_sides), alone=alone)


def self_test(model: nn.Module, sites: Sequence[Site], *, alone: bool = False) -> list[Site]:
    """Run one short forward pass and return the sites with what it measured.

    Checks that every site ran exactly once, that ids and weights are [tokens, K], ids in range
    and distinct per token, weights finite and not negative, and assignments add up; and that the
    rows of a padded batch are those of each prompt alone, see :mod:`capture.model.selftest`.

    Parameters
    ----------
    model : PreTrainedModel
        In evaluation mode; random generators are left as they are.
    sites : sequence of Site
        All sites of the model.
    alone : bool
        Whether a model may pass that has to read every text by itself.

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
    with without_gradients(model), plain_forward(model):
        mask = padding_mask(ids)
        with calls_kept(sites) as calls:
            batch = run_sites(model, sites, ids, mask)
        measured = [
            with_factor(
                with_kinds(_measured(site, observation, mask.flatten().bool())), calls.get(number)
            )
            for number, (site, observation) in enumerate(zip(sites, batch.sites, strict=True))
        ]
        differs = first_mixed(model, measured, ids, mask, batch)
        if differs is None:
            return measured
        if alone and reads_alone(model, measured, ids):
            return [replace(site, alone=True) for site in measured]
    raise SiteError(
        f"{differs.info.module}: the rows of a padded batch should be those of each prompt alone, "
        "in the order [prompt, token], but they are not: they come in another order, or a token's "
        "routing depends on the other prompts or on chance. Such a model cannot be recorded token "
        f"by token{'' if alone else ', unless by capture.record, which reads prompts one by one'}."
    )


def heeds_padding(model: nn.Module, sites: Sequence[Site]) -> bool:
    """Whether prompts of unequal length can be decoded together, padded on their left.

    Models of one's own may look at no attention mask, or count positions from the padding. Others
    heed it in the prompt, but keep a state that depends on it (MiniMax).
    """
    ids = probe_tokens(model)
    following, ids = ids[2:, :STEPS], ids[:2]
    with without_gradients(model), plain_forward(model):
        takes = takes_positions(model)
        return heeds_left_padding(model, sites, ids, position_ids=takes) and decodes_padded(
            model, sites, ids, following, position_ids=takes
        )


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
    if are_weights(scores, ids):
        return replace(site, scores_known=False)
    half = seen.weights.dtype != torch.float32
    labels = [site.parts.score_function or score_function_of(scores, ids, weights, half=half)]
    if labels == ["other"] and are_all_one(weights):
        # a share of one: the weights say nothing, the choice may, and else the code does
        said = probe.said_of_scores((site.router, site.parent))
        labels = ["sigmoid", "softmax"] if "sigmoid" in said else ["softmax", "sigmoid"]
    half_scores = seen.scores.dtype != torch.float32
    found = rule_of(
        scores,
        ids,
        labels,
        selection_bias=site.selection_bias,
        groups=(site.n_groups, site.top_groups),
        half=half_scores,
    )
    if found is None:
        label = labels[0] if len(labels) == 1 else "other"
        moved = n_renumbered(scores, ids, weights)
        if moved:
            raise SiteError(
                f"{site.info.module}: experts are told other numbers than the router scores them "
                f"under, always the same ones ({moved} of {site.info.n_experts} moved): physical "
                "ids of a placement. Undo the placement (EPLB) before recording."
            )
        return replace(site, info=site.info._replace(score_function=label))
    label = found.score_function
    if label == "sigmoid" and found.ranking is not None:
        label = "sigmoid_topk"  # chosen before they are squashed
    return replace(
        site,
        info=site.info._replace(score_function=label),
        selection_bias=found.selection_bias,
        n_groups=found.groups[0],
        top_groups=found.groups[1],
        ranking=found.ranking,
        margin_known=True,
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


class Seen(NamedTuple):
    """What one forward pass over ids [B, S] showed.

    Attributes
    ----------
    sites : list of SiteObservation
    inputs : dict of int to Tensor [R, D]
        Copies of the routers' inputs, by the number of the site.
    output : Tensor [B * S, ...] or None
        Of the model, whose rows are surely in order.
    cache : object or None
        Keys and values, when they were asked for.
    """

    sites: list[SiteObservation]
    inputs: dict[int, torch.Tensor]
    output: torch.Tensor | None
    cache: Any = None


def padding_mask(ids: torch.Tensor) -> torch.Tensor:
    """Return a mask [B, S] that makes padding of the ends of two prompts."""
    rows, length = ids.shape
    lengths = torch.full((rows, 1), length)
    lengths[rows // 2], lengths[rows - 1] = length - length // 4, (length + 1) // 2
    return (torch.arange(length) < lengths).long().to(ids.device)


def run_sites(
    model: nn.Module,
    sites: Sequence[Site],
    ids: torch.Tensor,
    mask: torch.Tensor | None = None,
    **arguments: Any,
) -> Seen:
    """Run the model on ids [B, S], without padding where there is no mask."""
    inputs: dict[int, torch.Tensor] = {}
    with ExitStack() as stack:
        taps = stack.enter_context(tap(sites))
        for number, site in enumerate(sites):
            stack.callback(_keep_input(site.router, inputs, number))
        given = torch.ones_like(ids) if mask is None else mask
        arguments = {**decoder_inputs(model, ids, given), "use_cache": False, **arguments}
        output = model(input_ids=ids, attention_mask=given, **arguments)
        cache = cache_of(output)
        return Seen(taps.take(), inputs, _output(output, ids), cache)


def first_mixed(
    model: nn.Module, sites: Sequence[Site], ids: torch.Tensor, mask: torch.Tensor, batch: Seen
) -> Site | None:
    """Compare a padded batch with two of its prompts alone, row by row, at every site.

    Of one prompt only the beginning runs alone: in a causal model its rows are the same. Where the
    model's own output is not, as in encoders, the whole prompt is compared instead.

    Returns the first site whose rows come in another order, or depend on what else is in the batch
    of ids [B, S] under the mask [B, S].
    """
    rows, length = ids.shape
    together = _vectors(sites, batch, ids.numel())
    for row, cut in ((rows - 1, 0), (rows // 2, 1)):
        whole = int(mask[row].sum())
        for kept in dict.fromkeys((max(1, whole - cut), whole)):
            alone = run_sites(model, sites, ids[row : row + 1, :kept])
            here = slice(row * length, row * length + kept)
            if batch.output is None or alone.output is None:
                break
            if _is_same(batch.output[here], alone.output):
                break
        single = _vectors(sites, alone, kept)
        differs = _first_difference(sites, together, single, here)
        if differs is not None:
            return differs
    return None


def reads_alone(model: nn.Module, sites: Sequence[Site], ids: torch.Tensor) -> bool:
    """Whether the rows of the first of ids [B, S] by itself are surely its tokens in their order.

    That of a block's rows is known where its adapter has held them against the block's output; the
    router's input moves most in the row of a token that is exchanged. And the routing must be the
    same every time.
    """
    if not all(site.parts.is_proven for site in sites):
        return False
    text, others = ids[:1], ids[1]
    first, again = (run_sites(model, sites, text) for _ in range(2))
    once, twice = (_vectors(sites, seen, text.numel()) for seen in (first, again))
    if not all(map(torch.equal, chain(*once), chain(*twice))):
        return False
    for place in range(0, text.shape[1], text.shape[1] // ROWS or 1):
        other = text.clone()
        other[0, place] = others[place]
        moved = run_sites(model, sites, other).inputs
        for number, rows in first.inputs.items():
            if int((moved[number] - rows).norm(dim=-1).argmax()) != place:
                return False
    return True


def heeds_left_padding(
    model: nn.Module, sites: Sequence[Site], ids: torch.Tensor, **positions: bool
) -> bool:
    """Whether a prompt that is padded on its left, as for decoding, is routed as it is alone.

    Parameters
    ----------
    model : PreTrainedModel
    sites : sequence of Site
    ids : Tensor [B, S]
        Plain tokens.
    **positions : bool
        ``position_ids=True`` where the model takes them.
    """
    rows, length = ids.shape
    mask = torch.ones_like(ids)
    mask[-1, : length // 2] = 0
    given = {
        name: (mask.cumsum(-1) - 1).clamp_min(0) for name, is_taken in positions.items() if is_taken
    }
    batch = run_sites(model, sites, ids, mask, **given)
    alone = run_sites(model, sites, ids[-1:, length // 2 :])
    here = slice((rows - 1) * length + length // 2, rows * length)
    together = _vectors(sites, batch, ids.numel())
    single = _vectors(sites, alone, length - length // 2)
    return _first_difference(sites, together, single, here) is None


def decodes_padded(
    model: nn.Module,
    sites: Sequence[Site],
    ids: torch.Tensor,
    following: torch.Tensor,
    **positions: bool,
) -> bool:
    """Whether tokens after a prompt that is padded on its left are routed as after it alone.

    Parameters
    ----------
    model : PreTrainedModel
    sites : sequence of Site
    ids : Tensor [B, S]
        Plain tokens.
    following : Tensor [B, n]
        Plain tokens to go on with.
    **positions : bool
        ``position_ids=True`` where the model takes them.
    """
    length = ids.shape[1]
    mask = torch.ones_like(ids)
    mask[-1, : length // 2] = 0
    batch = decode_sites(model, sites, ids, mask, following, **positions)
    last = slice(len(ids) - 1, len(ids))
    alone = decode_sites(
        model, sites, ids[last, length // 2 :], mask[last, length // 2 :], following[last],
        **positions,
    )  # fmt: skip
    pairs = [
        (one.inputs[number][last], two.inputs[number])
        for one, two in zip(batch, alone, strict=True)
        for number in one.inputs
    ]
    return _is_near(model, pairs)


def writes_as_it_reads(model: nn.Module, sites: Sequence[Site]) -> bool:
    """Whether tokens that are decoded with a cache are routed as when the text is read at once.

    Where they are not, as in MiniMax's linear attention, what this decoding computes has to be
    what the model's own ``generate`` computes.

    Raises
    ------
    SiteError
        If it is neither.
    """
    if has_two_sides(model):
        return _answers_as_it_reads(model)
    ids, following = probe_tokens(model)[:1], probe_tokens(model)[2:3, :STEPS]
    positions = {"position_ids": takes_positions(model)}
    with without_gradients(model), plain_forward(model):
        mask, length = torch.ones_like(ids), ids.shape[1]
        steps = decode_sites(model, sites, ids, mask, following, **positions)
        whole = run_sites(model, sites, torch.cat([ids, following], dim=1))
        pairs = [
            (step.inputs[number], whole.inputs[number][length + i : length + i + 1])
            for i, step in enumerate(steps)
            for number in step.inputs
        ]
        if _is_near(model, pairs):
            return True
        written, logits = _generated(model, ids)
        steps = decode_sites(model, sites, ids, mask, written, **positions)
        given = [step.output for step in steps]
        same = _is_near(
            model, [(a, b) for a, b in zip(given, logits, strict=True) if a is not None]
        )
    if given and same and None not in given:
        return False
    raise _decodes_otherwise(model)


def _answers_as_it_reads(model: Any) -> bool:
    """As :func:`writes_as_it_reads`, of an encoder-decoder: what its decoder reads and writes."""
    ids = probe_tokens(model)[:1]
    with without_gradients(model), plain_forward(model):
        written, logits = _generated(model, ids, start=True)
        encoded, cache, given = model.get_encoder()(input_ids=ids), None, []
        for step in range(written.shape[1]):
            one = model(
                encoder_outputs=encoded,
                decoder_input_ids=written[:, step : step + 1],
                **with_cache(model, cache),
            )
            cache = cache_of(one)
            given.append(one.logits[:, -1].float().cpu())
        whole = model(encoder_outputs=encoded, decoder_input_ids=written, use_cache=False).logits
        at_once = list(whole.float().cpu().unbind(1))
    if _is_near(model, list(zip(given, at_once, strict=True))):
        return True
    if given and _is_near(model, list(zip(given, logits, strict=True))):
        return False
    raise _decodes_otherwise(model)


def _decodes_otherwise(model: nn.Module) -> SiteError:
    return SiteError(
        f"Decoding {type(model).__name__} token by token should give what reading the text gives, "
        f"or what its own generate() gives, but after {STEPS} tokens it gives neither: its routers "
        "see other states. Record it without generate, on texts that it has written."
    )


def _generated(
    model: Any, ids: torch.Tensor, *, start: bool = False
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Return what a model's own decoding writes first [B, n], and its logits [B, V] behind it.

    ``start`` gives what a decoder reads: its own first token before what it writes.
    """
    if not callable(getattr(model, "generate", None)):
        return ids[:, :0], []  # of a class of one's own
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of settings that a generation configuration holds
        done = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=STEPS + 1,
            min_new_tokens=STEPS + 1,
            do_sample=False,
            num_beams=1,
            output_logits=True,
            return_dict_in_generate=True,
        )
    first = 0 if start else ids.shape[1]
    written = done.sequences[:, first : first + STEPS]
    behind = done.logits[: len(written[0])] if start else done.logits[1 : STEPS + 1]
    return written, [values.float().cpu() for values in behind]


def _is_near(model: Any, pairs: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> bool:
    """Whether most vectors are the same but for rounding; nothing is near nothing."""
    half = torch.finfo(model.dtype).bits < torch.finfo(torch.float32).bits
    limit = HALF_DRIFT if half else DRIFT
    near = [float((one - two).norm()) <= limit * float(two.norm()) for one, two in pairs]
    return sum(near) >= ENOUGH * len(near)


def decode_sites(
    model: nn.Module,
    sites: Sequence[Site],
    ids: torch.Tensor,
    mask: torch.Tensor,
    following: torch.Tensor,
    **positions: bool,
) -> list[Seen]:
    """Read ids [B, S] and return what each of the following tokens [B, n] showed, with a cache.

    Nothing, where the model keeps no cache.
    """
    seen: list[Seen] = []
    cache = None
    for step in range(following.shape[1] + 1):
        new = ids if step == 0 else following[:, step - 1 : step]
        mask = mask if step == 0 else torch.cat([mask, torch.ones_like(new)], dim=1)
        places = (mask.cumsum(-1) - 1).clamp_min(0)[:, -new.shape[1] :]
        given = {name: places for name, is_taken in positions.items() if is_taken}
        one = run_sites(model, sites, new, mask, **with_cache(model, cache), **given)
        cache = one.cache
        if not keeps(cache):
            return []
        seen += [one] if step else []
    return seen


def _first_difference(
    sites: Sequence[Site],
    together: list[list[torch.Tensor]],
    alone: list[list[torch.Tensor]],
    here: slice,
) -> Site | None:
    """Return the first site whose rows ``here`` of a batch are not those of a prompt alone."""
    for site, inside, single in zip(sites, together, alone, strict=True):
        if not all(_is_same(a[here], b) for a, b in zip(inside, single, strict=True)):
            return site
    return None


def _vectors(sites: Sequence[Site], seen: Seen, n_rows: int) -> list[list[torch.Tensor]]:
    """Return each site's weights by expert [R, E + 1] and router input [R, D]."""
    vectors = []
    for number, (site, observation) in enumerate(zip(sites, seen.sites, strict=True)):
        found = [_weights(site, observation)]
        found += [seen.inputs[number]] if number in seen.inputs else []
        if any(len(rows) != n_rows for rows in found):
            raise SiteError(
                f"{site.info.module}: {n_rows} rows (prompts x tokens, padding included) were "
                f"expected, but it ran on {min(map(len, found))}. Such a site cannot be recorded."
            )
        vectors.append(found)
    return vectors


def _keep_input(
    router: nn.Module, inputs: dict[int, torch.Tensor], number: int
) -> Callable[[], None]:
    """Keep a copy of the router's input as rows [R, D]; returns what ends it."""

    def keep(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        hidden = args[0] if args else kwargs.get("hidden_states")
        if isinstance(hidden, torch.Tensor):
            # a copy: the block may go on to write into this tensor
            inputs[number] = probe.flat_rows(hidden.detach()).to("cpu", torch.float32, copy=True)

    return router.register_forward_pre_hook(keep, with_kwargs=True).remove


def _weights(site: Site, seen: SiteObservation) -> torch.Tensor:
    """Return the weights by expert [R, E + 1]; the last column takes empty slots."""
    ids, weights = seen.expert_ids.cpu().long(), seen.weights.float().cpu()
    dense = torch.zeros(len(ids), site.info.n_experts + 1)
    return dense.scatter(1, ids % dense.shape[1], weights)


def _output(output: Any, ids: torch.Tensor) -> torch.Tensor | None:
    """Return the first tensor [B, S, ...] that a model put out, as rows."""
    if isinstance(output, torch.Tensor):
        output = (output,)
    values = output if isinstance(output, tuple | list) else getattr(output, "to_tuple", tuple)()
    for value in values:
        if (
            isinstance(value, torch.Tensor)
            and value.shape[:2] == ids.shape
            and value.ndim > ids.ndim
        ):
            return value.float().cpu().flatten(0, 1)
    return None


def _is_same(among: torch.Tensor, alone: torch.Tensor) -> bool:
    """Whether rows [n, ...] are the same ones in the same order."""
    among, alone = among.flatten(1), alone.flatten(1)
    own = (among - alone).norm(dim=-1)
    others = torch.cdist(among, alone, compute_mode="donot_use_mm_for_euclid_dist").median(dim=-1)
    slack = NOTHING * float(alone.abs().max()) * alone.shape[-1] ** 0.5
    return float((own <= NEAR * others.values + slack).float().mean()) >= ENOUGH
