"""Run a model over prompts in padded batches, and take the loss of every token."""

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from capture.errors import ModelError
from capture.model.inputs import (
    decoder_inputs,
    input_device,
    plain_forward,
    vocabulary,
    without_gradients,
)
from capture.model.sites import text_config

Ints = npt.NDArray[np.int64]
# of a test: enough tokens that a rule which does not explain the choice is caught, few enough to be
# quick
ROWS, LENGTH = 4, 16
SEED = 0
CACHE_NAMES = ("cache", "past_key_values")  # since transformers 5.24, and before
Finish = Callable[[torch.Tensor], torch.Tensor]
# logits held at a time; on a CPU they should stay within its caches
LOGIT_BYTES = {"cpu": 16 * 2**20, "cuda": 512 * 2**20}
FLOAT_BYTES = 4
# logits of a whole forward pass, where the model is left to compute them all
ALL_LOGIT_BYTES = 2 * 2**30
# relative to the largest logit; half-precision heads round differently by shape
PROBE_TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-5}
HALF_TOLERANCE = 2e-2


class PaddedBatch(NamedTuple):
    """Prompts of one forward pass: B rows, S columns, N real tokens.

    Attributes
    ----------
    prompts : array [B]
        Numbers of the prompts, ascending.
    lengths : array [B], tokens
    input_ids : array [B, S], int64
    mask : array [B, S], int64
        1 at real tokens.
    rows : array [N]
        Place of each real token in the flattened batch, prompt after prompt.
    row_prompt : array [N]
        Prompt of each real token.
    position : array [N]
        Place of each real token in its prompt.
    """

    prompts: Ints
    lengths: Ints
    input_ids: Ints
    mask: Ints
    rows: Ints
    row_prompt: Ints
    position: Ints

    @property
    def is_padded(self) -> bool:
        """Whether any prompt is shorter than the batch is wide."""
        return len(self.rows) < self.input_ids.size


