"""One capture from the model to the closed file: load, test, estimate, record, check, close."""

import contextlib
import logging
import os
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from capture.errors import CaptureCancelled, CaptureError
from capture.interrupts import Interrupts, Terminated
from capture.model.compiled import compiled, default_compiler, suspended
from capture.model.forward import Head, Runner
from capture.model.hooks import tap
from capture.model.inputs import vocabulary
from capture.model.load import LoadedModel, load_model, loading_bars
from capture.model.selftest import attach, probe_tokens
from capture.model.sites import Site
from capture.model.token_text import can_decode, has_offsets
from capture.model.tokens import tokenize
from capture.progress import Reporter
from capture.prompts import PromptList
from capture.recorder import preparation
from capture.recorder.assemble import Assembler, Step
from capture.recorder.config import CaptureConfig
from capture.recorder.estimate import check_space
from capture.recorder.loop import HiddenRows, Plan, Recording
from capture.recorder.observe import group_sites
from capture.recorder.sampling import plan_sample
from capture.recorder.transfer import WriterThread
from capture.store import PromptInfo, RunWriter

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
) -> Path:
    """Load the model and record; see :func:`capture.record`, which checks what it is given."""
    loaded = _load(model, config, tokenizer, reporter)
    with suspended(loaded.model) as was_compiled:
        if loaded.compiler is None and (was_compiled or config.compile):
            loaded = loaded._replace(compiler=default_compiler)
        return _capture(loaded, given, out, config, reporter, stop, started)


def _capture(
    loaded: LoadedModel,
    given: PromptList,
    out: Path,
    config: CaptureConfig,
    reporter: Reporter,
    stop: Stopper,
    started: float,
) -> Path:
    """Record with a model that is loaded, and not compiled yet."""
    prompts = tokenize(
        given,
        loaded.tokenizer,
        vocab_size=vocabulary(loaded.model),
        max_length=preparation.max_length(loaded, config),
        chat_template=config.chat_template,
        answers=config.generate > 0,
    )
    reporter.enter("self-test", "Testing that every router can be tapped.")
    sites = attach(loaded.model)
    sample = plan_sample(
        [p.domain for p in prompts],
        [len(p.ids) for p in prompts],
        config.sample_tokens,
        config.seed,
    )
    attention = preparation.plan_attention(prompts, sites, loaded, config)
    cost = preparation.cost_of(prompts, sites, loaded, config, sample, attention)
    check_space(cost, out)
    if stop.is_cancelled():
        raise CaptureCancelled(f"Cancelled before anything was recorded; there is no {out}.")
    info = preparation.describe_run(loaded, config, sample, attention)
    rows = [PromptInfo(p.text, p.domain, p.source, len(p.ids), p.truncated) for p in prompts]
    plan = preparation.plan_recording(prompts, sample, loaded, config, attention, sites)
    layers = attention.found.layers if attention is not None else ()
    writer = RunWriter.create(out, info, [site.info for site in sites], rows, layers)
    try:
        session = _Session(loaded, sites, plan, writer, reporter, attention)
        session.seconds_before = time.monotonic() - started
        session.notes = {"prompts": given.notes} if given.notes else {}
        reporter.enter("recording", " ".join(cost.lines()), total=cost.tokens)
    except BaseException:
        writer.discard()
        raise
    return session.run(stop)


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
            device=config.device,
            trust_remote_code=config.trust_remote_code,
            allow_pickle=config.allow_pickle,
        )
    return loaded if tokenizer is None else loaded._replace(tokenizer=tokenizer)


