"""What maps are made of: vectors of tokens, prompts or experts, and what is known of each point."""

import hashlib
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import pandas as pd
import pyarrow as pa

from explorer.errors import RunError
from explorer.maps.pca import Floats, Ids, has_umap, pca
from explorer.queries.routed import ROUTED
from explorer.queries.where import Part, conditions, prompt_conditions
from explorer.run import Run

Feature = Literal["hidden", "scores"]

NOISE = -1  # the cluster of points that are in none
FEWEST_MEASURED = 10  # different points that trustworthiness is measured on
# numbers of a table of prompts by experts; a larger one would not fit beside everything else
MAX_NUMBERS = 100_000_000
# assignments that are counted for it; more would take minutes
MAX_ASSIGNMENTS = 100_000_000


class Vectors(NamedTuple):
    """One vector per token.

    Attributes
    ----------
    token_ids : array [N]
        Rising.
    values : array [N, D]
        nan where a router ruled an expert out.
    """

    token_ids: Ids
    values: Floats


class Signatures(NamedTuple):
    """How the tokens of each prompt were spread over the experts of all routers.

    Attributes
    ----------
    prompt_ids : array [P]
        Rising; prompts with at least one assignment.
    counts : array [P, M]
        Assignments of the prompt's tokens to each unit.
    units : array [M, 3]
        Layer, site and expert.
    n_all : int
        Prompts there are; more than P when only every n-th was counted.
    """

    prompt_ids: Ids
    counts: Floats
    units: Ids
    n_all: int


def vector_counts(run: Run, layer: int, *, site: int = 0) -> dict[str, int]:
    """Return how many tokens have a vector of each kind at a router; absent kinds have 0."""
    return {
        feature: int(
            run.query(
                f"SELECT count(*) AS n FROM {feature} WHERE layer = $layer AND site = $site",
                {"layer": layer, "site": site},
            )["n"].iloc[0]
        )
        for feature in ("hidden", "scores")
    }


def token_vectors(run: Run, feature: Feature, layer: int, *, site: int = 0) -> Vectors:
    """Return the recorded vectors of a router.

    Parameters
    ----------
    feature : {"hidden", "scores"}
        What the router read, or what it put out for every expert.

    Raises
    ------
    RunError
        If none were recorded.
    """
    rows = run.table(
        f"SELECT token_id, {feature} AS v FROM {feature} "
        "WHERE layer = $layer AND site = $site ORDER BY token_id",
        {"layer": layer, "site": site},
    )
    if not rows.num_rows:
        raise RunError(
            f"{run.path.name} holds no {feature} of layer {layer}. Record it again with: "
            "python -m capture MODEL --sample-tokens 50000"
        )
    flat = np.concatenate(
        [chunk.flatten().to_numpy(zero_copy_only=False) for chunk in rows["v"].chunks]
    )
    values = np.asarray(flat, dtype=np.float32).reshape(rows.num_rows, -1)
    return Vectors(rows["token_id"].to_numpy().astype(np.int64), values)


