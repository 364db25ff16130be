"""From the arrays of a forward pass to the records of the run file, on the writer's thread."""

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from capture.batching import Ints, PaddedBatch
from capture.buffer import Arrays, Parcel
from capture.forward import next_in_prompt
from capture.observe import SiteGroup
from capture.store.records import ForwardRows, Level, SiteRows, TokenRows
from capture.store.schema import STATISTICS
from capture.tokens import TokenizedPrompt, decode_pieces

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, slots=True)
class PromptStep:
    """One forward pass over prompts.

    Attributes
    ----------
    batch : PaddedBatch
    domains : sequence of str or None
        The domains of this pass, in the order of its sums.
    sampled : array [M]
        Which of the real tokens belong to the sample.
    parcel : Parcel
        ``loss`` [tokens with a next one], and ``<group>.<name>`` as ``observe`` named it.
    """

    batch: PaddedBatch
    domains: Sequence[str | None]
    sampled: Ints
    parcel: Parcel


@dataclass(frozen=True, slots=True)
class DecodeStep:
    """One decoding step of a batch.

    Attributes
    ----------
    batch : PaddedBatch
    domains : sequence of str or None
    number : int
        0 feeds the first generated token.
    all_ended : Event
        Set here as soon as no row of the batch goes on.
    parcel : Parcel
        ``token`` [B], ``loss`` [B], ``has_loss`` [B], ``valid`` [B], ``goes_on`` [B] and
        ``<group>.<name>``.
    """

    batch: PaddedBatch
    domains: Sequence[str | None]
    number: int
    all_ended: threading.Event
    parcel: Parcel


@dataclass(slots=True)
class _Decoded:
    """A decoding step whose texts are not known yet: a character may end in a later one."""

    step: DecodeStep
    arrays: Arrays
    rows: Ints  # of the batch, those that count


