"""Record a tiny model as people do, and compare the run file with the truth, line by line."""

import tempfile
from collections.abc import Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import duckdb
import numpy as np
import torch
from torch import nn

from capture.errors import CaptureCancelled, CaptureError, ConfigError
from capture.matrix import tiny
from capture.matrix.found import Architecture
from capture.matrix.truth import NoTruth, Pass, Place, answering, decoding, greedy, measure
from capture.model.forward import cache_of, with_cache
from capture.model.inputs import has_two_sides
from capture.recorder.record import record
from capture.store.records import PHASES

EXACT, REFUSED, UNTESTED, WRONG = "exact", "refused", "untested", "wrong"
LENGTHS = (7, 11, 5)  # unequal, so that batches are padded
GENERATE = 3
LARGEST = 30_000_000  # parameters; a tiny model that is not tiny says nothing
# sums of at most 48 products in another order, and a weight stored within 0.1%
ABSOLUTE, RELATIVE = 2e-5, 2e-3
NOTHING = 1e-7
SIDES = {"encoder": "prompt", "decoder": "generated"}  # which tokens each reads
SAME = 1e-3  # logits with a cache and without, relative
# what is compared, see capture/README.md; the last three are not possible everywhere
CHECKS = ("ids", "padding", "generate", "reload", "levels", "weights", "scores", "attention")
MAP = 2e-5  # shares of a map are stored in steps of 4e-6


class Verdict(NamedTuple):
    """What capture makes of one architecture.

    Attributes
    ----------
    model_type, class_name : str
    outcome : str
        "exact", "refused", "untested" or "wrong".
    reason : str
        Why, where it is not exact.
    rules : tuple of str
        ``score_function`` of its sites.
    n_sites : int
    checks : tuple of str
        Those of ``CHECKS`` that were made, where it is exact.
    """

    model_type: str
    class_name: str
    outcome: str
    reason: str = ""
    rules: tuple[str, ...] = ()
    n_sites: int = 0
    checks: tuple[str, ...] = ()

    @property
    def is_wrong(self) -> bool:
        """Whether a run says something else than the experts did."""
        return self.outcome == WRONG


class Wrong(Exception):
    """The run file and the truth differ."""


@dataclass
class _Recorded:
    """What a run file says, by prompt."""

    sites: list[dict[str, Any]]
    tokens: dict[int, list[int]]
    generated: dict[int, list[int]]
    choices: dict[tuple[int, int, int, int], dict[int, float]]
    scores: dict[tuple[int, int, int, int], list[float]] = field(default_factory=dict)
    load: dict[tuple[int, int], list[int]] = field(default_factory=dict)

    def n_tokens(self, phases: Sequence[str]) -> int:
        """Count the tokens of some phases."""
        generated = sum(map(len, self.generated.values()))
        counts = {"generated": generated, "prompt": sum(map(len, self.tokens.values())) - generated}
        return sum(counts[phase] for phase in phases)


def check(found: Architecture, changes: dict[str, Any] | None = None) -> Verdict:
    """Return what capture makes of one architecture.

    Parameters
    ----------
    found : Architecture
    changes : dict, optional
        Fields of the configuration to set otherwise.
    """
    names = (found.model_type, found.class_name)
    try:
        config = tiny.config_of(found.config_class, **(changes or {}))
        size = tiny.size(found.model_class, config)
        if size > LARGEST:
            return Verdict(*names, UNTESTED, f"its smallest model has {size:,} parameters")
        model = tiny.build(found.model_class, config)
    except Exception as error:  # a new family may want anything of its configuration
        return Verdict(*names, UNTESTED, f"no tiny model could be built: {_told(error)}")
    return check_model(model, names)


def _told(error: Exception) -> str:
    """Return what an error says in one line."""
    return " ".join(str(error).split())


