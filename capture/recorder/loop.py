"""Capture's own loop: prompts through a tapped model in batches, and what each row of them is."""

import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt
import torch

from capture.model.compiled import uncompiled_steps
from capture.model.forward import (
    Ints,
    PaddedBatch,
    PromptPass,
    Runner,
    cache_of,
    keeps,
    next_in_prompt,
    pad_batch,
    plan_batches,
    to_device,
    with_cache,
)
from capture.model.hooks import Taps
from capture.model.inputs import vocabulary, without_gradients
from capture.model.token_text import decode_pieces
from capture.model.tokens import TokenizedPrompt
from capture.recorder.attention.summary import (
    AttentionTaps,
    PromptRow,
    pack_attention,
    unpack_attention,
)
from capture.recorder.engine import CallResult, CallStep, Ledger, Sender, next_losses, picked
from capture.recorder.estimate import Sample
from capture.recorder.observe import RealRows
from capture.store.records import ForwardRows, Level, Phase, TokenRows

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Numbers = npt.NDArray[Any]
# the last steps wait for the next ones: a character has at most 4 bytes, each a token at most
OPEN_STEPS = 4
ALONE = "A token's routing depends on what else is in a batch, so every prompt was read by itself."
TWO_SIDES = (
    "An encoder-decoder: prompt tokens are what the encoder read, generated ones what the decoder "
    "read, first its start token, which nobody wrote, then what it wrote."
)


@dataclass
class HiddenRows:
    """Tells the taps which router inputs to keep in the next forward pass."""

    rows: torch.Tensor | None = None

    def __call__(self) -> torch.Tensor | None:
        """Return the rows of the batch that belong to the sample."""
        return self.rows


@dataclass(frozen=True)
class CapturePlan:
    """What a recording needs to know of its prompts.

    Attributes
    ----------
    prompts : sequence of TokenizedPrompt
    batch_tokens : int, tokens
        Upper bound of a forward pass, padding included.
    sample : Sample
    level : Level
    generate : int, tokens
    pad_id : int
    end_ids : tuple of int
        Tokens that end a generated text.
    attended : array [P], bool, or None
        Prompts whose attention is recorded; None without attention.
    same_length : bool
        Batches hold prompts of one length, for a model that does not heed padding.
    cache_differs : bool
        With a cache, the model computes otherwise than when it reads the text at once.
    start : tuple of int and int or None, or None
        Of an encoder-decoder: what its decoder reads first, and what has to follow, if anything.
    """

    prompts: Sequence[TokenizedPrompt]
    batch_tokens: int
    sample: Sample
    level: Level
    generate: int
    pad_id: int
    end_ids: tuple[int, ...]
    attended: npt.NDArray[np.bool_] | None = None
    same_length: bool = False
    cache_differs: bool = False
    start: tuple[int, int | None] | None = None

    @property
    def steps(self) -> int:
        """How many tokens are decoded after a prompt; a decoder reads one more than it writes."""
        return self.generate + (self.start is not None)

    def batches(self, limit: int | None = None) -> list[Ints]:
        """Return the numbers of the prompts of each forward pass.

        Parameters
        ----------
        limit : int or None, tokens
            A further bound, from :meth:`capture.model.forward.Head.limit`.
        """
        budget = self.batch_tokens if limit is None else min(limit, self.batch_tokens)
        lengths = [len(prompt.ids) for prompt in self.prompts]
        return plan_batches(lengths, budget, self.generate, same_length=self.same_length)


@dataclass(frozen=True, slots=True)
class PromptCall:
    """A forward pass over prompts.

    Attributes
    ----------
    batch : PaddedBatch
    domains : sequence of str or None
        The domains of this pass, in the order of its sums.
    n_sampled : int
        How many of the real tokens belong to the sample.
    attended : sequence of PromptRow
        The prompts whose attention is recorded.
    """

    batch: PaddedBatch
    domains: Sequence[str | None]
    n_sampled: int
    attended: Sequence[PromptRow]


@dataclass(frozen=True, slots=True)
class DecodeCall:
    """A decoding step of a batch.

    Attributes
    ----------
    batch, domains : as of :class:`PromptCall`
    number : int
        0 feeds the first generated token.
    all_ended : Event
        Set on the writer's thread as soon as no row of the batch goes on.
    """

    batch: PaddedBatch
    domains: Sequence[str | None]
    number: int
    all_ended: threading.Event


