"""One capture from the model to the closed file: load, test, estimate, record, check, close."""

import contextlib
import importlib.metadata
import importlib.util
import logging
import os
import platform
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch

from capture.errors import CaptureCancelled, CaptureError, ConfigError
from capture.interrupts import Interrupts, Terminated
from capture.model.compiled import compiled, default_compiler, suspended
from capture.model.forward import Head, Runner, probe_tokens, start_of
from capture.model.hooks import tap
from capture.model.inputs import has_two_sides, input_device, vocabulary, width
from capture.model.load import LoadedModel, load_model, loading_bars, own_device
from capture.model.selftest import attach, heeds_padding, writes_as_it_reads
from capture.model.sites import Site, text_config
from capture.model.token_text import can_decode, has_offsets
from capture.model.tokens import TokenizedPrompt, tokenize
from capture.progress import Reporter
from capture.prompts import PromptList
from capture.recorder.attention.layers import FoundAttention, attach_attention
from capture.recorder.attention.summary import AttentionOptions, AttentionTaps
from capture.recorder.config import CaptureConfig
from capture.recorder.engine import Ledger, senders_of
from capture.recorder.estimate import (
    Attended,
    AttentionSize,
    Estimate,
    Sample,
    check_space,
    choose_attended,
    estimate,
    plan_sample,
)
from capture.recorder.loop import ALONE, TWO_SIDES, CapturePlan, HiddenRows, PlannedTexts, Recording
from capture.recorder.parts import RunPart
from capture.recorder.transfer import WriterThread
from capture.store import PromptInfo, RunInfo, RunWriter
from capture.store.merge import PART
from kernels.dispatch import backend_for

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

log = logging.getLogger(__name__)

NO_TEXT = "The tokenizer {name} cannot decode, so the text of tokens is not known."
BY_DECODING = (
    "The tokenizer {name} gives no character offsets: the text of tokens was found by decoding."
)
SPELLED = (
    "{count} prompts spell out special tokens that the tokenizer adds by itself, such as the first "
    "of a chat template; those were not added once more."
)
SAME_LENGTH = (
    "The model does not heed padding, so only prompts of one length were decoded together."
)
CACHE_DIFFERS = (
    "With its cache the model computes otherwise than when it reads the text at once: generated "
    "tokens and their routing are those of its own generate()."
)
# padded tokens of a forward pass; on a CPU larger ones leave the caches, on a GPU smaller ones
# leave it idle
BATCH_TOKENS = {"cpu": 2048, "cuda": 16_384}
PACKAGES = ("torch", "transformers", "tokenizers", "numpy", "duckdb", "pyarrow", "numba")
KERNEL_PACKAGE = "triton"  # comes with torch for CUDA
OPS = ("gate", "coactivation")
ATTENTION_OPS = ("attention",)
CONTEXT_NAMES = ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length")


class _Cancelled(Exception):
    """The caller's ``cancel`` said so."""


class Stopper(NamedTuple):
    """What may end a capture early: a signal, or the caller's ``cancel``."""

    interrupts: Interrupts
    cancel: Callable[[], bool] | None = None

    def is_cancelled(self) -> bool:
        """Whether the caller says so."""
        return self.cancel is not None and self.cancel()

    def check(self) -> None:
        """Raise when the recording is to end."""
        if self.interrupts.last is not None:
            raise self.interrupts.last
        if self.is_cancelled():
            raise _Cancelled


def capture(
    model: "str | Path | PreTrainedModel",
    given: PromptList,
    out: Path,
    config: CaptureConfig,
    tokenizer: "PreTrainedTokenizerBase | None",
    reporter: Reporter,
    stop: Stopper,
    started: float,
    parts: Sequence[RunPart] = (),
) -> Path:
    """Load the model and record; see :func:`capture.record`, which checks what it is given.

    With ``parts``, each of them is recorded under its own name, and nothing is written to ``out``.
    """
    with prepared(model, given, config, tokenizer, reporter) as whole:
        if not parts:
            return whole.record(out, stop, started)
        for part in parts:
            whole.record_part(part, stop, started)
            started = time.monotonic()
        return parts[-1].path


