"""``capture.recording``: a run file of whatever a model is called with inside a block."""

import contextlib
import logging
import os
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from capture.errors import CaptureError, ConfigError, PromptError, quoted
from capture.model.compiled import suspended
from capture.model.load import LoadedModel, load_model
from capture.model.selftest import attach
from capture.model.sites import Site
from capture.model.token_text import can_decode
from capture.paths import given_path
from capture.recorder.assemble import pair_sums
from capture.recorder.config import CaptureConfig
from capture.recorder.observe import PairCounter, group_sites
from capture.recorder.own_loop.listening import Failure, Listener, Sender, innermost
from capture.recorder.own_loop.rows import Pieces, describe, forward_rows
from capture.recorder.own_loop.steps import Declared, DeclareStep, OwnStep
from capture.recorder.own_loop.texts import Text, Texts
from capture.recorder.preparation import describe_run
from capture.recorder.sampling import plan_sample
from capture.recorder.transfer import Staging, WriterThread
from capture.store import RunWriter
from capture.store.records import RECORDED_LEVELS, Level

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

log = logging.getLogger(__name__)
HOW = {
    "source": "calls of the model in somebody's own loop",
    "beams": "Of beams, candidates and samples the texts that generate() returned are recorded.",
    "end": "An end token is recorded where the model read it; nothing after it is.",
    "phase": "Outside of generate() a token is generated where a call read it alone after others.",
}


class OwnRun:
    """A run that is being recorded.

    Attributes
    ----------
    path : Path
        The run file, once the block has ended.
    error : Exception or None
        What could not be followed; nothing is recorded from there on.
    """

    def __init__(self, path: Path, put: Any, failure: Failure) -> None:
        self.path = path
        self._put = put
        self._failure = failure

    @property
    def error(self) -> Exception | None:
        """What could not be followed."""
        return self._failure.error

    def prompts(self, prompts: Iterable[str | Mapping[str, Any]]) -> None:
        """Say what the next texts are, in the order of the rows of the calls that read them.

        Parameters
        ----------
        prompts : iterable of str or mapping
            Texts, or records with any of ``text``, ``domain`` and ``source``. A text that is not
            said is decoded from its tokens, where the tokenizer is known.

        Raises
        ------
        PromptError
            If one is neither.
        """
        said = [_declared(number, one) for number, one in enumerate(prompts, 1)]
        if self._failure.error is None:
            with self._failure.kept():
                self._put(DeclareStep(said))


def _declared(number: int, prompt: object) -> Declared:
    if isinstance(prompt, str):
        return Declared(text=prompt)
    fields = ("text", "domain", "source")
    if isinstance(prompt, Mapping) and set(prompt) <= set(fields):
        values = [prompt.get(name) for name in fields]
        if all(value is None or isinstance(value, str) for value in values):
            return Declared(*values)
    raise PromptError(
        f"Prompt {number}: a text or a record of text, domain and source was expected, got "
        f"{quoted(prompt)}."
    )


@contextmanager
def recording(
    model: Any,
    out: str | Path,
    *,
    level: Level = "ids",
    tokenizer: "PreTrainedTokenizerBase | None" = None,
    strict: bool = False,
) -> Iterator[OwnRun]:
    """Record whatever the model is called with inside the block, as a run file.

    Calls compute what they compute without, bit for bit. Every token that a model reads is
    recorded once, with its text, its position and whether the model had generated it; padding,
    what checkpointing runs again, rejected candidates, dropped beams and what fills a row after
    its end token are not.

    Parameters
    ----------
    model : PreTrainedModel
        Loaded, in training or evaluation mode; compiled, parallel, and with adapters as it is.
    out : str or Path
        The run file; it must not exist. Under ``torchrun`` the process's rank is put into its
        name, and each process records a part.
    level : {"stats", "ids", "scores"}
        As in :class:`capture.CaptureConfig`.
    tokenizer : tokenizer, optional
        For a model that does not know where its tokenizer lies.
    strict : bool
        Raise what cannot be followed where it happens, instead of once at the end.

    Yields
    ------
    OwnRun
        Its ``prompts`` says what the next texts are.

    Raises
    ------
    CaptureError
        At the start if the model or the file cannot work; at the end if a call could not be
        followed. What was recorded until then is kept, marked incomplete.
    """
    path = ranked(given_path(out, "the run file"))
    if level not in RECORDED_LEVELS[:3]:
        raise ConfigError(
            f"level must be one of {', '.join(RECORDED_LEVELS[:3])} in one's own loop, got "
            f"{quoted(level)}. Level attention is recorded by capture.record()."
        )
    if isinstance(model, nn.DataParallel):
        raise ConfigError(
            "A model in one place was expected, got DataParallel, which copies it at every call. "
            "Use DistributedDataParallel, or give the model inside."
        )
    loaded = take(model, tokenizer)
    sites = tested(loaded.model)
    config = CaptureConfig(level=level, sample_tokens=0)
    sample = plan_sample([], [], 0, 0)
    info = describe_run(loaded, config, sample)
    writer = RunWriter.create(path, info, [site.info for site in sites], [])
    book = _Book(writer, loaded, sites, level)
    failure = Failure(strict=strict)
    thread: WriterThread[OwnStep] = WriterThread(book.consume, idle=book.keep_up)
    staging = Staging()
    send = Sender(book.groups, level, thread.put, staging, thread.failed)
    listener = Listener(
        innermost(loaded.model), sites, failure, send, thread.put, staging, thread.failed
    )
    started = time.monotonic()
    run = OwnRun(path, thread.put, failure)
    theirs: BaseException | None = None
    try:
        with listener.open():
            yield run
    except BaseException as error:
        theirs = error
        raise
    finally:
        problem = _close(book, thread, failure, started, complete=theirs is None)
        if problem is not None and theirs is not None:
            theirs.add_note(str(problem))
    if problem is not None:
        raise problem


