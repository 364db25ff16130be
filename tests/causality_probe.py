"""Find out whether a rule looks into the future or at other sequences, by changing them.

Two changes look into the future: other tokens in the place of later ones, and none at all, as a
text is while it is being written. A rule that reads how long a text is, say to share out places by
its tokens, bears the first and is caught by the second.

The inputs come from a small causal toy model that is run again after each change, so that what a
rule reads is as wide as in a real model: attention received by a token, for example, depends on
later tokens, and a rule that uses it is caught although it looks at one row only.
"""

from collections.abc import Mapping
from copy import deepcopy
from dataclasses import replace
from functools import lru_cache
from typing import NamedTuple

import torch
from transformers import OlmoeConfig, OlmoeForCausalLM

from capture.model.selftest import attach
from capture.store.records import Place
from capture.swap.rules import Decision, PartMask, RouterInputs, Routing
from explorer.routers.contract import PartRouter, Router, dense, fit_layers, route_layers
from explorer.routers.learning.training import TrainedRouter, TrainingSession
from explorer.routers.native import TopKRouter

VOCABULARY = 40
HIDDEN = 16
EXPERTS = 8
TOP_K = 2
HEADS = 4
LAYERS = 3
ATTENTION_NAMES = ("entropy", "max_weight", "sink_mass")

_ROUNDING = 1e-4  # a product of matrices may round differently for another number of rows


class Verdict(NamedTuple):
    """What a rule's decisions were found to depend on.

    Attributes
    ----------
    causal : bool
        Neither other tokens later in a sequence nor their absence changed a decision on earlier
        ones: each prefix is decided as the whole is.
    batch_dependent : bool
        A change to other sequences, or their absence, changed a decision.
    """

    causal: bool
    batch_dependent: bool


def probe(router: Router, *, seed: int = 0, n_sequences: int = 4, length: int = 24) -> Verdict:
    """Fit a copy of a router on toy sequences and change others under its eyes.

    Parameters
    ----------
    router : Router
        Any rule; it is left as it is.
    seed : int
        Seeds the toy model and its sequences.
    n_sequences, length : int
        How many sequences there are, and how many tokens each has.
    """
    fit_inputs = toy_layers(toy_tokens(n_sequences, length, seed + 1), seed=seed)
    if isinstance(router, TrainedRouter):
        router = deepcopy(router).train(toy_session(seed=seed))
    fitted = fit_layers(router, fit_inputs, toy_targets(router, fit_inputs, seed=seed))
    return depends(fitted, seed=seed, n_sequences=n_sequences, length=length)


def depends(
    fitted: Mapping[Place, Router], *, seed: int = 0, n_sequences: int = 4, length: int = 24
) -> Verdict:
    """Change toy sequences under the eyes of routers that were fitted on them already.

    Parameters
    ----------
    fitted : mapping of (layer, site) to Router
        One for each layer of :func:`toy_layers`.
    seed, n_sequences, length : int
        As in :func:`probe`.
    """
    tokens = toy_tokens(n_sequences, length, seed)
    before = _decide(fitted, tokens, seed)
    causal, batch_dependent = True, False
    cuts = (1, length // 3, 2 * length // 3, length - 1)
    for sequence in range(n_sequences):
        for cut in cuts:
            changed = tokens.clone()
            # one token over and over: the strongest pull on whatever counts tokens
            changed[sequence, cut:] = (tokens[sequence, cut - 1] + cut) % VOCABULARY
            after = _decide(fitted, changed, seed)
            causal &= _same(before[sequence, :cut], after[sequence, :cut])
            others = [other for other in range(n_sequences) if other != sequence]
            batch_dependent |= not _same(before[others], after[others])
        own = tokens[sequence : sequence + 1]
        alone = _decide(fitted, own, seed)[0]
        batch_dependent |= not _same(before[sequence], alone)
        # by itself, so that nothing but its own length changes
        for cut in range(1, length) if sequence == 0 else cuts:
            causal &= _same(alone[:cut], _decide(fitted, own[:, :cut], seed)[0])
    return Verdict(causal, batch_dependent)


def toy_tokens(n_sequences: int, length: int, seed: int) -> torch.Tensor:
    """Draw token ids [N, S]; low ones are more frequent, as in text."""
    generator = torch.Generator().manual_seed(seed)
    uniform = torch.rand(n_sequences, length, generator=generator)
    return (uniform.square() * VOCABULARY).long()


def toy_layers(
    tokens: torch.Tensor,
    *,
    seed: int = 0,
    score_function: str = "softmax",
    biased: bool = False,
    grouped: bool | None = None,
    renormalize: bool = True,
    scaling: float | None = None,
    top_k: int = TOP_K,
) -> dict[Place, RouterInputs]:
    """Run the toy model over sequences and return what a capture would know of its routers.

    Parameters
    ----------
    tokens : Tensor [N, S], int64
        Token ids below ``VOCABULARY``; sequences are independent of each other.
    seed : int
        Seeds the weights.
    score_function : str
        What the model makes of its logits: ``"softmax"`` or ``"sigmoid"`` of all, the same with
        ``"_topk"`` of the chosen ones, or ``"probabilities"``, which the gate gives already.
    biased : bool
        Whether the model has a selection bias, and where nothing else is said a scaling factor of
        2.5 and groups, like DeepSeek-V3.
    grouped : bool, optional
        Whether it chooses within the best two of four groups; None = as ``biased``.
    renormalize : bool
        Whether its weights are divided by their sum.
    scaling : float, optional
        Factor on its weights.
    top_k : int

    Returns
    -------
    dict of (layer, site) to RouterInputs
    """
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int, scale: float = 1.0) -> torch.Tensor:
        return torch.randn(*shape, generator=generator) * scale

    groups = biased if grouped is None else grouped
    factor = scaling if scaling is not None else 2.5 if biased else 1.0
    n_sequences, length = tokens.shape
    stream = draw(VOCABULARY, HIDDEN)[tokens]  # [N, S, D]
    positions = torch.arange(length)
    layers: dict[Place, RouterInputs] = {}
    previous: Routing | None = None
    for layer in range(LAYERS):
        query, key, value = draw(HIDDEN, HIDDEN), draw(HIDDEN, HIDDEN), draw(HIDDEN, HIDDEN)
        attention = _attend(stream @ query, stream @ key)
        stream = stream + attention @ stream @ value / HIDDEN**0.5
        hidden = torch.nn.functional.layer_norm(stream, (HIDDEN,)).flatten(0, 1)
        gate = draw(EXPERTS, HIDDEN, scale=0.6)
        logits = hidden @ gate.T
        bias = draw(EXPERTS, scale=0.1)
        inputs = RouterInputs(
            layer=layer,
            n_experts=EXPERTS,
            top_k=top_k,
            score_function=score_function,
            renormalize=renormalize,
            scaling=factor,
            selection_bias=bias if biased else None,
            n_groups=4 if groups else None,
            top_groups=2 if groups else None,
            gate_weight=gate,
            hidden=hidden,
            logits=logits.softmax(dim=-1) if score_function == "probabilities" else logits,
            token_ids=tokens.flatten(),
            positions=positions.repeat(n_sequences),
            starts=(positions == 0).repeat(n_sequences),
            previous=previous,
            attention=_statistics(attention).flatten(0, 1),
            attention_names=ATTENTION_NAMES,
            received=attention.sum(dim=1).flatten(),
        )
        previous = TopKRouter().route(inputs)
        layers[layer, 0] = replace(inputs, native=previous)
    return layers