def check_model(model: nn.Module, names: tuple[str, str], *, saved: bool = True) -> Verdict:
    """Return what capture makes of one model.

    Parameters
    ----------
    model : PreTrainedModel
        With eight experts in every block.
    names : tuple of str
        Its type and its class, for the verdict.
    saved : bool
        Whether it is also recorded from the folder that it saves itself to.
    """
    with tempfile.TemporaryDirectory(prefix="routescope-") as folder, torch.no_grad():
        try:
            sites, checks = _compared(model, Path(folder), tiny.N_EXPERTS, saved=saved)
        except CaptureCancelled:
            raise
        except CaptureError as error:
            return Verdict(*names, REFUSED, str(error))
        except Wrong as error:
            return Verdict(*names, WRONG, str(error))
        except NoTruth as error:
            return Verdict(*names, UNTESTED, str(error))
        except Exception as error:
            said = f"{type(error).__name__}: {_told(error)}"
            if _runs(_speaking(model)):
                return Verdict(*names, WRONG, f"ends with {said}")
            return Verdict(*names, UNTESTED, f"the model itself does not run: {said}")
    rules = tuple(sorted({site["score_function"] for site in sites}))
    made = tuple(check for check in CHECKS if check in checks)
    return Verdict(*names, EXACT, "", rules, len(sites), made)


def _runs(model: Any) -> bool:
    """Whether a model reads text at all; some versions of transformers have one that does not."""
    try:
        model(input_ids=torch.tensor([prompts()[0]]), use_cache=False)
    except Exception:
        return False
    return True


def _speaking(whole: Any) -> Any:
    """Return the part of a model that reads and writes.

    All of Llama 4 reads nothing in transformers 5.24, its language model alone does.
    """
    model = getattr(whole, "thinker", whole)
    return model if _runs(model) else getattr(model, "language_model", model)


def prompts() -> list[list[int]]:
    """Return the token ids of prompts of unequal length."""
    random = np.random.default_rng(0)
    return [random.integers(3, tiny.VOCABULARY, length).tolist() for length in LENGTHS]


def _compared(
    whole: Any, folder: Path, n_experts: int, *, saved: bool
) -> tuple[list[dict[str, Any]], set[str]]:
    """Return the sites of a model and what was compared there."""
    texts, model = prompts(), _speaking(whole)
    options: dict[str, Any] = {"generate": GENERATE, "progress": False}
    two_sides = has_two_sides(model)
    path = _most(whole, texts, folder, options, attention=not two_sides)
    run = _read(path)
    checks = set(CHECKS) - (set() if saved else {"reload"})
    passes = _both_sides if two_sides else _passes
    for prompt, start, seen in passes(model, run, texts, n_experts):
        side = ("decoder" if start else "encoder") if two_sides else None
        sites = [site for site in run.sites if site["side"] == side]
        for site, place in _paired(sites, seen.places):
            checks -= _Comparison(run, prompt, start, site, place, seen).all()
    _same_load(run, run, "the highest level")
    if not _same_attention(path, model, texts):
        checks.remove("attention")
    stats = record(whole, texts, folder / "stats.duckdb", level="stats", **options)
    _same_load(_read(stats), run, "level stats")
    if saved:
        whole.save_pretrained(folder / "saved")
    source = folder / "saved" if saved else whole
    again = _read(record(source, texts, folder / "ids.duckdb", level="ids", **options))
    _same_load(again, run, "its folder")
    if again.choices != run.choices or again.tokens != run.tokens:
        raise Wrong("loaded from a folder, other tokens, ids or weights are recorded")
    return run.sites, checks


def _most(
    whole: Any, texts: list[list[int]], folder: Path, options: dict[str, Any], *, attention: bool
) -> Path:
    """Record at level attention, which holds all others, or at scores where no layer has a map."""
    if attention:
        try:
            return record(whole, texts, folder / "attention.duckdb", level="attention", **options)
        except ConfigError:
            pass
    return record(whole, texts, folder / "scores.duckdb", level="scores", **options)


