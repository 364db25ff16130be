"""From texts that ended to the records of the run file: what each call did with the kept rows."""

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from capture.model.forward import Ints
from capture.model.token_text import REPLACEMENT, decode, decode_pieces
from capture.recorder.own_loop.texts import Pass, Text
from capture.store.codec import decode_weights
from capture.store.records import Block, ForwardRows, Level, Phase, PromptInfo, TokenRows
from capture.store.schema import NO_TOKEN, STATISTICS

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Kept(NamedTuple):
    """The rows of one call that count, in one phase.

    Attributes
    ----------
    of : Pass
    rows : array [N], int64
        Places among its rows.
    forward : ForwardRows
    """

    of: Pass
    rows: Ints
    forward: ForwardRows

    def expert_ids(self) -> list[torch.Tensor]:
        """Return the choice of every group of sites, [sites, N, K]."""
        return [torch.from_numpy(ids[:, self.rows]) for ids in self.of.expert_ids]


class Pieces:
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


def describe(
    texts: Sequence[Text], tokenizer: Pieces | None
) -> tuple[list[PromptInfo], list[list[str] | None]]:
    """Return what the run file says of texts, and the text of each token."""
    prompts, pieces_of = [], []
    for text in texts:
        given, ids = text.given(), text.tokens()
        pieces = None
        if tokenizer is not None and (ids != NO_TOKEN).all():
            pieces = tokenizer.of(ids.tolist())
        said = text.declared
        known = said.text if said is not None else None
        if known is None and pieces is not None:
            known = "".join(
                piece for piece, is_given in zip(pieces, given, strict=True) if is_given
            )
        prompts.append(
            PromptInfo(
                text=known,
                domain=said.domain if said is not None else None,
                source=said.source if said is not None else None,
                n_tokens=int(given.sum()),
                truncated=0,
            )
        )
        pieces_of.append(pieces)
    return prompts, pieces_of


def forward_rows(
    texts: Sequence[Text],
    prompts: Sequence[PromptInfo],
    pieces_of: Sequence[list[str] | None],
    first_prompt: int,
    first_token: int,
    level: Level,
) -> list[Kept]:
    """Sort the tokens of texts by the call that read them, in the order of the calls.

    Parameters
    ----------
    texts : sequence of Text
    prompts, pieces_of : sequences
        From :func:`describe`.
    first_prompt, first_token : int
        Numbers of the first text and of its first token; others follow, text after text.
    level : Level
    """
    found: dict[int, tuple[Pass, list[dict[str, Any]]]] = {}
    token_id = first_token
    for number, text in enumerate(texts):
        position = 0
        for piece, upto in text.pieces:
            _, parts = found.setdefault(id(piece.of), (piece.of, []))
            place = np.arange(position, position + upto)
            parts.append(
                {
                    "rows": piece.rows[:upto],
                    "token": piece.tokens[:upto],
                    "given": piece.given[:upto],
                    "position": place,
                    "token_id": token_id + place,
                    "text": np.full(upto, number),
                }
            )
            position += upto
        token_id += position
    kept = []
    for of, parts in sorted(found.values(), key=lambda one: one[0].number):
        columns = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
        phases: tuple[Phase, ...] = ("prompt", "generated")
        for phase, chosen in zip(phases, (columns["given"], ~columns["given"]), strict=True):
            if chosen.any():
                here = {name: values[chosen] for name, values in columns.items()}
                kept.append(_rows(of, here, phase, prompts, pieces_of, first_prompt, level))
    return kept


