"""``capture.import_routing``: a trace of another program becomes a run file."""

import time
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt

from capture.errors import TraceError, first_line
from capture.model.token_text import decode_pieces
from capture.paths import given_path
from capture.store import (
    ForwardRows,
    Level,
    PromptInfo,
    RunInfo,
    RunWriter,
    SiteInfo,
    SiteRows,
    TokenRows,
)
from capture.store.files import check_new
from capture.store.schema import NO_TOKEN
from capture.traces.counts import CountsPart, CountTrace
from capture.traces.formats import open_trace
from capture.traces.sequences import MAX_TOP_K, Ids, Sequence, Survey, Trace, is_choice, survey

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ROWS = 4_096  # tokens that are handed over at a time
MAX_EXPERTS = 2**16 - 1
NO_MODEL = "not said"
_NO_IDS = "carries no ids of tokens, so that a tokenizer has nothing to read. Leave it out."


class Imported(NamedTuple):
    """What became of a trace.

    Attributes
    ----------
    run : Path
    format : str
    sequences, tokens, layers, n_experts, top_k : int
        0 sequences and tokens of a trace of counts.
    rows : int
        Tokens that the trace has rows of; of a trace of counts, assignments.
    warm_up : int
        Of these, equal rows at the head that were left out.
    missing : int
        (token, layer) of the run without a choice.
    weighted : bool
        Whether the trace has weights, and slots are therefore in order of weight.
    seconds : float
    windows : int
        Windows of time of a trace of counts.
    """

    run: Path
    format: str
    sequences: int
    tokens: int
    layers: int
    n_experts: int
    top_k: int
    rows: int
    warm_up: int
    missing: int
    weighted: bool
    seconds: float
    windows: int = 0

    def __str__(self) -> str:
        if not self.tokens:
            over_time = f" in {self.windows:,} windows of time" if self.windows else ""
            return (
                f"{self.run}: {self.format}, {self.rows:,} assignments{over_time}, {self.layers} "
                f"layers, {self.top_k} of {self.n_experts} experts; sums only, no tokens, "
                f"{self.seconds:.1f} s"
            )
        left_out = f", {self.warm_up:,} rows of warm-up left out" if self.warm_up else ""
        missing = f", {self.missing:,} (token, layer) not recorded" if self.missing else ""
        weights = "with weights" if self.weighted else "without weights; slots in no order"
        return (
            f"{self.run}: {self.format}, {self.tokens:,} tokens of {self.sequences:,} sequences, "
            f"{self.layers} layers, {self.top_k} of {self.n_experts} experts, {weights}{left_out}"
            f"{missing}, {self.seconds:.1f} s"
        )


class Recognised(NamedTuple):
    """What a trace holds, before it is imported.

    Attributes
    ----------
    format, level : str
    rows : int
        Tokens, or assignments of a trace of counts.
    layers, n_experts : int
    top_k : int or None
        None: it has to be said.
    warm_up : int
        Equal rows at the head.
    lacks : list of str
        What a run of it will not have.
    """

    format: str
    level: str
    rows: int
    layers: int
    n_experts: int
    top_k: int | None
    warm_up: int
    lacks: list[str]


def recognise(
    source: Any,
    *,
    format: str | None = None,
    n_experts: int | None = None,
    top_k: int | None = None,
) -> Recognised:
    """Say what a trace holds, with the parameters and errors of :func:`import_routing`."""
    trace = open_trace(source, format, top_k, n_experts)
    try:
        if isinstance(trace, CountTrace):
            total = sum((part.counts for part in trace.parts()), np.zeros((1, 1), np.int64))
            lacks = ["tokens and their experts", "weights", "scores", "texts", "loss"]
            layers, experts, k = int(total.any(1).sum()), total.shape[1], top_k or trace.top_k
            level, rows, warm_up = "counts", int(total.sum()), 0
        else:
            found = survey(trace)
            first = next(one for one in trace.sequences() if len(one.ids))
            lacks = ["scores", "loss"]
            lacks += ["weights, so that slots are in no order"] if first.weights is None else []
            lacks += ["texts"] if first.text is None else []
            lacks += ["ids of tokens"] if first.tokens is None else []
            lacks += [f"{found.missing:,} (token, layer)"] if found.missing else []
            layers, experts, k = int(found.routed.sum()), found.n_experts, found.top_k
            level, rows, warm_up = "ids", found.rows, found.warm_up
        experts = n_experts or getattr(trace, "n_experts", None) or experts
        return Recognised(trace.format, level, rows, layers, experts, k, warm_up, lacks)
    finally:
        trace.close()


