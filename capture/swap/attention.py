"""Attention of every token while a model runs, for rules that route or skip by it."""

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import nn

from capture.errors import SwapError
from capture.model.context import Passes, PassTokens
from capture.model.sites import Site
from capture.recorder.attention.layers import attach_attention
from capture.recorder.attention.summary import (
    AttentionCall,
    AttentionListener,
    AttentionOptions,
    AttentionSite,
    PromptRow,
    listen,
    rule_of,
    weights_of,
)

NAMES = ("entropy", "max_weight", "sink_mass", "mean_distance", "window_mass")
# a query's weights are summed over keys one by one, so that cost grows with the square
LONGEST = 2048


class AttentionRows(NamedTuple):
    """One layer's attention for the ``T`` real tokens of a pass, averaged over heads.

    Attributes
    ----------
    statistics : Tensor [T, 5], float32
        Of each token's own row; columns in the order of ``NAMES``.
    received : Tensor [T], float32
        Attention that the queries of its sequence give to the token, summed.
    """

    statistics: torch.Tensor
    received: torch.Tensor


class LiveAttention:
    """Keeps the attention of some layers during each forward pass.

    Parameters
    ----------
    model : PreTrainedModel
    sites : sequence of Site
        All MoE sites of the model.
    layers : collection of int
        Layers to listen to; those without softmax attention give nothing.
    """

    def __init__(self, model: nn.Module, sites: Sequence[Site], layers: Collection[int]) -> None:
        found = attach_attention(model, sites, longest=LONGEST)
        self._sites = [site for site in found.sites if site.layer in layers]
        self._rows: dict[int, tuple[int, AttentionRows]] = {}
        self._passes: Passes | None = None

    @contextmanager
    def open(self, passes: Passes) -> Iterator["LiveAttention"]:
        """Listen while ``passes`` is open."""
        self._passes = passes
        with listen({site.module: self._listener(site) for site in self._sites}):
            yield self

    def of(self, layer: int) -> AttentionRows | None:
        """Return a layer's attention in the pass that runs, or None if it had none."""
        number, rows = self._rows.get(layer, (-1, None))
        running = self._passes is not None and number == self._passes.count
        return rows if running else None

    def _listener(self, site: AttentionSite) -> AttentionListener:
        def on_call(call: AttentionCall) -> None:
            if self._passes is None:
                return
            tokens = self._passes.tokens.on(call.query.device)
            batch, _, length, _ = call.query.shape
            # a layer that some tokens skip shows the others only, out of their places
            if batch * length == tokens.n_rows:
                rows = attention_rows(site, call, tokens)
                self._rows[site.layer] = (self._passes.count, rows)

        return on_call


def attention_rows(site: AttentionSite, call: AttentionCall, tokens: PassTokens) -> AttentionRows:
    """Reduce one call to rows of real tokens, sequence by sequence as if each were alone.

    Raises
    ------
    SwapError
        If the keys are not the tokens of the pass, as with a cache, or a sequence is too long.
    """
    length = call.query.shape[2]
    try:
        rule = rule_of(site.module, call, site.layer_window)
    except ValueError as error:
        raise SwapError(
            f"{site.name}: its attention cannot be given to a rule: {error}. Call the model on "
            "whole texts with use_cache=False."
        ) from None
    if length > LONGEST:
        raise SwapError(
            f"{site.name}: attention is given to rules for up to {LONGEST:,} tokens a sequence, "
            f"got {length:,}. Cut the texts."
        )
    statistics, received = [], []
    for row in _sequences(tokens, length):
        # one bin a token, so that what a bin receives is what a token receives
        options = AttentionOptions(bins=row.length, every=1, top_keys=1)
        out = weights_of(call, row, rule, range(site.n_heads), options)
        largest = out.top_weights[..., 0]
        values = (out.entropy, largest, out.sink_mass, out.mean_distance, out.window_mass)
        statistics.append(torch.stack([v[0].float().mean(dim=0) for v in values], dim=-1))
        received.append(out.received[0].float().mean(dim=0))
    return AttentionRows(torch.cat(statistics), torch.cat(received))


def _sequences(tokens: PassTokens, length: int) -> Iterator[PromptRow]:
    """Yield where each sequence's real tokens lie in the batch; they are consecutive."""
    places = tokens.real
    if places is None:
        places = torch.arange(tokens.n_rows, device=tokens.sequences.device)
    for number in range(tokens.n_rows // length):
        own = places[tokens.sequences == number]
        if len(own):
            yield PromptRow(number, number, int(own[0]) - number * length, len(own))
