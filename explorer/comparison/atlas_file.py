"""The file of a causal atlas, beside its run: what the loss becomes without each expert.

One Parquet file per run, model and settings, named ``RUN.KEY.atlas``; its facts are JSON in the
schema's metadata. It may come from a stranger: columns, sizes and values are held against what a
measurement writes. Read without torch.
"""

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from scipy.stats import rankdata, spearmanr

from capture.errors import first_line
from capture.store.check import MAX_LAYER, MAX_LOSS, MAX_NAME
from explorer.comparison.results_file import files_beside
from explorer.errors import ComparisonError

SUFFIX = ".atlas"
FORMAT_VERSION = 1
EXACT = ("rerouted", "removed")
ESTIMATES = ("fisher", "first_order")
_FACTS = b"routescope atlas"
_MAKE = "Make one with: python -m explorer atlas RUN"
COLUMNS = pa.schema(
    [
        *((name, pa.int32()) for name in ("layer", "site", "expert_id")),
        ("way", pa.string()),  # of EXACT or ESTIMATES
        ("domain", pa.string()),  # NULL = all texts
        *((name, pa.int64()) for name in ("tokens", "texts")),
        ("load", pa.float64()),  # share of the tokens that chose the expert, 0..1
        # nats a token; margins are half of the 95% interval, paired by text
        *((name, pa.float64()) for name in ("loss_change", "loss_margin", "half_a", "half_b")),
        # another expert of the layer that about as many of these tokens chose; NULL = there is none
        ("control_id", pa.int32()),
        *((name, pa.float64()) for name in ("control_load", "control_change")),
        *((name, pa.float64()) for name in ("over_control", "over_margin")),
    ]
)
FACTS = {
    "format_version": int,
    "created_at": str,
    "run_name": str,
    "run_fingerprint": str,
    "model": str,
    "model_fingerprint": str,
    "texts": str,  # where they are from
    "n_texts": int,
    "n_tokens": int,
    "native_loss": float,
    "seed": int,
    "complete": bool,
}
# not in every file: experts that the estimate was held against, how it ranks them (Spearman), and
# how long taking every expert out would take
CHECK_FACTS = ("checked", "checked_agreement")
MAY_HOLD = {"checked": int, "checked_agreement": float, "exact_seconds": float}
MAX_ROWS = 4_000_000
THIRD = 1 / 3
MANY = 512  # experts of all layers: with more, taking each out takes hours
CHECKED = 64  # experts that an estimate is held against


class Atlas(NamedTuple):
    """An atlas as it was read.

    Attributes
    ----------
    path : Path
    facts : dict
        As in ``FACTS``.
    rows : DataFrame
        As in ``COLUMNS``: one row for each expert, way and domain, and for all texts.
    """

    path: Path
    facts: dict[str, Any]
    rows: pd.DataFrame

    def of(self, way: str, domain: str | None = None) -> pd.DataFrame:
        """Return the rows of one way to take experts out, on all texts or one domain's."""
        rows = self.rows[self.rows["way"] == way]
        rows = rows[rows["domain"].isna() if domain is None else rows["domain"] == domain]
        return rows.sort_values(["layer", "site", "expert_id"], ignore_index=True)

    @property
    def ways(self) -> list[str]:
        """The ways that were measured, exact ones first."""
        found = set(self.rows["way"])
        return [way for way in (*EXACT, *ESTIMATES) if way in found]


class Agreement(NamedTuple):
    """How well two rankings of experts agree.

    Attributes
    ----------
    overall : float
        Spearman's correlation over all experts of all layers.
    within : float
        Its mean over layers, of the experts of one layer.
    """

    overall: float
    within: float


def reliability(atlas: Atlas, way: str) -> Agreement:
    """Return how one half of the texts ranks experts as the other half does."""
    rows = atlas.of(way)
    return _agreement(rows, rows["half_a"], rows["half_b"])


def agreement(atlas: Atlas, one: str, other: str) -> Agreement:
    """Return how two ways of an atlas rank experts alike."""
    keys = ["layer", "site", "expert_id"]
    both = atlas.of(one).merge(atlas.of(other), on=keys, suffixes=("", "_other"))
    return _agreement(both, both["loss_change"], both["loss_change_other"])


def _agreement(rows: pd.DataFrame, a: "pd.Series[float]", b: "pd.Series[float]") -> Agreement:
    known = a.notna() & b.notna()
    places = rows[known].groupby(["layer", "site"]).groups
    within = [spearman(a.loc[at], b.loc[at]) for at in places.values()]
    real = [one for one in within if one == one]
    return Agreement(spearman(a[known], b[known]), float(np.mean(real)) if real else np.nan)


