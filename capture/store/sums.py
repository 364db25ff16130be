"""Sums over a run: what every expert did, and which experts met at a site or between layers.

``check_counts`` holds them, and the rows, against what was handed in when a capture ends.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import duckdb
import numpy as np
import numpy.typing as npt
import pyarrow as pa

from capture.errors import StoreError
from capture.store import schema
from capture.store.codec import Layout, unpack_ids
from capture.store.records import Block, ForwardRows, PairSums, SiteInfo, describe, next_sites
from capture.store.schema import Column
from capture.store.tables import rows_table

_Key = tuple[tuple[int, ...], str | None, str]  # indices of the sites, domain, phase
# tokens whose rows are unpacked at a time; 64 layers of top-8 take 64 MB
CHUNK_TOKENS = 16_384
MAX_CELLS = 2**28  # of all matrices together, 2 GB; 400 sites of 512 experts take less than half
_SUMS = ("assignments", "weight_sum", "prob_sum")
Counts = npt.NDArray[np.int64]
_ADVICE = "The partial file stays; report this, it is a defect of the capture."


class _Sums:
    """Sums over the tokens of S sites, one domain and one phase, each of shape [S, E]."""

    __slots__ = ("assignments", "prob_sum", "weight_sum")

    def __init__(self, shape: tuple[int, ...]) -> None:
        self.assignments = np.zeros(shape, np.int64)
        self.weight_sum = np.zeros(shape, np.float64)
        self.prob_sum: npt.NDArray[np.float64] | None = np.zeros(shape, np.float64)


class Rollup:
    """Adds up what every forward pass did to every expert.

    A site comes in blocks of the same sites throughout the run.
    """

    def __init__(self, sites: Sequence[SiteInfo]) -> None:
        self._sites = sites
        self._sums: dict[_Key, _Sums] = {}

    def add(self, forward: ForwardRows, blocks: Sequence[Block]) -> None:
        """Add the sums of one forward pass."""
        phase = forward.tokens.phase
        for block in blocks:
            for row, domain in enumerate(forward.domains):
                key = (block.site_indices, domain, phase)
                sums = self._sums.get(key)
                if sums is None:
                    shape = block.assignments[:, row].shape
                    sums = self._sums[key] = _Sums(shape)
                sums.assignments += block.assignments[:, row]
                sums.weight_sum += block.weight_sum[:, row]
                if block.prob_sum is None:
                    # a sum over only some of the tokens would read as one over all
                    sums.prob_sum = None
                elif sums.prob_sum is not None:
                    sums.prob_sum += block.prob_sum[:, row]

    def add_load(self, domain: str | None, assignments: Sequence[Counts]) -> None:
        """Add sums that no token is known of, [E] a site: neither weights nor a phase."""
        for index, counts in enumerate(assignments):
            key = ((index,), domain, schema.ANY_PHASE)
            sums = self._sums.setdefault(key, _Sums((1, len(counts))))
            sums.assignments[0] += counts
            sums.weight_sum[:] = np.nan
            sums.prob_sum = None

    def assignments(self) -> list[int]:
        """Return the number of assignments of every site."""
        totals = [0] * len(self._sites)
        for (indices, _, _), sums in self._sums.items():
            for place, index in enumerate(indices):
                totals[index] += int(sums.assignments[place].sum())
        return totals

    def table(self, columns: Sequence[Column]) -> pa.Table:
        """Return the sums as rows of the table ``rollup``."""
        rows: list[list[Any]] = [
            [
                self._sites[index].layer,
                self._sites[index].site,
                domain,
                phase,
                sums.assignments[place],
                sums.weight_sum[place],
                None if sums.prob_sum is None else sums.prob_sum[place],
            ]
            for (indices, domain, phase), sums in self._sums.items()
            for place, index in enumerate(indices)
        ]
        return rows_table(columns, rows)


def summed(rows: Iterable[Mapping[str, Any]], key: Sequence[str]) -> list[dict[str, Any]]:
    """Add up rows of sums over experts that agree in ``key``; unknown plus known is unknown."""
    found: dict[tuple[Any, ...], dict[str, Any]] = {}
    for row in rows:
        named = {name: row[name] for name in key}
        group = found.setdefault(tuple(named.values()), named | dict.fromkeys(_SUMS, 0))
        for name in _SUMS:
            # a sum over only some of the tokens would read as one over all
            missing = row[name] is None or group[name] is None
            group[name] = None if missing else group[name] + np.asarray(row[name])
    return list(found.values())


class PairTotals:
    """Adds up :class:`PairSums`."""

    def __init__(self, sites: Sequence[SiteInfo]) -> None:
        self._sites = sites
        self._next = next_sites(sites)
        self._pairs: dict[int, Counts] = {}
        self._transitions: dict[int, Counts] = {}

    def __bool__(self) -> bool:
        """Whether anything was added."""
        return bool(self._pairs)

    def add(self, sums: Sequence[PairSums]) -> None:
        """Add what came in, all of it or nothing.

        Raises
        ------
        StoreError
            If a matrix has another shape than its sites say, or a negative count.
        """
        for given in sums:
            self._check(given)
        for given in sums:
            _add(self._pairs, given.site_index, given.pairs)
            if given.transitions is not None:
                _add(self._transitions, given.site_index, given.transitions)

    def _check(self, given: PairSums) -> None:
        if not 0 <= given.site_index < len(self._sites):
            raise StoreError(
                f"Pairs belong to one of the {len(self._sites)} sites, got site_index "
                f"{given.site_index}. Count the sites from 0."
            )
        site, following = self._sites[given.site_index], self._next[given.site_index]
        if given.next_index != following or (given.transitions is None) != (following is None):
            raise StoreError(
                f"Transitions of {site.module} lead to site {following}, got next_index "
                f"{given.next_index} {'without' if given.transitions is None else 'with'} counts. "
                "Follow next_sites."
            )
        self._check_matrix("pairs", site, given.pairs, site.n_experts)
        if given.transitions is not None and following is not None:
            width = self._sites[following].n_experts
            self._check_matrix("transitions", site, given.transitions, width)

    @staticmethod
    def _check_matrix(name: str, site: SiteInfo, counts: Counts, width: int) -> None:
        if counts.shape != (site.n_experts, width):
            raise StoreError(
                f"{name} of {site.module} must have shape [{site.n_experts}, {width}], got "
                f"{list(counts.shape)}. Pass one row per expert."
            )
        if counts.min(initial=0) < 0 or (name == "pairs" and not np.array_equal(counts, counts.T)):
            raise StoreError(
                f"{name} of {site.module} must be counts, and pairs the same in both orders, got a "
                "negative or one-sided count. Count the real tokens only."
            )

    def tables(self, columns_of: dict[str, list[Column]]) -> dict[str, pa.Table]:
        """Return the sums as rows of the tables ``coactivation`` and ``transition``."""
        sites = self._sites
        pairs = [(sites[i].layer, sites[i].site, m.ravel()) for i, m in self._pairs.items()]
        transitions = []
        for index, counts in self._transitions.items():
            following = self._next[index]
            assert following is not None  # checked when it came in
            place = (sites[index].layer, sites[following].layer, sites[following].n_experts)
            transitions.append((*place, counts.ravel()))
        return {
            "coactivation": rows_table(columns_of["coactivation"], pairs),
            "transition": rows_table(columns_of["transition"], transitions),
        }


def store_pairs(
    connection: duckdb.DuckDBPyConnection,
    totals: PairTotals,
    columns_of: dict[str, list[Column]],
    *,
    rewrite: Callable[[str], str] = str,
) -> None:
    """Replace the stored sums by these; the caller opens the transaction.

    ``rewrite`` names the tables where they are not those of the connection itself.
    """
    connection.execute(rewrite(schema.CLEAR_PAIRS))
    for name, rows in totals.tables(columns_of).items():
        connection.register("rows", rows)
        try:
            connection.execute(rewrite(schema.insert(name)))
        finally:
            connection.unregister("rows")


def _add(sums: dict[int, Counts], index: int, counts: Counts) -> None:
    if index in sums:
        sums[index] += counts
    else:
        sums[index] = counts.astype(np.int64)  # a copy: the caller may reuse its buffer


def pairs_of_rows(
    connection: duckdb.DuckDBPyConnection, layout: Layout, sites: Sequence[SiteInfo]
) -> PairTotals:
    """Count the pairs again from the stored routing rows of a run at level ids or deeper.

    Raises
    ------
    StoreError
        If the rows are not one for each token and site, or there are too many pairs to count.
    """
    cells = sum(site.n_experts**2 for site in sites)
    if cells > MAX_CELLS:
        raise StoreError(
            f"Pairs of experts are counted for up to {MAX_CELLS:,} pairs, and {len(sites)} sites "
            f"have {cells:,}. Record level 'stats'."
        )
    totals = PairTotals(sites)
    places = sorted(range(len(sites)), key=lambda i: (sites[i].layer, sites[i].site))
    first, last = connection.execute(schema.TOKEN_RANGE).fetchall()[0]
    for start in range(first, last + 1, CHUNK_TOKENS):
        bounds = [start, start + CHUNK_TOKENS]
        rows = connection.sql(schema.routed_tokens(layout), params=bounds).to_arrow_table()
        if not rows.num_rows:
            continue  # prompts that an interrupted capture had not come to
        words = np.stack([rows[f"ids{word}"].to_numpy() for word in range(layout.id_words)], axis=1)
        ids = unpack_ids(words, layout)
        at = np.stack([rows[name].to_numpy() for name in ("layer", "site")], axis=1)
        # rows come site after site; a site has as many as the others of its side
        starts = np.flatnonzero(np.any(np.diff(at, axis=0, prepend=-1) != 0, axis=1))
        parts = {
            (int(at[start, 0]), int(at[start, 1])): part
            for start, part in zip(starts, np.split(ids, starts[1:]), strict=True)
        }
        nothing = ids[:0]
        of_site = {i: parts.get((sites[i].layer, sites[i].site), nothing) for i in places}
        for side in {site.side for site in sites}:
            counts = {len(of_site[i]) for i in places if sites[i].side == side}
            if len(counts) > 1:
                raise StoreError(
                    f"Every token has a row at each of the {len(sites)} sites, got "
                    f"{min(counts)} to {max(counts)}. The file is damaged; record the run again."
                )
        totals.add(count_pairs(of_site, sites))
    return totals


def count_pairs(ids: dict[int, npt.NDArray[np.int32]], sites: Sequence[SiteInfo]) -> list[PairSums]:
    """Count pairs and transitions of every site's ids [N, K], -1 = empty slot."""
    found = []
    for index, following in enumerate(next_sites(sites)):
        width = sites[index].n_experts
        transitions = None
        if following is not None:
            transitions = _count(ids[index], ids[following], width, sites[following].n_experts)
        pairs = _count(ids[index], ids[index], width, width)
        found.append(PairSums(index, pairs, transitions, following))
    return found


