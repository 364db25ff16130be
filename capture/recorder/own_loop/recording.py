"""``capture.recording``: a run file of whatever a model is called with inside a block."""

import contextlib
import logging
import os
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from capture.errors import CaptureError, ConfigError, PromptError, quoted
from capture.model.compiled import suspended
from capture.model.inputs import vocabulary
from capture.model.load import LoadedModel, load_model
from capture.model.selftest import attach
from capture.model.sites import Site
from capture.model.token_text import REPLACEMENT, can_decode, decode, decode_pieces
from capture.paths import given_path
from capture.recorder.attention.layers import FoundAttention, attach_attention
from capture.recorder.attention.summary import (
    AttentionOptions,
    AttentionTaps,
    PromptRow,
    pack_attention,
)
from capture.recorder.config import CaptureConfig, RecordingOptions, described
from capture.recorder.engine import (
    Ledger,
    RowsOfCall,
    Segments,
    Sender,
    is_routed,
    next_losses,
    pair_sums,
)
from capture.recorder.estimate import Sample
from capture.recorder.observe import PairCounter, RealRows, group_sites
from capture.recorder.own_loop.call import Call, Declared, DeclareStep, OwnCall, OwnStep
from capture.recorder.own_loop.listening import CallListener, Failure, ObservedCall, innermost
from capture.recorder.own_loop.texts import ReadCall, Text, Texts
from capture.recorder.session import describe_run
from capture.recorder.transfer import Staging, WriterThread
from capture.store import RunWriter
from capture.store.records import ForwardRows, Phase, PromptInfo, TokenRows
from capture.store.schema import NO_TOKEN

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