@contextlib.contextmanager
def prepared(
    model: "str | Path | PreTrainedModel",
    given: PromptList,
    config: CaptureConfig,
    tokenizer: "PreTrainedTokenizerBase | None",
    reporter: Reporter,
) -> Iterator["Prepared"]:
    """Load the model, read the prompts with it, and test that it can be recorded."""
    loaded = _load(model, config, tokenizer, reporter)
    with suspended(loaded.model) as was_compiled:
        if loaded.compiler is None and (was_compiled or config.compile):
            loaded = loaded._replace(compiler=default_compiler)
        prompts = tokenize(
            given,
            loaded.tokenizer,
            vocab_size=vocabulary(loaded.model),
            max_length=max_length(loaded, config),
            chat_template=config.chat_template,
            answers=config.generate > 0,
        )
        reporter.enter("self-test", "Testing that every router can be tapped.")
        sites = attach(loaded.model, two_sides=True, alone=True)
        sample = plan_sample(
            [p.domain for p in prompts],
            [len(p.ids) for p in prompts],
            config.sample_tokens,
            config.seed,
        )
        attention = plan_attention(prompts, sites, loaded, config)
        notes: dict[str, Any] = {"prompts": given.notes} if given.notes else {}
        yield Prepared(loaded, sites, prompts, sample, attention, config, reporter, notes)


def _load(
    model: "str | Path | PreTrainedModel",
    config: CaptureConfig,
    tokenizer: "PreTrainedTokenizerBase | None",
    reporter: Reporter,
) -> LoadedModel:
    with loading_bars(shown=reporter.draws):
        loaded = load_model(
            model,
            revision=config.revision,
            dtype=config.dtype,
            device=config.device or (own_device() if isinstance(model, str | Path) else None),
            trust_remote_code=config.trust_remote_code,
            allow_pickle=config.allow_pickle,
        )
    return loaded if tokenizer is None else loaded._replace(tokenizer=tokenizer)


def max_length(loaded: LoadedModel, config: CaptureConfig) -> int | None:
    """Return how many tokens of a prompt fit, with room for what is generated."""
    options = text_config(loaded.model)
    sizes = [getattr(options, name, None) for name in CONTEXT_NAMES]
    context = next((size for size in sizes if isinstance(size, int) and size > 0), None)
    if context is None:
        return config.max_length
    if config.generate >= context:
        raise ConfigError(
            f"generate={config.generate} leaves no room for a prompt in the model's context of "
            f"{context} tokens. Choose at most {context - 1}."
        )
    return min(context - config.generate, config.max_length or context)


@dataclass(frozen=True)
class AttentionPlan:
    """What a capture at level attention settles before it starts.

    Attributes
    ----------
    found : FoundAttention
        Every layer, and those that are recorded.
    attended : Attended
        The prompts.
    taps : AttentionTaps
    size : AttentionSize
        For the estimate.
    """

    found: FoundAttention
    attended: Attended
    taps: AttentionTaps
    size: AttentionSize

    @property
    def without(self) -> str:
        """The layers without an attention map and why, for people; empty when there is none."""
        lines = [
            f"Layer {layer.layer} ({layer.kind}): {layer.reason}"
            for layer in self.found.layers
            if layer.reason is not None
        ]
        return " ".join(lines)


def plan_attention(
    prompts: list[TokenizedPrompt],
    sites: list[Site],
    loaded: LoadedModel,
    config: CaptureConfig,
) -> AttentionPlan | None:
    """Choose prompts and test layers for level attention; None at other levels.

    Raises
    ------
    ConfigError
        If no layer has attention that can be recorded, or one asked for has none.
    """
    if has_two_sides(loaded.model) and (config.level == "attention" or loaded.compiler):
        asked = "level='attention'" if config.level == "attention" else "compile"
        raise ConfigError(
            f"{asked} is for decoder-only models, and {type(loaded.model).__name__} is an "
            "encoder-decoder. Leave it out: its routers are recorded without."
        )
    if config.level != "attention":
        return None
    lengths = [len(prompt.ids) for prompt in prompts]
    domains = [prompt.domain for prompt in prompts]
    attended = choose_attended(domains, lengths, config.attention_prompts, config.seed)
    kept = [
        length for length, is_kept in zip(lengths, attended.is_attended, strict=True) if is_kept
    ]
    found = attach_attention(
        loaded.model,
        sites,
        longest=max(kept),
        layers=config.attention_layers,
        heads=config.attention_heads,
    ).checked()
    options = AttentionOptions(
        config.attention_bins, config.attention_every, config.attention_top_keys
    )
    size = AttentionSize(
        kept, len(found.sites), sum(len(site.heads) for site in found.sites), *options
    )
    return AttentionPlan(found, attended, AttentionTaps(found.sites, options), size)


