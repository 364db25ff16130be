"""One comparison from start to end: what is asked for, what is there already, what is missing."""

import datetime
import hashlib
import importlib.metadata
import json
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, NamedTuple

from torch import nn

from capture.errors import CaptureError, quoted
from capture.model.load import DEMO, LoadedModel, load_model, loading_bars
from capture.model.selftest import attach
from capture.paths import model_name
from capture.progress import Reporter
from capture.store.records import Place
from explorer.comparison.causality import Badges, badges
from explorer.comparison.fit import Fitted
from explorer.comparison.live import LiveModel, Outcome
from explorer.comparison.live_results import (
    RowSubject,
    card,
    choices,
    layer_rows,
    live_rows,
    text_rows,
    token_losses,
)
from explorer.comparison.matched_controls import controls_of
from explorer.comparison.oracle import last_layer_oracle
from explorer.comparison.replay import RecordedSplit, choice_rows, recorded_split, replay_router
from explorer.comparison.results_file import (
    CONDITION_TABLES,
    FORMAT_VERSION,
    SUFFIX,
    TableRows,
    empty_rows,
    open_comparison,
    write_comparison,
)
from explorer.comparison.text_split import recorded_texts, split_texts
from explorer.errors import ComparisonCancelled, ComparisonError, ExplorerError
from explorer.router_cards import SENSIBLE, RouterSpec, parse_router
from explorer.routers import ROUTERS, PartRouter, TrainedRouter
from explorer.routers.by_name import content_of, make_router, takes_seed
from explorer.routers.learning.training import TrainingCancelled
from explorer.run import Run

# Part of every file's key. Raise it when the same run, model and settings would give other numbers
# than before: a rule, a fit, a metric, a choice of texts. Not for a new router, words or speed.
RESULTS_VERSION = 2
BLOCK, BLOCKS = 2**16, 1024  # of a file of weights: bytes at a time, and how often
SAMPLED = 256  # values of each weight that are looked at


