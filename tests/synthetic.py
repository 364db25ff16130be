"""A small run with known routing, and the same rows as plain Python to compare with.

Weights are multiples of 1/64 and statistics of 1/8, which the run file stores exactly.
At level attention, every prompt has attention but the one that is shortest.
"""

from copy import deepcopy
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from capture.errors import StoreError
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
    check,
    check_run,
)
from capture.store.sums import count_pairs

SITES = (
    SiteInfo(1, 0, "model.layers.1.mlp", 6, 2, 1, "softmax"),
    SiteInfo(3, 0, "model.layers.3.mlp", 6, 2, 0, "softmax_topk"),
    SiteInfo(3, 1, "model.layers.3.attn", 4, 1, 0, "other"),
)
# expert 5 of the first site is never chosen
IDLE = (1, 0, 5)
NASTY = "<script>alert(1)</script>"
PROMPTS = (
    ("law", ["The", " court", " shall", " not", " rule", "."]),
    ("code", ["x", " =", " <b>", "1", "</b>", "\n", "%{x}"]),
    (None, ["", "Hi"]),
    ("law", ["No"]),
    ("code", [NASTY, "\u202e", "\u200b", " a", " a", " a", " a", " a", " &amp;"]),
    ("text", [" 100%_", " Größe", "🙂", "", " מילה"]),
)
GENERATED = {0: [" And", " so"], 4: [" a"]}
BATCHES = ((2, 0), (1, 3, 5), (4,))
LAYERS = (
    AttentionLayer(0, "model.layers.0.mixer", None, "MambaMixer", "It has no keys."),
    AttentionLayer(1, "model.layers.1.attn", 3, "attention", None, (0, 2)),
    AttentionLayer(2, "model.layers.2.attn", 3, "attention", None, (0, 2)),
    AttentionLayer(3, "model.layers.3.attn", 2, "attention", None, (0, 1)),
)
WITHOUT_ATTENTION = 3
BIN_WIDTH = 2
RANKS = 3


@dataclass
class Known:
    """What was written, row by row."""

    path: Path
    tokens: list[dict[str, Any]] = field(default_factory=list)
    routes: dict[tuple[int, int, int], dict[str, Any]] = field(default_factory=dict)
    # (prompt, layer, head) -> queries, the four statistics, map, received
    attention: dict[tuple[int, int, int], dict[str, Any]] = field(default_factory=dict)
    # (token, layer, head) -> [(key token, weight)], heaviest first
    keys: dict[tuple[int, int, int], list[tuple[int, float]]] = field(default_factory=dict)

    def pairs(self, layer, site=0):
        """Count the tokens of every two experts of a site, both orders and the diagonal."""
        return self._met((layer, site), (layer, site))

    def transitions(self, layer, site, next_layer, next_site):
        """Count the tokens of every (expert, expert of the next site)."""
        return self._met((layer, site), (next_layer, next_site))

    def _met(self, here, there):
        counts = {}
        for (token_id, *place), route in self.routes.items():
            if tuple(place) != here:
                continue
            for first, _ in route["experts"]:
                for second, _ in self.routes[token_id, *there]["experts"]:
                    counts[first, second] = counts.get((first, second), 0) + 1
        return counts

    def assignments(self, layer=None, site=None, domain=None, phase=None):
        """Return (token, slot, expert, weight) of every assignment that matches."""
        by_id = {token["token_id"]: token for token in self.tokens}
        rows = []
        for (token_id, at_layer, at_site), route in self.routes.items():
            token = by_id[token_id]
            if (layer, site) not in ((None, None), (at_layer, site), (at_layer, at_site)):
                continue
            if site is not None and site != at_site:
                continue
            if domain is not None and (token["domain"] or "") != domain:
                continue
            if phase is not None and token["phase"] != phase:
                continue
            for slot, (expert, weight) in enumerate(route["experts"]):
                rows.append((token, slot, expert, weight))
        return rows


_WRITTEN: dict[str, tuple[bytes, Known, bool]] = {}


def write_run(path, *, fresh=False, **choices):
    """Write the run, see `_write_run`, and return what is in it.

    A run of the same choices is written once a process and then copied, also its time and id;
    one that must be another recording is written `fresh`. Whether its parts agree is found out
    once, too: the app asks that of every new file, and a copy says the same.
    """
    path = Path(path)
    key = repr((sorted(choices.items()), PROMPTS))  # a test may have changed the prompts
    if fresh or key not in _WRITTEN or path.exists():
        known = _write_run(path, **choices)
        if key not in _WRITTEN:
            _WRITTEN[key] = path.read_bytes(), deepcopy(known), _is_sound(path)
        return known
    content, known, sound = _WRITTEN[key]
    path.write_bytes(content)
    if sound:
        check._verdicts[check.identity(path)] = None
    return replace(deepcopy(known), path=path)


