"""What a capture too large to try would cost, from what was measured on smaller ones."""

import argparse

from capture.bench import say
from capture.recorder.estimate import estimate, human_bytes
from capture.store import Level, SiteInfo

# rows/s of one writer: 100 million rows of 48 layers, 128 experts, top-8 (README, 2026-11-27)
WRITTEN = 1.85e6
LEVELS: tuple[Level, ...] = ("scores", "ids", "stats")


def arithmetic_options(parser: argparse.ArgumentParser) -> None:
    """Add what :func:`arithmetic` reads."""
    add = parser.add_argument
    add("--tokens", type=float, default=1e9, help="prompt and generated tokens in all")
    add("--layers", type=int, default=48, help="with routed experts")
    add("--experts", type=int, default=128)
    add("--top-k", type=int, default=8)
    add("--hidden", type=int, default=2048, help="width of a router's input")
    add("--processes", type=int, default=64, help="each with a GPU and a writer of its own")
    add("--tokens-per-second", type=float, default=10_000, help="of one process, without capture")
    add("--rows-per-second", type=float, default=WRITTEN, help="(token, layer) rows of one writer")
    add("--sample", type=int, default=50_000, help="tokens whose scores and inputs are kept")


def arithmetic(options: argparse.Namespace) -> None:
    """Work out bytes, hours and the writer's share of a capture by many processes."""
    tokens = int(options.tokens)
    sites = [
        SiteInfo(layer, 0, "", options.experts, options.top_k, 0, "softmax")
        for layer in range(options.layers)
    ]
    hours = tokens / options.processes / options.tokens_per_second / 3600
    rows = options.tokens_per_second * options.layers
    say(
        f"{tokens:,} tokens x {options.layers} layers x {options.experts} experts, top-"
        f"{options.top_k}, by {options.processes} processes of "
        f"{options.tokens_per_second:,.0f} tokens/s: {hours:.2f} h of the model alone, "
        f"{rows:,.0f} rows/s for a writer that does {options.rows_per_second:,.0f}."
    )
    say("| level | bytes a token | in all | of a process | a process writes | writer busy |")
    say("|---|---:|---:|---:|---:|---:|")
    for level in LEVELS:
        cost = estimate(
            n_tokens=tokens,
            sites=sites,
            hidden_size=options.hidden,
            level=level,
            sample_tokens=options.sample,
        )
        each = cost.bytes_per_token[level]
        # how fast scores are written was not measured
        busy = "" if level == "scores" else f"{rows / options.rows_per_second:.0%}"
        say(
            f"| {level} | {each:,.0f} | {human_bytes(cost.total_bytes)} "
            f"| {human_bytes(cost.total_bytes / options.processes)} "
            f"| {human_bytes(each * options.tokens_per_second)}/s "
            f"| {busy} |"
        )
    say(
        f"At levels stats and ids {human_bytes(cost.sample_bytes)} of it are the scores and inputs "
        f"of {cost.sample_tokens:,} sampled tokens."
    )