def toy_targets(
    router: Router, inputs: Mapping[Place, RouterInputs], *, seed: int = 0
) -> dict[Place, Decision]:
    """Return what a rule may learn from on the toy model: importances for a rule about parts."""
    if not isinstance(router, PartRouter):
        return {place: recorded.decision() for place, recorded in inputs.items()}
    width = {"head": HEADS, "layer": 1, "expert": EXPERTS}[router.part]
    generator = torch.Generator().manual_seed(seed)
    targets: dict[Place, Decision] = {}
    for place, recorded in inputs.items():
        truth = torch.randn(HIDDEN, width, generator=generator)
        targets[place] = PartMask(router.part, (recorded.tensor("hidden") @ truth / 2).sigmoid())
    return targets


def toy_session(*, seed: int = 0, n_sequences: int = 6, length: int = 16) -> TrainingSession:
    """Return a session on a small random model of the same sizes as the toy layers.

    Parameters
    ----------
    seed : int
        Seeds the weights and the texts.
    n_sequences, length : int
        How many texts there are, and how many tokens each has.
    """
    config = OlmoeConfig(
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN,
        intermediate_size=8,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_experts=EXPERTS,
        num_experts_per_tok=TOP_K,
        max_position_embeddings=64,
        norm_topk_prob=True,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = OlmoeForCausalLM(config).eval()  # type: ignore[no-untyped-call]
    tokens = toy_tokens(n_sequences, length, seed).numpy()
    return TrainingSession(model=model, sites=attach(model), sequences=list(tokens), seed=seed)


def _decide(routers: Mapping[Place, Router], tokens: torch.Tensor, seed: int) -> torch.Tensor:
    """Return what all layers apply to the sequences, [N, S, L * P]."""
    every = torch.arange(tokens.numel())
    # the same few texts for every router; a rule that spoils its inputs spoils a copy of them
    layers = {at: one.take(every) for at, one in _layers(_texts(tokens), seed).items()}
    decisions = route_layers(routers, layers)
    return torch.cat([dense(each) for each in decisions.values()], -1).view(*tokens.shape, -1)


def _texts(tokens: torch.Tensor) -> tuple[tuple[int, ...], ...]:
    return tuple(tuple(row) for row in tokens.tolist())


@lru_cache(maxsize=256)
def _layers(texts: tuple[tuple[int, ...], ...], seed: int) -> dict[Place, RouterInputs]:
    return toy_layers(torch.tensor(texts), seed=seed)


def _same(first: torch.Tensor, second: torch.Tensor) -> bool:
    return bool(torch.allclose(first, second, rtol=0, atol=_ROUNDING))


def _attend(query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    """Return causal attention weights [N, S, S]."""
    length = query.shape[1]
    scores = query @ key.transpose(1, 2) / (4 * query.shape[-1] ** 0.5)
    later = torch.ones(length, length, dtype=torch.bool).triu(1)
    weights: torch.Tensor = scores.masked_fill(later, -torch.inf).softmax(dim=-1)
    return weights


def _statistics(attention: torch.Tensor) -> torch.Tensor:
    """Return the statistics named in ``ATTENTION_NAMES``, [N, S, A]."""
    entropy = -(attention * attention.clamp_min(1e-12).log()).sum(dim=-1)
    return torch.stack([entropy, attention.amax(dim=-1), attention[:, :, 0]], dim=-1)