def _is_sound(path):
    try:
        check_run(path)
    except StoreError:
        return False
    return True


def _write_run(path, *, level="ids", seed=0, complete=True, sites=SITES, scored_every=3):
    """Write a run.

    Scores are stored for every `scored_every`-th token, 0 = for none; at level scores for all.
    """
    random = np.random.default_rng(seed)
    known = Known(Path(path))
    plan = _plan()
    prompts = [
        PromptInfo(
            text="".join(pieces),
            domain=domain,
            source=f"test:{number + 1}",
            n_tokens=len(pieces) + len(GENERATED.get(number, [])),
            truncated=7 if number == 3 else 0,
        )
        for number, (domain, pieces) in enumerate(PROMPTS)
    ]
    info = RunInfo(
        model="synthetic",
        revision=None,
        architecture="NoSuchForCausalLM",
        dtype="float32",
        device="cpu",
        level=level,
        vocab_size=100,
        hidden_size=4,
    )
    layers = LAYERS if level == "attention" else ()
    writer = RunWriter.create(known.path, info, sites, prompts, layers)
    for batch, (phase, tokens) in enumerate(plan):
        for token in tokens:
            token |= {"phase": phase, "batch": batch, "loss": float(random.integers(0, 40)) / 8}
            token["token"] = int(random.integers(0, 12))
            if token["last"]:
                token["loss"] = None
        known.tokens += tokens
        every = 1 if level in ("scores", "attention") else scored_every
        forward = [
            _site_rows(random, index, site, tokens, level, every, known.routes)
            for index, site in enumerate(sites)
        ]
        if layers and phase == "prompt":
            for prompt in dict.fromkeys(token["prompt_id"] for token in tokens):
                if prompt != WITHOUT_ATTENTION:
                    here = [token for token in tokens if token["prompt_id"] == prompt]
                    writer.append_attention(_attention(random, prompt, here, known))
        if level != "stats":
            ids = {site.site_index: site.expert_ids for site in forward}
            writer.append_pairs(count_pairs(ids, sites))
        writer.append(ForwardRows(_token_rows(tokens, phase), _domains(tokens), forward))
    writer.finish(seconds=1.5, complete=complete)
    known.tokens.sort(key=lambda token: token["token_id"])
    return known


def _plan():
    """Return the forward passes as (phase, tokens): prompts in batches, then one by one."""
    first, start = [], 0
    for _, pieces in PROMPTS:
        first.append(start)
        start += len(pieces)
    rows = {
        number: [
            {
                "token_id": first[number] + position,
                "prompt_id": number,
                "domain": domain,
                "position": position,
                "text": text,
                "last": position == len(pieces) - 1,
            }
            for position, text in enumerate(pieces)
        ]
        for number, (domain, pieces) in enumerate(PROMPTS)
    }
    plan = [("prompt", [row for n in batch for row in rows[n]]) for batch in BATCHES]
    for number, texts in GENERATED.items():
        domain, pieces = PROMPTS[number]
        for step, text in enumerate(texts):
            token = {
                "token_id": start,
                "prompt_id": number,
                "domain": domain,
                "position": len(pieces) + step,
                "text": text,
                "last": True,
            }
            start += 1
            plan.append(("generated", [token]))
    return plan


def _domains(tokens):
    return list(dict.fromkeys(token["domain"] for token in tokens))


def _token_rows(tokens, phase):
    losses = [token["loss"] for token in tokens]
    return TokenRows(
        token_id=np.array([token["token_id"] for token in tokens], np.uint32),
        prompt_id=np.array([token["prompt_id"] for token in tokens], np.uint32),
        position=np.array([token["position"] for token in tokens], np.uint32),
        token=np.array([token["token"] for token in tokens], np.int32),
        text=[token["text"] for token in tokens],
        loss=np.ma.MaskedArray(
            [0.0 if loss is None else loss for loss in losses],
            mask=[loss is None for loss in losses],
            dtype=np.float32,
        ),
        phase=phase,
    )