def _same_attention(path: Path, model: Any, texts: list[list[int]]) -> bool:
    """Compare every map with the weights that the model's eager function returns, if it does.

    The texts are short, so that a map has a bin for each token.
    """
    with duckdb.connect(path, read_only=True) as run:
        maps = run.execute(
            "SELECT prompt_id, module, head, bins, map FROM attention_maps "
            "JOIN attention_layers USING (layer) WHERE kind = 'attention' AND map IS NOT NULL"
        ).fetchall()
    if not maps:
        return False
    eager, seen = deepcopy(model), {}
    eager.set_attn_implementation("eager")

    def keep(name: str) -> Any:
        def hook(_: nn.Module, __: Any, output: Any) -> None:
            seen[name] = output[1] if isinstance(output, tuple) and len(output) > 1 else None

        return hook

    for name in {module for _, module, *_ in maps}:
        eager.get_submodule(name).register_forward_hook(keep(name))
    for prompt, text in enumerate(texts):
        eager(input_ids=torch.tensor([text]), use_cache=False)
        for _, module, head, bins, values in (row for row in maps if row[0] == prompt):
            shown = seen[module]
            if shown is None or shown.shape[2:] != (bins, bins):
                return False
            weights = shown[0, head] / shown[0, head].sum(dim=-1, keepdim=True)  # less a sink's
            if (weights - torch.tensor(values).view(bins, bins)).abs().max() > MAP:
                raise Wrong(f"{module}, prompt {prompt}, head {head}: its map is another")
    return True


@dataclass
class _Comparison:
    """One forward pass over tokens of one prompt at one site; the first is at ``start``."""

    run: _Recorded
    prompt: int
    start: int
    site: dict[str, Any]
    place: Place
    seen: Pass

    def __post_init__(self) -> None:
        """Count the tokens."""
        self.length = len(self.place.hidden)

    def all(self) -> set[str]:
        """Compare ids, weights through the experts, and scores; return what could not be."""
        self._kinds()
        weights = self._weights()
        given, rest = self.place.gave()
        self._ids(weights, given)
        done = {"weights": self._replay(weights, given, rest), "scores": self._scores()}
        return {check for check, was_made in done.items() if not was_made}

    def _key(self, row: int) -> tuple[int, int, int, int]:
        return self.prompt, self.start + row, self.site["layer"], self.site["site"]

    def _kinds(self) -> None:
        """Compare which experts are said to compute with which have parameters."""
        computing = [kind == "routed" for kind in self.site["expert_kinds"]]
        n_experts = self.place.bank.n_experts
        if computing != [number < n_experts for number in range(self.site["n_experts"])]:
            raise self._wrong(
                f"{n_experts} experts have parameters, kinds are {self.site['expert_kinds']}"
            )

    def _weights(self) -> torch.Tensor:
        """Return the recorded weights [T, E], nan where an expert was not chosen."""
        weights = torch.full((self.length, self.site["n_experts"]), torch.nan)
        for row in range(self.length):
            for expert, weight in self.run.choices[self._key(row)].items():
                weights[row, expert] = weight
        return weights

    def _ids(self, weights: torch.Tensor, given: torch.Tensor) -> None:
        """Compare who was chosen with who changed the token."""
        n_experts = self.place.bank.n_experts
        largest = given.abs().amax(dim=-1).T  # [T, E]
        worked = largest > NOTHING * largest.max()
        chosen = weights[:, :n_experts] > 0
        # experts without a bias make nothing of nothing, such as the embedding of padding
        is_zero = ~self.place.hidden.any(dim=-1)
        chosen[is_zero] = worked[is_zero] = False
        if not torch.equal(worked, chosen):
            row = int((worked != chosen).any(dim=-1).nonzero()[0])
            raise self._wrong(
                f"token {self.start + row} went to experts "
                f"{worked[row].nonzero().flatten().tolist()}, recorded are "
                f"{chosen[row].nonzero().flatten().tolist()}"
            )

    def _replay(self, weights: torch.Tensor, given: torch.Tensor, rest: torch.Tensor) -> bool:
        """Compare what experts gave with what they give under the recorded weights, if told."""
        weights, computing = weights.nan_to_num(0.0), self.place.bank.n_experts
        size = float(given.abs().max())
        for expert in range(computing):
            replayed = self.place.alone(expert, weights[:, expert])
            if replayed is None:
                return False
            self._close(replayed, given[expert], size, f"expert {expert} under recorded weights")
        passed = weights[:, computing:].sum(dim=-1, keepdim=True) * self.place.hidden
        if len(weights[0]) > computing:
            self._close(passed, rest, size, "tokens that pass through")
        return True

    def _close(self, got: torch.Tensor, want: torch.Tensor, size: float, what: str) -> None:
        error = float((got - want).abs().max())
        if error > ABSOLUTE + RELATIVE * size:
            raise self._wrong(f"{what} differ by {error:g} of {size:g}")

    def _scores(self) -> bool:
        """Compare scores with what a module of the block put out, unless its router hides them."""
        kept = [self.run.scores.get(self._key(row)) for row in range(self.length)]
        if kept == [None] * self.length and self.site["score_function"] == "other":
            return False
        if None in kept:
            raise self._wrong("tokens without scores")
        scores, inside = torch.tensor(kept), f"{self.site['module']}."
        seen = [
            found
            for name, values in self.seen.seen.items()
            for rows in (values if f"{name}.".startswith(inside) else ())
            for found in (rows, _of_pairs(rows, scores.shape[1]))
            if found.shape == scores.shape
        ]
        errors = [float((rows - scores).abs().max()) for rows in seen]
        if not errors or min(errors) > ABSOLUTE + RELATIVE * float(scores.abs().max()):
            raise self._wrong("its scores are what no module of the block puts out")
        return True

    def _wrong(self, what: str) -> Wrong:
        return Wrong(f"{self.site['module']}, prompt {self.prompt}: {what}")


