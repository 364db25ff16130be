"""Random forward passes for tests of the run file, and how to write them."""

from dataclasses import replace

import numpy as np

from capture.store import (
    AttentionLayer,
    ForwardRows,
    LayerAttention,
    PromptAttention,
    PromptInfo,
    RunInfo,
    RunWriter,
    SiteInfo,
    SiteRows,
    TokenRows,
)

STATISTICS = ("entropy", "margin", "logsumexp", "topk_mass")


def make_info(level="ids", **changes):
    """Facts of a run that no test looks at, but for the changes."""
    facts = RunInfo("model", None, "Arch", "float32", "cpu", level, 100, 3)
    return replace(facts, **changes)


def make_site(layer, n_experts, top_k, site=0):
    """Describe a site."""
    return SiteInfo(layer, site, f"layers.{layer}.moe{site}", n_experts, top_k, 0, "softmax")


def make_site_rows(index, site, n_tokens, domain_of, n_domains, random, *, level="ids", empty=0.2):
    """Route tokens at random, with some slots empty; domain_of [N] is each token's domain."""
    ids = np.argsort(random.random((n_tokens, site.n_experts)), axis=1)[:, : site.top_k]
    ids = ids.astype(np.int32)
    weights = -np.sort(-random.random((n_tokens, site.top_k), np.float32), axis=1)
    # empty slots are the last ones of a row
    filled = random.integers(1, site.top_k + 1, n_tokens)
    filled = np.where(random.random(n_tokens) < empty, filled, site.top_k)
    vacant = np.arange(site.top_k) >= filled[:, None]
    ids[vacant], weights[vacant] = -1, 0
    assignments = np.zeros((n_domains, site.n_experts), np.int64)
    weight_sum = np.zeros((n_domains, site.n_experts))
    for token in range(n_tokens):
        for slot in range(filled[token]):
            assignments[domain_of[token], ids[token, slot]] += 1
            weight_sum[domain_of[token], ids[token, slot]] += weights[token, slot]
    routed = level != "stats"
    statistics = {
        name: random.normal(0, 3, n_tokens).astype(np.float32) if routed else None
        for name in STATISTICS
    }
    return SiteRows(
        site_index=index,
        assignments=assignments,
        weight_sum=weight_sum,
        prob_sum=weight_sum + 0.5,
        expert_ids=ids if routed else None,
        weights=weights if routed else None,
        **statistics,
    )


def make_forward(first_token, n_tokens, sites, random, *, level="ids", domains=("a", "b"), **more):
    """Make one forward pass over tokens first_token .. first_token + n_tokens - 1."""
    domain_of = random.integers(0, len(domains), n_tokens)
    tokens = TokenRows(
        token_id=np.arange(first_token, first_token + n_tokens, dtype=np.uint32),
        prompt_id=domain_of.astype(np.uint32),
        position=np.arange(n_tokens, dtype=np.uint32),
        token=random.integers(0, 100, n_tokens).astype(np.int32),
        text=[f"t{first_token + n}" for n in range(n_tokens)],
        loss=np.ma.MaskedArray(random.random(n_tokens, np.float32), random.random(n_tokens) < 0.2),
        phase="prompt",
    )
    rows = [
        make_site_rows(i, site, n_tokens, domain_of, len(domains), random, level=level, **more)
        for i, site in enumerate(sites)
    ]
    return ForwardRows(tokens, domains, rows)


def with_tokens(forward, **changes):
    """Copy a forward pass with other token columns."""
    return replace(forward, tokens=replace(forward.tokens, **changes))


def with_site(forward, index=0, **changes):
    """Copy a forward pass with other rows of one site."""
    sites = list(forward.sites)
    sites[index] = replace(sites[index], **changes)
    return replace(forward, sites=sites)


# layers 1 and 4 are recorded, the second with one head of two
LAYERS = [
    AttentionLayer(0, "layers.0.mixer", None, "MambaMixer", "It has no keys."),
    AttentionLayer(1, "layers.1.attn", 3, "attention", None, (0, 1, 2)),
    AttentionLayer(4, "layers.4.attn", 2, "attention", None, (1,)),
]


def make_attention(prompt, first_token, n_tokens, random, *, width=2, ranks=3):
    """Draw the attention of one prompt in the recorded layers."""
    layers = []
    for layer in LAYERS:
        if not layer.recorded:
            continue
        n_heads = len(layer.recorded)
        weights = np.tril(random.random((n_heads, n_tokens, n_tokens))) + np.eye(n_tokens)
        weights /= weights.sum(axis=-1, keepdims=True)
        starts = np.arange(0, n_tokens, width)
        maps = np.add.reduceat(np.add.reduceat(weights, starts, axis=1), starts, axis=2)
        order = np.argsort(-weights, axis=-1)[..., :ranks]
        heavy = np.take_along_axis(weights, order, axis=-1)
        layers.append(
            LayerAttention(
                layer=layer.layer,
                queries=n_tokens,
                **{
                    name: random.random(n_heads, np.float32)
                    for name in ("entropy", "sink_mass", "mean_distance", "window_mass")
                },
                maps=(maps / maps.sum(axis=-1, keepdims=True)).astype(np.float32),
                received=maps.sum(axis=1).astype(np.float32),
                top_queries=np.arange(n_tokens),
                top_ids=np.where(heavy > 0, order, -1).astype(np.int32),
                top_weights=heavy.astype(np.float32),
            )
        )
    return PromptAttention(prompt, first_token, n_tokens, width, 1, layers)


def start(out, sites, level="ids", prompts=None, layers=()):
    """Open a writer for prompts of the domains a and b."""
    prompts = prompts or [PromptInfo("A", "a", None, 1, 0), PromptInfo("B", "b", "f:2", 1, 3)]
    return RunWriter.create(out, make_info(level), sites, prompts, layers)


def write(out, sites, forwards, level="ids", **facts):
    """Write a whole run."""
    writer = start(out, sites, level)
    for forward in forwards:
        writer.append(forward)
    return writer.finish(seconds=1.0, **facts)