def plan_batches(
    lengths: Sequence[int], budget: int, extra: int = 0, *, same_length: bool = False
) -> list[Ints]:
    """Group prompts of similar length, longest first, within a budget of padded tokens.

    Longest first, so that a model that does not fit into memory fails at once. A prompt longer
    than the budget gets a forward pass of its own.

    Parameters
    ----------
    lengths : sequence of int, tokens
    budget : int, tokens
        Rows times width of a batch stay below it.
    extra : int, tokens
        Tokens that will be generated after each prompt.
    same_length : bool
        Put only prompts of one length together, so that nothing is padded.

    Returns
    -------
    list of arrays
        Numbers of the prompts of each batch, ascending.
    """
    order = np.argsort(-np.asarray(lengths, dtype=np.int64), kind="stable")
    batches: list[Ints] = []
    start = 0
    while start < len(order):
        width = lengths[order[start]] + extra
        stop = start + max(1, budget // width)
        if same_length:
            alike = [lengths[n] == lengths[order[start]] for n in order[start:stop]]
            stop = start + (alike.index(False) if False in alike else len(alike))
        batches.append(np.sort(order[start:stop]))
        start = stop
    return batches


def pad_batch(
    prompts: Ints,
    ids: Sequence[npt.NDArray[np.int32]],
    *,
    side: Literal["left", "right"],
    pad_id: int,
) -> PaddedBatch:
    """Lay prompts out as one rectangle.

    Parameters
    ----------
    prompts : array [B]
        Numbers of the prompts, ascending.
    ids : sequence of array, one a prompt of the whole run
    side : {"left", "right"}
        Where the padding goes: left where decoding follows.
    pad_id : int
        What padding holds; the attention mask hides it.
    """
    lengths = np.array([len(ids[p]) for p in prompts], dtype=np.int64)
    width = int(lengths.max())
    column = np.arange(width)
    start = width - lengths if side == "left" else np.zeros_like(lengths)
    real = (column >= start[:, None]) & (column < (start + lengths)[:, None])  # [B, S]
    input_ids = np.full(real.shape, pad_id, dtype=np.int64)
    input_ids[real] = np.concatenate([ids[p] for p in prompts])
    position = (column - start[:, None])[real]
    return PaddedBatch(
        prompts=prompts,
        lengths=lengths,
        input_ids=input_ids,
        mask=real.astype(np.int64),
        rows=np.flatnonzero(real),
        row_prompt=np.repeat(prompts, lengths),
        position=position,
    )


class Head:
    """The last step of a language model, run on chosen rows only.

    While open, the model computes logits of one position instead of all, and the rows that the
    caller asks for are computed in pieces. Where the model does more to its logits than one
    of the known last steps, it is left to compute all of them. What its configuration asks it to
    give besides is switched off, see :mod:`capture.model.inputs`.

    Parameters
    ----------
    model : PreTrainedModel
    """

    def __init__(self, model: Any) -> None:
        self._model = model
        self._module: nn.Module | None = model.get_output_embeddings()
        self._hidden: torch.Tensor | None = None
        self._narrow = False
        self._finish: Finish | None = None

    @contextmanager
    def open(self, probe_ids: torch.Tensor) -> Iterator["Head"]:
        """Attach to the output layer and find out by ``probe_ids`` [B, S] what follows it.

        Raises
        ------
        ModelError
            If the model puts out no logits.
        """
        with ExitStack() as stack:
            stack.enter_context(plain_forward(self._model))
            stack.callback(self._forget)
            if self._module is not None:
                stack.callback(self._module.register_forward_pre_hook(self._on_head).remove)
            self._finish = self._probe(probe_ids)
            self._narrow = self._finish is not None
            yield self

    def _forget(self) -> None:
        self._narrow = False
        self._hidden = None

    @property
    def is_chunked(self) -> bool:
        """Whether logits are computed in pieces."""
        return self._finish is not None

    def limit(self, vocab_size: int) -> int | None:
        """Return how many tokens a forward pass may have, or None when logits are no limit."""
        return None if self.is_chunked else max(1, ALL_LOGIT_BYTES // (vocab_size * FLOAT_BYTES))

    def take(self, output: Any) -> torch.Tensor:
        """Return what :meth:`logits` needs from a forward pass, flattened to rows [R, ...]."""
        if self._finish is None or self._hidden is None:
            values: torch.Tensor = output.logits
        else:
            values, self._hidden = self._hidden, None
        return values.reshape(-1, values.shape[-1])

    def logits(self, rows: torch.Tensor) -> torch.Tensor:
        """Return float32 logits [R, V] of rows that :meth:`take` gave."""
        if self._finish is None or self._module is None:
            return rows.float()
        logits = self._finish(self._module(rows)).float()
        self._hidden = None  # the hook saw these rows too
        return logits

    def losses(
        self, taken: torch.Tensor, rows: torch.Tensor, targets: torch.Tensor
    ) -> torch.Tensor:
        """Return the loss of predicting ``targets`` [N] from ``rows`` [N] of ``taken``, nats."""
        loss = torch.empty(len(rows), dtype=torch.float32, device=taken.device)
        for piece in _pieces(len(rows), self.vocabulary(taken), taken.device):
            logits = self.logits(taken.index_select(0, rows[piece]))
            loss[piece] = nn.functional.cross_entropy(logits, targets[piece], reduction="none")
        return loss

    def vocabulary(self, taken: torch.Tensor) -> int:
        """Return the width of the logits."""
        if self._finish is None:
            return int(taken.shape[-1])
        return int(self._module.weight.shape[0])  # type: ignore[union-attr, index]

    def _on_head(self, _: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        if not args or not isinstance(args[0], torch.Tensor):
            return None
        self._hidden = args[0].detach()
        if not self._narrow or args[0].ndim < 3:
            return None
        return (args[0][:, -1:], *args[1:])

    def _probe(self, ids: torch.Tensor) -> Finish | None:
        """Return what the model does after its output layer, or None when that is unknown."""
        with without_gradients(self._model):
            mask = torch.ones_like(ids)
            output = self._model(
                input_ids=ids,
                attention_mask=mask,
                use_cache=False,
                **decoder_inputs(self._model, ids, mask),
            )
            hidden, logits = self._hidden, self._checked(getattr(output, "logits", None), ids)
            weight = getattr(self._module, "weight", None)
            if self._module is None or hidden is None or weight is None:
                return None
            if hidden.shape[:-1] != logits.shape[:-1] or weight.shape[0] != logits.shape[-1]:
                return None
            plain = self._module(hidden)
            tolerance = PROBE_TOLERANCE.get(weight.dtype, HALF_TOLERANCE)
            limit = logits.float().abs().amax() * tolerance
            for finish in _known_finishes(text_config(self._model)):
                error = (finish(plain).float() - logits.float()).abs().amax()
                if bool(error <= limit):
                    return finish
        return None

    def _checked(self, logits: Any, ids: torch.Tensor) -> torch.Tensor:
        """Return the logits [B, S, V]; refuse any that do not score every word at every token."""
        model, problem = self._model, None
        words = getattr(text_config(model), "vocab_size", None)
        if not isinstance(logits, torch.Tensor):
            problem = "no logits"
        elif logits.ndim != len("BSV") or logits.shape[:2] != ids.shape:
            problem = f"logits of shape {list(logits.shape)} for {list(ids.shape)} tokens"
        elif self._module is None and (
            # classifiers have no output layer for words, but may have as many labels
            (isinstance(words, int) and logits.shape[-1] < words) or hasattr(model, "num_labels")
        ):
            problem = f"{logits.shape[-1]} scores a token and has no output layer for words"
        if problem:
            raise ModelError(
                f"A causal language model was expected, but {type(model).__name__} puts out "
                f"{problem}, so losses cannot be known. Give the model with its language head, as "
                "AutoModelForCausalLM loads it."
            )
        scores: torch.Tensor = logits
        return scores


def losses_of(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Return the loss of predicting ``targets`` [N] by logits [N, V], nats, in pieces."""
    loss = torch.empty(len(targets), dtype=torch.float32, device=logits.device)
    for piece in _pieces(len(targets), logits.shape[-1], logits.device):
        loss[piece] = nn.functional.cross_entropy(
            logits[piece].float(), targets[piece], reduction="none"
        )
    return loss


def _pieces(n_rows: int, n_words: int, device: torch.device) -> Iterator[slice]:
    """Yield rows whose logits are computed together."""
    budget = LOGIT_BYTES.get(device.type, LOGIT_BYTES["cpu"])
    step = max(1, budget // (n_words * FLOAT_BYTES))
    for start in range(0, n_rows, step):
        yield slice(start, start + step)


def _known_finishes(config: Any) -> Iterator[Finish]:
    """Yield the last steps that causal language models take, those the config names first."""
    scaling = getattr(config, "logits_scaling", None)  # Granite
    if scaling:
        yield lambda logits: logits / scaling
    scale = getattr(config, "logit_scale", None)  # Cohere
    if scale:
        yield lambda logits: logits * scale
    cap = getattr(config, "final_logit_softcapping", None)  # Gemma
    if cap:
        yield lambda logits: torch.tanh(logits / cap) * cap
    # last: small logits pass a soft cap almost unchanged
    yield _identity


def _identity(logits: torch.Tensor) -> torch.Tensor:
    return logits


class PromptPass(NamedTuple):
    """What a forward pass over prompts gives besides its routing.

    Attributes
    ----------
    loss : Tensor [M], float32, nats
        Of the real tokens that have a next token, in the order of the batch's rows.
    taken : Tensor [R, ...]
        What ``Head.logits`` takes, one row per place of the batch.
    cache : object or None
        Keys and values, when they were asked for; of an encoder, its output.
    """

    loss: torch.Tensor
    taken: torch.Tensor
    cache: Any


def keeps(cache: Any) -> bool:
    """Whether a model really kept what it has read: some hand back nothing, or an empty cache."""
    length = getattr(cache, "get_seq_length", None)
    return cache is not None and not (callable(length) and int(length()) == 0)


class Runner:
    """Calls a causal language model as capture needs it.

    Parameters
    ----------
    model : PreTrainedModel
    head : Head
        Open, so that logits of all positions are never computed at once.
    """

    def __init__(self, model: Any, head: Head) -> None:
        self.model = model
        self.head = head
        self.device = input_device(model)
        self.is_compiled = any(m._compiled_call_impl is not None for m in model.modules())
        self._takes_positions = takes_positions(model)

    def prompts(self, batch: PaddedBatch, *, keep_cache: bool = False) -> PromptPass:
        """Run the prompts of a batch; padding is masked and gets no loss."""
        ids = to_device(batch.input_ids, self.device)
        # without padding the mask says nothing, and models are faster without it
        mask = to_device(batch.mask, self.device) if batch.is_padded or keep_cache else None
        arguments: dict[str, Any] = {"use_cache": keep_cache}
        if keep_cache and mask is not None:
            arguments |= self.positions((mask.cumsum(-1) - 1).clamp_min(0))
        output = self.model(input_ids=ids, attention_mask=mask, **arguments)
        taken = self.head.take(output)
        has_next = next_in_prompt(batch)
        rows = to_device(batch.rows[has_next], self.device)
        targets = ids.flatten()[rows + 1]
        if taken.device != self.device:  # a model spread over several devices
            rows, targets = rows.to(taken.device), targets.to(taken.device)
        loss = self.head.losses(taken, rows, targets)
        return PromptPass(loss, taken, cache_of(output))

    def encode(self, batch: PaddedBatch) -> PromptPass:
        """Run the prompts of a batch, padded on their right, through an encoder.

        It predicts no token: the losses are infinite, which is stored as NULL.
        """
        ids, mask = (to_device(a, self.device) for a in (batch.input_ids, batch.mask))
        output = self.model.get_encoder()(input_ids=ids, attention_mask=mask)
        loss = torch.full((int(next_in_prompt(batch).sum()),), torch.inf, device=self.device)
        hidden: torch.Tensor = output.last_hidden_state
        return PromptPass(loss, hidden.reshape(-1, hidden.shape[-1]), output)

    def answer(
        self, token: torch.Tensor, encoded: Any, mask: torch.Tensor, cache: Any
    ) -> tuple[torch.Tensor, Any]:
        """Feed one token per row [B] to a decoder; return the logits [B, V] and its cache."""
        output = self.model(
            encoder_outputs=encoded,
            attention_mask=mask,
            decoder_input_ids=token[:, None],
            **with_cache(self.model, cache),
        )
        return self.head.logits(self.head.take(output)), cache_of(output)

    def again(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Return the logits [B, V] after texts [B, S] that are read from their start.

        For decoding with a model that keeps no cache; texts end at the right edge.
        """
        positions = self.positions((mask.cumsum(-1) - 1).clamp_min(0))
        output = self.model(input_ids=ids, attention_mask=mask, use_cache=False, **positions)
        taken = self.head.take(output)
        return self.head.logits(taken.reshape(*ids.shape, -1)[:, -1])

    def positions(self, position_ids: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return the argument for positions, where the model takes one."""
        return {"position_ids": position_ids} if self._takes_positions else {}


def start_of(model: Any) -> tuple[int, int | None]:
    """Return the token that a decoder reads first, and the one that has to follow it, if any.

    Raises
    ------
    ModelError
        If neither the generation configuration nor the model's names the first.
    """

    def named(name: str) -> int | None:
        owners = (getattr(model, "generation_config", None), model.config)
        found = (getattr(owner, name, None) for owner in owners)
        return next((value for value in found if isinstance(value, int)), None)

    first = named("decoder_start_token_id")
    first = named("bos_token_id") if first is None else first
    if first is None:
        raise ModelError(
            f"{type(model).__name__} is an encoder-decoder, and its configuration does not say "
            "which token its decoder begins with. Set model.config.decoder_start_token_id."
        )
    return first, named("forced_bos_token_id")


def cache_of(output: Any) -> Any:
    """Return the cache that a model's output carries, if any."""
    # not the other name too: transformers warns of it
    name = next((name for name in CACHE_NAMES if hasattr(output, name)), None)
    return None if name is None else getattr(output, name)


def with_cache(model: Any, cache: Any) -> dict[str, Any]:
    """Return the arguments that hand a model its cache, under the name that it takes."""
    # a class of one's own may hand on what it does not name
    named = (name for given in _forwards(model) for name in CACHE_NAMES if name in given)
    return {next(named, CACHE_NAMES[-1]): cache, "use_cache": True}


def _forwards(model: Any) -> Iterator[Mapping[str, inspect.Parameter]]:
    """Yield the parameters of a model's forward pass, then of those that it may hand on to."""
    yield _parameters(model)
    for kind in type(model).__mro__:
        if "forward" in vars(kind):
            yield inspect.signature(vars(kind)["forward"]).parameters


def probe_tokens(model: nn.Module) -> torch.Tensor:
    """Return token ids [4, 16] that a text model accepts, always the same ones."""
    size = vocabulary(model)
    special = set(_special_ids(model))
    plain = torch.tensor([i for i in range(size) if i not in special] or [*range(size)])
    positions = getattr(text_config(model), "max_position_embeddings", None) or LENGTH
    generator = torch.Generator().manual_seed(SEED)
    chosen = torch.randint(len(plain), (ROWS, min(LENGTH, int(positions))), generator=generator)
    return plain[chosen].to(input_device(model))


def _special_ids(model: nn.Module) -> Iterable[int]:
    """Yield ids that stand for something else than text: padding, images, audio."""
    config = getattr(model, "config", None)
    for owner in (config, text_config(model)):
        for name, value in vars(owner).items() if owner is not None else ():
            if name.endswith(("_token_id", "_token_index")):
                values = value if isinstance(value, list | tuple) else [value]
                yield from (v for v in values if isinstance(v, int))


def takes_positions(model: Any) -> bool:
    """Whether a model takes positions; an adapter's wrapper takes anything and hands it on."""
    return "position_ids" in _parameters(model)


def _parameters(model: Any) -> Mapping[str, inspect.Parameter]:
    base = getattr(model, "get_base_model", None)
    called = base() if callable(base) else model
    return inspect.signature(called.forward).parameters


def next_in_prompt(batch: PaddedBatch) -> npt.NDArray[np.bool_]:
    """Return which of the real tokens [N] are not the last of their prompt."""
    last = np.cumsum(batch.lengths) - 1
    has_next = np.ones(len(batch.rows), dtype=np.bool_)
    has_next[last] = False
    return has_next


def to_device(array: npt.NDArray[Any], device: torch.device) -> torch.Tensor:
    """Copy an array to the device; from page-locked memory, so that nothing waits."""
    tensor = torch.from_numpy(np.ascontiguousarray(array))
    if device.type == "cpu":
        return tensor
    return tensor.pin_memory().to(device, non_blocking=True)
