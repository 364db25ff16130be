"""Run batches through a tapped model and send what its sites did to the writer."""

import threading
from collections.abc import Callable, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

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
    pad_batch,
    plan_batches,
    to_device,
    with_cache,
)
from capture.model.hooks import Taps
from capture.model.inputs import vocabulary
from capture.model.sites import Site
from capture.model.tokens import TokenizedPrompt
from capture.recorder.assemble import (
    DecodeResult,
    DecodeStep,
    PairStep,
    PromptResult,
    PromptStep,
    Step,
)
from capture.recorder.attention.summary import AttentionTaps, PromptRow, pack_attention
from capture.recorder.observe import PairCounter, Rows, SiteGroup, observe
from capture.recorder.sampling import Sample
from capture.recorder.transfer import Parcel, Staging, WriterThread
from capture.store.records import Level, SiteBlock


@dataclass
class HiddenRows:
    """Tells the taps which router inputs to keep in the next forward pass."""

    rows: torch.Tensor | None = None

    def __call__(self) -> torch.Tensor | None:
        """Return the rows of the batch that belong to the sample."""
        return self.rows


@dataclass(frozen=True)
class Plan:
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


@dataclass
class Recording:
    """The loop over batches; every forward pass ends as one step in the writer's queue.

    Attributes
    ----------
    runner, taps, hidden_rows, sites, groups : as the session made them
    plan : Plan
    thread : WriterThread
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
    sites: Sequence[Site]
    groups: Sequence[SiteGroup]
    plan: Plan
    thread: WriterThread[Step]
    advance: Callable[[], None]
    check: Callable[[], None]
    attention: AttentionTaps | None = None
    staging: Staging = field(default_factory=Staging)

    def __post_init__(self) -> None:
        """Count the tokens and the domains."""
        prompts = self.plan.prompts
        lengths = [len(prompt.ids) for prompt in prompts]
        self._first = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
        self._domains = list(dict.fromkeys(prompt.domain for prompt in prompts))
        number = {domain: i for i, domain in enumerate(self._domains)}
        self._domain_of = np.array([number[prompt.domain] for prompt in prompts], dtype=np.int64)
        self._ids = [prompt.ids for prompt in prompts]
        self._pairs = PairCounter(self.sites, self.groups)
        self._torn = False  # whether a forward pass is handed over, but not its pairs

    def run(self) -> None:
        """Record every batch of the plan."""
        side: Literal["left", "right"] = "left" if self.plan.generate else "right"
        model = self.runner.model
        limit = self.runner.head.limit(vocabulary(model))
        with torch.inference_mode():
            try:
                for prompts in self.plan.batches(limit):
                    batch = pad_batch(prompts, self._ids, side=side, pad_id=self.plan.pad_id)
                    self.check()
                    if self.plan.generate:
                        self._generate(batch, self._prompts(batch))
                    else:
                        self._prompts(batch)
            except BaseException:
                if not self._torn:
                    with suppress(Exception):  # the first error is the one to tell
                        self._send_pairs()
                raise
            self._send_pairs()

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
            done = self.runner.prompts(batch, keep_cache=self.plan.generate > 0)
        finally:
            self.hidden_rows.rows = None
        domains, of_prompt = self._local_domains(batch)
        rows = Rows(
            rows=to_device(batch.rows, device) if batch.is_padded else None,
            domain=to_device(np.repeat(of_prompt, batch.lengths), device),
            n_domains=len(domains),
            sampled=sampled,
            sampled_here=to_device(sampled, device) if len(sampled) else None,
        )
        attention = None if self.attention is None else pack_attention(*self.attention.take())
        self._hand_over(
            lambda sites: PromptResult(done.loss, sites, attention),
            rows,
            partial(PromptStep, batch, domains, sampled, attended),
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
        last = to_device((np.arange(len(batch.prompts)) + 1) * width - 1, device)
        token = self.runner.head.logits(done.taken.index_select(0, last)).argmax(dim=-1)  # [B]
        state: dict[str, Any] = {
            "cache": done.cache,
            "mask": to_device(batch.mask, self.runner.device),
            "position": to_device(batch.lengths, self.runner.device),
        }
        if not keeps(done.cache):
            state["ids"] = to_device(batch.input_ids, self.runner.device)
        del done  # its hidden states are as large as the cache
        valid = torch.ones_like(token, dtype=torch.bool)
        all_ended = threading.Event()
        for number in range(self.plan.generate):
            if all_ended.is_set():
                return
            self.check()
            logits = self._decode(token, state)
            following = logits.argmax(dim=-1)
            goes_on = valid & ~(token[:, None] == end_ids).any(dim=-1)
            if number == self.plan.generate - 1:
                goes_on = torch.zeros_like(goes_on)
            loss = torch.nn.functional.cross_entropy(logits, following, reduction="none")
            self._hand_over(
                partial(DecodeResult, token, loss, goes_on, valid, goes_on),
                Rows(self._last_places(state), domain, len(domains), valid=valid),
                partial(DecodeStep, batch, domains, number, all_ended),
            )
            self.advance()
            valid = goes_on
            token = torch.where(goes_on, following, self.plan.pad_id)

    def _decode(self, token: torch.Tensor, state: dict[str, Any]) -> torch.Tensor:
        """Feed one token per row and return the logits of the next, [B, V] float32."""
        mask = state["mask"]
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

    def _hand_over(
        self,
        result: Callable[[list[SiteBlock[torch.Tensor]]], Any],
        rows: Rows,
        step: Callable[[Parcel[Any]], Step],
    ) -> None:
        """Send what a forward pass gave to the writer, and count its pairs."""
        seen = self.taps.take()
        blocks, expert_ids = [], []
        for group in self.groups:
            device = seen[group.members[0]].expert_ids.device
            here = rows if device == rows.domain.device else _moved(rows, device)
            block, ids = observe(group, seen, here, self.plan.level)
            blocks.append(block)
            expert_ids.append(ids)
        parcel = self.staging.send(result(blocks), stop=self.thread.failed)
        self._torn = True
        self.thread.put(step(parcel))
        self._pairs.add(expert_ids)
        self._torn = False
        if self._pairs.is_full:
            self._send_pairs()

    def _send_pairs(self) -> None:
        sums = self._pairs.take()
        if sums:
            self.thread.put(PairStep(self.staging.send(sums, stop=self.thread.failed)))

    def _local_domains(self, batch: PaddedBatch) -> tuple[list[str | None], Ints]:
        """Return the domains of a batch and each prompt's place among them."""
        present, of_prompt = np.unique(self._domain_of[batch.prompts], return_inverse=True)
        return [self._domains[i] for i in present], of_prompt.astype(np.int64)


def _moved(rows: Rows, device: torch.device) -> Rows:
    def move(value: torch.Tensor | None) -> torch.Tensor | None:
        return None if value is None else value.to(device, non_blocking=True)

    return rows._replace(
        rows=move(rows.rows),
        domain=rows.domain.to(device, non_blocking=True),
        sampled_here=move(rows.sampled_here),
        valid=move(rows.valid),
    )