@dataclass
class Recording:
    """The loop over batches; every forward pass is one call that the sender sends.

    Attributes
    ----------
    runner, taps, hidden_rows : as the session made them
    senders : mapping of str to Sender
        Of each phase.
    plan : CapturePlan
    advance : callable
        Called after every forward pass.
    check : callable
        Called before every forward pass; raises to end the recording.
    attention : AttentionTaps or None
        Open, when the plan says whose attention is recorded.
    """

    runner: Runner
    taps: Taps
    hidden_rows: HiddenRows
    senders: Mapping[Phase, Sender]
    plan: CapturePlan
    advance: Callable[[], None]
    check: Callable[[], None]
    attention: AttentionTaps | None = None

    def __post_init__(self) -> None:
        """Count the tokens and the domains."""
        prompts = self.plan.prompts
        self._first = first_tokens(prompts)
        self._domains = list(dict.fromkeys(prompt.domain for prompt in prompts))
        number = {domain: i for i, domain in enumerate(self._domains)}
        self._domain_of = np.array([number[prompt.domain] for prompt in prompts], dtype=np.int64)
        self._ids = [prompt.ids for prompt in prompts]

    def run(self) -> None:
        """Record every batch of the plan."""
        # an encoder's prompts have nothing behind them
        decodes_on = self.plan.generate and self.plan.start is None
        side: Literal["left", "right"] = "left" if decodes_on else "right"
        model = self.runner.model
        limit = self.runner.head.limit(vocabulary(model))
        with without_gradients(model):
            try:
                for prompts in self.plan.batches(limit):
                    batch = pad_batch(prompts, self._ids, side=side, pad_id=self.plan.pad_id)
                    self.check()
                    if self.plan.steps:
                        self._generate(batch, self._prompts(batch))
                    else:
                        self._prompts(batch)
            except BaseException:
                for sender in dict.fromkeys(self.senders.values()):
                    sender.rescue_pairs()
                raise
            for sender in dict.fromkeys(self.senders.values()):
                sender.send_pairs()

    def _prompts(self, batch: PaddedBatch) -> PromptPass:
        device = self.runner.device
        token_id = self._first[batch.row_prompt] + batch.position
        sampled = np.flatnonzero(self.plan.sample.is_sampled[token_id])
        place = to_device(batch.rows[sampled], device) if len(sampled) else None
        self.hidden_rows.rows = place
        attended = self._attended(batch)
        if self.attention is not None:
            self.attention.rows = attended
        try:
            if self.plan.start is None:
                done = self.runner.prompts(batch, keep_cache=self.plan.generate > 0)
            else:
                done = self.runner.encode(batch)
        finally:
            self.hidden_rows.rows = None
        domains, of_prompt = self._local_domains(batch)
        rows = RealRows(
            rows=to_device(batch.rows, device) if batch.is_padded else None,
            domain=to_device(np.repeat(of_prompt, batch.lengths), device),
            n_domains=len(domains),
            sampled=sampled,
            sampled_here=to_device(sampled, device) if len(sampled) else None,
        )
        self.senders["prompt"].send(
            self.taps.take_of("prompt"),
            rows,
            PromptCall(batch, domains, len(sampled), attended),
            loss=done.loss,
            attention=None if self.attention is None else pack_attention(*self.attention.take()),
        )
        self.advance()
        return done

    def _attended(self, batch: PaddedBatch) -> list[PromptRow]:
        """Return where the prompts lie whose attention is recorded."""
        if self.attention is None or self.plan.attended is None:
            return []
        width = batch.input_ids.shape[1]
        first = np.cumsum(batch.lengths) - batch.lengths
        return [
            PromptRow(int(prompt), row, int(batch.rows[first[row]]) - row * width, int(length))
            for row, (prompt, length) in enumerate(zip(batch.prompts, batch.lengths, strict=True))
            if self.plan.attended[prompt]
        ]

    def _generate(self, batch: PaddedBatch, done: PromptPass) -> None:
        """Decode greedily; a row that has ended is computed on, but no longer counts."""
        device = done.taken.device
        width = batch.input_ids.shape[1]
        domains, of_prompt = self._local_domains(batch)
        domain = to_device(of_prompt, device)
        end_ids = to_device(np.array(self.plan.end_ids, dtype=np.int64), device)
        forced = None
        if self.plan.start is None:
            last = to_device((np.arange(len(batch.prompts)) + 1) * width - 1, device)
            token = self.runner.head.logits(done.taken.index_select(0, last)).argmax(dim=-1)  # [B]
        else:
            first, forced = self.plan.start
            token = torch.full((len(batch.prompts),), first, device=device)
        state: dict[str, Any] = {
            "cache": done.cache,
            "mask": to_device(batch.mask, self.runner.device),
            "position": to_device(batch.lengths, self.runner.device),
        }
        if self.plan.start is not None:
            state["encoded"], state["cache"] = done.cache, None
        elif not keeps(done.cache):
            state["ids"] = to_device(batch.input_ids, self.runner.device)
        del done  # its hidden states are as large as the cache
        valid = torch.ones_like(token, dtype=torch.bool)
        all_ended = threading.Event()
        for number in range(self.plan.steps):
            if all_ended.is_set():
                return
            self.check()
            logits = self._decode(token, state)
            following = logits.argmax(dim=-1)
            if number == 0 and forced is not None:
                following = torch.full_like(following, forced)
            goes_on = valid
            # some decoders begin with the token that ends a text
            if number or self.plan.start is None:
                goes_on = valid & ~(token[:, None] == end_ids).any(dim=-1)
            if number == self.plan.steps - 1:
                goes_on = torch.zeros_like(goes_on)
            loss = torch.nn.functional.cross_entropy(logits, following, reduction="none")
            self.senders["generated"].send(
                self.taps.take_of("generated"),
                RealRows(self._last_places(state), domain, len(domains), valid=valid),
                DecodeCall(batch, domains, number, all_ended),
                tokens=token,
                valid=valid,
                loss=loss,
                has_loss=goes_on,
            )
            self.advance()
            valid = goes_on
            token = torch.where(goes_on, following, self.plan.pad_id)

    def _decode(self, token: torch.Tensor, state: dict[str, Any]) -> torch.Tensor:
        """Feed one token per row and return the logits of the next, [B, V] float32."""
        mask = state["mask"]
        if "encoded" in state:
            logits, state["cache"] = self.runner.answer(
                token, state["encoded"], mask, state["cache"]
            )
            return logits
        state["mask"] = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
        if "ids" in state:
            following = token.to(mask.device)[:, None]
            state["ids"] = torch.cat([state["ids"], following], dim=1)
            with uncompiled_steps() if self.runner.is_compiled else nullcontext():
                return self.runner.again(state["ids"], state["mask"])
        with uncompiled_steps() if self.runner.is_compiled else nullcontext():
            output = self.runner.model(
                input_ids=token.to(mask.device)[:, None],
                attention_mask=state["mask"],
                **with_cache(self.runner.model, state["cache"]),
                **self.runner.positions(state["position"][:, None]),
            )
        state["cache"] = cache_of(output)
        state["position"] = state["position"] + 1
        return self.runner.head.logits(self.runner.head.take(output))

    def _last_places(self, state: dict[str, Any]) -> torch.Tensor | None:
        """Return where the new tokens are among the rows of a pass; None where they are all."""
        if "ids" not in state:
            return None
        ids: torch.Tensor = state["ids"]
        rows, length = ids.shape
        return (torch.arange(rows, device=ids.device) + 1) * length - 1

    def _local_domains(self, batch: PaddedBatch) -> tuple[list[str | None], Ints]:
        """Return the domains of a batch and each prompt's place among them."""
        present, of_prompt = np.unique(self._domain_of[batch.prompts], return_inverse=True)
        return [self._domains[i] for i in present], of_prompt.astype(np.int64)