class Prepared(NamedTuple):
    """A model that is ready to be recorded, its prompts, and what is kept besides their routing."""

    loaded: LoadedModel
    sites: list[Site]
    prompts: list[TokenizedPrompt]
    sample: Sample
    attention: AttentionPlan | None
    config: CaptureConfig
    reporter: Reporter
    notes: dict[str, Any]  # for ``run.notes``

    def record_part(self, part: RunPart, stop: Stopper, started: float) -> None:
        """Record the prompts of a part under its name, unless it is there meanwhile."""
        share = self._share(part.note.numbers)
        share.notes[PART] = part.note._asdict()
        with part.attempt() as path:
            share.record(path, stop, started)

    def _share(self, numbers: Sequence[int]) -> "Prepared":
        """Return the part with the prompts of these numbers, ascending; records stay of all."""
        lengths = [len(prompt.ids) for prompt in self.prompts]
        is_own = np.isin(np.arange(len(lengths)), numbers)
        sampled = self.sample.is_sampled[np.repeat(is_own, lengths)]
        attention = self.attention
        if attention is not None:
            attended = attention.attended
            own = attended._replace(is_attended=attended.is_attended[is_own])
            attention = replace(attention, attended=own)
        return self._replace(
            prompts=[self.prompts[number] for number in numbers],
            sample=self.sample._replace(is_sampled=sampled),
            attention=attention,
            notes=dict(self.notes),
        )

    def record(self, out: Path, stop: Stopper, started: float) -> Path:
        """Record one file."""
        loaded, sites, prompts, sample, attention, config, reporter, notes = self
        cost = cost_of(prompts, sites, loaded, config, sample, attention)
        check_space(cost, out)
        if stop.is_cancelled():
            raise CaptureCancelled(f"Cancelled before anything was recorded; there is no {out}.")
        info = describe_run(loaded, config, sample, attention)
        rows = [PromptInfo(p.text, p.domain, p.source, len(p.ids), p.truncated) for p in prompts]
        plan = plan_recording(prompts, sample, loaded, config, attention, sites)
        layers = attention.found.layers if attention is not None else ()
        writer = RunWriter.create(out, info, [site.info for site in sites], rows, layers)
        try:
            session = _Session(loaded, sites, plan, writer, reporter, attention, notes)
            session.seconds_before = time.monotonic() - started
            reporter.enter("recording", " ".join(cost.lines()), total=cost.tokens)
        except BaseException:
            writer.discard()
            raise
        return session.run(stop)


def cost_of(
    prompts: list[TokenizedPrompt],
    sites: list[Site],
    loaded: LoadedModel,
    config: CaptureConfig,
    sample: Sample,
    attention: AttentionPlan | None = None,
) -> Estimate:
    """Estimate the size of the run."""
    steps = config.generate + has_two_sides(loaded.model)
    n_tokens = sum(len(prompt.ids) for prompt in prompts) + steps * len(prompts)
    return estimate(
        n_tokens=n_tokens,
        sites=[site.info for site in sites],
        hidden_size=width(loaded.model),
        level=config.level,
        sample_tokens=int(sample.record["planned"]),
        n_domains=len({prompt.domain for prompt in prompts}),
        attention=attention.size if attention is not None else None,
    )


def plan_recording(
    prompts: list[TokenizedPrompt],
    sample: Sample,
    loaded: LoadedModel,
    config: CaptureConfig,
    attention: AttentionPlan | None = None,
    sites: list[Site] | None = None,
) -> CapturePlan:
    """Settle what the loop over batches needs to know; ``sites`` are needed for decoding."""
    start = start_of(loaded.model) if has_two_sides(loaded.model) else None
    alone = any(site.alone for site in sites or [])
    padded = start is None and not alone and len({len(prompt.ids) for prompt in prompts}) > 1
    budget = config.batch_tokens or BATCH_TOKENS.get(loaded.model.device.type, BATCH_TOKENS["cpu"])
    pad_id = getattr(text_config(loaded.model), "pad_token_id", None)
    return CapturePlan(
        prompts=prompts,
        batch_tokens=1 if alone else budget,
        sample=sample,
        level=config.level,
        generate=config.generate,
        pad_id=pad_id if isinstance(pad_id, int) and 0 <= pad_id < vocabulary(loaded.model) else 0,
        end_ids=_end_ids(loaded),
        attended=attention.attended.is_attended if attention is not None else None,
        start=start,
        same_length=config.generate > 0 and padded and not heeds_padding(loaded.model, sites or []),
        cache_differs=config.generate > 0 and not writes_as_it_reads(loaded.model, sites or []),
    )