def signatures(run: Run) -> Signatures:
    """Count the assignments of every prompt to every (layer, expert).

    Of a large run every n-th prompt is counted, with all of its tokens.

    Raises
    ------
    RunError
        If expert ids were not recorded.
    """
    run.refuse_without_ids("Which prompt went to which expert")
    widths = [site.n_experts for site in run.sites]
    first = np.cumsum([0, *widths])
    n_all = int(run.query("SELECT count(*) AS n FROM prompts")["n"].iloc[0])
    n_assignments = int(run.info["n_tokens"]) * sum(site.top_k for site in run.sites)
    step = max(-(-n_all * int(first[-1]) // MAX_NUMBERS), -(-n_assignments // MAX_ASSIGNMENTS), 1)
    rows = run.table(
        """
        SELECT prompt_id, layer, site, expert_id, count(*) AS n
        FROM assignments
        JOIN (SELECT token_id, prompt_id FROM tokens WHERE prompt_id % $step = 0) USING (token_id)
        GROUP BY ALL ORDER BY prompt_id
        """,
        {"step": step},
    )
    prompt, layer, site, expert, n = (
        rows[name].to_numpy().astype(np.int64) for name in rows.column_names
    )
    prompts, row = np.unique(prompt, return_inverse=True)
    counts = np.zeros((len(prompts), int(first[-1])), dtype=np.float32)
    for place, info in enumerate(run.sites):
        here = (layer == info.layer) & (site == info.site)
        counts[row[here], first[place] + expert[here]] = n[here]
    units = [(s.layer, s.site, e) for s in run.sites for e in range(s.n_experts)]
    return Signatures(prompts, counts, np.array(units, dtype=np.int64), n_all)


def token_facts(run: Run, feature: Feature, layer: int, *, site: int = 0) -> pa.Table:
    """Return what is known of the tokens with a vector, in the order of ``token_vectors``.

    Returns
    -------
    Table
        ``token_id``, ``prompt_id``, ``position``, ``phase``, ``domain`` (``""`` = none),
        ``text``, and at this router ``expert`` (the heaviest), ``weight`` and ``entropy`` (gate
        entropy, nats); NULL where it was not recorded.
    """
    return run.table(
        f"""
        WITH wanted AS (
            SELECT token_id FROM {feature} WHERE layer = $layer AND site = $site
        ), gate AS (
            SELECT token_id, entropy FROM gates WHERE layer = $layer AND site = $site
        ), top AS (
            SELECT token_id, expert_id, weight FROM assignments
            WHERE layer = $layer AND site = $site AND slot = 0
        )
        SELECT token_id, prompt_id, position, phase, coalesce(domain, '') AS domain,
            tokens.text AS text, expert_id AS expert, weight, entropy
        FROM wanted JOIN tokens USING (token_id) JOIN prompts USING (prompt_id)
            LEFT JOIN gate USING (token_id) LEFT JOIN top USING (token_id)
        ORDER BY token_id
        """,
        {"layer": layer, "site": site},
    )


def prompt_facts(run: Run, layer: int, *, site: int = 0) -> pa.Table:
    """Return what is known of each prompt, by rising ``prompt_id``.

    Returns
    -------
    Table
        ``prompt_id``, ``domain``, ``text`` (its beginning), ``tokens``, and at this router the
        mean gate ``entropy`` (nats) and the ``expert`` that most tokens have as their heaviest.
    """
    return run.table(
        """
        WITH gate AS (
            SELECT prompt_id, avg(entropy) AS entropy FROM gates JOIN tokens USING (token_id)
            WHERE layer = $layer AND site = $site GROUP BY prompt_id
        ), top AS (
            SELECT prompt_id, mode(expert_id) AS expert
            FROM assignments JOIN tokens USING (token_id)
            WHERE layer = $layer AND site = $site AND slot = 0 GROUP BY prompt_id
        )
        SELECT prompt_id, coalesce(domain, '') AS domain, left(text, 160) AS text,
            n_tokens AS tokens, expert, entropy
        FROM prompts JOIN prompt_sizes USING (prompt_id)
            LEFT JOIN gate USING (prompt_id) LEFT JOIN top USING (prompt_id)
        ORDER BY prompt_id
        """,
        {"layer": layer, "site": site},
    )


def matching_tokens(
    run: Run, *, domain: str | None = None, phase: str | None = None, part: Part | None = None
) -> Ids | None:
    """Return the tokens that the filters leave, rising; None = all."""
    where, params = conditions(domain=domain, phase=phase, part=part)
    if where == "true":
        return None
    rows = run.table(
        f"SELECT token_id FROM tokens JOIN prompts USING (prompt_id) WHERE {where} ORDER BY ALL",
        params,
    )
    return np.asarray(rows["token_id"].to_numpy(), dtype=np.int64)


def expert_counts(
    run: Run,
    layer: int,
    *,
    site: int = 0,
    ids: Ids | None = None,
    of: Literal["tokens", "prompts"] = "tokens",
    feature: Feature | None = None,
    domain: str | None = None,
    phase: str | None = None,
    part: Part | None = None,
) -> pd.DataFrame:
    """Count assignments per prompt and expert at one router.

    Parameters
    ----------
    ids : array, optional
        Of these tokens, or of all tokens of these prompts, as ``of`` says.
    feature : {"hidden", "scores"}, optional
        Only of tokens with such a vector.

    Returns
    -------
    DataFrame
        ``prompt_id``, ``expert_id``, ``assignments``.
    """
    where, params = conditions(layer=layer, site=site, domain=domain, phase=phase, part=part)
    if ids is not None:
        column = "token_id" if of == "tokens" else "prompt_id"
        where += f" AND {column} IN (SELECT unnest($ids::BIGINT[]))"
        params["ids"] = ids
    if feature is not None:
        where += (
            f" AND token_id IN (SELECT token_id FROM {feature} "
            "WHERE layer = $layer AND site = $site)"
        )
    return run.query(
        f"""
        SELECT prompt_id, expert_id, count(*) AS assignments
        FROM assignments JOIN tokens USING (token_id) JOIN prompts USING (prompt_id)
        WHERE {where} GROUP BY ALL ORDER BY ALL
        """,
        params,
    )


def expert_domains(run: Run) -> pd.DataFrame:
    """Count assignments per (layer, expert) and domain, from the run's totals.

    Returns
    -------
    DataFrame
        ``layer``, ``site``, ``expert_id``, ``domain`` (``""`` = none), ``assignments``.
    """
    return run.query(
        "SELECT layer, site, expert_id, coalesce(domain, '') AS domain, "
        "sum(assignments)::BIGINT AS assignments FROM expert_load_by GROUP BY ALL ORDER BY ALL"
    )


def expert_facts(run: Run) -> pa.Table:
    """Return what is known of each (layer, expert) unit, by layer, site and expert.

    Returns
    -------
    Table
        ``layer``, ``site``, ``expert_id``, ``kind`` (missing where it was not seen),
        ``assignments``, ``ratio`` (share of its router's assignments to routed experts over the
        uniform share; missing for others, which have no load), ``domain``: the one whose
        assignments go to this expert most often, against all domains; and ``lift``, how much more
        often.
    """
    return run.table(
        f"""
        WITH by_domain AS (
            SELECT layer, site, expert_id, coalesce(domain, '') AS domain,
                sum(assignments) AS n
            FROM expert_load_by GROUP BY ALL
        ), shares AS (
            SELECT *, n / nullif(sum(n) OVER (PARTITION BY layer, site, domain), 0) AS of_domain,
                sum(n) OVER (PARTITION BY layer, site, expert_id) AS assignments,
                sum(n) OVER (PARTITION BY layer, site) AS of_site
            FROM by_domain
        ), typical AS (
            SELECT layer, site, expert_id, arg_max(domain, of_domain) AS domain,
                max(of_domain) / nullif(any_value(assignments / of_site), 0) AS lift
            FROM shares WHERE assignments > 0 GROUP BY ALL
        )
        SELECT layer, site, expert_id, e.kind, e.assignments,
            CASE WHEN routed.layer IS NOT NULL THEN e.assignments * count(routed.layer) OVER of_site
                / nullif(sum(e.assignments) FILTER (routed.layer IS NOT NULL) OVER of_site, 0)
                END AS ratio,
            domain, lift
        FROM expert_load e LEFT JOIN {ROUTED} USING (layer, site, expert_id)
            LEFT JOIN typical USING (layer, site, expert_id)
        WINDOW of_site AS (PARTITION BY layer, site)
        ORDER BY layer, site, expert_id
        """
    )


def matching_prompts(run: Run, *, domain: str | None = None, part: Part | None = None) -> Ids:
    """Return the prompts that the filters leave, rising."""
    where, params = prompt_conditions(domain=domain, part=part)
    rows = run.table(f"SELECT prompt_id FROM prompts WHERE {where} ORDER BY ALL", params)
    return np.asarray(rows["prompt_id"].to_numpy(), dtype=np.int64)


Unit = Literal["tokens", "prompts", "experts"]


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


# names of the columns of ``Prepared.ids``
ID_COLUMNS = {
    "tokens": ("token_id",),
    "prompts": ("prompt_id",),
    "experts": ("layer", "site", "expert_id"),
}


class Prepared(NamedTuple):
    """Points without their vectors.

    Attributes
    ----------
    ids : array [N, C]
    flat : array [N, 2]
        The first two principal components.
    digest : str
        Name of the vectors' content.
    dims : int
        Of a vector.
    n_all : int
        Units that the run has; more than N where some have no vector.
    has_umap : bool
        Whether UMAP can lay them out.
    is_point : bool
        Whether all vectors are equal.
    """

    ids: Ids
    flat: Floats
    digest: str
    dims: int
    n_all: int
    has_umap: bool
    is_point: bool


def prepare(run: Run, source: Source) -> Prepared:
    """Read the vectors once, and return what can be said of them at once.

    Raises
    ------
    RunError
        If the run did not record what is asked for.
    """
    points = read_points(run, source)
    values = points.values
    flat = pca(values)
    return Prepared(
        points.ids,
        flat,
        points.digest,
        values.shape[1],
        points.n_all,
        has_umap(values),
        not flat.any(),
    )


def point_facts(run: Run, source: Source, ids: Ids) -> pa.Table:
    """Return what is known of each point, one row per row of ``ids``.

    Parameters
    ----------
    source : Source
        Its layer and site are the router that experts and entropies are of.
    ids : array [N, C]
        ``Prepared.ids``.
    """
    if source.unit == "tokens":
        facts = token_facts(run, source.feature, source.layer, site=source.site)
    elif source.unit == "prompts":
        facts = prompt_facts(run, source.layer, site=source.site)
    else:
        facts = expert_facts(run)
    names = ID_COLUMNS[source.unit]
    known = _keys(np.stack([facts[name].to_numpy().astype(np.int64) for name in names], axis=1))
    return facts.take(pa.array(np.searchsorted(known, _keys(ids))))


def _keys(ids: Ids) -> npt.NDArray[np.int64]:
    """Return one number per row that rises as the rows do; experts are numbered below 2**20."""
    key = np.zeros(len(ids), dtype=np.int64)
    for column in ids.T:
        key = key * 2**20 + column
    return key
