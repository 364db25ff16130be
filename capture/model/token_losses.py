"""Next-token losses in pieces, so that [tokens, vocabulary] never exists at once."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from capture.errors import ModelError
from capture.model.sites import text_config
from capture.model.switches import plain_forward

Finish = Callable[[torch.Tensor], torch.Tensor]

# logits held at a time; on a CPU they should stay within its caches
LOGIT_BYTES = {"cpu": 16 * 2**20, "cuda": 512 * 2**20}
FLOAT_BYTES = 4
# logits of a whole forward pass, where the model is left to compute them all
ALL_LOGIT_BYTES = 2 * 2**30
# relative to the largest logit; half-precision heads round differently by shape
PROBE_TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-5}
HALF_TOLERANCE = 2e-2


class Head:
    """The last step of a language model, run on chosen rows only.

    While open, the model computes logits of one position instead of all, and the rows that the
    caller asks for are computed in pieces. Where the model does more to its logits than one
    of the known last steps, it is left to compute all of them. What its configuration asks it to
    give besides is switched off, see :mod:`capture.model.switches`.

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
        vocabulary = self.vocabulary(taken)
        budget = LOGIT_BYTES.get(taken.device.type, LOGIT_BYTES["cpu"])
        step = max(1, budget // (vocabulary * FLOAT_BYTES))
        for start in range(0, len(rows), step):
            piece = slice(start, start + step)
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
        with torch.inference_mode():
            output = self._model(
                input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False
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
