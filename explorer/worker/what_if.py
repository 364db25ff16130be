"""Answer what another routing would have done to a text: losses, next tokens, a continuation.

The model stays loaded between answers, and what it does unchanged is kept for each text, so that an
answer after the first takes as long as the text does in the model.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from capture.errors import quoted
from capture.model.forward import Head, cache_of, keeps, with_cache
from capture.model.inputs import input_device
from capture.model.load import LoadedModel, load_model, loading_bars
from capture.model.selftest import attach
from capture.model.sites import Site
from capture.progress import Progress
from capture.store.records import Place
from capture.swap.routers import site_key, swap
from capture.swap.rules import OWN_ROUTER, Choice, NativeRule, RouterInputs
from explorer.comparison.fit import ATTENTION, FitData
from explorer.comparison.text_split import TokenTexts, split_texts
from explorer.errors import ExplorerError, JobCancelled
from explorer.router_cards import CARDS, parse_router
from explorer.routers.live_rule import Convention, LiveRule, completed, joined
from explorer.routers.native import host_choice
from explorer.routers.scores import weigh
from explorer.run import Run, open_run
from explorer.worker.interventions import KINDS, Edit, kind_of, read_edits, write_answer
from explorer.worker.requests import WhatIfRequest, refuse_unnamed_model

SHOWN = 8  # next tokens of each distribution
WRITTEN = 16  # tokens of a continuation
FIT_TOKENS = 8_000  # that another router is fitted on
LONGEST = 1_024  # tokens of a text, unless the chosen one comes later
PROBED = 16  # tokens that show what follows the output layer
KEPT_BYTES = 256 * 2**20  # of what the unchanged model did; the newest text is always kept

Routed = dict[Place, list[list[int]]]
Ids = npt.NDArray[np.int32]


class Reading(NamedTuple):
    """What a model did on a text of S tokens.

    Attributes
    ----------
    losses : list of float, nats
        Of predicting each token from the second on.
    taken : Tensor [S, ...]
        What ``Head.logits`` takes.
    routing : dict of (layer, site) to list of lists of int
        Experts of every token.
    written : dict of int to list of int
        The most likely tokens after a chosen one, one after the other.
    """

    losses: list[float]
    taken: torch.Tensor
    routing: Routed
    written: dict[int, list[int]]


@dataclass
class OpenModel:
    """A loaded model and what was found out about it.

    Attributes
    ----------
    texts : dict of tuple to array [S]
        Tokens, by file and text: a run is opened only for what is not here.
    readings : dict of bytes to Reading
        What the unchanged model does on a text, oldest first.
    """

    key: tuple[str, str | None]
    loaded: LoadedModel
    sites: list[Site]
    conventions: dict[Place, Convention] = field(default_factory=dict)
    texts: dict[tuple[Any, ...], Ids] = field(default_factory=dict)
    readings: dict[bytes, Reading] = field(default_factory=dict)
    fit_texts: dict[tuple[Any, ...], TokenTexts] = field(default_factory=dict)
    routers: dict[tuple[Any, ...], Mapping[Place, Any]] = field(default_factory=dict)
    kinds: torch.Tensor | None = None

    def keep(self, ids: Ids, reading: Reading) -> None:
        """Keep what the unchanged model does on a text, and let old texts go for it."""
        self.readings[ids.tobytes()] = reading
        for old in list(self.readings)[:-1]:
            if sum(one.taken.nbytes for one in self.readings.values()) > KEPT_BYTES:
                del self.readings[old]

    def kinds_of_vocabulary(self) -> torch.Tensor:
        """Return the number in ``KINDS`` of every vocabulary entry, [V]."""
        if self.kinds is None:
            tokenizer = self.loaded.tokenizer
            if tokenizer is None:
                raise ExplorerError("This model has no tokenizer, so its tokens have no kind.")
            texts = tokenizer.batch_decode([[i] for i in range(len(tokenizer))])
            self.kinds = torch.tensor([KINDS.index(kind_of(text)) for text in texts])
        return self.kinds


_opened: list[OpenModel] = []  # one at most


def forget() -> None:
    """Let the loaded model go: another job needs the memory."""
    _opened.clear()


def answer_what_if(
    request: WhatIfRequest,
    report: Callable[[Progress], None],
    cancelled: Callable[[], bool],
) -> Path:
    """Run a text with its routing changed and keep the answer.

    A request that changes nothing makes ready for those that will: the model is loaded, the text
    is read, and nothing is written.

    Returns
    -------
    Path
        A JSON file: ``tokens`` and ``texts`` of the text, ``position`` of the chosen token,
        ``losses`` (``before``, ``after``: nats, of the tokens from the second on), ``next`` (rows
        ``text``, ``before``, ``after``: probabilities), ``written`` (``before``, ``after``:
        texts), ``routing`` (rows ``layer``, ``site``, ``before``, ``after``: experts of each
        token), ``seconds`` and ``cpu_seconds``.

    Raises
    ------
    ExplorerError
        If the run has no such text, or the routing cannot be changed as asked.
    """
    began = time.perf_counter(), time.process_time()

    def on(message: str) -> None:
        if cancelled():
            raise JobCancelled("Nothing was kept.")
        report(Progress("mapping", message=message))

    with torch.inference_mode():
        opened, ids, router = _prepared(request, on)
        edits = read_edits(request.edits, [s.info for s in opened.sites], n_tokens=len(ids))
        model: Any = opened.loaded.model
        probe = torch.from_numpy(ids[None, :PROBED].astype(np.int64))
        with Head(model).open(probe.to(input_device(model))) as head:
            before = opened.readings.get(ids.tobytes())
            if before is None:
                on("the text as it was")
                before = _read(opened, head, ids, {})
                opened.keep(ids, before)
            was = _write_on(opened, head, ids, request.position, before, {})
            if not edits and not router:
                return Path(request.out)
            on("the text with its routing changed")
            rules = _rules(opened, edits, router, ids)
            after = _read(opened, head, ids, rules)
            now = _write_on(opened, head, ids, request.position, after, rules)
        decode = _decoder(opened.loaded)
        answer = {"position": request.position, "next": _likely(decode, was, now)}
        answer |= _both(decode, ids, request.position, before, after)
    answer["seconds"] = time.perf_counter() - began[0]
    answer["cpu_seconds"] = time.process_time() - began[1]
    return write_answer(Path(request.out), answer)


def _likely(
    decode: Callable[[list[int]], str], was: torch.Tensor, now: torch.Tensor
) -> list[dict[str, Any]]:
    """Return the likely next tokens of two distributions [V], with both probabilities."""
    likely = [torch.topk(one, min(SHOWN, len(one))).indices for one in (was, now)]
    return [
        {"text": decode([token]), "before": float(was[token]), "after": float(now[token])}
        for token in dict.fromkeys(torch.cat(likely).tolist())
    ]


def _both(
    decode: Callable[[list[int]], str], ids: Ids, position: int, before: Reading, after: Reading
) -> dict[str, Any]:
    """Return what is kept of two readings, see :func:`answer_what_if`."""
    readings = {"before": before, "after": after}
    return {
        "tokens": ids.tolist(),
        "texts": [decode([token]) for token in ids.tolist()],
        "losses": {name: one.losses for name, one in readings.items()},
        "written": {name: decode(one.written[position]) for name, one in readings.items()},
        "routing": [
            {"layer": place[0], "site": place[1]}
            | {name: one.routing[place] for name, one in readings.items()}
            for place in before.routing
        ],
    }


def _prepared(
    request: WhatIfRequest, on: Callable[[str], None]
) -> tuple[OpenModel, Ids, Mapping[Place, Any]]:
    """Return the model, the text and the other router; open the run for what is not known yet."""
    path = Path(request.run)
    status = path.stat() if path.is_file() else None
    file = request.run, status and status.st_mtime_ns, status and status.st_size
    length = max(LONGEST, request.position + 1)
    text = *file, request.model, request.prompt_id, length
    other = *file, request.router
    opened = _opened[0] if _opened and text in _opened[0].texts else None
    if opened is None or (request.router and other not in opened.routers):
        with open_run(request.run) as run:
            refuse_unnamed_model(str(run.info["model"]), request.model)
            ids = _text(run, request.prompt_id, length)
            opened = _open(run, on)
            opened.texts[text] = ids
            if request.router and other not in opened.routers:
                opened.routers[other] = _router(opened, run, file, request.router, on)
    ids = opened.texts[text]
    if len(ids) < 2 or not 0 <= request.position < len(ids):
        raise ExplorerError(
            f"Text {request.prompt_id} has {len(ids)} tokens with known ids, and the chosen one "
            f"is number {request.position}: there is no next token to predict. Choose another."
        )
    return opened, ids, opened.routers[other] if request.router else {}


def _text(run: Run, prompt_id: int, length: int) -> Ids:
    """Return the token ids of a recorded text, none where some are not known."""
    found = run.query(
        "SELECT token FROM tokens WHERE prompt_id = ? AND position < ? ORDER BY position",
        [prompt_id, length],
    )["token"]
    return np.asarray([] if found.isna().any() else found, dtype=np.int32)


def _open(run: Run, on: Callable[[str], None]) -> OpenModel:
    """Return the loaded model of a run: the last one, if it is the same."""
    key = str(run.info["model"]), run.info["revision"]
    if not _opened or _opened[0].key != key:
        forget()
        on("loading the model")
        revision = None if key[0] == "demo" else key[1]
        with loading_bars(shown=False), torch.inference_mode(False):
            loaded = load_model(key[0], revision=revision)
            opened = OpenModel(key, loaded, list(attach(loaded.model)))
        recorded = sorted((s.layer, s.site, s.n_experts) for s in run.sites)
        if recorded != sorted((s.info.layer, s.info.site, s.info.n_experts) for s in opened.sites):
            raise ExplorerError(
                f"The model {quoted(key[0])} has other routers now than the run recorded: it is "
                "not the model that was recorded."
            )
        _opened.append(opened)
    return _opened[0]


def _router(
    opened: OpenModel, run: Run, file: tuple[Any, ...], text: str, on: Callable[[str], None]
) -> Mapping[Place, Any]:
    """Return another router for every place, fitted where it learns."""
    spec, texts = parse_router(text), TokenTexts([], [], [], "")
    with torch.inference_mode(False):
        if CARDS[spec.name].fits is not None:
            on(f"fitting {text}")
            if file not in opened.fit_texts:
                split = split_texts(run, opened.loaded, fit_tokens=FIT_TOKENS, tokens=FIT_TOKENS)
                opened.fit_texts[file] = split.fit
            texts = opened.fit_texts[file]
        fitted = FitData(opened.loaded.model, opened.sites, texts).fit(spec, 0)
    if fitted.part != "expert":
        raise ExplorerError(
            f"{text} decides about {fitted.part}s and not about experts. Compare it live on "
            "the Compare page."
        )
    return fitted.routers


def _read(opened: OpenModel, head: Head, ids: Ids, rules: Mapping[Place, Any]) -> Reading:
    """Run a text."""
    model: Any = opened.loaded.model
    routing: Routed = {}
    first: dict[Place, RouterInputs] = {}

    def keep(inputs: RouterInputs, choice: Choice) -> None:
        first[inputs.place] = inputs
        routing[inputs.place] = choice.expert_ids.tolist()

    text = torch.from_numpy(ids.astype(np.int64))[None].to(input_device(model))
    with _swapped(opened, rules, on_choice=keep):
        taken = head.take(model(input_ids=text, use_cache=False))
    rows = torch.arange(text.shape[1] - 1, device=taken.device)
    losses = head.losses(taken, rows, text.flatten()[1:].to(taken.device)).tolist()
    if not opened.conventions:
        known = {place: joined([inputs]) for place, inputs in first.items()}
        opened.conventions = {p: Convention(k.renormalize, k.scaling) for p, k in known.items()}
    return Reading(losses, taken, routing, {})


def _swapped(
    opened: OpenModel, rules: Mapping[Place, Any], **how: Any
) -> AbstractContextManager[Any]:
    """Put rules in the place of routers; the other sites keep theirs and are told of as well."""
    every = {site_key(site): NativeRule() for site in opened.sites} | dict(rules)
    return swap(opened.loaded.model, opened.sites, every, attention=_whole(rules), **how)


def _whole(rules: Mapping[Place, Any]) -> bool:
    """Whether a rule needs whole texts, because it looks at the attention."""
    return any(frozenset(ATTENTION) & _needs(rule) for rule in rules.values())


def _needs(rule: Any) -> frozenset[str]:
    router = getattr(getattr(rule, "base", rule), "router", None)
    return frozenset() if router is None else router.info.needs


def _write_on(
    opened: OpenModel,
    head: Head,
    ids: Ids,
    position: int,
    reading: Reading,
    rules: Mapping[Place, Any],
) -> torch.Tensor:
    """Return the probabilities [V] of the token after one; let the model write on from there.

    What it writes is added to the reading, unless it is there.
    """
    model: Any = opened.loaded.model
    probs = head.logits(reading.taken[[position]])[0].softmax(dim=-1).cpu()
    if position in reading.written:
        return probs
    text = torch.from_numpy(ids[: position + 1].astype(np.int64))[None].to(input_device(model))
    written = [int(probs.argmax())]
    cache = None
    with _swapped(opened, rules, checked=False) if rules else nullcontext():
        if not _whole(rules):
            output = model(input_ids=text, use_cache=True)
            head.take(output)
            cache = cache_of(output)
        while len(written) < WRITTEN:
            new = torch.tensor([[written[-1]]], device=text.device)
            if cache is not None and keeps(cache):
                output = model(input_ids=new, **with_cache(model, cache))
                cache = cache_of(output)
            else:
                text = torch.cat((text, new), dim=1)
                output = model(input_ids=text, use_cache=False)
            written.append(int(head.logits(head.take(output)[-1:])[0].argmax()))
    reading.written[position] = written
    return probs


def _decoder(loaded: LoadedModel) -> Callable[[list[int]], str]:
    def decode(ids: list[int]) -> str:
        if loaded.tokenizer is None:
            return " ".join(f"id {token}" for token in ids)
        return str(loaded.tokenizer.decode(ids))

    return decode


def _rules(
    opened: OpenModel,
    edits: Sequence[Edit],
    router: Mapping[Place, Any],
    ids: Ids,
) -> dict[Place, Any]:
    """Return the rules of the sites whose routing changes."""
    several = any(site.info.site for site in opened.sites)
    rules: dict[Place, Any] = {}
    for site in opened.sites:
        place = site_key(site)
        name = f"{place[0]}.{place[1]}" if several else str(place[0])
        own = [edit for edit in edits if edit.layer in ("*", name)]
        convention = opened.conventions.get(place)
        base = LiveRule(router[place], convention) if place in router else None
        if own:
            rules[place] = EditedRule(own, base, convention, opened, ids)
        elif base is not None:
            rules[place] = base
    return rules


class EditedRule:
    """A rule of one site that changes the routing of some tokens, and only theirs.

    What is forbidden, forced or limited in number is chosen again by the model's own scores; swaps
    come last.

    Parameters
    ----------
    edits : sequence of Edit
        Of this site.
    base : LiveRule or None
        Another router, for the tokens that no edit changes; None = the model's own.
    convention : Convention or None
        How the model weighs its experts.
    opened : OpenModel
    ids : array [S]
        Of the text, which tokens are called by their place in.
    """

    reads = OWN_ROUTER

    def __init__(
        self,
        edits: Sequence[Edit],
        base: LiveRule | None,
        convention: Convention | None,
        opened: OpenModel,
        ids: Ids,
    ) -> None:
        self.edits, self.base, self.convention = edits, base, convention
        self.opened, self.ids = opened, ids

    def route(self, inputs: RouterInputs, /) -> Choice:
        """Route the tokens of one forward pass."""
        told = inputs.native if self.base is None else self.base.route(inputs)
        ids, weights = told.expert_ids, told.weights.float()  # type: ignore[union-attr]
        masks = [self._where(edit, inputs) for edit in self.edits]
        chosen_again = [
            (edit, mask)
            for edit, mask in zip(self.edits, masks, strict=True)
            if edit.action != "swap"
        ]
        if chosen_again:
            ids, weights = self._again(inputs, ids, weights, chosen_again)
        for edit, mask in zip(self.edits, masks, strict=True):
            if edit.other is not None:
                a, b = edit.value, edit.other
                swapped = ids.masked_fill(ids == a, b).masked_fill(ids == b, a)
                uses = mask & (ids == a).any(dim=-1)
                ids = torch.where(uses[:, None], swapped, ids)
        return Choice(ids, weights)

    def _again(
        self,
        inputs: RouterInputs,
        ids: torch.Tensor,
        weights: torch.Tensor,
        edits: Sequence[tuple[Edit, torch.Tensor]],
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Choose again by the model's own scores where an edit changes what is allowed."""
        known = completed(inputs, self.convention)
        scores, choice = host_choice(known)
        choice = choice.clone()
        k = torch.full((len(choice),), inputs.top_k, device=choice.device)
        touched = torch.zeros_like(k, dtype=torch.bool)
        for edit, mask in edits:
            if edit.action == "k":
                k = k.where(~mask, edit.value)
                touched |= mask
            else:
                # what would change nothing leaves the token as it is
                uses = (ids == edit.value).any(dim=-1)
                touched |= mask & (uses if edit.action == "forbid" else ~uses)
                limit = -torch.inf if edit.action == "forbid" else torch.inf
                choice[:, edit.value] = choice[:, edit.value].where(~mask, limit)
        best = choice.sort(dim=-1, descending=True, stable=True)
        n = int(k.max())
        rank = torch.arange(n, device=k.device)
        again = best.indices[:, :n].where(
            (rank < k[:, None]) & (best.values[:, :n] > -torch.inf), -1
        )
        again_weights = weigh(scores, again, known)
        width = max(n, ids.shape[-1])
        pad = torch.nn.functional.pad
        ids, again = (pad(one, (0, width - one.shape[-1]), value=-1) for one in (ids, again))
        weights, again_weights = (
            pad(one, (0, width - one.shape[-1])) for one in (weights, again_weights)
        )
        chosen = touched[:, None]
        return torch.where(chosen, again, ids), torch.where(chosen, again_weights, weights)

    def _where(self, edit: Edit, inputs: RouterInputs) -> torch.Tensor:
        """Return which tokens [T] an edit is about."""
        positions = inputs.tensor("positions")
        digits = "".join(filter(str.isdecimal, edit.where))
        name = edit.where.removesuffix(digits)
        if name == "t":
            return positions == int(digits)
        if name == "from":
            return positions >= int(digits)
        if name == "like":
            return inputs.tensor("token_ids") == int(self.ids[int(digits)])
        if name in KINDS:
            kinds = self.opened.kinds_of_vocabulary().to(positions.device)
            found: torch.Tensor = kinds[inputs.tensor("token_ids")] == KINDS.index(name)
            return found
        return torch.ones_like(positions, dtype=torch.bool)
