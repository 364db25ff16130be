"""A causal atlas: what the model's loss becomes without each of its experts, on texts of a run."""

import datetime
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import numpy.typing as npt

from capture.model.load import load_model, loading_bars
from capture.paths import model_name
from capture.progress import Progress
from capture.store.records import Place
from capture.swap.losses import SequenceLosses, loss_change
from explorer.comparison.atlas_file import (
    CHECK_FACTS,
    ESTIMATES,
    EXACT,
    FORMAT_VERSION,
    SUFFIX,
    Atlas,
    read_atlas,
    spearman,
    write_atlas,
)
from explorer.comparison.conditions.condition import Subject
from explorer.comparison.conditions.knock_out import (
    Way,
    Whole,
    knocked_out,
    screened,
    whole_model,
)
from explorer.comparison.session import key_of, source_fingerprint
from explorer.comparison.text_split import TokenTexts, split_texts
from explorer.errors import ComparisonCancelled, ConditionError
from explorer.run import Run, open_run
from explorer.text import counted, duration

# raised when the same run, model and settings would give other numbers than before
ATLAS_VERSION = 1
# with fewer the halves of the texts rank experts differently, see the README
TOKENS = 8_000
NEAREST = 3  # experts of about equal load, of which one is drawn as the control

Floats = npt.NDArray[np.float64]
Rows = list[dict[str, Any]]


def measure_atlas(
    run: str | Path,
    *,
    model: str | None = None,
    tokens: int = TOKENS,
    seed: int = 0,
    screen: bool = False,
    check: int = 0,
    progress: Callable[[Progress], None] = lambda _: None,
    cancelled: Callable[[], bool] = lambda: False,
) -> Path:
    """Knock every expert out of the run's model in turn and keep what the loss becomes.

    Texts are those of the split that comparisons fit on, so that what is decided by an atlas can
    be judged on others; all texts of the run where there are too few to divide.

    Parameters
    ----------
    run : str or Path
        A run file.
    model : str, optional
        Default: the model that the run was recorded from.
    tokens : int
        At most so many.
    seed : int
        Draws texts, halves and controls.
    screen : bool
        Only estimate, by one gradient, what removing experts does: for models with thousands.
    check : int
        Take so many experts out, drawn by chance, to say how the estimate ranks them.
    progress, cancelled : callable, optional
        Told how far it is; asked between forward passes.

    Returns
    -------
    Path
        Of the atlas file beside the run. Layers that it holds already are not measured again.

    Raises
    ------
    ComparisonCancelled
        If ``cancelled()`` said so; finished layers are kept.
    """
    path = Path(run)
    with open_run(path) as opened:
        name = opened.info["model"] if model is None else model
        facts = {
            "run": opened.fingerprint,
            "model": source_fingerprint(name, opened.info["revision"]),
            "version": ATLAS_VERSION,
            **{"tokens": tokens, "seed": seed},
        }
        out = path.parent / f"{path.stem}.{key_of(facts)}{SUFFIX}"
        known = read_atlas(out) if out.is_file() else None
        if known is not None and (
            known.facts["complete"] or (screen and known.facts.get("checked", 0) >= check)
        ):
            return out
        progress(Progress("loading", message="loading the model"))
        local = model is not None or name == "demo"
        with loading_bars(shown=False):
            loaded = load_model(name, revision=None if local else opened.info["revision"])
        split = split_texts(opened, loaded, fit_tokens=tokens, tokens=tokens, seed=seed)
        texts = split.fit if split.fit.sequences else split.report
        work = _Measuring(opened, loaded.model, texts, seed, out, progress, cancelled)
        work.head |= {"model": model_name(str(name)), "model_fingerprint": facts["model"]}
        work.go(known, exact=not screen, check=check)
    return out


