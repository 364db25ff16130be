"""From the arrays of a forward pass to the records of the run file, on the writer's thread."""

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from capture.model.forward import Ints, PaddedBatch, next_in_prompt
from capture.model.token_text import decode_pieces
from capture.model.tokens import TokenizedPrompt
from capture.recorder.attention.parcel import unpack_attention
from capture.recorder.attention.summary import AttentionTaps, PromptRow
from capture.recorder.observe import SiteGroup
from capture.recorder.pairs import Stretch, by_site
from capture.recorder.transfer import Arrays, Parcel
from capture.store.records import (
    LEVELS,
    AttentionRows,
    ForwardRows,
    Level,
    PairSums,
    SiteBlock,
    TokenRows,
)
from capture.store.schema import STATISTICS

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
    attended : sequence of PromptRow
        The prompts whose attention is recorded.
    parcel : Parcel
        ``loss`` [tokens with a next one], ``<group>.<name>`` as ``observe`` named it, and what
        ``pack_attention`` named.
    """

    batch: PaddedBatch
    domains: Sequence[str | None]
    sampled: Ints
    attended: Sequence[PromptRow]
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


@dataclass(frozen=True, slots=True)
class PairStep:
    """Counts of experts that met since the last such step.

    Attributes
    ----------
    stretches : sequence of Stretch
    parcel : Parcel
        ``pairs.i`` and ``transitions.i`` of stretch ``i``.
    """

    stretches: Sequence[Stretch]
    parcel: Parcel


Step = PromptStep | DecodeStep | PairStep

# the last steps wait for the next ones: a character has at most 4 bytes, each a token at most
OPEN_STEPS = 4


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
    append_pairs : callable
        Takes what :meth:`capture.store.RunWriter.append_pairs` does.
    append_attention : callable
        Takes the attention of a prompt, before the forward pass it comes from.
    attention : AttentionTaps or None
        Which sites and options the attention comes from.
    groups : sequence of SiteGroup
    prompts : sequence of TokenizedPrompt
    level : Level
    tokenizer : tokenizer or None
        None leaves the text of tokens unknown.
    prompt_tokens, generated_tokens, sampled_tokens, forwards : int
        Handed over so far.
    """

    append: Callable[[ForwardRows], None]
    append_pairs: Callable[[Sequence[PairSums]], None]
    append_attention: Callable[[AttentionRows], None]
    groups: Sequence[SiteGroup]
    prompts: Sequence[TokenizedPrompt]
    level: Level
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
            self.append_pairs(_pair_sums(step))
            return
        arrays = step.parcel.open()
        rows = np.flatnonzero(arrays["valid"])
        if len(rows):
            self._held.append(_Decoded(step, arrays, rows))
            prompts = step.batch.prompts[rows].tolist()
            for prompt, token in zip(prompts, arrays["token"][rows].tolist(), strict=True):
                self._generated.setdefault(prompt, []).append(token)
        if not arrays["goes_on"].any():
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
        sites = self._blocks(arrays, None, np.arange(len(batch.rows)), step.sampled)
        if self.attention is not None and step.attended:
            place = (self.attention.sites, self.attention.options, self._first)
            for rows in unpack_attention(arrays, step.attended, *place):
                self.append_attention(rows)
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
        sites = self._blocks(arrays, rows, np.arange(len(rows)), nothing)
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

    def _blocks(
        self, arrays: Arrays, rows: Ints | None, everything: Ints, sampled: Ints
    ) -> list[SiteBlock]:
        """Name the arrays of every group, without the rows left out."""
        blocks: list[SiteBlock] = []
        scored = everything if LEVELS.index(self.level) >= LEVELS.index("scores") else sampled
        for number, group in enumerate(self.groups):
            prefix = f"{number}."
            found = {k.removeprefix(prefix): v for k, v in arrays.items() if k.startswith(prefix)}
            scores = _vectors(found, "scores", len(group.members))
            if rows is not None:
                found = _kept(found, rows)
                scores = None if scores is None else [values[rows] for values in scores]
            hidden = _vectors(found, "hidden", len(group.members))
            blocks.append(
                SiteBlock(
                    site_indices=group.members,
                    assignments=found["assignments"],
                    weight_sum=found["weight_sum"],
                    prob_sum=found.get("prob_sum"),
                    expert_ids=found.get("expert_ids"),
                    weights=found.get("weights"),
                    **{name: found.get(name) for name in STATISTICS},
                    scores=None if scores is None or not len(scored) else (scored, scores),
                    hidden=None if hidden is None or not len(sampled) else (sampled, hidden),
                )
            )
        return blocks


def _kept(found: Arrays, rows: Ints) -> Arrays:
    """Return the arrays with only these rows of those that have one per token."""
    per_token = ("expert_ids", "weights", *STATISTICS)
    return {
        k: v[:, rows] if k in per_token and len(rows) < v.shape[1] else v for k, v in found.items()
    }


def _vectors(found: Arrays, name: str, n_sites: int) -> Sequence[npt.NDArray[Any]] | None:
    """Return the arrays ``name`` of every site, sent together or one by one."""
    if name in found:
        return list(found[name])
    if f"{name}.0" not in found:
        return None
    return [found[f"{name}.{place}"] for place in range(n_sites)]


def _pair_sums(step: PairStep) -> list[PairSums]:
    arrays = step.parcel.open()
    sums = []
    for number, row, site, following in by_site(step.stretches):
        transitions = None if following is None else arrays[f"transitions.{number}"][row]
        sums.append(PairSums(site, arrays[f"pairs.{number}"][row], transitions, following))
    return sums
