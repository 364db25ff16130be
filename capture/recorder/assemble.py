"""From the arrays of a forward pass to the records of the run file, on the writer's thread."""

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Generic, NamedTuple

import numpy as np
import numpy.typing as npt

from capture.model.forward import Ints, PaddedBatch, next_in_prompt
from capture.model.token_text import decode_pieces
from capture.model.tokens import TokenizedPrompt
from capture.recorder.attention.summary import (
    AttentionTaps,
    PackedAttention,
    PromptRow,
    unpack_attention,
)
from capture.recorder.observe import StretchSums
from capture.recorder.transfer import Parcel
from capture.store.records import (
    Array,
    Block,
    ForwardRows,
    PairSums,
    PromptAttention,
    SiteBlock,
    TokenRows,
)
from capture.store.schema import STATISTICS

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class PromptResult(NamedTuple, Generic[Array]):
    """What a forward pass over prompts gave.

    Attributes
    ----------
    loss : array [tokens with a next one], float32, nats
    sites : list of SiteBlock
        One for each group of sites.
    attention : PackedAttention or None
    """

    loss: Array
    sites: list[SiteBlock[Array]]
    attention: PackedAttention[Array] | None


class DecodeResult(NamedTuple, Generic[Array]):
    """What one decoding step of B rows gave.

    Attributes
    ----------
    token, loss : array [B]
        The token that was fed, and the loss of the next one.
    has_loss, valid, goes_on : array [B], bool
        Whether there is a next one, the row counts, and it goes on.
    sites : list of SiteBlock
        One for each group of sites, with all B rows.
    """

    token: Array
    loss: Array
    has_loss: Array
    valid: Array
    goes_on: Array
    sites: list[SiteBlock[Array]]


Numbers = npt.NDArray[Any]


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
    attended : sequence of PromptRow
        The prompts whose attention is recorded.
    parcel : Parcel of PromptResult
    """

    batch: PaddedBatch
    domains: Sequence[str | None]
    sampled: Ints
    attended: Sequence[PromptRow]
    parcel: Parcel[PromptResult[Numbers]]


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
    parcel : Parcel of DecodeResult
    """

    batch: PaddedBatch
    domains: Sequence[str | None]
    number: int
    all_ended: threading.Event
    parcel: Parcel[DecodeResult[Numbers]]


@dataclass(frozen=True, slots=True)
class PairStep:
    """Counts of experts that met since the last such step."""

    parcel: Parcel[list[StretchSums[Numbers]]]


Step = PromptStep | DecodeStep | PairStep

# the last steps wait for the next ones: a character has at most 4 bytes, each a token at most
OPEN_STEPS = 4


@dataclass(slots=True)
class _Decoded:
    """A decoding step whose texts are not known yet: a character may end in a later one."""

    step: DecodeStep
    result: DecodeResult[Numbers]
    rows: Ints  # of the batch, those that count