def _count(
    first: npt.NDArray[np.int32], second: npt.NDArray[np.int32], height: int, width: int
) -> Counts:
    """Count the tokens for every pair (id in first, id in second), [height, width]."""
    counts = np.zeros(height * width, np.int64)
    for left in first.T:
        for right in second.T:
            both = (left >= 0) & (right >= 0)
            cells = left[both].astype(np.int64) * width + right[both]
            counts += np.bincount(cells, minlength=height * width)
    return counts.reshape(height, width)


def check_counts(
    connection: duckdb.DuckDBPyConnection,
    *,
    layout: Layout,
    sites: Sequence[SiteInfo],
    routed: bool,
    tokens: Mapping[str, int],
    assignments: Sequence[int],
    vectors: Mapping[str, Sequence[int]],
    attention: Mapping[str, int],
) -> None:
    """Compare the stored rows with what was handed in.

    Parameters
    ----------
    routed : bool
        Whether the level stores a row per token and site.
    tokens : mapping of int
        How many were handed in of each phase.
    assignments : sequence of int
        Assignments of every site, summed while the forward passes came in.
    vectors : mapping of sequences of int
        For the tables ``score`` and ``hidden``: how many rows every site was handed.
    attention : mapping of int
        For the tables of attention: how many rows were handed in.

    Raises
    ------
    StoreError
        If a count differs; the message names the site.
    """
    n_tokens = sum(tokens.values())
    rows, distinct = connection.execute(schema.COUNT_TOKENS).fetchall()[0]
    if rows != n_tokens or distinct != n_tokens:
        raise StoreError(
            f"{n_tokens} tokens were handed in, but {rows} rows with {distinct} different token "
            f"ids are stored. {_ADVICE}"
        )
    for table, expected in attention.items():
        count = connection.execute(schema.count_all(table)).fetchall()[0][0]
        if count != expected:
            raise StoreError(
                f"{expected} rows of the table {table} were handed in, and {count} are stored. "
                f"{_ADVICE}"
            )
    load = _by_site(connection, schema.COUNT_LOAD)
    reached = [sum(n for phase, n in tokens.items() if site.reads(phase)) for site in sites]
    expected_rows = {"route": reached if routed else [0] * len(sites), **vectors}
    for table, wanted in expected_rows.items():
        stored = _by_site(connection, schema.count_rows(table))
        for site, count in zip(sites, wanted, strict=True):
            if stored.get((site.layer, site.site), 0) != count:
                raise StoreError(
                    f"{describe(site)} was handed {count} rows of the table {table}, and "
                    f"{stored.get((site.layer, site.site), 0)} are stored. {_ADVICE}"
                )
    filled = _by_site(connection, schema.count_assignments(layout)) if routed else load
    for site, expected in zip(sites, assignments, strict=True):
        place = (site.layer, site.site)
        if not load.get(place, 0) == filled.get(place, 0) == expected:
            raise StoreError(
                f"{describe(site)} was handed {expected} assignments, but its load sums to "
                f"{load.get(place, 0)} and its rows to {filled.get(place, 0)}. {_ADVICE}"
            )


def check_diagonal(connection: duckdb.DuckDBPyConnection, sites: Sequence[SiteInfo]) -> None:
    """Compare how often an expert meets itself with its load.

    Raises
    ------
    StoreError
        If they differ; the message names the site.
    """
    load = _by_site(connection, schema.COUNT_LOAD)
    met = _by_site(connection, schema.COUNT_DIAGONAL)
    for site in sites:
        place = (site.layer, site.site)
        if load.get(place, 0) != met.get(place, 0):
            raise StoreError(
                f"{describe(site)} has {load.get(place, 0)} assignments, but its pairs cover "
                f"{met.get(place, 0)}. {_ADVICE}"
            )


def _by_site(connection: duckdb.DuckDBPyConnection, sql: str) -> dict[tuple[int, int], int]:
    rows = connection.execute(sql).fetchall()
    return {(layer, site): count or 0 for layer, site, count in rows}
