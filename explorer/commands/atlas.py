"""``python -m explorer atlas`` and ``prune``: what each expert is for, and which ones can go."""

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import duckdb
import pandas as pd

from capture.model.load import load_model, loading_bars
from capture.progress import Progress
from capture.store.records import Place
from capture.swap.losses import loss_change
from capture.swap.measure import sequence_losses
from explorer import writing
from explorer.commands import Output, run_file
from explorer.commands.compare import plain_table
from explorer.comparison.atlas import measure_atlas
from explorer.comparison.atlas_file import (
    ESTIMATES,
    EXACT,
    MANY,
    Atlas,
    agreement,
    read_atlas,
    reliability,
    with_news,
)
from explorer.comparison.compare import demo_run
from explorer.comparison.conditions.catalogue import make_condition
from explorer.comparison.conditions.condition import Applied, Subject
from explorer.comparison.conditions.expert_pruning import ExpertPruning
from explorer.comparison.conditions.pruned_checkpoint import write_pruned
from explorer.comparison.text_split import split_texts
from explorer.errors import ConditionError, ExplorerError
from explorer.run import open_run
from explorer.text import duration

SHOWN = 12  # experts in the table
MASK_VERSION = 1
LOADED_TOLERANCE = 1e-3  # nats a token between the masked model and the checkpoint


def run(options: argparse.Namespace) -> Output:
    """Measure an atlas, say what it shows, and write it as a file."""
    if options.out is not None and options.out.suffix not in (".json", ".parquet", ".duckdb"):
        raise ExplorerError(
            f"--out should end in .json, .parquet or .duckdb, got {options.out.name!r}."
        )
    last = ""

    def say(now: Progress) -> None:
        nonlocal last
        if not options.quiet and now.message != last:
            last = now.message
            done = "" if now.part is None else f" ({now.part:.0%} done)"
            sys.stderr.write(f"{last}{done}\n")

    run = _run(options.run)
    with open_run(run) as opened:
        n_experts = sum(site.n_experts for site in opened.sites)
    screen = options.screen or (n_experts > MANY and not options.exact)
    path = measure_atlas(
        run,
        model=options.model,
        tokens=options.tokens,
        seed=options.seed,
        screen=screen,
        check=options.check if screen else 0,
        progress=say,
    )
    atlas = read_atlas(path)
    if options.out is not None:
        writing.write_new(options.out, exported(atlas, options.out.suffix), what="Writing an atlas")
    return Output(f"{as_text(atlas)}\n\n{options.out or path}")


def _run(given: Path) -> Path:
    return demo_run() if str(given) == "demo" else run_file(given)


def as_text(atlas: Atlas) -> str:
    """Return what an atlas shows, for a terminal."""
    facts, way = atlas.facts, atlas.ways[0]
    rows = with_news(atlas.of(way))
    lines = [
        f"{len(rows)} experts, {facts['n_tokens']:,} tokens of {facts['n_texts']} texts "
        f"({facts['texts']}), loss of the whole model {facts['native_loss']:.3f} nats a token.",
        *(_estimated(facts, len(rows)) if way in ESTIMATES else ()),
        "",
        "Rank agreement of experts (Spearman): all layers / within a layer",
    ]
    for one in atlas.ways:
        found = reliability(atlas, one)
        lines.append(f"  {one}, halves of the texts: {found.overall:.3f} / {found.within:.3f}")
    for estimate in ESTIMATES if set(EXACT) & set(atlas.ways) else ():
        found = agreement(atlas, estimate, "removed")
        lines.append(f"  {estimate} with removed: {found.overall:.3f} / {found.within:.3f}")
    lines += ["", f"Most missed ({way}), nats a token"]
    most = rows.sort_values("loss_change", ascending=False).head(SHOWN)
    columns = ["layer", "expert_id", "load", "loss_change", "loss_margin", "over_control"]
    lines.append(plain_table(most[[*columns, "over_margin", "news"]]))
    for news in ("rare but needed", "busy but idle"):
        named = [f"L{r.layer}.E{r.expert_id}" for r in rows[rows["news"] == news].itertuples()]
        lines.append(f"{news.capitalize()}: {', '.join(named) or 'none'}")
    return "\n".join(lines)


def _estimated(facts: Mapping[str, Any], n_experts: int) -> list[str]:
    """Return what is known of an atlas that is only estimated."""
    lines = ["Estimated by one gradient; no expert's row is of a knock-out."]
    if facts.get("checked"):
        found = facts.get("checked_agreement")
        said = "–, all alike" if found is None else f"{found:.3f}"
        lines.append(
            f"{facts['checked']} experts drawn by chance were taken out: Fisher ranks them as "
            f"removing them does with a correlation of {said} (Spearman)."
        )
    if "exact_seconds" in facts:
        about = duration(facts["exact_seconds"])
        lines.append(f"Taking all {n_experts:,} out in two ways would take about {about}: --exact.")
    return lines


