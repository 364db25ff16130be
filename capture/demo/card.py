"""Write the model card from the measured figures, so that its numbers cannot drift."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from capture.demo.model import WARM_UP_STEPS
from capture.demo.sources import DOMAINS, describe_source

_INTRODUCTION = """\
# The embedded demo model

A small mixture-of-experts language model that RouteScope trained itself, so that a newcomer sees
real routing without a download or a GPU. It is **a routing specimen, not a text generator**: its
routers, its balance and its specialised experts are real, its sentences have the right shape and
no sense. Every number below is written from `figures.json` by `capture/demo/card.py`.
"""

_ARCHITECTURE = """\
## What it is

`OlmoeForCausalLM` of stock transformers, loaded by `AutoModelForCausalLM` without remote code:
{layers} layers, hidden size 128, 4 attention heads, {experts} experts of size 128 a layer,
top-{top_k} with renormalised weights, tied embeddings, byte-level BPE of 6,144 tokens.
{parameters:.2f} M parameters, stored in bfloat16. Its context is 1,024 tokens, of which most
of its training windows had only 256 (loss by position below).
"""

_DATA = """\
## Data and licences

Nineteen domains, each from a package of a public registry (versions where the registry pins
them). Licences were read from the packages' own metadata and copyright files, not reviewed by a
lawyer. No text of persons' mail or chats is in it.

{table}

4% of the documents of every domain, chosen by a hash of the document's name, were never trained
on. `fit.jsonl.xz` and `heldout.jsonl.xz` hold the part of those that is in the public domain or
CC0, disjoint by document; the corpus script rebuilds the rest. sqlite3.c and set.mm are one file
each, split in stretches of 64 KB: held-out stretches lie between trained ones, which flatters
their loss a little.
"""

_RECIPE = """\
## Recipe and time

AdamW (betas 0.9 and 0.95, weight decay 0.1 except on embeddings and norms), {warm_up} steps of
warm-up to the peak rate, then linearly to zero at the end of a schedule that goes by the clock;
gradient clipped at 1. Loss: next token, plus 0.01 of a balance loss per layer with load taken over
the global batch, plus 0.001 of the z-loss. Every domain in turn (JSON at a weight of 0.6).

{stages}

All on two shared CPU cores that other work kept busy, two single-thread processes. The CUDA path
of the trainer has not been run. These commands go the same way again, from weights of an earlier
run:

```bash
python -m capture.demo.train --work FIRST --init EARLIER --minutes 80 --rate 2e-3
python -m capture.demo.train --work LAST --init FIRST/result/weights --minutes 24 --rate 4e-4 \\
    --cluster-router 1
```