class _Session:
    """The recording of one run, from the first forward pass to the closed file."""

    def __init__(
        self,
        loaded: LoadedModel,
        sites: list[Site],
        plan: Plan,
        writer: RunWriter,
        reporter: Reporter,
        attention: preparation.AttentionPlan | None = None,
    ) -> None:
        self.loaded = loaded
        self.sites = sites
        self.plan = plan
        self.writer = writer
        self.reporter = reporter
        self.seconds_before = 0.0
        self.notes: dict[str, Any] = {}
        self.groups = group_sites(sites)
        self.attention = attention
        self.assembler = Assembler(
            append=writer.append,
            append_pairs=writer.append_pairs,
            append_attention=writer.append_attention,
            attention=attention.taps if attention is not None else None,
            prompts=plan.prompts,
            tokenizer=loaded.tokenizer if can_decode(loaded.tokenizer) else None,
        )

    def run(self, stop: Stopper) -> Path:
        """Record, and close the file whatever happens; see :func:`record`."""
        started = time.monotonic()
        thread: WriterThread[Step] = WriterThread(self._consume, idle=self._keep_up)
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

    def _consume(self, step: Step) -> None:
        self.assembler.consume(step)
        self._keep_up()

    def _keep_up(self) -> None:
        """Commit what has waited long enough; on the writer's thread."""
        if self.writer.is_due:
            self.assembler.settle()
            self.writer.flush()

    def _close(self, thread: WriterThread[Step], started: float, why: BaseException | None) -> Path:
        """Store what is still on its way, and finish the file."""
        self.reporter.enter("writing", f"Closing {self.writer.out}.")
        thread.close()
        self.assembler.flush()
        if why is not None and not self.assembler.forwards:
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
        return f"{self.assembler.prompt_tokens + self.assembler.generated_tokens:,} tokens"

    def _record(self, thread: WriterThread[Step], stop: Stopper) -> None:
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
                sites=self.sites,
                groups=self.groups,
                plan=self.plan,
                thread=thread,
                advance=lambda: self.reporter.reach(self.writer.stored_tokens),
                check=stop.check,
                attention=self.attention.taps if self.attention is not None else None,
            ).run()

    def _check_counts(self) -> None:
        """Refuse to call a run complete that lacks a prompt token."""
        expected = sum(len(prompt.ids) for prompt in self.plan.prompts)
        if self.assembler.prompt_tokens != expected:
            raise CaptureError(
                f"{expected} prompt tokens were to be recorded, but "
                f"{self.assembler.prompt_tokens} were. Please report this."
            )

    def _finish(self, started: float, *, complete: bool) -> Path:
        notes: dict[str, Any] = self.notes | {
            "seconds_before_recording": round(self.seconds_before, 3),
            "forward_passes": self.assembler.forwards,
            "sampled_tokens": self.assembler.sampled_tokens,
        }
        notes |= self._text_notes()
        if self.plan.same_length:
            notes["padding"] = SAME_LENGTH
        if self.plan.cache_differs:
            notes["cache"] = CACHE_DIFFERS
        if any(site.selection_bias is not None for site in self.sites):
            notes["selection_bias"] = "Margins include the bias that routers add for the choice."
        choices = [choice for site in self.sites if (choice := site.choice()) is not None]
        if choices:
            notes["choice"] = choices
        factors = [site.after_sum() for site in self.sites if site.factor != 1]
        if factors:
            notes["factor_after_sum"] = factors
        if self.attention is not None and self.attention.without:
            notes["attention"] = self.attention.without
        return self.writer.finish(
            seconds=time.monotonic() - started, complete=complete, notes=notes
        )

    def _text_notes(self) -> dict[str, str]:
        """Say what is unusual about the text of tokens."""
        tokenizer, notes = self.loaded.tokenizer, {}
        if tokenizer is not None and not has_offsets(tokenizer):
            told = NO_TEXT if self.assembler.tokenizer is None else BY_DECODING
            notes["text"] = told.format(name=type(tokenizer).__name__)
        spelled = sum(prompt.spelled > 0 for prompt in self.plan.prompts)
        if spelled:
            notes["special_tokens"] = SPELLED.format(count=f"{spelled:,}")
        return notes

    def _keep(self, thread: WriterThread[Step], error: BaseException) -> None:
        """After a failure, commit what can be committed and leave the partial file."""
        if _is_same_file(self.writer.partial, self.writer.out):
            self.writer.partial.unlink()  # the run is whole and has its name
            return
        for step in (thread.close, self.assembler.flush, self.writer.flush):
            try:
                step()
            except Exception as second:
                if second is not error:
                    log.warning("While keeping what was recorded: %s", second)
        if not self.assembler.forwards:
            self.writer.discard()
            return
        self.writer.abandon()
        if "recover" not in str(error) and self.writer.partial.exists():
            error.add_note(
                f"What was recorded is in {self.writer.partial}. Close it with: "
                f"python -m capture recover '{self.writer.partial}'"
            )


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