def spearman(a: npt.ArrayLike, b: npt.ArrayLike) -> float:
    """Return the rank correlation of two lists, nan where there is none."""
    if len(np.unique(np.asarray(a))) < 2 or len(np.unique(np.asarray(b))) < 2 or np.size(a) < 3:
        return float("nan")
    return float(spearmanr(a, b).statistic)


def with_news(rows: pd.DataFrame) -> pd.DataFrame:
    """Return rows of one way with where use and need disagree.

    Parameters
    ----------
    rows : DataFrame
        From :meth:`Atlas.of`.

    Returns
    -------
    DataFrame
        With ``load_rank`` and ``need_rank`` (0 = least of the layer, 1 = most) and ``news``:
        ``"rare but needed"`` (among the third of the layer that is used least and the third that
        is missed most, with an interval above 0), ``"busy but idle"`` (the other way round), or
        ``""``.
    """
    found = rows.copy()
    places = found.groupby(["layer", "site"])
    for name, column in (("load_rank", "load"), ("need_rank", "loss_change")):
        found[name] = places[column].transform(_places)
    sure = found["loss_change"] > found["loss_margin"]
    rare, busy = found["load_rank"] <= THIRD, found["load_rank"] >= 1 - THIRD
    needed, idle = found["need_rank"] >= 1 - THIRD, found["need_rank"] <= THIRD
    found["news"] = np.select(
        [rare & needed & sure, busy & idle], ["rare but needed", "busy but idle"], default=""
    )
    return found


def _places(values: "pd.Series[float]") -> npt.NDArray[np.float64]:
    ranks = rankdata(values, method="average")
    return np.asarray((ranks - 1) / max(1, len(ranks) - 1))


def atlases_of(run: str | Path) -> list[Path]:
    """Return the atlas files that lie beside a run file, newest first."""
    return files_beside(run, SUFFIX)


def read_atlas(path: str | Path) -> Atlas:
    """Read an atlas file.

    Raises
    ------
    ComparisonError
        If there is no such file, or it is none of this format.
    """
    path = Path(path)
    try:
        with pq.ParquetFile(path) as file:
            metadata = file.schema_arrow.metadata or {}
            if file.metadata.num_rows > MAX_ROWS or file.schema_arrow.names != COLUMNS.names:
                raise ValueError("other columns, or too many rows")
            facts = json.loads(metadata[_FACTS])
            rows = file.read().cast(COLUMNS).to_pandas()
        _check(facts, rows)
    except FileNotFoundError:
        raise ComparisonError(f"Expected an atlas at {path}, there is none. {_MAKE}") from None
    except (OSError, ValueError, KeyError, TypeError, RecursionError, pa.ArrowException) as error:
        raise ComparisonError(f"{path.name} is no atlas ({first_line(error)}). {_MAKE}") from error
    return Atlas(path, facts, rows)


def _check(facts: Any, rows: pd.DataFrame) -> None:
    """Refuse what no measurement writes."""
    if not isinstance(facts, dict) or facts.get("format_version") != FORMAT_VERSION:
        raise ValueError("another format than this code's")
    for name, kind in FACTS.items():
        value = facts.get(name)
        if type(value) is not kind or (isinstance(value, str) and len(value) > MAX_NAME):
            raise ValueError(f"no {name}")
    for name, kind in MAY_HOLD.items():
        if type(facts.get(name, kind())) is not kind or not np.isfinite(facts.get(name, 0)):
            raise ValueError(f"a strange {name}")
    known = ["layer", "site", "expert_id", "tokens", "texts"]
    numbers = [n for n in COLUMNS.names if pa.types.is_floating(COLUMNS.field(n).type)]
    values = rows[numbers].to_numpy(dtype=np.float64)
    sound = (
        not rows[[*known, "way", "load", "loss_change"]].isna().any().any()
        and bool((rows[known] >= 0).all().all())
        and bool((rows[["layer", "site", "expert_id"]] <= MAX_LAYER).all().all())
        and set(rows["way"]) <= {*EXACT, *ESTIMATES}
        and bool((np.isnan(values) | (np.abs(values) <= MAX_LOSS)).all())
        and bool(rows["load"].between(0, 1).all())
        and bool((rows["domain"].dropna().str.len() <= MAX_NAME).all())
        and not rows.duplicated(["layer", "site", "expert_id", "way", "domain"]).any()
    )
    if not sound:
        raise ValueError("values that no measurement gives")


def write_atlas(path: Path, facts: Mapping[str, Any], rows: Iterable[Mapping[str, Any]]) -> None:
    """Write an atlas in one step, so that a reader sees the old one or the new one."""
    listed: Sequence[Mapping[str, Any]] = list(rows)
    arrays = [
        pa.array([row.get(f.name) for row in listed], f.type, from_pandas=True) for f in COLUMNS
    ]
    table = pa.table(arrays, schema=COLUMNS.with_metadata({_FACTS: json.dumps(facts).encode()}))
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        pq.write_table(table, partial, compression="zstd")
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