class _Measuring:
    """One atlas in the making."""

    def __init__(
        self,
        run: Run,
        model: Any,
        texts: TokenTexts,
        seed: int,
        out: Path,
        progress: Callable[[Progress], None],
        cancelled: Callable[[], bool],
    ) -> None:
        self.texts, self.seed, self.out = texts, seed, out
        self.progress, self.cancelled = progress, cancelled
        self.subject = Subject.of(model)
        self.rows: Rows = []
        self.head: dict[str, Any] = {
            "format_version": FORMAT_VERSION,
            "created_at": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "run_name": run.path.stem,
            "run_fingerprint": run.fingerprint,
            "texts": texts.source,
            "n_texts": len(texts.sequences),
            "n_tokens": texts.n_tokens,
            "seed": seed,
        }

    def go(self, known: Atlas | None, *, exact: bool, check: int) -> None:
        """Measure what an earlier atlas of the same key has not, and write after each layer."""
        began = time.perf_counter()
        whole = whole_model(self.subject, self.texts.sequences, self._told("whole model", 1, 0))
        took = time.perf_counter() - began
        self.head["native_loss"] = whole.losses.mean
        lengths = np.array([len(one) for one in self.texts.sequences])
        # a pass for each pair of a text and an expert that it uses, in each way
        again = sum(int(lengths @ (hits > 0).sum(axis=1)) for hits in whole.hits.values())
        self.head["exact_seconds"] = took / lengths.sum() * again * len(EXACT)
        done: set[tuple[int, int, str]] = set()
        if known is not None:
            self.rows = known.rows.astype(object).where(known.rows.notna(), None).to_dict("records")
            done = {(row["layer"], row["site"], row["way"]) for row in self.rows}
            self.head |= {name: known.facts[name] for name in CHECK_FACTS if name in known.facts}
        steps: list[tuple[Place, str]] = []
        if not any(way in ESTIMATES for *_, way in done):
            told = self._told("gradient", 1, 0)
            estimates = screened(self.subject, self.texts.sequences, told)
            for way, found in zip(
                ESTIMATES, (estimates.fisher, estimates.first_order), strict=True
            ):
                for place, change in found.items():
                    self._add(place, way, change, whole.hits[place], lengths)
        if not exact and check:
            self._write(complete=False)
            self._check(whole, check)
        if exact:
            said = counted(sum(hits.shape[1] for hits in whole.hits.values()), "expert")
            about = duration(self.head["exact_seconds"])
            self.progress(Progress("mapping", message=f"{said} taken out in turn: about {about}"))
            steps = [(p, w) for p in whole.hits for w in EXACT if (*p, w) not in done]
        self._write(complete=not steps and exact)
        for number, (place, way) in enumerate(steps):
            said = f"layer {place[0]}, {way}"
            share = (number / len(steps), 1 / len(steps))
            pairs = int((whole.hits[place] > 0).sum())
            told = self._told(said, pairs, *share)
            try:
                change = knocked_out(
                    self.subject, self.texts.sequences, whole, place, cast(Way, way), told
                )
            except ConditionError:
                if way == "removed":
                    raise
                continue  # its router cannot choose again; removing its experts says enough
            self._add(place, way, change, whole.hits[place], lengths)
            self._write(complete=number + 1 == len(steps))

    def _check(self, whole: Whole, n_experts: int) -> None:
        """Take experts out that are drawn by chance, and say how the estimate ranks them."""
        used = [(p, e) for p, hits in whole.hits.items() for e in np.flatnonzero(hits.sum(axis=0))]
        random = np.random.default_rng(self.seed)
        drawn = [used[n] for n in random.permutation(len(used))[:n_experts]]
        guess = {
            (row["layer"], row["site"], row["expert_id"]): row["loss_change"]
            for row in self.rows
            if row["way"] == "fisher" and row["domain"] is None
        }
        pairs: list[tuple[float, float]] = []
        for number, place in enumerate(whole.hits):
            mine = sorted(int(expert) for at, expert in drawn if at == place)
            of = int((whole.hits[place][:, mine] > 0).sum())
            told = self._told(
                f"layer {place[0]}, check", of, number / len(whole.hits), 1 / len(whole.hits)
            )
            change = knocked_out(
                self.subject, self.texts.sequences, whole, place, "removed", told, experts=mine
            )
            pairs += [(guess[*place, expert], change[:, expert].sum()) for expert in mine]
        found = spearman(*np.array(pairs).reshape(-1, 2).T)
        self.head["checked"] = len(pairs)
        self.head.pop("checked_agreement", None)
        if not np.isnan(found):
            self.head["checked_agreement"] = found
        self._write(complete=False)

    def _told(self, said: str, of: int, begun: float, part: float = 0.0) -> Callable[[int], None]:
        done, since = 0, time.perf_counter()

        def told(pairs: int) -> None:
            nonlocal done
            if self.cancelled():
                kept = self.out if self.out.is_file() else None
                raise ComparisonCancelled(
                    "Layers that were finished are kept; the same atlas again does only the rest."
                    if kept
                    else "No layer was finished.",
                    kept,
                )
            share = begun + part * done / max(of, 1)
            # what is left goes on at the pace of this step
            pace = (time.perf_counter() - since) / (share - begun) if share > begun else None
            left = None if pace is None else pace * (1 - share)
            self.progress(Progress("mapping", message=said, part=share, seconds_left=left))
            done += pairs

        return told

    def _write(self, *, complete: bool) -> None:
        write_atlas(self.out, {**self.head, "complete": complete}, self.rows)

    def _add(
        self,
        place: Place,
        way: str,
        change: Floats,
        hits: npt.NDArray[np.int64],
        lengths: npt.NDArray[np.int64],
    ) -> None:
        """Add the rows of one site: all texts, and each domain where there are several."""
        domains = np.array(self.texts.domains, dtype=object)
        named = sorted(set(self.texts.domains))
        half = _halves(self.texts.domains, self.seed)
        for number, domain in enumerate((None, *(named if len(named) > 1 else ()))):
            own = np.ones(len(domains), np.bool_) if domain is None else domains == domain
            random = np.random.default_rng([self.seed, *place, number])
            shared = {"layer": place[0], "site": place[1], "way": way, "domain": domain}
            found = _effects(change[own], hits[own], lengths[own], half[own], random)
            self.rows += [shared | row for row in found]


