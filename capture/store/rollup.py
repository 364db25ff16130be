"""Running sums per site, domain and phase, from which the view ``expert_load`` is made."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from capture.store.records import ForwardRows, SiteInfo
from capture.store.schema import Column

_Key = tuple[int, str | None, str]  # index of the site, domain, phase


class _Sums:
    """Sums over the tokens of one site, domain and phase, each of shape [E]."""

    __slots__ = ("assignments", "prob_sum", "weight_sum")

    def __init__(self, n_experts: int) -> None:
        self.assignments = np.zeros(n_experts, np.int64)
        self.weight_sum = np.zeros(n_experts, np.float64)
        self.prob_sum: npt.NDArray[np.float64] | None = np.zeros(n_experts, np.float64)


class Rollup:
    """Adds up what every forward pass did to every expert."""

    def __init__(self, sites: Sequence[SiteInfo]) -> None:
        self._sites = sites
        self._sums: dict[_Key, _Sums] = {}

    def add(self, forward: ForwardRows) -> None:
        """Add the sums of one forward pass."""
        phase = forward.tokens.phase
        for site in forward.sites:
            n_experts = self._sites[site.site_index].n_experts
            for row, domain in enumerate(forward.domains):
                key = (site.site_index, domain, phase)
                sums = self._sums.get(key)
                if sums is None:
                    sums = self._sums[key] = _Sums(n_experts)
                sums.assignments += site.assignments[row]
                sums.weight_sum += site.weight_sum[row]
                if site.prob_sum is None:
                    # a sum over only some of the tokens would read as one over all
                    sums.prob_sum = None
                elif sums.prob_sum is not None:
                    sums.prob_sum += site.prob_sum[row]

    def assignments(self) -> list[int]:
        """Return the number of assignments of every site."""
        totals = [0] * len(self._sites)
        for (index, _, _), sums in self._sums.items():
            totals[index] += int(sums.assignments.sum())
        return totals

    def table(self, columns: Sequence[Column]) -> pa.Table:
        """Return the sums as rows of the table ``rollup``."""
        rows: list[list[Any]] = [
            [
                self._sites[index].layer,
                self._sites[index].site,
                domain,
                phase,
                sums.assignments,
                sums.weight_sum,
                sums.prob_sum,
            ]
            for (index, domain, phase), sums in self._sums.items()
        ]
        by_column = zip(*rows, strict=True) if rows else ([] for _ in columns)
        arrays = [
            pa.array(values, column.arrow)
            for values, column in zip(by_column, columns, strict=True)
        ]
        return pa.Table.from_arrays(arrays, names=[column.name for column in columns])