def import_routing(
    source: Any,
    out: str | Path,
    *,
    format: str | None = None,
    n_experts: int | None = None,
    top_k: int | None = None,
    keep_warm_up: bool = False,
    tokenizer: "str | Path | PreTrainedTokenizerBase | None" = None,
) -> Imported:
    """Write routing that another program recorded as a run file of level ``ids`` or ``counts``.

    Parameters
    ----------
    source : path, or sequence of paths, objects or arrays
        Files of a format of ``capture.traces.formats.NAMES``, vLLM's ``RequestOutput`` objects,
        or arrays of expert ids [tokens, layers, top k], one a sequence.
    out : str or Path
        The run file; it must not exist.
    format : str, optional
        By default found out from what the source holds.
    n_experts : int, optional
        Routed experts of a layer; by default what the trace says, else the largest id and one.
    top_k : int, optional
        Where the trace does not say it, and few rows leave it open; counts seldom say it.
    keep_warm_up : bool
        Keep equal rows at the head, which engines write before the first request.
    tokenizer : folder or tokenizer, optional
        The model's, for the texts of a trace that carries ids of tokens.

    Returns
    -------
    Imported

    Raises
    ------
    TraceError
        If the source is of no known format, or holds what cannot be routing; with file, line or
        key. Nothing of the run remains.
    StoreError
        If ``out`` exists or cannot be written.
    """
    started = time.monotonic()
    path = given_path(out, "the run file")
    check_new(path)
    trace = open_trace(source, format, top_k, n_experts)
    try:
        if isinstance(trace, CountTrace):
            if tokenizer is not None:
                raise TraceError(f"The {trace.format} trace {_NO_IDS}")
            made = _import_counts(trace, path, n_experts, top_k)
        else:
            texts = None if tokenizer is None else _Texts(tokenizer)
            made = _import(trace, path, n_experts, texts, keep_warm_up=keep_warm_up)
        return made._replace(seconds=time.monotonic() - started)
    finally:
        trace.close()


class _Texts:
    """What a tokenizer says of the ids of a trace."""

    def __init__(self, tokenizer: "str | Path | PreTrainedTokenizerBase") -> None:
        if isinstance(tokenizer, (str, Path)):
            folder = given_path(tokenizer, "the tokenizer", TraceError)
            # takes seconds, and only ids that are to be read need it
            from transformers import AutoTokenizer

            try:
                tokenizer = AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
            except (OSError, ValueError, KeyError) as error:
                raise TraceError(
                    f"No tokenizer could be read from {folder}: {first_line(error)}. Pass the "
                    "model's folder, with tokenizer.json."
                ) from error
        self._tokenizer = tokenizer

    def pieces(self, tokens: Ids, name: str) -> list[str]:
        """Return the text of each token; together they are the whole text."""
        known = len(self._tokenizer)
        if len(tokens) and not 0 <= int(tokens.min()) <= int(tokens.max()) < known:
            raise TraceError(
                f"{name}: has token {int(tokens.max())}, and the tokenizer knows {known:,}. Pass "
                "the tokenizer of the model that was recorded."
            )
        return decode_pieces(self._tokenizer, tokens.tolist())


