"""Which vectors a map shows: of tokens, of prompts, or of (layer, expert) units."""

import hashlib
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from explorer.errors import RunError
from explorer.maps.data import signatures, token_vectors
from explorer.run import Run

Floats = npt.NDArray[np.float32]
Ids = npt.NDArray[np.int64]
Unit = Literal["tokens", "prompts", "experts"]
Feature = Literal["hidden", "scores"]


class Source(NamedTuple):
    """Where vectors come from.

    Attributes
    ----------
    unit : {"tokens", "prompts", "experts"}
        What a point of the map is.
    feature : {"hidden", "scores"}
        Of tokens: what the router read, or its score for every expert.
    layer, site : int
        Of tokens: which router.
    """

    unit: Unit
    feature: Feature = "hidden"
    layer: int = 0
    site: int = 0

    @property
    def place(self) -> tuple[str, ...]:
        """What of this makes a difference for the vectors."""
        if self.unit != "tokens":
            return (self.unit,)
        return self.unit, self.feature, str(self.layer), str(self.site)


class Points(NamedTuple):
    """The vectors of a map.

    Attributes
    ----------
    ids : array [N, C]
        What each point is: the token, the prompt, or layer, site and expert.
    values : array [N, D]
        Finite.
    groups : array [N]
        Points of one group are not independent: the tokens of a prompt.
    n_all : int
        Units that the run has; more than N where some have no vector.
    """

    ids: Ids
    values: Floats
    groups: Ids
    n_all: int

    @property
    def digest(self) -> str:
        """Name of the content, the same for the same vectors of the same units."""
        mark = hashlib.blake2b(digest_size=16)
        for array in (self.ids, self.values):
            mark.update(repr((array.shape, array.dtype.str)).encode())
            mark.update(np.ascontiguousarray(array).data)
        return mark.hexdigest()


def read_points(run: Run, source: Source) -> Points:
    """Read the vectors of a map from a run.

    Router inputs are taken as recorded. Of scores that a softmax turns into probabilities, the
    mean over the experts is taken off first: a softmax does not see it. Prompts and experts are
    described by square roots of shares, so that distances are Hellinger distances: a prompt by
    how its assignments at each router are spread over the experts, an expert by how the
    assignments that it got are spread over the prompts, each prompt counted as one.

    Raises
    ------
    RunError
        If the run did not record what is asked for.
    """
    if source.unit == "tokens":
        return _of_tokens(run, source)
    return _of_prompts(run) if source.unit == "prompts" else _of_experts(run)


def _of_tokens(run: Run, source: Source) -> Points:
    info = run.site_info(source.layer, source.site)
    found = token_vectors(run, source.feature, source.layer, site=source.site)
    values = found.values
    if source.feature == "scores":
        values = _known(values)
        if info.score_function.startswith("softmax"):
            values = values - values.mean(axis=1, keepdims=True)
    prompts = run.table("SELECT token_id, prompt_id FROM tokens ORDER BY token_id")
    at = np.searchsorted(prompts["token_id"].to_numpy(), found.token_ids)
    groups = prompts["prompt_id"].to_numpy()[at].astype(np.int64)
    return Points(found.token_ids[:, None], values, groups, int(run.info["n_tokens"]))


def _known(values: Floats) -> Floats:
    """Return scores without gaps: an expert that was ruled out is as bad as the worst other."""
    if not np.isnan(values).any():
        return values
    worst = np.where(np.isnan(values), np.inf, values).min(axis=1)
    worst[np.isinf(worst)] = 0  # not one known
    return np.asarray(np.where(np.isnan(values), worst[:, None], values), dtype=np.float32)


def _of_prompts(run: Run) -> Points:
    found = signatures(run)
    # every router counts the same, however many experts it chooses
    shares = _per_site(found.counts, found.units)
    ids = found.prompt_ids
    return Points(ids[:, None], np.sqrt(shares), ids, found.n_all)


def _per_site(counts: Floats, units: Ids) -> Floats:
    shares = np.zeros_like(counts)
    sites, place = np.unique(units[:, :2], axis=0, return_inverse=True)
    for site in range(len(sites)):
        here = place.ravel() == site
        total = counts[:, here].sum(axis=1, keepdims=True)
        shares[:, here] = counts[:, here] / np.maximum(total, 1)
    return shares


def _of_experts(run: Run) -> Points:
    found = signatures(run)
    # a prompt counts as one, however long it is
    shares = _per_site(found.counts, found.units).T  # [M, P]
    used = shares.sum(axis=1) > 0
    if used.sum() < 2:
        raise RunError("Fewer than two experts got a token, so there is no map of experts.")
    shares = shares[used]
    shares = shares / shares.sum(axis=1, keepdims=True)
    units = found.units[used]
    return Points(units, np.sqrt(shares, dtype=np.float32), np.arange(len(units)), len(used))