def exported(atlas: Atlas, suffix: str) -> bytes:
    """Return an atlas as the bytes of a JSON, Parquet or DuckDB file."""
    if suffix == ".parquet":
        return atlas.path.read_bytes()
    if suffix == ".json":
        rows = json.loads(atlas.rows.to_json(orient="records", double_precision=12))
        return (json.dumps({"facts": atlas.facts, "rows": rows}, indent=1) + "\n").encode()
    with TemporaryDirectory() as folder:
        path = Path(folder, "atlas.duckdb")
        with duckdb.connect(str(path)) as connection:
            tables = {"facts": pd.DataFrame([atlas.facts]), "atlas": atlas.rows}
            for name, table in tables.items():
                connection.register("incoming", table)
                connection.execute(f"CREATE TABLE {name} AS SELECT * FROM incoming")
                connection.unregister("incoming")
        return path.read_bytes()


def prune(options: argparse.Namespace) -> Output:
    """Choose the experts to drop; write them as a mask, and the model without them."""
    condition = make_condition(options.condition)
    if not isinstance(condition, ExpertPruning):
        raise ConditionError(
            f"A condition that prunes experts was expected, such as prune_atlas(keep=0.75) or "
            f"prune_reap, got {options.condition!r}."
        )
    if options.checkpoint is not None and options.checkpoint.exists():
        raise ConditionError(
            f"{options.checkpoint} exists already and is not overwritten. Choose another one."
        )
    path = _run(options.run)
    with open_run(path) as opened:
        name = opened.info["model"] if options.model is None else options.model
        with loading_bars(shown=False):
            loaded = load_model(name)
        split = split_texts(opened, loaded, fit_tokens=options.fit_tokens, tokens=options.tokens)
    subject = Subject.of(loaded.model, split.fit.sequences)
    applied = Applied()
    pruned = condition.choose(subject, applied)
    mask = mask_of(subject, pruned, model=str(name), condition=condition.label, how=applied.method)
    if options.out is not None:
        text = json.dumps(mask, indent=1) + "\n"
        writing.write_new(options.out, text.encode(), what="Writing a mask")
    texts = split.report.sequences
    whole = sequence_losses(loaded.model, texts)
    with condition.masked(subject, pruned):
        masked = sequence_losses(loaded.model, texts)
    change = loss_change(whole, masked)
    lines = [
        f"{condition.label}: {applied.method}",
        *(
            f"layer {layer}: without {', '.join(map(str, gone))}"
            for layer, gone in mask["pruned"].items()
        ),
        f"Loss on {split.report.source}: {whole.mean:.4f} whole, {masked.mean:.4f} without them "
        f"({change.change:+.4f} ± {change.margin:.4f} nats a token, 95%).",
    ]
    if options.checkpoint is not None:
        write_pruned(loaded, subject, pruned, options.checkpoint)
        with loading_bars(shown=False):
            again = load_model(options.checkpoint)
        found = sequence_losses(again.model, texts)
        lines.append(f"Loss of {options.checkpoint}, loaded again: {found.mean:.4f}.")
        if abs(found.mean - masked.mean) > LOADED_TOLERANCE:
            raise ConditionError(
                f"The checkpoint in {options.checkpoint} loads with a loss of {found.mean:.4f} "
                f"where the model without the experts has {masked.mean:.4f}: this family weighs "
                "experts in a way that cutting them changes. Use the mask instead."
            )
    lines += [str(out) for out in (options.out, options.checkpoint) if out is not None]
    return Output("\n".join(lines))


def mask_of(
    subject: Subject,
    pruned: Mapping[Place, Sequence[int]],
    *,
    model: str,
    condition: str,
    how: str,
) -> dict[str, Any]:
    """Return a pruning mask as JSON holds it: experts that go and stay, by layer.

    A layer with several routers has one entry for each, ``"LAYER.SITE"``.
    """
    several = any(site.info.site for site in subject.sites)
    gone, kept = {}, {}
    for site in subject.sites:
        info = site.info
        name = f"{info.layer}.{info.site}" if several else str(info.layer)
        gone[name] = sorted(pruned[info.layer, info.site])
        kept[name] = [e for e in range(info.n_experts) if e not in gone[name]]
    return {
        **{"format": "routescope expert mask", "version": MASK_VERSION, "model": model},
        **{"condition": condition, "method": how, "n_experts": subject.sites[0].info.n_experts},
        **{"pruned": gone, "kept": kept},
    }