def _import(
    trace: Trace,
    path: Path,
    n_experts: int | None,
    texts: _Texts | None,
    *,
    keep_warm_up: bool,
) -> Imported:
    started = time.monotonic()
    found = survey(trace)
    experts = _experts(n_experts or trace.n_experts, found, trace)
    skip = 0 if keep_warm_up else found.warm_up
    layers = trace.layers or tuple(range(len(found.routed)))
    if len(layers) != len(found.routed):
        raise TraceError(
            f"The {trace.format} trace names {len(layers)} layers and holds {len(found.routed)}."
        )
    sites = [
        SiteInfo(layer, 0, f"layers.{layer}", experts, found.top_k, 0, "other")
        for layer, routed in zip(layers, found.routed, strict=True)
        if routed
    ]
    prompts, vocabulary = _prompts(trace, skip, texts)
    if texts is not None and not vocabulary:
        raise TraceError(f"The {trace.format} trace {_NO_IDS}")
    writer = RunWriter.create(path, _about(trace, "ids", vocabulary), sites, prompts)
    counts = _Counts()
    try:
        for forward in _forwards(trace, found, sites, prompts, skip, counts, texts):
            writer.append(forward)
        notes = {
            "import": {
                **{"format": trace.format, "rows": found.rows, "warm_up": skip},
                **{"missing": counts.missing, "slots_by_weight": counts.weighted},
                **{
                    "weight_sum": counts.weight_sum / max(counts.choices, 1)
                    if counts.weighted
                    else None
                },
                **{"n_experts_said": bool(n_experts or trace.n_experts), **trace.facts},
            }
        }
        writer.finish(seconds=time.monotonic() - started, notes=notes)
    except BaseException:
        writer.discard()
        raise
    return Imported(
        run=path,
        format=trace.format,
        sequences=len(prompts),
        tokens=counts.tokens,
        layers=len(sites),
        n_experts=experts,
        top_k=found.top_k,
        rows=found.rows,
        warm_up=skip,
        missing=counts.missing,
        weighted=counts.weighted,
        seconds=time.monotonic() - started,
    )


def _import_counts(
    trace: CountTrace, path: Path, n_experts: int | None, top_k: int | None
) -> Imported:
    started = time.monotonic()
    by_domain: dict[str | None, npt.NDArray[np.int64]] = {}
    steps: set[int] = set()
    for part in trace.parts():
        by_domain[part.domain] = by_domain.get(part.domain, 0) + part.counts
        steps.update(() if part.step is None else (part.step,))
    total = sum(by_domain.values(), np.zeros((len(trace.layers), 1), np.int64))
    routed = np.flatnonzero(total.any(1))  # nobody counts in a dense layer
    if not len(routed):
        raise TraceError(f"The {trace.format} trace counts no assignment.")
    found, k = total.shape[1], top_k or trace.top_k
    if n_experts is not None and n_experts < found:
        raise TraceError(
            f"The {trace.format} trace counts {found} experts, but a layer is said to have "
            f"{n_experts}. Say the right number with --experts."
        )
    experts = n_experts or found
    if k is None or not 1 <= k <= min(experts, MAX_TOP_K):
        raise TraceError(
            f"Counts of {experts} experts do not say how many of them a token visits. Say it with "
            "--top-k: it is num_experts_per_tok in the model's config.json."
            if k is None
            else f"A token has 1 to {min(experts, MAX_TOP_K)} of {experts} experts, got {k}."
        )
    sites = [
        SiteInfo(trace.layers[at], 0, f"layers.{trace.layers[at]}", experts, k, 0, "other")
        for at in routed
    ]
    writer = RunWriter.create(path, _about(trace, "counts", 0), sites, ())
    wider = ((0, 0), (0, experts - found))
    try:
        for domain, counts in by_domain.items():
            writer.append_load(list(np.pad(counts, wider)[routed]), domain=domain)
        for step, counts in _windows(trace.parts()):
            writer.append_window(step, list(np.pad(counts, wider)[routed]))
        note = {"format": trace.format, "windows": len(steps), **trace.facts}
        writer.finish(seconds=time.monotonic() - started, notes={"import": note})
    except BaseException:
        writer.discard()
        raise
    return Imported(
        run=path,
        format=trace.format,
        sequences=0,
        tokens=0,
        layers=len(sites),
        n_experts=experts,
        top_k=k,
        rows=int(total.sum()),
        warm_up=0,
        missing=0,
        weighted=False,
        seconds=time.monotonic() - started,
        windows=len(steps),
    )


