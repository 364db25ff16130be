"""``capture.record``: what is asked for is checked, and then recorded."""

import inspect
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from capture.errors import PromptError, quoted
from capture.interrupts import remembered_interrupts
from capture.paths import given_path
from capture.progress import Progress, Reporter
from capture.prompts import STANDARD_INPUT, PromptSource, read_prompts
from capture.recorder.config import CaptureConfig
from capture.recorder.parts import is_whole, plan_parts, put_together, shard_of
from capture.store.files import check_new
from capture.store.merge import merged_from

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def record(
    model: "str | Path | PreTrainedModel",
    prompts: PromptSource,
    out: str | Path,
    *,
    tokenizer: "PreTrainedTokenizerBase | None" = None,
    progress: bool | Callable[[Progress], None] = True,
    cancel: Callable[[], bool] | None = None,
    **options: Any,
) -> Path:
    """Record the routing of a mixture-of-experts model on some prompts as a run file.

    Parameters
    ----------
    model : str, Path or PreTrainedModel
        ``"demo"``, a Hugging Face id, a local folder, or a loaded model in evaluation mode.
    prompts : str, Path or iterable
        ``"demo"``, ``"demo-fit"``, ``"demo-heldout"``; a file, a folder, a pattern or ``"-"``; a
        DataFrame, data set or table; or strings, token-id lists, conversations and records. See
        ``capture.prompts.read_prompts``.
    out : str or Path
        The run file; it must not exist. While recording, its name ends in ``.partial``.
    tokenizer : tokenizer, optional
        For a loaded model that does not know where its tokenizer lies.
    progress : bool or callable
        True draws a bar on standard error; a callable gets :class:`Progress` reports.
    cancel : callable, optional
        Asked before every forward pass; True ends the capture.
    **options
        As in :class:`capture.CaptureConfig`: ``level="scores"``, ``generate=32``, ...

    Returns
    -------
    Path
        ``out``. Of several processes the last one to end puts their parts together as ``out``;
        the others return the folder of the parts.

    Raises
    ------
    CaptureCancelled
        If ``cancel`` said so or Ctrl-C was pressed. What was recorded is closed as an incomplete
        run, whose path is the error's ``path``; None when there was nothing yet.
    CaptureError
        If an option, the prompts, the model or the file cannot work. Whatever fails after the
        first forward pass leaves ``OUT.partial`` for ``python -m capture recover``.
    """
    config = CaptureConfig(**options)
    if config.chat_template is not None:
        config = replace(config, chat_template=template_of(config.chat_template))
    path = given_path(out, "the run file")
    shard = shard_of(config.shard, path)
    # several bars would overwrite each other
    reporter = Reporter(
        False if progress is True and shard is not None and shard.rank else progress
    )
    with closing(reporter), remembered_interrupts() as interrupts:
        if shard is None:
            check_new(path)
        elif prompts == STANDARD_INPUT:
            raise PromptError(
                "Standard input goes to one process, and every one that records a share reads all "
                "prompts. Write them to a file."
            )
        given = read_prompts(
            prompts,
            text_column=config.text_column,
            domain_column=config.domain_column,
            encoding=config.encoding,
        )
        name = model if isinstance(model, str | Path) else type(model).__name__
        started = time.monotonic()
        loading = f"Loading {name} and {len(given):,} prompt{'s' * (len(given) != 1)}."
        reporter.enter("loading", " ".join([loading, *given.notes]))
        from capture.recorder.session import Stopper, capture  # torch takes seconds

        stop = Stopper(interrupts, cancel)
        if shard is None:
            return capture(model, given, path, config, tokenizer, reporter, stop, started)
        plan = plan_parts(str(name), given, config, path, shard.size)
        if merged_from(path) == plan[0].note.capture:
            reporter.enter("done", f"{path} is there already, of all {len(plan)} parts.")
            return path
        check_new(path)
        mine = [part for part in plan[shard.rank :: shard.size] if not is_whole(part)]
        if mine:
            config = replace(config, shard=None, parts=None)
            capture(model, given, path, config, tokenizer, reporter, stop, started, mine)
        reporter.enter("writing", f"Looking for the other parts of {path}.")
        return put_together(plan, path) or plan[0].path.parent


def template_of(given: str | Path) -> str:
    """Return a chat template, given as itself or as the file that holds it."""
    if isinstance(given, str) and ("{{" in given or "{%" in given):
        return given
    path = given_path(given, "the chat template", PromptError)
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8 text"
        raise PromptError(
            f"A file with a chat template in Jinja was expected, but {quoted(given)} cannot be "
            f"read: {reason}."
        ) from None


def _spelled_out(function: Callable[..., Path]) -> inspect.Signature:
    """Return the signature of ``record`` with every option, for ``help()`` and completion."""
    own = list(inspect.signature(function).parameters.values())[:-1]
    options = inspect.signature(CaptureConfig).parameters.values()
    return inspect.Signature([*own, *options], return_annotation=Path)


setattr(record, "__signature__", _spelled_out(record))  # noqa: B010  mypy forbids the assignment