def _close(
    book: "_Book",
    thread: WriterThread[OwnStep],
    failure: Failure,
    started: float,
    *,
    complete: bool,
) -> CaptureError | None:
    """Finish the file; return what there is to complain of."""
    with failure.kept() if not failure.strict else contextlib.suppress(Exception):
        thread.close()
    error, writer = failure.error, book.writer
    try:
        book.settle()
        if not book.tokens:
            writer.discard()
            why = "" if error is None else f" {error}"
            return CaptureError(f"Nothing was recorded, and there is no {writer.out}.{why}")
        path = book.finish(time.monotonic() - started, complete=complete and error is None)
    except Exception as second:
        writer.abandon()
        return CaptureError(
            f"{error or second} What was recorded is in {writer.partial}. Close it with: python "
            f"-m capture recover '{writer.partial}'"
        )
    if error is None:
        return None
    return CaptureError(f"{error} The {book.tokens:,} tokens before are the incomplete run {path}.")


class _Book:
    """Writes texts that ended into the run file; on the writer's thread."""

    def __init__(
        self, writer: RunWriter, loaded: LoadedModel, sites: list[Site], level: Level
    ) -> None:
        self.writer = writer
        self.groups = group_sites(sites)
        self.tokens = self.texts = self.forwards = 0
        self._sites = sites
        self._level = level
        known = loaded.tokenizer
        self._pieces = Pieces(known) if known is not None and can_decode(known) else None
        self._follower = Texts(self._write)
        # at deeper levels pairs are counted from the rows
        self._pairs = PairCounter(sites, self.groups) if level == "stats" else None

    def consume(self, step: OwnStep) -> None:
        self._follower.consume(step)
        self.keep_up()

    def keep_up(self) -> None:
        """Commit what has waited long enough."""
        if self.writer.is_due:
            self.writer.flush()

    def _write(self, texts: list[Text]) -> None:
        if not texts:
            return
        prompts, pieces = describe(texts, self._pieces)
        self.writer.append_prompts(prompts)
        for kept in forward_rows(texts, prompts, pieces, self.texts, self.tokens, self._level):
            self.writer.append(kept.forward)
            self.forwards += 1
            if self._pairs is not None:
                self._pairs.add(kept.expert_ids())
        self.texts += len(texts)
        self.tokens += sum(len(text.tokens()) for text in texts)

    def settle(self) -> None:
        """Write what is still open."""
        self._follower.finish()
        if self._pairs is not None:
            self.writer.append_pairs(pair_sums(self._pairs.take()))

    def finish(self, seconds: float, *, complete: bool) -> Path:
        """Close the file."""
        notes: dict[str, Any] = {"forward_passes": self.forwards, "own_loop": HOW}
        choices = [choice for site in self._sites if (choice := site.choice()) is not None]
        if choices:
            notes["choice"] = choices
            notes["selection_bias"] = "Margins include the bias that routers add for the choice."
        factors = [site.after_sum() for site in self._sites if site.factor != 1]
        if factors:
            notes["factor_after_sum"] = factors
        return self.writer.finish(seconds=seconds, complete=complete, notes=notes)


def take(model: Any, tokenizer: "PreTrainedTokenizerBase | None") -> LoadedModel:
    """Return a loaded model as capture knows it, whatever mode it is in."""
    inside = model
    while isinstance(inside, nn.Module) and not hasattr(inside, "config"):
        deeper = innermost(inside)
        if deeper is inside:
            break
        inside = deeper
    with evaluating(inside):
        loaded = load_model(inside)
    return loaded if tokenizer is None else loaded._replace(tokenizer=tokenizer)


def tested(model: Any) -> list[Site]:
    """Find and test the sites of a model in whatever mode it is."""
    with evaluating(model), suspended(model), torch.autocast(_device_type(model), enabled=False):
        return attach(model)


def _device_type(model: Any) -> str:
    kind = str(model.device.type)
    return "cpu" if kind == "meta" else kind


@contextmanager
def evaluating(model: Any) -> Iterator[None]:
    """Put a model into evaluation mode while the block runs; every module is as before then."""
    if not isinstance(model, nn.Module):
        yield
        return
    training = [module for module in model.modules() if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True


def ranked(path: Path) -> Path:
    """Return the path of this process's part where torchrun started several processes."""
    size, rank = (os.environ.get(name, "") for name in ("WORLD_SIZE", "RANK"))
    if not (size.isdigit() and rank.isdigit()) or int(size) < 2:
        return path
    if f"rank{int(rank)}" in path.stem:
        return path
    return path.with_name(f"{path.stem}-rank{int(rank)}{path.suffix}")