def _of_pairs(rows: torch.Tensor, n_experts: int) -> torch.Tensor:
    """Return the scores [T, E] of pairs of keys where rows [T, 2n] are those of n * n = E pairs.

    Doge takes its rows for all first halves and then all second ones.
    """
    n_keys = rows.shape[1] // 2
    if n_keys**2 != n_experts:
        return rows
    first, second = rows.reshape(2, len(rows), n_keys)
    return torch.cat([first[:, key, None] + second for key in range(n_keys)], dim=1)


def _paired(
    sites: Sequence[dict[str, Any]], places: Sequence[Place]
) -> Iterator[tuple[dict[str, Any], Place]]:
    """Yield every site with the place of its experts.

    Raises
    ------
    Wrong
        If experts ran at no site, or a site has none.
    """
    free = list(sites)
    for place in places:
        name = place.bank.name
        around = [site for site in free if f"{name}.".startswith(f"{site['module']}.")]
        if not around:
            raise Wrong(f"the experts of {name} ran, and no site records them")
        site = max(around, key=lambda site: len(site["module"]))
        free.remove(site)
        yield site, place
    if free:
        raise Wrong(f"{free[0]['module']} is a site, and no experts were found there")


def _passes(
    model: Any, run: _Recorded, texts: list[list[int]], n_experts: int
) -> Iterator[tuple[int, int, Pass]]:
    """Yield every prompt with what was written after it, from its first token: each run alone.

    Some models write something else with a cache than when they read the text again. There what
    the model's own ``generate`` writes counts, and each token is run with the cache.
    """
    ends = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    known = set(ends if isinstance(ends, list) else [ends]) - {None}
    for prompt, text in enumerate(texts):
        recorded = run.tokens[prompt]
        own = model.generate(torch.tensor([text]), max_new_tokens=GENERATE, do_sample=False)
        written = text + greedy(model, text, GENERATE, known)
        if recorded not in (written, own[0].tolist()):
            raise Wrong(f"prompt {prompt} should end in {written}, recorded is {recorded}")
        if recorded == written and _reads_as_it_writes(model, text, recorded):
            yield prompt, 0, measure(model, torch.tensor([recorded]), n_experts)
            continue
        start = 0
        for seen in decoding(model, text, run.generated[prompt], n_experts):
            yield prompt, start, seen
            start = max(start + 1, len(text))


