"""An open run file, as the explorer's questions see it."""

import hashlib
import html
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import pandas as pd
import pyarrow as pa

from capture.paths import given_path, model_name
from capture.store import RunReader, SiteInfo
from capture.store.rewrite import NOTE
from explorer.errors import RunError
from explorer.text import counted, visible

# how a prompt without a domain is named in filters and results; NULL in the run file
UNLABELLED = ""


class Run:
    """A finished run, open for reading; safe to share between threads.

    Attributes
    ----------
    path : Path
    info : dict
        The one row of the view ``run``; at level counts ``n_tokens`` is assignments / top_k.
    sites : list of SiteInfo
        Ordered by layer and site.
    layers : list of int
        Decoder layers with at least one site, in order.
    domains : list of str
        In alphabetical order, ``""`` (UNLABELLED) last when some prompts have no domain.
    phases : list of str
        Of ``prompt`` and ``generated``, those that occur.
    """

    def __init__(self, reader: RunReader) -> None:
        self._reader = reader
        self.path = Path(reader.path)
        self.info: dict[str, Any] = dict(reader.info)
        self.sites: list[SiteInfo] = list(reader.sites)
        self.layers: list[int] = sorted({site.layer for site in self.sites})
        if self.sums_only:
            self.info["n_tokens"] = self.tokens_of_sums()
        source = "expert_load_by" if self.sums_only else "prompts"
        named = self.query(f"SELECT DISTINCT domain FROM {source}")["domain"].tolist()
        if named == [None] and self.sums_only:
            named = []
        self.domains = sorted({name for name in named if name})
        if any(not name for name in named):
            self.domains.append(UNLABELLED)
        found = set(self.query("SELECT DISTINCT phase FROM batches")["phase"])
        self.phases: list[str] = [phase for phase in ("prompt", "generated") if phase in found]

    def query(
        self, sql: str, params: Sequence[object] | Mapping[str, object] | None = None
    ) -> pd.DataFrame:
        """Return the result of a SELECT; values go into ``params``, never into ``sql``.

        Returns
        -------
        DataFrame
            Missing is None in columns of text, NaN in columns of floats (a run file holds no
            NaN, so it cannot be mistaken for a value) and NA in nullable columns of integers.
        """
        return frame(self.table(sql, params))

    def table(
        self, sql: str, params: Sequence[object] | Mapping[str, object] | None = None
    ) -> pa.Table:
        """Return the result of a SELECT as an Arrow table, for results of millions of rows."""
        return self._reader.query(sql, dict(params) if isinstance(params, Mapping) else params)

    def site_info(self, layer: int, site: int = 0) -> SiteInfo:
        """Return what is known of one router.

        Raises
        ------
        RunError
            If the run has no router there.
        """
        for info in self.sites:
            if (info.layer, info.site) == (layer, site):
                return info
        raise RunError(
            f"Layer {layer} has no router {site} in {self.path.name}. "
            f"Choose one of the layers {', '.join(map(str, self.layers))}."
        )

    @property
    def fingerprint(self) -> str:
        """A short name for what was recorded; a copy of the file has it, another recording not."""
        names = ("model", "architecture", "dtype", "level", "started_at", "seconds")
        facts = [self.info[name] for name in (*names, "n_prompts", "n_tokens", "complete")]
        text = repr((*map(str, facts), *(tuple(site[:7]) for site in self.sites)))
        return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()

    @property
    def records_ids(self) -> bool:
        """Whether expert ids per token were recorded; at levels counts and stats they were not."""
        return self.info["level"] not in ("counts", "stats")

    @property
    def sums_only(self) -> bool:
        """Whether this is level counts: sums of another program, and no token or prompt."""
        return bool(self.info["level"] == "counts")

    def refuse_without_ids(self, what: str) -> None:
        """Refuse what needs the experts of every token where the run does not hold them.

        Raises
        ------
        RunError
        """
        if not self.records_ids:
            raise RunError(f"{what} {self.needs_ids}")

    @property
    def needs_ids(self) -> str:
        """Why the experts of every token are missing, and where to get them, after "It"."""
        if self.sums_only:
            return (
                "needs the experts of every token, and this run is imported from counts, which do "
                "not have them. Import a trace that has."
            )
        return (
            "needs the experts of every token, which level stats does not keep. Record the run "
            "again with --level ids."
        )

    def tokens_of_sums(
        self, where: str = "true", params: Mapping[str, object] | None = None
    ) -> int:
        """Return how many tokens counts are of: those of the layer that counted most.

        ``where`` is a condition on the columns of ``expert_load_by``.
        """
        found = self.query(
            "SELECT coalesce(max(n), 0) AS n FROM (SELECT sum(assignments) / any_value(top_k) AS n"
            f" FROM expert_load_by JOIN sites USING (layer, site) WHERE {where} GROUP BY layer,"
            " site)",
            params or {},
        )
        return round(float(found["n"].iloc[0]))

    @property
    def notes(self) -> dict[str, Any]:
        """What the capture says of itself beside the columns, empty if that cannot be read."""
        try:
            notes = json.loads(self.info["notes"])
        except ValueError:
            return {}
        return notes if isinstance(notes, dict) else {}

    @property
    def counts_only(self) -> bool:
        """Whether this is an export that leaves the text out, and all that is known per token."""
        return self.notes.get(NOTE) is True

    def _repr_html_(self) -> str:
        """Say in a notebook what the run is."""
        info, sites = self.info, self.sites
        experts, top_k = (
            " to ".join(map(str, sorted({min(numbers), max(numbers)})))
            for numbers in ([s.n_experts for s in sites], [s.top_k for s in sites])
        )
        prompts = "" if self.sums_only else f" of {counted(info['n_prompts'], 'prompt')}"
        layers = counted(len(self.layers), "layer")
        rows = {
            "Model": f"{model_name(str(info['model']))} ({info['architecture']})",
            "Tokens": f"{info['n_tokens']:,}{prompts}",
            "Routers": f"{len(sites)} in {layers}, each choosing {top_k} of {experts} experts",
            "Level": info["level"],
            "Domains": ", ".join(name or "(no domain)" for name in self.domains[:12])
            + (f" and {len(self.domains) - 12} others" if len(self.domains) > 12 else "")
            or "none",
            "Complete": "yes" if info["complete"] else "no: the capture did not end",
        }
        body = "".join(
            f"<tr><th style='text-align:left'>{name}</th>"
            f"<td style='text-align:left'>{html.escape(visible(str(value)))}</td></tr>"
            for name, value in rows.items()
        )
        return f"<b>Run {html.escape(visible(self.path.stem))}</b><table>{body}</table>"

    def close(self) -> None:
        """Close the file."""
        self._reader.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def open_run(path: str | Path) -> Run:
    """Open a finished run file.

    Raises
    ------
    RunError
        If there is no such file, or it is the ``.partial`` file of a capture that has not ended.
    capture.errors.StoreError
        If the file is not a run, or of a schema version that this code does not read.
    """
    path = given_path(path, "the run file", RunError)
    if path.name.endswith(".partial"):
        raise RunError(
            f"{path.name} is the file of a capture that has not ended. If that capture was killed,"
            f" close the file with: python -m capture recover {path.name}"
        )
    if not path.is_file():
        raise RunError(
            f"Expected a run file at {path}, but there is no such file. "
            "Record one with: python -m capture demo --prompts demo --out runs/demo.duckdb"
        )
    reader = RunReader.open(path, checked=True)
    try:
        return Run(reader)
    except BaseException:
        reader.close()
        raise


def frame(table: pa.Table) -> pd.DataFrame:
    """Return an Arrow table as a DataFrame, with missing values as ``Run.query`` says."""
    columns: dict[str, pd.Series] = {}
    for name, column in zip(table.column_names, table.columns, strict=True):
        if pa.types.is_string(column.type) or pa.types.is_large_string(column.type):
            columns[name] = pd.Series(column.to_pylist(), dtype=object)
        elif pa.types.is_integer(column.type) and column.null_count:
            columns[name] = pd.Series(column.to_pylist(), dtype="Int64")
        elif pa.types.is_floating(column.type):
            columns[name] = pd.Series(column.cast(pa.float64()).to_numpy(), dtype="float64")
        else:
            columns[name] = column.to_pandas()
    return pd.DataFrame(columns)