The result is alike, not identical: a clock-driven schedule takes as many steps as the machine
allows, and today's first stage has long windows as well. `python -m capture.demo.train` alone
trains from random weights in one stage; each part of it was run, the whole never to the end.
`trends/` holds the routing of the demo prompts through a random start, at 1, 5, 20, 60 and 100% of
the time of the first stage (the step is in the name of each file), and at the end of the last one.
They were recorded from snapshots after the training; the trainer now records them itself.
"""

_FIRST_START = (
    "the weights of an earlier and shorter run of the same recipe (about 15 M tokens of the same"
    " corpus, a prototype), with that run's tokenizer"
)
_COLD_START = "random weights (deviation 0.04, output projections scaled down with depth)"
_NEXT_START = "the weights of the stage before"
_CLUSTERED = (
    "; before the first step {share:.0%} of the router of layer {layer} were replaced by K-Means"
    " clusters of training windows (no domain labels; `capture/demo/routing.py`), because"
    " that layer had come to say little more about the domain than an untrained one"
)


def _table(header: Iterable[str], rows: Iterable[Iterable[object]]) -> str:
    titles = list(header)
    lines = ["| " + " | ".join(titles) + " |", "|" + "---|" * len(titles)]
    lines += ["| " + " | ".join(str(cell) for cell in row) + " |" for row in rows]
    return "\n".join(lines)


def _data() -> str:
    rows = (
        (d.name, d.title, describe_source(d, "`"), d.licence, "yes" if d.ships else "")
        for d in DOMAINS
    )
    header = ("domain", "text", "source", "licence", "held-out text ships")
    return _DATA.format(table=_table(header, rows))


def _stage(number: int, stage: dict[str, Any]) -> str:
    first = _FIRST_START if stage["warm_start"] else _COLD_START
    start = _NEXT_START if number else first
    if stage["cluster_router"] is not None:
        start += _CLUSTERED.format(layer=stage["cluster_router"], share=stage["cluster_share"])
    windows = f"{stage['windows_per_step']} windows of {stage['window']} tokens a step"
    if stage["long_every"]:
        windows += f", every {stage['long_every']}th step as long windows of"
        windows += f" {stage['long_window']:,} tokens"
    return (
        f"{number + 1}. From {start}. {stage['steps']:,} steps,"
        f" {stage['tokens'] / 1e6:.1f} M tokens, {stage['minutes']:.0f} minutes, peak rate"
        f" {stage['peak_rate']:g}, {windows}."
    )


def _recipe(stages: list[dict[str, Any]]) -> str:
    lines = [_stage(number, stage) for number, stage in enumerate(stages)]
    return _RECIPE.format(warm_up=WARM_UP_STEPS, stages="\n".join(lines))


def _language(figures: dict[str, Any]) -> str:
    held_out = figures["held_out"]
    earlier = figures.get("earlier")
    rows = []
    for name, row in held_out["domains"].items():
        cells = [name, f"{row['loss_nats']:.3f}", f"{row['bits_per_byte']:.3f}"]
        cells.append(f"{row['error']:.3f}")
        if earlier:
            before = earlier["domains"][name]
            cells += [f"{before:.3f}", f"{100 * (row['bits_per_byte'] / before - 1):+.1f}%"]
        rows.append(cells)
    header = ["domain", "loss, nats a token", "bits per byte", "standard error"]
    text = "## Held-out loss\n\n"
    text += "Every window of 256 tokens of the earlier run's held-out split"
    text += f" ({sum(row['tokens'] for row in held_out['domains'].values()):,} tokens)."
    text += f" Mean over domains: **{held_out['mean_bits_per_byte']:.3f} bits per byte**,"
    text += f" {held_out['mean_loss_nats']:.3f} nats a token."
    if earlier:
        header += ["earlier run", "change"]
        text += f" The earlier run has {earlier['mean_bits_per_byte']:.3f} on the same windows;"
        change = 100 * (earlier["worst_ratio"] - 1)
        text += f" the domain that fared worst is {earlier['worst_domain']} ({change:+.1f}%)."
    return f"{text}\n\n{_table(header, rows)}\n"


def _positions(rows: list[dict[str, Any]]) -> str:
    cells = ((f"{row['first']} to {row['last']}", f"{row['loss_nats']:.2f}") for row in rows)
    return (
        "Mean loss by position in a context of 1,000 tokens"
        f" ({rows[0]['contexts']} contexts over all domains):\n\n"
        f"{_table(('tokens before', 'loss, nats a token'), cells)}\n"
    )


def _balance(layers: list[dict[str, Any]]) -> str:
    names = ("min_load", "max_load", "max_violation", "coefficient_of_variation")
    rows = (
        (number, *(f"{row[name]:.2f}" for name in names), f"{row['normalized_entropy']:.3f}")
        for number, row in enumerate(layers)
    )
    header = ("layer", "least load", "most load", "MaxVio", "CV", "normalised entropy")
    dead = sum(int(row["dead_experts"]) for row in layers)
    return (
        "## Balance\n\nLoad of each layer's experts over the domains with equal weight; least and"
        f" most are multiples of the mean. Experts without any token: {dead}.\n\n"
        f"{_table(header, rows)}\n"
    )


def _baseline(row: dict[str, Any], name: str) -> tuple[str, str]:
    untrained = row[f"information_{name}_bits"]
    return f"{untrained:.3f}", f"{row['information_bits'] / untrained:.1f}"


def _information(routing: dict[str, Any]) -> str:
    rows = (
        (
            number,
            f"{row['information_bits']:.3f}",
            *_baseline(row, "random_init"),
            *_baseline(row, "stock_init"),
            f"{row['information_shuffled_bits']:.4f}",
        )
        for number, row in enumerate(routing["layers"])
    )
    header = (
        "layer",
        "trained, bits",
        "random-init, bits",
        "trained over it",
        "stock init, bits",
        "trained over it",
        "shuffled labels, bits",
    )
    low = [
        str(number)
        for number, row in enumerate(routing["layers"])
        if row["information_bits"] < 2 * row["information_stock_init_bits"]
    ]
    short = f" Layers below twice the stock init: {', '.join(low)}." if low else ""
    return (
        "## What the routing says about the domain\n\nMutual information of expert and domain,"
        f" {routing['tokens']:,} held-out tokens ({routing['windows_per_domain']} windows a"
        " domain). A random router already separates domains, because vocabularies differ; that,"
        " and not shuffled labels, is the baseline. *Random-init* is this recipe's own start"
        " (output projections scaled down with depth); *stock init* is what transformers makes"
        " from the config, where the untrained attention mixes neighbouring tokens more strongly"
        f" and so tells more about the domain.{short}\n\n{_table(header, rows)}\n\n"
        "Domain of a window of 256 tokens, told from its expert histogram alone (nearest centroid;"
        " centroids from the first half of each domain's windows, judged on the second; chance is"
        f" 5.3%): **{100 * routing['window_accuracy']:.1f}%**, random-init"
        f" {100 * routing['window_accuracy_random_init']:.1f}%, stock init"
        f" {100 * routing['window_accuracy_stock_init']:.1f}%.\n"
    )


def _harm(harm: dict[str, Any]) -> str:
    rows = (
        (
            f"{row['layer']}/{row['expert']}",
            row["domain"],
            f"{row['own']:+.3f} ± {row['own_error']:.3f}",
            f"{row['others_mean']:+.4f}",
            f"{row['next_domain']} {row['next']:+.3f}",
        )
        for row in harm["measured"]
    )
    header = (
        "layer/expert",
        "domain hurt most",
        "its loss, nats a token",
        "mean of the others",
        "hurt next",
    )
    strict = sum(row["next"] <= harm["threshold_others"] for row in harm["specific"])
    return (
        "## Taking an expert away\n\nOne expert is masked in its router, so that its tokens go to"
        f" the next best one. Of {harm['experts_scanned']} experts,"
        f" **{len(harm['specific'])}** were found that cost one domain at least"
        f" {harm['threshold_own']} nats a token and the others at most"
        f" {harm['threshold_others']} on average; {strict} of these cost no other domain more than"
        f" that. The table has the {len(harm['measured'])} experts that a scan of these found most"
        f" specific, on {harm['windows_per_domain']} windows a domain (± standard error over"
        f" windows).\n\n{_table(header, rows)}\n"
    )


def _samples(samples: dict[str, str]) -> str:
    text = "## Sample continuations\n\nTemperature 0.7, top-40, seed 0; not chosen.\n"
    for domain, sample in samples.items():
        body = sample.replace("```", "'''")
        text += f"\n{domain}:\n\n```text\n{body}\n```\n"
    return text


def write_card(figures: dict[str, Any], path: Path) -> None:
    """Write the card from the content of ``figures.json``."""
    shape = {name: figures[name] for name in ("layers", "experts", "top_k")}
    parts = [
        _INTRODUCTION,
        _ARCHITECTURE.format(parameters=figures["parameters"] / 1e6, **shape),
        _data(),
        _recipe(figures["training"]),
        _language(figures),
        _positions(figures["positions"]),
        _balance(figures["routing"]["layers"]),
        _information(figures["routing"]),
        _harm(figures["harm"]),
        _samples(figures["samples"]),
    ]
    path.write_text("\n".join(parts), encoding="utf-8")