def _both_sides(
    model: Any, run: _Recorded, texts: list[list[int]], n_experts: int
) -> Iterator[tuple[int, int, Pass]]:
    """As :func:`_passes`, of an encoder-decoder: what each side read of each prompt alone."""
    for prompt, text in enumerate(texts):
        own = model.generate(torch.tensor([text]), max_new_tokens=GENERATE, do_sample=False)
        written = own[0].tolist()
        if run.tokens[prompt] != text + written or run.generated[prompt] != written:
            raise Wrong(
                f"the decoder should read {written} after prompt {prompt}, recorded is "
                f"{run.generated[prompt]}"
            )
        for start, seen in answering(model, text, written, n_experts):
            yield prompt, start, seen


@torch.no_grad()
def _reads_as_it_writes(model: Any, text: list[int], recorded: list[int]) -> bool:
    """Whether the last token has the same logits with a cache and without."""
    cache = cache_of(model(input_ids=torch.tensor([text]), use_cache=True))
    one = None
    for token in recorded[len(text) :]:
        one = model(input_ids=torch.tensor([[token]]), **with_cache(model, cache))
        cache = cache_of(one)
    whole = model(input_ids=torch.tensor([recorded]), use_cache=False).logits[0, -1]
    return one is None or bool((one.logits[0, -1] - whole).norm() < SAME * whole.norm())


def _same_load(run: _Recorded, truth: _Recorded, what: str) -> None:
    """Compare the assignments of every expert with those counted from the choices."""
    for site in run.sites:
        place = site["layer"], site["site"]
        counts = [0] * site["n_experts"]
        for (_, _, *here), chosen in truth.choices.items():
            for expert in chosen if tuple(here) == place else ():
                counts[expert] += 1
        phases = [phase for phase in PHASES if SIDES.get(site["side"], phase) == phase]
        dropped = run.n_tokens(phases) * site["top_k"] - sum(counts)
        if site["dropped"] != dropped:
            raise Wrong(f"{what}: {site['module']} dropped {dropped}, not {site['dropped']}")
        if run.load.get(place) != counts:
            raise Wrong(f"{what}: {site['module']} counts {run.load.get(place)}, not {counts}")


def _read(path: Path) -> _Recorded:
    with duckdb.connect(path, read_only=True) as run:

        def rows(statement: str) -> list[tuple[Any, ...]]:
            return run.execute(statement).fetchall()

        def dicts(statement: str) -> list[dict[str, Any]]:
            names = [column[0] for column in run.execute(statement).description]
            return [dict(zip(names, row, strict=True)) for row in rows(statement)]

        tokens: dict[int, list[int]] = {}
        generated: dict[int, list[int]] = {}
        places = {}
        for token_id, prompt, phase, token in rows(
            "SELECT token_id, prompt_id, phase, token FROM tokens ORDER BY prompt_id, position"
        ):
            places[token_id] = prompt, len(tokens.setdefault(prompt, []))
            tokens[prompt].append(token)
            generated.setdefault(prompt, []).extend([token] if phase == "generated" else [])
        sites = dicts("SELECT * FROM sites ORDER BY layer, site")
        choices: dict[tuple[int, int, int, int], dict[int, float]] = {
            (*place, site["layer"], site["site"]): {} for place in places.values() for site in sites
        }
        for token_id, layer, site, expert, weight in rows(
            "SELECT token_id, layer, site, expert_id, weight FROM assignments"
        ):
            choices[(*places[token_id], layer, site)][expert] = weight
        scores = {
            (*places[token_id], layer, site): values
            for token_id, layer, site, values in rows(
                "SELECT token_id, layer, site, scores FROM scores"
            )
        }
        load: dict[tuple[int, int], list[int]] = {}
        for layer, site, count in rows(
            "SELECT layer, site, assignments FROM expert_load ORDER BY layer, site, expert_id"
        ):
            load.setdefault((layer, site), []).append(count)
    return _Recorded(sites, tokens, generated, choices, scores, load)