@dataclass
class Assembler:
    """Turns steps into :class:`ForwardRows` and hands them to ``append``.

    Attributes
    ----------
    append : callable
        Takes each :class:`ForwardRows`, in the order of execution.
    groups : sequence of SiteGroup
    prompts : sequence of TokenizedPrompt
    level : Level
    tokenizer : tokenizer or None
        None leaves the text of tokens unknown.
    prompt_tokens, generated_tokens, sampled_tokens, forwards : int
        Handed over so far.
    """

    append: Callable[[ForwardRows], None]
    groups: Sequence[SiteGroup]
    prompts: Sequence[TokenizedPrompt]
    level: Level
    tokenizer: "PreTrainedTokenizerBase | None"
    prompt_tokens: int = 0
    generated_tokens: int = 0
    sampled_tokens: int = 0
    forwards: int = 0
    _held: list[_Decoded] = field(default_factory=list)

    def __post_init__(self) -> None:
        """Count the tokens: prompts first, in their order, whatever the batches."""
        lengths = [len(prompt.ids) for prompt in self.prompts]
        self._first = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)

    def consume(self, step: PromptStep | DecodeStep) -> None:
        """Take one step; decoding steps wait until their batch has ended."""
        if isinstance(step, PromptStep):
            self.flush()
            self._hand_over_prompts(step)
            return
        arrays = step.parcel.open()
        rows = np.flatnonzero(arrays["valid"])
        if len(rows):
            self._held.append(_Decoded(step, arrays, rows))
        if not arrays["goes_on"].any():
            step.all_ended.set()

    def flush(self) -> None:
        """Hand over the decoding steps that are held."""
        held, self._held = self._held, []
        texts = self._generated_texts(held)
        for decoded in held:
            self._hand_over_decoded(decoded, texts)

    def _hand_over_prompts(self, step: PromptStep) -> None:
        arrays, batch = step.parcel.open(), step.batch
        has_next = next_in_prompt(batch)
        loss = np.zeros(len(batch.rows), dtype=np.float32)
        loss[has_next] = arrays["loss"]
        tokens = TokenRows(
            token_id=(self._first[batch.row_prompt] + batch.position).astype(np.uint32),
            prompt_id=batch.row_prompt.astype(np.uint32),
            position=batch.position.astype(np.uint32),
            token=batch.input_ids.reshape(-1)[batch.rows].astype(np.int32),
            text=self._prompt_texts(batch.prompts),
            loss=np.ma.array(loss, mask=~has_next),
            phase="prompt",
        )
        everything = np.arange(len(batch.rows))
        sites = self._sites(arrays, None, everything, step.sampled)
        self._append(ForwardRows(tokens, step.domains, sites))
        self.prompt_tokens += len(batch.rows)
        self.sampled_tokens += len(step.sampled)

    def _hand_over_decoded(
        self, decoded: _Decoded, texts: dict[tuple[int, int], str] | None
    ) -> None:
        step, arrays, rows = decoded.step, decoded.arrays, decoded.rows
        prompts = step.batch.prompts[rows]
        first = int(self._first[-1]) + self.generated_tokens
        tokens = TokenRows(
            token_id=np.arange(first, first + len(rows), dtype=np.uint32),
            prompt_id=prompts.astype(np.uint32),
            position=(step.batch.lengths[rows] + step.number).astype(np.uint32),
            token=arrays["token"][rows].astype(np.int32),
            text=None if texts is None else [texts[p, step.number] for p in prompts.tolist()],
            loss=np.ma.array(arrays["loss"][rows], mask=~arrays["has_loss"][rows]),
            phase="generated",
        )
        nothing = np.empty(0, dtype=np.int64)
        sites = self._sites(arrays, rows, np.arange(len(rows)), nothing)
        self._append(ForwardRows(tokens, step.domains, sites))
        self.generated_tokens += len(rows)

    def _append(self, forward: ForwardRows) -> None:
        self.append(forward)
        self.forwards += 1

    def _prompt_texts(self, prompts: Ints) -> list[str] | None:
        texts: list[str] = []
        for prompt in prompts:
            pieces = self.prompts[prompt].pieces()
            if pieces is None:
                return None
            texts += pieces
        return texts

    def _generated_texts(self, held: Sequence[_Decoded]) -> dict[tuple[int, int], str] | None:
        """Return the text of every generated token, by prompt and step."""
        if self.tokenizer is None:
            return None
        ids: dict[int, list[int]] = {}
        for decoded in held:
            prompts = decoded.step.batch.prompts[decoded.rows].tolist()
            for prompt, token in zip(prompts, decoded.arrays["token"][decoded.rows], strict=True):
                ids.setdefault(prompt, []).append(int(token))
        texts: dict[tuple[int, int], str] = {}
        for prompt, generated in ids.items():
            context = self.prompts[prompt].ids.tolist()
            pieces = decode_pieces(self.tokenizer, generated, context)
            texts |= {(prompt, number): piece for number, piece in enumerate(pieces)}
        return texts

    def _sites(
        self, arrays: Arrays, rows: Ints | None, everything: Ints, sampled: Ints
    ) -> list[SiteRows]:
        """Take the groups apart again into one record per site, without the rows left out."""
        records: list[SiteRows] = []
        for number, group in enumerate(self.groups):
            prefix = f"{number}."
            found = {k.removeprefix(prefix): v for k, v in arrays.items() if k.startswith(prefix)}
            if rows is not None:
                for name in ("expert_ids", "weights", "scores", *STATISTICS):
                    if name in found:
                        found[name] = found[name][:, rows]
            scored = everything if self.level == "scores" else sampled
            for place, site_index in enumerate(group.members):
                records.append(
                    SiteRows(
                        site_index=site_index,
                        assignments=found["assignments"][place],
                        weight_sum=found["weight_sum"][place],
                        prob_sum=_as_double(_at(found, "prob_sum", place)),
                        expert_ids=_at(found, "expert_ids", place),
                        weights=_at(found, "weights", place),
                        **{name: _at(found, name, place) for name in STATISTICS},
                        scores=_with_rows(scored, _at(found, "scores", place)),
                        hidden=_with_rows(sampled, _at(found, "hidden", place)),
                    )
                )
        return sorted(records, key=lambda record: record.site_index)


def _at(arrays: Arrays, name: str, place: int) -> npt.NDArray[Any] | None:
    return arrays[name][place] if name in arrays else None


def _as_double(values: npt.NDArray[Any] | None) -> npt.NDArray[np.float64] | None:
    return None if values is None else values.astype(np.float64)


def _with_rows(
    rows: Ints, values: npt.NDArray[Any] | None
) -> tuple[Ints, npt.NDArray[np.float32]] | None:
    return None if values is None or not len(rows) else (rows, values)