def first_tokens(prompts: Sequence[TokenizedPrompt]) -> Ints:
    """Return the token id of the first token of every prompt, and of the first generated one."""
    lengths = [len(prompt.ids) for prompt in prompts]
    return np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)


@dataclass(slots=True)
class _Decoded:
    """A decoding step whose texts are not known yet: a character may end in a later one."""

    call: DecodeCall
    result: CallResult[Numbers]
    rows: Ints  # of the batch, those that count


@dataclass
class PlannedTexts:
    """The follower of capture's own loop, which knows every prompt before it is read.

    Attributes
    ----------
    ledger : Ledger
    prompts : sequence of TokenizedPrompt
    tokenizer : tokenizer or None
        None leaves the text of tokens unknown.
    attention : AttentionTaps or None
        Which sites and options the attention comes from.
    goes_on : bool
        Whether what is generated goes on the text of its prompt; a decoder begins anew.
    prompt_tokens, generated_tokens, sampled_tokens : int
        Handed over so far.
    """

    ledger: Ledger
    prompts: Sequence[TokenizedPrompt]
    tokenizer: "PreTrainedTokenizerBase | None"
    attention: AttentionTaps | None = None
    goes_on: bool = True
    prompt_tokens: int = 0
    generated_tokens: int = 0
    sampled_tokens: int = 0
    _held: list[_Decoded] = field(default_factory=list)
    # of the batch that is being decoded, by prompt
    _generated: dict[int, list[int]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Give tokens their numbers: prompts first, in their order, whatever the batches."""
        self._first = first_tokens(self.prompts)

    def consume(self, step: CallStep) -> None:
        """Take one step; decoding steps wait for :meth:`settle`, or until their batch has ended."""
        result = step.parcel.open()
        if isinstance(step.about, PromptCall):
            self.finish()
            self._hand_over_prompts(step.about, result)
            return
        call: DecodeCall = step.about
        assert result.tokens is not None and result.valid is not None
        assert result.has_loss is not None
        rows = np.flatnonzero(result.valid)
        if len(rows):
            self._held.append(_Decoded(call, result, rows))
            prompts = call.batch.prompts[rows].tolist()
            for prompt, token in zip(prompts, result.tokens[rows].tolist(), strict=True):
                self._generated.setdefault(prompt, []).append(token)
        if not result.has_loss.any():
            call.all_ended.set()

    def finish(self) -> None:
        """Hand over the decoding steps that are held; their batch has ended."""
        self._hand_over_held(len(self._held))
        self._generated.clear()

    def settle(self) -> None:
        """Hand over the decoding steps whose texts no later token can change."""
        self._hand_over_held(len(self._held) - OPEN_STEPS)

    def _hand_over_held(self, count: int) -> None:
        if count <= 0:
            return
        texts = self._generated_texts(self._held[0].call.number)
        for decoded in self._held[:count]:
            self._hand_over_decoded(decoded, texts)
        del self._held[:count]

    def _hand_over_prompts(self, call: PromptCall, result: CallResult[Numbers]) -> None:
        batch, has_next = call.batch, next_in_prompt(call.batch)
        loss = np.zeros(len(batch.rows), dtype=np.float32)
        loss[has_next] = result.loss
        tokens = TokenRows(
            token_id=(self._first[batch.row_prompt] + batch.position).astype(np.uint32),
            prompt_id=batch.row_prompt.astype(np.uint32),
            position=batch.position.astype(np.uint32),
            token=batch.input_ids.reshape(-1)[batch.rows].astype(np.int32),
            text=self._prompt_texts(batch.prompts),
            loss=next_losses(loss, has_next),
            phase="prompt",
        )
        if self.attention is not None and result.attention is not None:
            place = (self.attention.sites, self.attention.options)
            for rows in unpack_attention(result.attention, call.attended, *place):
                first = int(self._first[rows.prompt_id])
                self.ledger.writer.append_attention(replace(rows, first_token=first))
        self.ledger.append(ForwardRows(tokens, call.domains, result.sites))
        self.prompt_tokens += len(batch.rows)
        self.sampled_tokens += call.n_sampled

    def _hand_over_decoded(
        self, decoded: _Decoded, texts: dict[tuple[int, int], str] | None
    ) -> None:
        call, result, rows = decoded.call, decoded.result, decoded.rows
        assert result.tokens is not None and result.loss is not None
        assert result.has_loss is not None and result.valid is not None
        prompts = call.batch.prompts[rows]
        first = int(self._first[-1]) + self.generated_tokens
        tokens = TokenRows(
            token_id=np.arange(first, first + len(rows), dtype=np.uint32),
            prompt_id=prompts.astype(np.uint32),
            position=(call.batch.lengths[rows] + call.number).astype(np.uint32),
            token=result.tokens[rows].astype(np.int32),
            text=None if texts is None else [texts[p, call.number] for p in prompts.tolist()],
            loss=next_losses(result.loss[rows], result.has_loss[rows]),
            phase="generated",
        )
        # sums are of these rows already: the others were not valid on the device
        sites = [picked(block, rows, len(result.valid)) for block in result.sites]
        self.ledger.append(ForwardRows(tokens, call.domains, sites))
        self.generated_tokens += len(rows)

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
            before = self.prompts[prompt].ids.tolist() if self.goes_on else []
            context = [*before, *generated[:start]]
            pieces = decode_pieces(self.tokenizer, generated[start:], context)
            texts |= {(prompt, number): piece for number, piece in enumerate(pieces, start)}
        return texts