@dataclass
class Assembler:
    """Turns steps into :class:`ForwardRows` and hands them to ``append``.

    Attributes
    ----------
    append : callable
        Takes each :class:`ForwardRows`, in the order of execution.
    append_pairs : callable
        Takes what :meth:`capture.store.RunWriter.append_pairs` does.
    append_attention : callable
        Takes the attention of a prompt, before the forward pass it comes from.
    attention : AttentionTaps or None
        Which sites and options the attention comes from.
    prompts : sequence of TokenizedPrompt
    tokenizer : tokenizer or None
        None leaves the text of tokens unknown.
    prompt_tokens, generated_tokens, sampled_tokens, forwards : int
        Handed over so far.
    """

    append: Callable[[ForwardRows], None]
    append_pairs: Callable[[Sequence[PairSums]], None]
    append_attention: Callable[[PromptAttention], None]
    prompts: Sequence[TokenizedPrompt]
    tokenizer: "PreTrainedTokenizerBase | None"
    attention: AttentionTaps | None = None
    prompt_tokens: int = 0
    generated_tokens: int = 0
    sampled_tokens: int = 0
    forwards: int = 0
    _held: list[_Decoded] = field(default_factory=list)
    # of the batch that is being decoded, by prompt
    _generated: dict[int, list[int]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Count the tokens: prompts first, in their order, whatever the batches."""
        lengths = [len(prompt.ids) for prompt in self.prompts]
        self._first = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)

    def consume(self, step: Step) -> None:
        """Take one step; decoding steps wait for :meth:`settle`, or until their batch has ended."""
        if isinstance(step, PromptStep):
            self.flush()
            self._hand_over_prompts(step)
            return
        if isinstance(step, PairStep):
            self.append_pairs(pair_sums(step.parcel.open()))
            return
        result = step.parcel.open()
        rows = np.flatnonzero(result.valid)
        if len(rows):
            self._held.append(_Decoded(step, result, rows))
            prompts = step.batch.prompts[rows].tolist()
            for prompt, token in zip(prompts, result.token[rows].tolist(), strict=True):
                self._generated.setdefault(prompt, []).append(token)
        if not result.goes_on.any():
            step.all_ended.set()

    def flush(self) -> None:
        """Hand over the decoding steps that are held; their batch has ended."""
        self._hand_over_held(len(self._held))
        self._generated.clear()

    def settle(self) -> None:
        """Hand over the decoding steps whose texts no later token can change."""
        self._hand_over_held(len(self._held) - OPEN_STEPS)

    def _hand_over_held(self, count: int) -> None:
        if count <= 0:
            return
        texts = self._generated_texts(self._held[0].step.number)
        for decoded in self._held[:count]:
            self._hand_over_decoded(decoded, texts)
        del self._held[:count]

    def _hand_over_prompts(self, step: PromptStep) -> None:
        result, batch = step.parcel.open(), step.batch
        has_next = next_in_prompt(batch)
        loss = np.zeros(len(batch.rows), dtype=np.float32)
        loss[has_next] = result.loss
        tokens = TokenRows(
            token_id=(self._first[batch.row_prompt] + batch.position).astype(np.uint32),
            prompt_id=batch.row_prompt.astype(np.uint32),
            position=batch.position.astype(np.uint32),
            token=batch.input_ids.reshape(-1)[batch.rows].astype(np.int32),
            text=self._prompt_texts(batch.prompts),
            loss=np.ma.array(loss, mask=~has_next),
            phase="prompt",
        )
        if self.attention is not None and result.attention is not None:
            place = (self.attention.sites, self.attention.options, self._first)
            for rows in unpack_attention(result.attention, step.attended, *place):
                self.append_attention(rows)
        self._append(ForwardRows(tokens, step.domains, result.sites))
        self.prompt_tokens += len(batch.rows)
        self.sampled_tokens += len(step.sampled)

    def _hand_over_decoded(
        self, decoded: _Decoded, texts: dict[tuple[int, int], str] | None
    ) -> None:
        step, result, rows = decoded.step, decoded.result, decoded.rows
        prompts = step.batch.prompts[rows]
        first = int(self._first[-1]) + self.generated_tokens
        tokens = TokenRows(
            token_id=np.arange(first, first + len(rows), dtype=np.uint32),
            prompt_id=prompts.astype(np.uint32),
            position=(step.batch.lengths[rows] + step.number).astype(np.uint32),
            token=result.token[rows].astype(np.int32),
            text=None if texts is None else [texts[p, step.number] for p in prompts.tolist()],
            loss=np.ma.array(result.loss[rows], mask=~result.has_loss[rows]),
            phase="generated",
        )
        sites = [_kept(block, rows) for block in result.sites]
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

    def _generated_texts(self, first: int) -> dict[tuple[int, int], str] | None:
        """Return the text of every generated token from step ``first`` on, by prompt and step."""
        if self.tokenizer is None:
            return None
        # some steps more: a character that began before is seen whole
        start = max(0, first - OPEN_STEPS)
        texts: dict[tuple[int, int], str] = {}
        for prompt, generated in self._generated.items():
            context = [*self.prompts[prompt].ids.tolist(), *generated[:start]]
            pieces = decode_pieces(self.tokenizer, generated[start:], context)
            texts |= {(prompt, number): piece for number, piece in enumerate(pieces, start)}
        return texts


def _kept(block: Block, rows: Ints) -> Block:
    """Return a block with only these rows of what has one per token."""
    if block.expert_ids is None or len(rows) == block.expert_ids.shape[1]:
        return block
    per_token: dict[str, Any] = {
        name: None if values is None else values[:, rows]
        for name in ("expert_ids", "weights", *STATISTICS)
        for values in (getattr(block, name),)
    }
    scores = block.scores
    if scores is not None:
        scores = np.arange(len(rows)), [values[rows] for values in scores[1]]
    return replace(block, **per_token, scores=scores)


def pair_sums(stretches: Sequence[StretchSums[Any]]) -> list[PairSums]:
    """Return counts on the host as the store takes them."""
    return [
        PairSums(
            site,
            np.asarray(sums.pairs[row]),
            None
            if following is None or sums.transitions is None
            else np.asarray(sums.transitions[row]),
            following,
        )
        for sums in stretches
        for row, site, following in sums.by_site()
    ]