def _windows(parts: Iterator[CountsPart]) -> Iterator[tuple[int, npt.NDArray[np.int64]]]:
    """Return the sum of each step; parts come in their order."""
    for step, of_step in groupby(parts, lambda part: part.step):
        if step is not None:
            yield step, np.sum([part.counts for part in of_step], axis=0)


def _about(trace: Trace | CountTrace, level: Level, vocabulary: int) -> RunInfo:
    return RunInfo(
        model=trace.model or NO_MODEL,
        revision=None,
        architecture=f"imported from {trace.format}",
        dtype="not said",
        device="not said",
        level=level,
        vocab_size=vocabulary,
        hidden_size=0,
    )


class _Counts:
    """What was stored so far."""

    def __init__(self) -> None:
        self.tokens = self.missing = self.choices = 0
        self.weight_sum = 0.0
        self.weighted = False


def _experts(said: int | None, found: Survey, trace: Trace) -> int:
    if said is not None and said < found.n_experts:
        raise TraceError(
            f"The {trace.format} trace names expert {found.n_experts - 1}, but a layer is said to "
            f"have {said} experts. Ids count routed experts from 0; say the right number with "
            "--experts, or bring physical ids back to logical ones first."
        )
    experts = said or found.n_experts
    if not found.top_k <= experts <= MAX_EXPERTS:
        raise TraceError(f"A layer has {found.top_k} to {MAX_EXPERTS} experts, got {experts}.")
    return experts


def _kept(trace: Trace, skip: int) -> Iterator[Sequence]:
    """Return the sequences without the first ``skip`` rows of the trace."""
    for sequence in trace.sequences():
        cut = min(skip, len(sequence.ids))
        skip -= cut
        if cut and cut == len(sequence.ids):
            continue
        if cut:
            weights = None if sequence.weights is None else sequence.weights[cut:]
            # what comes after the warm-up is a request of its own
            sequence = sequence._replace(ids=sequence.ids[cut:], weights=weights, first=0)
        yield sequence


def _prompts(trace: Trace, skip: int, texts: _Texts | None) -> tuple[list[PromptInfo], int]:
    prompts, vocabulary = [], 0
    for sequence in _kept(trace, skip):
        length = sequence.length
        n_prompt = length if sequence.n_prompt is None else min(sequence.n_prompt, length)
        text = sequence.text
        if texts is not None and sequence.tokens is not None:
            text = "".join(texts.pieces(sequence.tokens, sequence.name)[:n_prompt])
        prompts.append(PromptInfo(text, sequence.domain, sequence.name, n_prompt, 0))
        if sequence.tokens is not None and len(sequence.tokens):
            vocabulary = max(vocabulary, int(sequence.tokens.max()) + 1)
    return prompts, vocabulary