def _end_ids(loaded: LoadedModel) -> tuple[int, ...]:
    """Return the tokens that end a text, from wherever the model says it."""
    generation = getattr(loaded.model, "generation_config", None)
    for owner in (generation, loaded.model.config, loaded.tokenizer):
        found = getattr(owner, "eos_token_id", None)
        if found is not None:
            return tuple(found) if isinstance(found, list | tuple) else (int(found),)
    return ()


def _version(package: str) -> str:
    """Return a package's version, from the package itself where it is loaded: that is faster."""
    version = getattr(sys.modules.get(package), "__version__", None)
    return version if isinstance(version, str) else importlib.metadata.version(package)


def describe_run(
    loaded: LoadedModel,
    config: CaptureConfig,
    sample: Sample,
    attention: AttentionPlan | None = None,
) -> RunInfo:
    """Return what is known of the run before its first token."""
    model = loaded.model
    place = model.device if model.device.type != "meta" else input_device(model)
    device = f"{place} (weights offloaded)" if model.device.type == "meta" else str(place)
    if place.type == "cuda":
        device = f"{device} ({torch.cuda.get_device_name(place)})"
    names = [*PACKAGES, *([KERNEL_PACKAGE] if importlib.util.find_spec(KERNEL_PACKAGE) else [])]
    ops = OPS if attention is None else OPS + ATTENTION_OPS
    chosen = {} if attention is None else {"attention": attention.attended.record}
    packages = {name: _version(name) for name in names}
    return RunInfo(
        model=loaded.name,
        revision=loaded.revision,
        architecture=type(model).__name__,
        dtype=str(model.dtype).removeprefix("torch."),
        device=device,
        level=config.level,
        vocab_size=vocabulary(loaded.model),
        hidden_size=width(loaded.model),
        backends={op: backend_for(op, place) for op in ops},
        packages={"python": platform.python_version(), **packages},
        config=config.to_json(),
        sample=sample.record if attention is None else sample.record | chosen,
    )