log = logging.getLogger(__name__)
# options of a capture that mean something where somebody else calls the model
OPTIONS = tuple(
    one.name for one in described(RecordingOptions) if one.name not in ("level", "generate")
)
# an assistant's tokens are dropped one by one, of a single row
ASSISTED_TAIL = 32
WHY_FIRST = (
    "How many tokens a loop will read is not known before, so the sample is the first of them that "
    "calls of more than one token a text read."
)
WHY_FIRST_PROMPTS = (
    "How many texts a loop will read is not known before, so attention is kept for the first of "
    "them that one call reads from their start, a row each."
)
HOW = {
    "source": "calls of the model in somebody's own loop",
    "beams": "Of beams, candidates and samples the texts that generate() returned are recorded.",
    "end": "An end token is recorded where the model read it; nothing after it is.",
    "loss": "Of what a call put out logits for: in generate() no prompt, and the first tokens of "
    "a text as a model that keeps no cache reads it again have none.",
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
    tokenizer: "PreTrainedTokenizerBase | None" = None,
    strict: bool = False,
    **options: Any,
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
    tokenizer : tokenizer, optional
        For a model that does not know where its tokenizer lies.
    strict : bool
        Raise what cannot be followed where it happens, instead of once at the end.
    **options
        As in :class:`capture.CaptureConfig`: ``level="scores"``, ``sample_tokens`` (default 0) and
        those of level attention. Which tokens and texts are kept is settled as calls read them:
        the first ones.

    Yields
    ------
    OwnRun
        Its ``prompts`` says what the next texts are.

    Raises
    ------
    CaptureError
        At the start if an option, the model or the file cannot work; at the end if a call could not
        be followed. What was recorded until then is kept, marked incomplete.
    """
    wrong = options.keys() - {"level", *OPTIONS}
    if wrong:
        raise ConfigError(
            f"An option of one's own loop was expected (level, {', '.join(OPTIONS)}), got "
            f"{quoted(min(wrong))}. What else there is to choose is chosen by who calls the model."
        )
    config = CaptureConfig(**{"sample_tokens": 0, **options})
    path = ranked(given_path(out, "the run file"))
    if isinstance(model, nn.DataParallel):
        raise ConfigError(
            "A model in one place was expected, got DataParallel, which copies it at every call. "
            "Use DistributedDataParallel, or give the model inside."
        )
    loaded = take(model, tokenizer)
    sites = tested(loaded.model)
    attention = _attention_of(loaded.model, sites, config)
    info = describe_run(loaded, config, _sample(config))
    layers = attention.layers if attention is not None else ()
    writer = RunWriter.create(path, info, [site.info for site in sites], [], layers)
    failure = Failure(strict=strict)
    taps = None
    if attention is not None:
        kept = (config.attention_bins, config.attention_every, config.attention_top_keys)
        taps = AttentionTaps(attention.sites, AttentionOptions(*kept))
    ledger = Ledger(writer, sites)
    texts = ledger.follower = _OwnTexts(ledger, loaded, sites, config, taps)
    thread: WriterThread[Any] = WriterThread(ledger.consume, idle=ledger.keep_up)
    staging = Staging()
    sender = Sender(group_sites(sites), config.level, thread, staging)
    calls = _OwnCalls(sender, thread, config, taps)
    listener = CallListener(
        innermost(loaded.model), sites, failure, calls.end, staging=staging, stop=thread.failed
    ).telling(thread.put, calls.begin, calls.hidden_rows, vocabulary(loaded.model))
    started = time.monotonic()
    run = OwnRun(path, thread.put, failure)
    theirs: BaseException | None = None
    try:
        with listener.open(), contextlib.ExitStack() as stack:
            if taps is not None:
                stack.enter_context(taps.open(failure.kept))
            yield run
    except BaseException as error:
        theirs = error
        raise
    finally:
        problem = _close(texts, thread, failure, started, complete=theirs is None)
        if problem is not None and theirs is not None:
            theirs.add_note(str(problem))
    if problem is not None:
        raise problem


def _sample(config: CaptureConfig) -> Sample:
    """Return what the run file says of the sample, whose tokens calls will tell."""
    record: dict[str, Any] = {"requested": config.sample_tokens, "planned": config.sample_tokens}
    record |= {"seed": config.seed, "strata": [], "why": WHY_FIRST}
    if not config.sample_tokens:
        record["why"] = "No sample was asked for (sample_tokens=0)."
    if config.level == "attention":
        count = {"requested": config.attention_prompts, "planned": config.attention_prompts}
        record["attention"] = {**count, "strata": [], "why": WHY_FIRST_PROMPTS}
    return Sample(np.zeros(0, np.bool_), record)


def _attention_of(
    model: Any, sites: Sequence[Site], config: CaptureConfig
) -> FoundAttention | None:
    """Find and test the layers of level attention; None at other levels."""
    if config.level != "attention":
        return None
    with ready_to_test(model):
        return attach_attention(
            model,
            sites,
            longest=sys.maxsize,
            layers=config.attention_layers,
            heads=config.attention_heads,
        ).checked()


def _close(
    texts: "_OwnTexts",
    thread: WriterThread[Any],
    failure: Failure,
    started: float,
    *,
    complete: bool,
) -> CaptureError | None:
    """Finish the file; return what there is to complain of."""
    with failure.kept() if not failure.strict else contextlib.suppress(Exception):
        thread.close()
    error, ledger = failure.error, texts.ledger
    try:
        texts.finish()
        if not ledger.tokens:
            ledger.writer.discard()
            why = "" if error is None else f" {error}"
            return CaptureError(f"Nothing was recorded, and there is no {ledger.writer.out}.{why}")
        seconds = time.monotonic() - started
        path = ledger.finish(seconds, {"own_loop": HOW}, complete=complete and error is None)
    except Exception as second:
        return CaptureError(f"{error or second} {ledger.abandon()}")
    if error is None:
        return None
    return CaptureError(
        f"{error} The {ledger.tokens:,} tokens before are the incomplete run {path}."
    )


class _OwnCalls:
    """Sends the calls of somebody's loop, and settles what is kept of each before it runs."""

    def __init__(
        self,
        sender: Sender,
        thread: WriterThread[OwnStep],
        config: CaptureConfig,
        attention: AttentionTaps | None,
    ) -> None:
        self._sender = sender
        self._count = 0
        self._sample_left = config.sample_tokens
        self._attention = attention
        self._prompts_left = config.attention_prompts
        self._sampled: torch.Tensor | None = None
        self._attended: list[PromptRow] = []

    def hidden_rows(self) -> torch.Tensor | None:
        """Return the rows of the call whose router inputs are kept."""
        return self._sampled

    def begin(self, call: Call, is_new: bool) -> None:
        """Settle what is kept of a call; this waits for its mask while anything is left to keep."""
        self._sampled, self._attended = None, []
        if call.width == 1:
            return
        valid = call.valid
        if self._sample_left:
            real = torch.ones(call.rows, call.width) if valid is None else valid
            self._sampled = real.flatten().nonzero().flatten()[: self._sample_left]
            self._sample_left -= len(self._sampled)
        if self._attention is not None:
            packed = call.starts is not None and bool(call.starts[:, 1:].any())
            if self._prompts_left and is_new and not packed:
                self._attended = _whole_rows(call)[: self._prompts_left]
                self._prompts_left -= len(self._attended)
            self._attention.rows = self._attended

    def end(self, seen: ObservedCall) -> None:
        """Send one call."""
        call = seen.call
        keeps = seen.key is not None or seen.scope is not None
        tail = 0 if not keeps else ASSISTED_TAIL if call.rows == 1 else 1
        segments = Segments.of_columns(call.rows, call.width, tail)
        # elsewhere this would wait for the device, and texts of one row are apart all the same
        if call.starts is not None and call.starts.device.type == "cpu" and not keeps:
            segments = Segments.of_texts(call.starts.numpy())
        sampled, self._sampled = self._sampled, None
        rows = RealRows(
            rows=None,
            domain=torch.from_numpy(segments.of_row),
            n_domains=segments.total,
            valid=None if call.valid is None else call.valid.flatten(),
        )
        if sampled is not None:
            rows = rows._replace(sampled=sampled.cpu().numpy(), sampled_here=sampled)
        about = OwnCall(
            self._count, call.rows, call.width, seen.key, seen.scope, segments, self._attended
        )
        self._count += 1
        attention = None if self._attention is None else pack_attention(*self._attention.take())
        self._sender.send(
            seen.sites,
            rows,
            about,
            tokens=call.tokens,
            valid=call.valid,
            starts=call.starts,
            attention=attention,
            **seen.losses,
        )


def _whole_rows(call: Call) -> list[PromptRow]:
    """Return the rows of a call whose tokens lie together, as texts of their own."""
    found = []
    valid = np.ones((call.rows, call.width)) if call.valid is None else call.valid.cpu().numpy()
    for row in range(call.rows):
        place = np.flatnonzero(valid[row])
        if len(place) > 1 and place[-1] - place[0] == len(place) - 1:
            found.append(PromptRow(row, row, int(place[0]), len(place)))
    return found


class _OwnTexts(Texts):
    """Writes texts as they end."""

    def __init__(
        self,
        ledger: Ledger,
        loaded: LoadedModel,
        sites: Sequence[Site],
        config: CaptureConfig,
        attention: AttentionTaps | None,
    ) -> None:
        super().__init__(self._write, attention)
        self.ledger = ledger
        self._level = config.level
        self._count = 0
        known = loaded.tokenizer
        self._pieces = _PieceTexts(known) if known is not None and can_decode(known) else None
        # at deeper levels pairs are counted from the rows
        self._pairs = None if is_routed(self._level) else PairCounter(sites, group_sites(sites))

    def finish(self) -> None:
        """Hand over what is open."""
        super().finish()
        if self._pairs is not None:
            self.ledger.writer.append_pairs(pair_sums(self._pairs.take()))

    def _write(self, texts: list[Text]) -> None:
        if not texts:
            return
        writer, token_id = self.ledger.writer, self.ledger.tokens
        columns: dict[int, tuple[ReadCall, list[dict[str, npt.NDArray[Any]]]]] = {}
        domains: list[str | None] = []
        prompts = []
        for number, text in enumerate(texts, self._count):
            prompt, pieces = self._described(text)
            prompts.append(prompt)
            if prompt.domain not in domains:
                domains.append(prompt.domain)
            attention = text.pieces[0][0].attention
            if attention is not None and attention.tokens <= text.pieces[0][1]:
                writer.append_attention(replace(attention, prompt_id=number, first_token=token_id))
            losses, position = text.losses(), 0
            known, words = ~np.ma.getmaskarray(losses), np.array(pieces, object)
            for piece, upto in text.pieces:
                place = np.arange(position, position + upto)
                _, parts = columns.setdefault(id(piece.of), (piece.of, []))
                parts.append(
                    {
                        "rows": piece.rows[:upto],
                        "token": piece.tokens[:upto],
                        "given": piece.given[:upto],
                        "position": place,
                        "token_id": token_id + place,
                        "prompt": np.full(upto, number),
                        "domain": np.full(upto, domains.index(prompt.domain)),
                        "loss": losses.data[place],
                        "has_loss": known[place],
                        "text": np.full(upto, None) if pieces is None else words[place],
                    }
                )
                position += upto
            token_id += position
        writer.append_prompts(prompts)
        self._count += len(texts)
        for call, parts in sorted(columns.values(), key=lambda one: one[0].about.number):
            together = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
            phases: tuple[Phase, ...] = ("prompt", "generated")
            given = together["given"]
            for phase, chosen in zip(phases, (given, ~given), strict=True):
                if chosen.any():
                    here = {name: values[chosen] for name, values in together.items()}
                    self._append(call, here, phase, domains)

    def _append(
        self,
        call: ReadCall,
        columns: dict[str, npt.NDArray[Any]],
        phase: Phase,
        domains: Sequence[str | None],
    ) -> None:
        """Write the rows of one call that count, in one phase."""
        present, domain = np.unique(columns["domain"], return_inverse=True)
        text = columns["text"].tolist()
        tokens = TokenRows(
            token_id=columns["token_id"].astype(np.uint32),
            prompt_id=columns["prompt"].astype(np.uint32),
            position=columns["position"].astype(np.uint32),
            token=columns["token"].astype(np.int32),
            text=None if None in text else text,
            loss=next_losses(columns["loss"], columns["has_loss"]),
            phase=phase,
        )
        rows = RowsOfCall(columns["rows"], domain, len(present))
        ids = call.result.expert_ids
        blocks = rows.blocks(call.result.sites, ids, call.about.segments, call.valid, self._level)
        self.ledger.append(ForwardRows(tokens, [domains[i] for i in present], blocks))
        if self._pairs is not None:
            self._pairs.add([torch.from_numpy(one[:, rows.rows]) for one in ids])

    def _described(self, text: Text) -> tuple[PromptInfo, list[str] | None]:
        """Return what the run file says of a text, and the text of each token."""
        given, ids = text.given(), text.tokens()
        pieces = None
        if self._pieces is not None and (ids != NO_TOKEN).all():
            pieces = self._pieces.of(ids.tolist())
        said = text.declared or Declared()
        known = said.text
        if known is None and pieces is not None:
            known = "".join(piece for piece, own in zip(pieces, given, strict=True) if own)
        return PromptInfo(known, said.domain, said.source, int(given.sum()), 0), pieces


class _PieceTexts:
    """The text of each token, quickly where tokens read the same alone and together.

    Parameters
    ----------
    tokenizer : tokenizer
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerBase") -> None:
        self._tokenizer = tokenizer
        self._alone: dict[int, str] = {}

    def of(self, ids: list[int]) -> list[str]:
        """Return what :func:`capture.model.token_text.decode_pieces` does."""
        for token in set(ids) - self._alone.keys():
            (self._alone[token],) = decode_pieces(self._tokenizer, [token])
        alone = [self._alone[token] for token in ids]
        joined = "".join(alone)
        if REPLACEMENT not in joined and joined == decode(self._tokenizer, ids):
            return alone
        return decode_pieces(self._tokenizer, ids)


def take(model: Any, tokenizer: "PreTrainedTokenizerBase | None") -> LoadedModel:
    """Return a loaded model as capture knows it, whatever mode it is in.

    Raises
    ------
    ConfigError
        If FSDP1 holds its weights: it cuts them into flat pieces, which no longer look like routers
        and experts.
    """
    if isinstance(model, nn.Module) and any(
        type(one).__name__ == "FullyShardedDataParallel" for one in model.modules()
    ):
        raise ConfigError(
            "A model whose modules hold their own weights was expected, got FSDP1 "
            "(FullyShardedDataParallel), which cuts them into flat pieces. Shard it with FSDP2 "
            "(torch.distributed.fsdp.fully_shard), or record a saved checkpoint."
        )
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
    with ready_to_test(model):
        return attach(model)


@contextmanager
def ready_to_test(model: Any) -> Iterator[None]:
    """Have a model compute as in a capture while the block runs, whatever its loop has set."""
    kind = "cpu" if model.device.type == "meta" else str(model.device.type)
    with evaluating(model), suspended(model), torch.autocast(kind, enabled=False):
        yield


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