def _forwards(
    trace: Trace,
    found: Survey,
    sites: list[SiteInfo],
    prompts: list[PromptInfo],
    skip: int,
    counts: _Counts,
    texts: _Texts | None,
) -> Iterator[ForwardRows]:
    """Return the rows of the run, some thousand tokens of one sequence and phase at a time."""
    first_of_prompt = 0
    first_generated = sum(prompt.n_tokens for prompt in prompts)
    routed = np.flatnonzero(found.routed)
    for number, (sequence, prompt) in enumerate(zip(_kept(trace, skip), prompts, strict=True)):
        pieces: list[str | None] | None = None
        if texts is not None and sequence.tokens is not None:
            known = len(sequence.tokens)
            pieces = [*texts.pieces(sequence.tokens, sequence.name)]
            pieces += [None] * (sequence.length - known)
        for start, stop in _chunks(prompt.n_tokens, sequence.length):
            is_prompt = start < prompt.n_tokens
            at = first_of_prompt + start if is_prompt else first_generated
            first_generated += 0 if is_prompt else stop - start
            ids, weights = _rows(sequence, start, stop, routed)
            counts.tokens += stop - start
            counts.missing += int((ids < 0).all(2).sum())
            if weights is not None:
                counts.weighted = True
                counts.weight_sum += float(weights.sum())
                counts.choices += int((ids >= 0).any(2).sum())
            tokens = np.full(stop - start, NO_TOKEN, np.int32)
            if sequence.tokens is not None:
                given = sequence.tokens[start:stop]
                tokens[: len(given)] = given
            yield ForwardRows(
                tokens=TokenRows(
                    token_id=np.arange(at, at + stop - start, dtype=np.uint32),
                    prompt_id=np.full(stop - start, number, np.uint32),
                    position=np.arange(start, stop, dtype=np.uint32),
                    token=tokens,
                    text=None if pieces is None else pieces[start:stop],
                    loss=np.ma.MaskedArray(np.zeros(stop - start, np.float32), mask=True),
                    phase="prompt" if is_prompt else "generated",
                ),
                domains=[prompt.domain],
                sites=[
                    _site_rows(
                        index, site, ids[:, index], None if weights is None else weights[:, index]
                    )
                    for index, site in enumerate(sites)
                ],
            )
        first_of_prompt += prompt.n_tokens


def _chunks(n_prompt: int, length: int) -> Iterator[tuple[int, int]]:
    for begin, end in ((0, n_prompt), (n_prompt, length)):
        for start in range(begin, end, ROWS):
            yield start, min(start + ROWS, end)


def _rows(
    sequence: Sequence, start: int, stop: int, routed: npt.NDArray[np.int64]
) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.float32] | None]:
    """Return ids and weights of the tokens start .. stop - 1, heaviest first; -1 = no record."""
    shape = (stop - start, len(routed), sequence.ids.shape[2])
    ids = np.full(shape, -1, np.int32)
    low, high = (min(max(at - sequence.first, 0), len(sequence.ids)) for at in (start, stop))
    inside = slice(low + sequence.first - start, high + sequence.first - start)
    given = sequence.ids[low:high][:, routed]
    chosen = is_choice(given)
    ids[inside] = np.where(chosen[..., None], given, -1)
    if sequence.weights is None:
        # empty slots last, as a run file has them
        order = np.argsort(ids < 0, axis=-1, kind="stable")
        return np.take_along_axis(ids, order, -1), None
    weights = np.zeros(shape, np.float32)
    weights[inside] = sequence.weights[low:high][:, routed]
    weights[ids < 0] = -1
    order = np.argsort(-weights, axis=-1, kind="stable")
    ids, weights = np.take_along_axis(ids, order, -1), np.take_along_axis(weights, order, -1)
    return ids, np.where(ids < 0, 0, weights)


def _site_rows(
    index: int,
    site: SiteInfo,
    ids: npt.NDArray[np.int32],
    weights: npt.NDArray[np.float32] | None,
) -> SiteRows:
    filled = ids >= 0
    flat = ids[filled]
    sums = (
        np.full(site.n_experts, np.nan)
        if weights is None
        else np.bincount(flat, weights[filled], minlength=site.n_experts)
    )
    if weights is None:
        weights = np.full(ids.shape, np.nan, np.float32)
    return SiteRows(
        site_index=index,
        assignments=np.bincount(flat, minlength=site.n_experts).astype(np.int64)[None],
        weight_sum=sums.astype(np.float64)[None],
        prob_sum=None,
        expert_ids=ids,
        weights=weights,
    )
