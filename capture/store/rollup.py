"""Running sums per site, domain and phase, from which the view ``expert_load`` is made."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from capture.store.records import ForwardRows, SiteBlock, SiteInfo
from capture.store.schema import Column

_Key = tuple[tuple[int, ...], str | None, str]  # indices of the sites, domain, phase


class _Sums:
    """Sums over the tokens of S sites, one domain and one phase, each of shape [S, E]."""

    __slots__ = ("assignments", "prob_sum", "weight_sum")

    def __init__(self, shape: tuple[int, ...]) -> None:
        self.assignments = np.zeros(shape, np.int64)
        self.weight_sum = np.zeros(shape, np.float64)
        self.prob_sum: npt.NDArray[np.float64] | None = np.zeros(shape, np.float64)


class Rollup:
    """Adds up what every forward pass did to every expert.

    Parameters
    ----------
    sites : sequence of SiteInfo
        The run's sites, each in blocks of the same sites throughout the run.
    """

    def __init__(self, sites: Sequence[SiteInfo]) -> None:
        self._sites = sites
        self._sums: dict[_Key, _Sums] = {}

    def add(self, forward: ForwardRows, blocks: Sequence[SiteBlock]) -> None:
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
        by_column = zip(*rows, strict=True) if rows else ([] for _ in columns)
        arrays = [
            pa.array(values, column.arrow)
            for values, column in zip(by_column, columns, strict=True)
        ]
        return pa.Table.from_arrays(arrays, names=[column.name for column in columns])