def _site_rows(random, index, site, tokens, level, scored_every, routes):
    """Draw what one site does with the tokens, and note it in `routes`."""
    n, n_experts, top_k = len(tokens), site.n_experts, site.top_k
    known = site.score_function != "other"
    domains = _domains(tokens)
    ids = np.full((n, top_k), -1, np.int32)
    weights = np.zeros((n, top_k), np.float32)
    statistics = random.integers(0, 12, size=(4, n)).astype(np.float32) / 8
    scores = random.integers(-32, 32, size=(n, n_experts)).astype(np.float32) / 8
    assignments = np.zeros((len(domains), n_experts), np.int64)
    weight_sum = np.zeros((len(domains), n_experts))
    scored = [
        row
        for row, token in enumerate(tokens)
        if scored_every and not token["token_id"] % scored_every
    ]
    for row, token in enumerate(tokens):
        usable = n_experts - (1 if (site.layer, site.site) == IDLE[:2] else 0)
        # now and then a slot stays empty
        filled = top_k if random.random() < 0.9 else top_k - 1
        chosen = random.permutation(usable)[:filled]
        gates = sorted((random.integers(1, 64, size=filled) / 64).tolist(), reverse=True)
        ids[row, :filled], weights[row, :filled] = chosen, gates
        group = domains.index(token["domain"])
        for expert, gate in zip(chosen.tolist(), gates, strict=True):
            assignments[group, expert] += 1
            weight_sum[group, expert] += gate
        names = ("entropy", "margin", "logsumexp", "topk_mass")
        routes[token["token_id"], site.layer, site.site] = {
            "experts": list(zip(chosen.tolist(), gates, strict=True)) if level != "stats" else [],
            "scores": scores[row].tolist() if row in scored else None,
            **{
                name: float(statistics[i, row]) if known and level != "stats" else None
                for i, name in enumerate(names)
            },
        }
    deep = level != "stats"
    return SiteRows(
        site_index=index,
        assignments=assignments,
        weight_sum=weight_sum,
        prob_sum=assignments / 2 if known else None,
        expert_ids=ids if deep else None,
        weights=weights if deep else None,
        **{
            name: statistics[i] if known and deep else None
            for i, name in enumerate(("entropy", "margin", "logsumexp", "topk_mass"))
        },
        scores=(np.array(scored, np.int64), scores[scored]) if scored else None,
    )


def _attention(random, prompt, tokens, known):
    """Draw the attention of one prompt in every recorded layer, and note it in `known`."""
    first, n = tokens[0]["token_id"], len(tokens)
    bins = -(-n // BIN_WIDTH)
    layers = []
    for layer in LAYERS:
        if not layer.recorded:
            continue
        n_heads = len(layer.recorded)
        statistics = random.integers(0, 16, size=(4, n_heads)).astype(np.float32) / 8
        maps = np.zeros((n_heads, bins, bins), np.float32)
        ids = np.full((n_heads, n, RANKS), -1, np.int32)
        weights = np.zeros((n_heads, n, RANKS), np.float32)
        for row, head in enumerate(layer.recorded):
            for query_bin in range(bins):
                maps[row, query_bin, : query_bin + 1] = _shares(random, query_bin + 1)
            for query in range(n):
                seen = random.permutation(query + 1)[:RANKS]
                heavy = np.sort(random.integers(1, 32, size=len(seen)))[::-1] / 64
                ids[row, query, : len(seen)], weights[row, query, : len(seen)] = seen, heavy
                known.keys[first + query, layer.layer, head] = list(
                    zip((first + seen).tolist(), heavy.tolist(), strict=True)
                )
            known.attention[prompt, layer.layer, head] = {
                "queries": n,
                "entropy": float(statistics[0, row]),
                "sink_mass": float(statistics[1, row]),
                "mean_distance": float(statistics[2, row]),
                "window_mass": float(statistics[3, row]),
                "map": maps[row].ravel().tolist(),
                "received": (maps[row].sum(axis=0) * BIN_WIDTH).tolist(),
            }
        received = maps.sum(axis=1) * BIN_WIDTH
        top = (np.arange(n), ids, weights)
        layers.append(LayerAttention(layer.layer, n, *statistics, maps, received, *top))
    return PromptAttention(prompt, first, n, BIN_WIDTH, 1, layers)


def _shares(random, n):
    """Return n shares in 64ths that sum to 1."""
    cuts = np.sort(random.integers(0, 65, size=n - 1))
    return np.diff(np.concatenate([[0], cuts, [64]])) / 64