def _halves(domains: Sequence[str], seed: int) -> npt.NDArray[np.bool_]:
    """Draw half of each domain's texts."""
    random, half = np.random.default_rng(seed), np.zeros(len(domains), np.bool_)
    for domain in sorted(set(domains)):
        at = np.flatnonzero([one == domain for one in domains])
        half[random.permutation(at)[::2]] = True
    return half


def _effects(
    change: Floats,
    hits: npt.NDArray[np.int64],
    lengths: npt.NDArray[np.int64],
    half: npt.NDArray[np.bool_],
    random: np.random.Generator,
) -> Rows:
    """Return one row for each expert of a site, on some texts.

    Parameters
    ----------
    change : array [N, E], nats
        Of the sum of each text's losses.
    hits : array [N, E]
    lengths : array [N], tokens
    half : array [N], bool
    """
    scored = lengths - 1
    load = hits.sum(axis=0) / lengths.sum()
    rows = []
    for expert in range(change.shape[1]):
        own = change[:, expert]
        effect = _paired(np.zeros_like(own), own, scored)
        row = {
            "expert_id": expert,
            "tokens": int(lengths.sum()),
            "texts": len(lengths),
            "load": float(load[expert]),
            "loss_change": effect[0],
            "loss_margin": effect[1],
            "half_a": float(own[half].sum() / scored[half].sum()) if half.any() else None,
            "half_b": float(own[~half].sum() / scored[~half].sum()) if not half.all() else None,
        }
        others = np.delete(np.arange(len(load)), expert)
        if len(others):
            near = others[np.argsort(np.abs(load[others] - load[expert]), kind="stable")]
            control = int(random.choice(near[:NEAREST]))
            over = _paired(change[:, control], own, scored)
            row |= {
                "control_id": control,
                "control_load": float(load[control]),
                "control_change": float(change[:, control].sum() / scored.sum()),
                "over_control": over[0],
                "over_margin": over[1],
            }
        rows.append(row)
    return rows


def _paired(
    before: Floats, after: Floats, tokens: npt.NDArray[np.int64]
) -> tuple[float, float | None]:
    """Return a difference a token and half of its 95% interval, None for a single text."""
    found = loss_change(SequenceLosses(before, tokens), SequenceLosses(after, tokens))
    return float(found.change), None if np.isnan(found.margin) else float(found.margin)