def source_fingerprint(model: str | Path | nn.Module, revision: str | None = None) -> str:
    """Return a short name for a model, without loading it where it is a folder.

    Parameters
    ----------
    model : str, Path or Module
        ``"demo"``, a folder, a Hugging Face id, or a loaded model.
    revision : str, optional
        Of the Hugging Face id, which is all that is known of its weights here.
    """
    if not isinstance(model, str | Path):
        return model_fingerprint(model)
    folder = DEMO if model == "demo" else Path(model).expanduser()
    found = hashlib.sha256()
    if not folder.is_dir():
        return hashlib.sha256(f"{model} {revision}".encode()).hexdigest()[:16]
    for path in sorted((*folder.glob("*.safetensors"), *folder.glob("config.json"))):
        found.update(f"{path.name} {path.stat().st_size}".encode())
        with path.open("rb") as file:
            for at in range(0, path.stat().st_size, max(BLOCK, path.stat().st_size // BLOCKS)):
                file.seek(at)
                found.update(file.read(BLOCK))
    return found.hexdigest()[:16]


def model_fingerprint(model: nn.Module) -> str:
    """Return a short name for a model's weights, from values spread over each of them."""
    found = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        found.update(f"{name} {tuple(parameter.shape)} {parameter.dtype}".encode())
        if parameter.device.type != "meta":
            flat = parameter.detach().flatten()
            few = flat[:: max(1, flat.numel() // SAMPLED)][: SAMPLED + 1]
            found.update(few.double().cpu().numpy().tobytes())
    return found.hexdigest()[:16]


def key_of(facts: dict[str, Any]) -> str:
    """Return the part of a file's name that says what it depends on."""
    text = json.dumps(facts, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def fingerprint(parts: Iterable[object]) -> str:
    """Return a short name for what one router's rows depend on."""
    return hashlib.sha256(repr(tuple(parts)).encode()).hexdigest()[:16]


Mode = Literal["replay", "live", "live-layer"]


@dataclass(frozen=True)
class Settings:
    """What the numbers of a comparison depend on, beside run, model and routers.

    Attributes
    ----------
    tokens, fit_tokens : int
        At most so many to report on, and to fit on.
    seed : int
        Chooses texts and splits; routers have seeds of their own.
    skip : {"block", "layer"}
        What rules about layers skip: the MoE block, or the whole layer.
    validation : bool
        Whether reported on a part of the fit split, on which settings are chosen.
    """

    tokens: int = 10_000
    fit_tokens: int = 20_000
    seed: int = 0
    skip: Literal["block", "layer"] = "block"
    validation: bool = False

    def __post_init__(self) -> None:
        """Refuse what cannot work."""
        if self.tokens < 2 or self.fit_tokens < 2:
            raise ComparisonError(
                f"At least 2 tokens are needed to report on and to fit on, got {self.tokens} and "
                f"{self.fit_tokens}."
            )
        if self.skip not in ("block", "layer"):
            raise ComparisonError(f"Expected skip 'block' or 'layer', got {quoted(self.skip)}.")

    def as_dict(self) -> dict[str, Any]:
        """Return the settings by name."""
        return asdict(self)


class Unit(NamedTuple):
    """One router with one seed in one mode: what is computed at a time, and found again."""

    spec: RouterSpec
    seed: int | None
    mode: Mode

    @property
    def name(self) -> tuple[str, int | None, str]:
        """Router, seed and mode as the tables write them."""
        return self.spec.label, self.seed, self.mode


def read_specs(routers: Sequence[str] | None) -> list[RouterSpec]:
    """Return routers by name, the sensible set for None, each once.

    Raises
    ------
    UnknownNameError
        If there is no such router.
    RouterError
        If a name cannot be read.
    """
    specs = [parse_router(text) for text in (SENSIBLE if routers is None else routers)]
    if not specs:
        raise ComparisonError(f"Expected at least one router. There are: {', '.join(ROUTERS)}.")
    for spec in specs:
        _ = ROUTERS[spec.name]
    return list({spec.label: spec for spec in specs}.values())


def units_of(
    specs: Sequence[RouterSpec], *, modes: Sequence[Mode], seeds: Sequence[int]
) -> list[Unit]:
    """Return what there is to compute, router after router."""
    if not seeds:
        raise ComparisonError("Expected at least one seed, got none.")
    return [
        Unit(spec, seed, mode)
        for spec in specs
        for seed in (seeds if takes_seed(spec) else (None,))
        for mode in modes
    ]


Stop = Callable[[], bool]
PACKAGES = ("torch", "transformers", "numpy", "scikit-learn", "duckdb")
NATIVE = {"router": "native", "seed": None, "mode": "live"}


class Session:
    """Computes the units that a comparison file lacks, and writes it after each.

    Parameters
    ----------
    run : Run
    settings : Settings
    model : str, Path or PreTrainedModel
        What live units run on; loaded when the first of them comes.
    controls, timed : bool
        Whether routers get random controls, and whether they are timed.
    folder : Path
        Where the file goes.
    reporter : Reporter
    cancelled : callable
        Asked between forward passes.
    """

    def __init__(
        self,
        run: Run,
        settings: Settings,
        model: Any,
        *,
        controls: bool,
        timed: bool,
        folder: Path,
        reporter: Reporter,
        cancelled: Stop,
    ) -> None:
        self.run, self.settings, self.model = run, settings, model
        self.controls, self.timed = controls, timed
        self.reporter, self.cancelled = reporter, cancelled
        self.model_fingerprint = source_fingerprint(model, run.info["revision"])
        facts = {
            "run": run.fingerprint,
            "model": self.model_fingerprint,
            "version": RESULTS_VERSION,
            **settings.as_dict(),
        }
        self.path = folder / f"{run.path.stem}.{key_of(facts)}{SUFFIX}"
        self.rows: TableRows = empty_rows()
        if self.path.is_file():
            with open_comparison(self.path) as known:
                self.rows = known.records()
        self._live_model: LiveModel | None = None
        self._fitted: tuple[RouterSpec, int | None, Fitted] | None = None
        self._last_badges: tuple[RouterSpec, int | None, Badges] | None = None

    def missing(self, units: Sequence[Unit]) -> list[Unit]:
        """Return the units whose rows are not in the file yet."""
        known = {
            (u["router"], u["seed"], u["mode"]): u["fingerprint"]
            for u in self.rows["units"]
            if u["error"] is None
        }
        return [unit for unit in units if known.get(unit.name) != self._fingerprint(unit)]

    def compute(self, units: Sequence[Unit]) -> None:
        """Compute units one by one; what one of them cannot do is noted, and the others go on."""
        if any(unit.mode != "replay" for unit in units):
            try:
                _ = self.live  # a model that cannot be loaded fails once, not for every router
            except ComparisonCancelled:
                raise self._stopped() from None
        self.reporter.enter("comparing", total=len(units))
        try:
            for unit in units:
                self._compute_one(unit)
        finally:
            # whatever ended it, Ctrl-C included, what is finished is kept
            if self.rows["units"]:
                done = {(u["router"], u["seed"], u["mode"]) for u in self.rows["units"]}
                self._write(complete=all(unit.name in done for unit in units))

    def oracle(self) -> None:
        """Measure the oracle of the last layer, unless the file has it."""
        if self.rows["oracle"]:
            return

        def told(done: int, total: int) -> None:
            self.reporter.at(f"oracle of the last layer: set {done} of {total}")

        try:
            self.rows["oracle"] = last_layer_oracle(self.live, seed=self.settings.seed, told=told)
        except (ComparisonCancelled, TrainingCancelled):
            raise self._stopped() from None
        self._write(complete=True)

    def _compute_one(self, unit: Unit) -> None:
        if self.cancelled():
            raise self._stopped()
        seed = "" if unit.seed is None else f", seed {unit.seed}"
        self.reporter.at(f"{unit.spec.label}{seed}: {unit.mode}")
        found = empty_rows()
        error = None
        try:
            self._compute(unit, found)
        except (ComparisonCancelled, TrainingCancelled):
            raise self._stopped() from None
        except (ExplorerError, CaptureError) as problem:
            found, error = empty_rows(), str(problem)
            self.reporter.note(f"{unit.spec.label} ({unit.mode}): {error}")
        self._store(unit, found, error)
        self.reporter.reach(self.reporter.done + 1)

    def _stopped(self) -> ComparisonCancelled:
        if not self.rows["units"]:
            return ComparisonCancelled("Stopped before the first router was finished.")
        return ComparisonCancelled(
            f"Stopped. What was finished is in {self.path.name}; the same comparison again does "
            "only the rest.",
            self.path,
        )

    def _fingerprint(self, unit: Unit) -> str:
        code = content_of([unit.spec.name])
        live = () if unit.mode == "replay" else (self.controls, self.timed)
        return fingerprint((unit.spec.label, code, *live))

    def _compute(self, unit: Unit, found: TableRows) -> None:
        if unit.mode == "replay":
            self._replay(unit, found)
            return
        live = self.live
        fitted = self._fit(unit.spec, unit.seed)
        found["routers"].append(card(unit.spec.label, fitted.router))
        found_badges = self._badges(fitted, unit)
        subject = RowSubject(unit.spec.label, unit.seed, fitted, found_badges)
        if unit.mode == "live":
            self._live(subject, live, found)
        else:
            for key in sorted(fitted.routers):
                self._live_layer(subject, live, found, key)

    def _replay(self, unit: Unit, found: TableRows) -> None:
        router = make_router(unit.spec, seed=unit.seed)
        found["routers"].append(card(unit.spec.label, router))
        split, text_ids = self._recorded
        replayed = replay_router(unit.spec.label, router, split)
        own = {"seed": unit.seed, "condition": "base", "part": "expert"}
        found["results"] += [{**row, **own} for row in replayed.rows]
        found["domains"] += [{**row, "seed": unit.seed} for row in replayed.domains]
        named = {"router": unit.spec.label, "seed": unit.seed}
        found["choices"] += choice_rows(named, split, replayed.decisions, text_ids)

    @cached_property
    def _recorded(self) -> tuple[RecordedSplit, dict[int, int]]:
        """What the run recorded, and the text_id of the prompts that are looked at one by one."""
        split = recorded_split(self.run, seed=self.settings.seed)
        text_ids, texts = recorded_texts(self.run, next(iter(split.tokens.values())))
        if not any(row["mode"] == "replay" for row in self.rows["texts"]):
            own = {at: inputs.decision() for at, inputs in split.held_out.items()}
            self.rows["texts"] += texts
            self.rows["choices"] += choice_rows({**NATIVE, "mode": "replay"}, split, own, text_ids)
        return split, text_ids

    def _live(self, subject: RowSubject, live: LiveModel, found: TableRows) -> None:
        fitted = subject.fitted
        outcome = live.run(fitted)
        timed = live.time(fitted) if self.timed else None
        live_rows(found, live, subject, outcome, timed=timed, counted=live.count(fitted))
        found["curves"] += [{**row, **subject.unit} for row in fitted.curves]
        for beside in self._controls(subject, live, outcome, found):
            live_rows(found, live, beside, live.run(beside.fitted))

    def _live_layer(
        self, subject: RowSubject, live: LiveModel, found: TableRows, key: Place
    ) -> None:
        fitted, only = subject.fitted, [key]
        outcome = live.run(fitted, only=only)
        timed = live.time(fitted, only) if self.timed else None
        counted = live.count(fitted, only)
        layer_rows(found, live, subject, outcome, key, timed=timed, counted=counted)
        for beside in self._controls(subject, live, outcome, found, only=key):
            layer_rows(found, live, beside, live.run(beside.fitted, only=only), key)

    def _controls(
        self,
        subject: RowSubject,
        live: LiveModel,
        outcome: Outcome,
        found: TableRows,
        *,
        only: Place | None = None,
    ) -> list[RowSubject]:
        """Return the random controls of a router's run, whose cards are added."""
        if not self.controls:
            return []
        label, seed = subject.label, subject.seed
        beside = controls_of(label, subject.fitted, outcome, live, seed or 0, only=only)
        cards = {row["router"]: row for row in found["routers"]}
        for one in beside:
            cards[one.label] = card(one.label, one.fitted.router, control=one.kind, of=label)
        found["routers"] = list(cards.values())
        return [
            RowSubject(one.label, seed, one.fitted, Badges(True, False), one.kind, label)
            for one in beside
        ]

    def _badges(self, fitted: Fitted, unit: Unit) -> Badges:
        """Find out what a router looks at, once where the unit before was the same one."""
        known = (unit.spec, unit.seed)
        if self._last_badges is None or self._last_badges[:2] != known:
            found = badges(self.live.model, self.live.sites, fitted, self.live.rules(fitted))
            self._last_badges = (*known, found)
        return self._last_badges[2]

    def _fit(self, spec: RouterSpec, seed: int | None) -> Fitted:
        """Fit a router, or take it again where the unit before was the same in another mode."""
        if self._fitted is None or self._fitted[:2] != (spec, seed):
            self._fitted = (spec, seed, self.live.data.fit(spec, seed))
        return self._fitted[2]

    @property
    def live(self) -> LiveModel:
        """The loaded model, with the unchanged model's own run."""
        if self._live_model is None:
            self.reporter.enter("loading", "loading the model")
            with loading_bars(shown=False):
                loaded: LoadedModel = load_model(self.model, revision=self._revision)
            sites = attach(loaded.model)
            split = split_texts(
                self.run,
                loaded,
                fit_tokens=self.settings.fit_tokens,
                tokens=self.settings.tokens,
                seed=self.settings.seed,
                validation=self.settings.validation,
            )
            self.reporter.enter("loading", "measuring the unchanged model")
            self._live_model = LiveModel(
                loaded,
                sites,
                split,
                skip=self.settings.skip,
                seed=self.settings.seed,
                cancelled=self.cancelled,
            )
            self._describe(self._live_model)
        return self._live_model

    @property
    def _revision(self) -> str | None:
        local = not isinstance(self.model, str) or self.model == "demo"
        return None if local else self.run.info["revision"]

    def _describe(self, live: LiveModel) -> None:
        """Keep what the comparison says of model and texts, and the unchanged model's choices."""
        info, fit = live.sites[0].info, live.data.texts
        whole = live.cost(live.native, None)
        parameter = next(iter(live.model.parameters()))
        self._facts = {
            "architecture": type(live.model).__name__,
            "dtype": str(parameter.dtype).removeprefix("torch."),
            "device": str(parameter.device),
            "n_layers": len({site.info.layer for site in live.sites}),
            "n_experts": info.n_experts,
            "top_k": info.top_k,
            "fit_source": fit.source,
            "fit_sequences": len(fit.sequences),
            "fit_tokens": fit.n_tokens,
            "report_source": live.report.source,
            "report_sequences": len(live.report.sequences),
            "report_tokens": live.report.n_tokens,
            "native_loss": live.native.per_sequence.mean,
            "head_flops_share": live.flops.head / whole.flops,
            "expert_flops_share": whole.expert_flops / whole.flops,
        }
        if not any(row["mode"] == "live" for row in self.rows["texts"]):
            self.rows["texts"] += text_rows(live)
            self.rows["choices"] += choices(live, NATIVE, live.native)
            self.rows["token_losses"] += token_losses(live, NATIVE, live.native)

    def _store(self, unit: Unit, found: TableRows, error: str | None) -> None:
        """Put a unit's rows in the place of its old ones."""
        label, seed, mode = unit.name
        own = {label, *(row["router"] for row in found["routers"])}
        own |= {r["router"] for r in self.rows["routers"] if r["control_of"] == label}
        for table, rows in self.rows.items():
            if table in ("comparison", "texts", "oracle", *CONDITION_TABLES):
                continue
            if table == "routers":
                fresh = {row["router"] for row in found["routers"]}
                kept = [row for row in rows if row["router"] not in fresh]
            elif table == "curves":
                stale = (label, seed) if mode == "live" else None
                kept = [row for row in rows if (row["router"], row["seed"]) != stale]
            elif (label, mode) == ("native", "live") and table in ("choices", "token_losses"):
                kept, found[table] = rows, []  # the unchanged model's own are there
            else:
                kept = [
                    row
                    for row in rows
                    if not (row["router"] in own and row["seed"] == seed and row["mode"] == mode)
                ]
            self.rows[table] = [*kept, *found[table]]
        entry = {"router": label, "seed": seed, "mode": mode, "error": error}
        self.rows["units"].append({**entry, "fingerprint": self._fingerprint(unit)})
        # a file grows with its rows: writing it takes a small part of the time at most
        begun = time.monotonic()
        if begun - self._written_at > 20 * self._write_seconds:
            self._write(complete=False)
            self._written_at = time.monotonic()
            self._write_seconds = self._written_at - begun

    _written_at = _write_seconds = 0.0
    _facts: dict[str, Any]

    def _write(self, *, complete: bool) -> None:
        known = self.rows["comparison"][0] if self.rows["comparison"] else {}
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        packages = {name: importlib.metadata.version(name) for name in PACKAGES}
        row = {
            **known,
            **getattr(self, "_facts", {}),
            "format_version": FORMAT_VERSION,
            "created_at": known.get("created_at") or now,
            "run_name": self.run.path.stem,
            "run_fingerprint": self.run.fingerprint,
            "model": model_name(str(self.run.info["model"])),
            "model_fingerprint": self.model_fingerprint,
            "seed": self.settings.seed,
            "settings": json.dumps(self.settings.as_dict()),
            "packages": json.dumps(packages),
            "complete": complete,
        }
        self.rows["comparison"] = [row]
        write_comparison(self.path, self.rows)


def can_replay(spec: RouterSpec) -> bool:
    """Whether a router can be replayed: it chooses experts, and needs no model to learn on."""
    router = make_router(spec)
    return not isinstance(router, PartRouter | TrainedRouter)