class _Session:
    """The recording of one run, from the first forward pass to the closed file."""

    def __init__(
        self,
        loaded: LoadedModel,
        sites: list[Site],
        plan: CapturePlan,
        writer: RunWriter,
        reporter: Reporter,
        attention: AttentionPlan | None = None,
        notes: dict[str, Any] | None = None,
    ) -> None:
        self.loaded = loaded
        self.sites = sites
        self.plan = plan
        self.writer = writer
        self.reporter = reporter
        self.seconds_before = 0.0
        self.notes = notes or {}
        self.attention = attention
        self.ledger = Ledger(writer, sites)
        self.texts = PlannedTexts(
            self.ledger,
            plan.prompts,
            loaded.tokenizer if can_decode(loaded.tokenizer) else None,
            attention.taps if attention is not None else None,
            goes_on=plan.start is None,
        )
        self.ledger.follower = self.texts

    def run(self, stop: Stopper) -> Path:
        """Record, and close the file whatever happens; see :func:`record`."""
        started = time.monotonic()
        thread: WriterThread[Any] = WriterThread(self.ledger.consume, idle=self.ledger.keep_up)
        why: BaseException | None = None
        try:
            try:
                self._record(thread, stop)
            except (KeyboardInterrupt, _Cancelled) as error:
                why = error
            with stop.interrupts.closing(self._say_closing):
                path = self._close(thread, started, why)
        except CaptureCancelled:
            raise
        except BaseException as error:
            self._keep(thread, error)
            raise
        if why is not None:
            raise CaptureCancelled(
                f"{_named(why)}: {self._counted()} were recorded and are kept as the incomplete "
                f"run {path}.",
                path,
            ) from why
        self.reporter.enter("done", f"{path}: {self._counted()} recorded.")
        return path

    def _close(self, thread: WriterThread[Any], started: float, why: BaseException | None) -> Path:
        """Store what is still on its way, and finish the file."""
        self.reporter.enter("writing", f"Closing {self.writer.out}.")
        thread.close()
        self.texts.finish()
        if why is not None and not self.ledger.forwards:
            self.writer.discard()
            raise CaptureCancelled(
                f"{_named(why)} before anything was recorded; nothing is kept."
            ) from why
        self.writer.flush()
        self.reporter.reach(self.writer.stored_tokens)
        if why is None:
            self._check_counts()
        return self._finish(started, complete=why is None)

    def _say_closing(self) -> None:
        self.reporter.enter(
            "writing",
            f"{self.writer.out} is being closed, which goes on; to stop at once, and leave it to "
            "python -m capture recover, interrupt once more.",
        )

    def _counted(self) -> str:
        return f"{self.ledger.tokens:,} tokens"

    def _record(self, thread: WriterThread[Any], stop: Stopper) -> None:
        hidden_rows = HiddenRows()
        model = self.loaded.model
        with (
            Head(model).open(probe_tokens(model)[:1]) as head,
            tap(self.sites, hidden_rows=hidden_rows) as taps,
            compiled(model, self.loaded.compiler),
            ExitStack() as stack,
        ):
            if self.attention is not None:
                stack.enter_context(self.attention.taps.open())
            Recording(
                runner=Runner(model, head),
                taps=taps,
                hidden_rows=hidden_rows,
                senders=senders_of(self.sites, self.plan.level, thread),
                plan=self.plan,
                advance=lambda: self.reporter.reach(self.writer.stored_tokens),
                check=stop.check,
                attention=self.attention.taps if self.attention is not None else None,
            ).run()

    def _check_counts(self) -> None:
        """Refuse to call a run complete that lacks a prompt token."""
        expected = sum(len(prompt.ids) for prompt in self.plan.prompts)
        if self.texts.prompt_tokens != expected:
            raise CaptureError(
                f"{expected} prompt tokens were to be recorded, but "
                f"{self.texts.prompt_tokens} were. Please report this."
            )

    def _finish(self, started: float, *, complete: bool) -> Path:
        notes: dict[str, Any] = self.notes | {
            "seconds_before_recording": round(self.seconds_before, 3),
            "sampled_tokens": self.texts.sampled_tokens,
        }
        notes |= self._text_notes()
        said = (
            ("padding", SAME_LENGTH, self.plan.same_length),
            ("batches", ALONE, any(site.alone for site in self.sites)),
            ("two_sides", TWO_SIDES, self.plan.start is not None),
            ("cache", CACHE_DIFFERS, self.plan.cache_differs),
        )
        notes |= {name: note for name, note, is_so in said if is_so}
        if self.attention is not None and self.attention.without:
            notes["attention"] = self.attention.without
        return self.ledger.finish(time.monotonic() - started, notes, complete=complete)

    def _text_notes(self) -> dict[str, str]:
        """Say what is unusual about the text of tokens."""
        tokenizer, notes = self.loaded.tokenizer, {}
        if tokenizer is not None and not has_offsets(tokenizer):
            told = NO_TEXT if self.texts.tokenizer is None else BY_DECODING
            notes["text"] = told.format(name=type(tokenizer).__name__)
        spelled = sum(prompt.spelled > 0 for prompt in self.plan.prompts)
        if spelled:
            notes["special_tokens"] = SPELLED.format(count=f"{spelled:,}")
        return notes

    def _keep(self, thread: WriterThread[Any], error: BaseException) -> None:
        """After a failure, commit what can be committed and leave the partial file."""
        if _is_same_file(self.writer.partial, self.writer.out):
            self.writer.partial.unlink()  # the run is whole and has its name
            return
        for step in (thread.close, self.texts.finish, self.writer.flush):
            try:
                step()
            except Exception as second:
                if second is not error:
                    log.warning("While keeping what was recorded: %s", second)
        if not self.ledger.forwards:
            self.writer.discard()
            return
        how = self.ledger.abandon()
        if "recover" not in str(error) and self.writer.partial.exists():
            error.add_note(how)


def _named(why: BaseException) -> str:
    """Return how a capture ended that did not come to its end."""
    if isinstance(why, Terminated):
        return "Terminated"
    return "Interrupted" if isinstance(why, KeyboardInterrupt) else "Cancelled"


def _is_same_file(one: Path, other: Path) -> bool:
    """Whether both names are there, of one file: a rename that was cut in half."""
    with contextlib.suppress(OSError):
        return os.path.samefile(one, other)
    return False