def _rows(
    of: Pass,
    columns: dict[str, npt.NDArray[Any]],
    phase: Phase,
    prompts: Sequence[PromptInfo],
    pieces_of: Sequence[list[str] | None],
    first_prompt: int,
    level: Level,
) -> Kept:
    numbers, positions = columns["text"].tolist(), columns["position"].tolist()
    domains = list(dict.fromkeys(prompts[number].domain for number in numbers))
    place = {domain: row for row, domain in enumerate(domains)}
    domain = np.array([place[prompts[number].domain] for number in numbers])
    known = all(pieces_of[number] is not None for number in set(numbers))
    tokens = TokenRows(
        token_id=columns["token_id"].astype(np.uint32),
        prompt_id=(first_prompt + columns["text"]).astype(np.uint32),
        position=columns["position"].astype(np.uint32),
        token=columns["token"].astype(np.int32),
        text=[
            (pieces_of[number] or [])[position]
            for number, position in zip(numbers, positions, strict=True)
        ]
        if known
        else None,
        loss=np.ma.array(np.zeros(len(numbers), np.float32), mask=True),
        phase=phase,
    )
    rows = columns["rows"]
    share = _share(of, rows, domain, len(domains))
    sites = [
        _block(block, ids, rows, domain, len(domains), share, routed=level != "stats")
        for block, ids in zip(of.blocks, of.expert_ids, strict=True)
    ]
    return Kept(of, rows, ForwardRows(tokens, domains, sites))


def _share(of: Pass, rows: Ints, domain: Ints, n_domains: int) -> npt.NDArray[np.int64] | None:
    """Return how often each segment counts in each domain, [D, G]; None where a part of one does.

    Sums are kept by segment, so that those of rows that do not count can be left out.
    """
    segment, n_segments = of.segments
    if n_domains == 1 and np.array_equal(np.sort(rows), np.flatnonzero(of.valid)):
        return np.ones((1, n_segments), np.int64)
    whole = np.bincount(segment[of.valid], minlength=n_segments)
    share = np.zeros((n_domains, n_segments), np.int64)
    for number in range(n_domains):
        times = np.bincount(rows[domain == number], minlength=len(segment))
        counted = np.bincount(segment, weights=times, minlength=n_segments).astype(np.int64)
        most = np.zeros(n_segments, np.int64)
        np.maximum.at(most, segment, times)
        if not np.array_equal(counted, most * whole):
            return None
        share[number] = most
    return share


def _block(
    block: Block,
    expert_ids: npt.NDArray[Any],
    rows: Ints,
    domain: Ints,
    n_domains: int,
    share: npt.NDArray[np.int64] | None,
    *,
    routed: bool,
) -> Block:
    """Return what a group of sites did with the rows that count."""
    everything = len(rows) == expert_ids.shape[1] and bool((np.diff(rows) == 1).all())
    chosen: Any = slice(None) if everything else rows
    per_token: dict[str, Any] = {
        name: None if values is None else values[:, chosen]
        for name in ("expert_ids", "weights", *STATISTICS)
        for values in (getattr(block, name),)
    }
    scores = block.scores
    if scores is not None:
        scores = np.arange(len(rows)), [values[chosen] for values in scores[1]]
    if share is not None:
        # [D, G] times [S, G, E]
        sums = {
            "assignments": np.einsum("dg,sge->sde", share, block.assignments),
            "weight_sum": np.einsum("dg,sge->sde", share, block.weight_sum),
            "prob_sum": None
            if block.prob_sum is None
            else np.einsum("dg,sge->sde", share, block.prob_sum),
        }
    else:
        sums = _counted(expert_ids[:, chosen], per_token["weights"], domain, n_domains, block)
    if not routed:
        per_token = dict.fromkeys(per_token)
    return replace(block, **per_token, **sums, scores=scores)


def _counted(
    ids: npt.NDArray[Any],
    weights: npt.NDArray[Any] | None,
    domain: Ints,
    n_domains: int,
    block: Block,
) -> dict[str, Any]:
    """Count the sums again from the rows; probabilities of single tokens are not known."""
    n_sites, _, n_experts = block.assignments.shape
    applied = None if weights is None else decode_weights(weights)
    load = np.zeros((n_sites, n_domains, n_experts), np.int64)
    heavy = np.zeros((n_sites, n_domains, n_experts))
    for site in range(n_sites):
        filled = ids[site] < n_experts
        at = domain[np.nonzero(filled)[0]], ids[site][filled].astype(np.int64)
        np.add.at(load[site], at, 1)
        if applied is not None:
            np.add.at(heavy[site], at, applied[site][filled])
    return {"assignments": load, "weight_sum": heavy, "prob_sum": None}
