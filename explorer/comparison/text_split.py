"""Which texts routers are fitted on, and which they are reported on; the two never meet."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pandas as pd

from capture.model.inputs import vocabulary
from capture.model.load import LoadedModel
from capture.model.tokens import tokenize
from capture.prompts import read_prompts
from explorer.errors import ComparisonError, RouterError
from explorer.routers.recorded import fit_split
from explorer.run import UNLABELLED, Run

DEMO = "demo"
LONGEST = 512  # tokens of a sequence; attention that rules ask for grows with the square
FIT_SHARE = 0.75  # of the fit split that rules are fitted on while settings are chosen on the rest
SHARED_TEXTS = 4  # texts whose choices and losses are kept token by token
SHARED_TOKENS = 160  # at most of each


class TokenTexts(NamedTuple):
    """Token sequences with what is known of them.

    Attributes
    ----------
    sequences : list of array [S], int32
        At least two tokens each.
    domains : list of str
        ``""`` where a text has none.
    pieces : list of (list of str or None)
        The text of each token.
    source : str
        Where they come from, for people.
    """

    sequences: list[npt.NDArray[np.int32]]
    domains: list[str]
    pieces: list[list[str] | None]
    source: str

    @property
    def n_tokens(self) -> int:
        """Tokens of all sequences."""
        return sum(len(one) for one in self.sequences)

    def take(self, numbers: Sequence[int], source: str = "") -> "TokenTexts":
        """Return some of the texts, in this order."""
        return TokenTexts(
            [self.sequences[n] for n in numbers],
            [self.domains[n] for n in numbers],
            [self.pieces[n] for n in numbers],
            source or self.source,
        )


class FitAndReport(NamedTuple):
    """Texts to fit on and texts to report on."""

    fit: TokenTexts
    report: TokenTexts


def check_text(run: Run) -> None:
    """Refuse a run that holds nothing to route or to predict.

    Raises
    ------
    ComparisonError
        If it is a counts-only export.
    """
    if run.counts_only:
        raise ComparisonError(
            f"{run.path.name} is an export that leaves text and tokens out, so there is nothing to "
            "compare routers on. Use the run that it was made from."
        )


def shared_texts(domains: Sequence[str]) -> list[int]:
    """Choose texts for looking at tokens one by one, of different domains where there are."""
    firsts: dict[str, int] = {}
    for number, domain in enumerate(domains):
        firsts.setdefault(domain, number)
    others = [n for n in range(len(domains)) if n not in firsts.values()]
    return [*firsts.values(), *others][:SHARED_TEXTS]


def recorded_texts(run: Run, tokens: pd.DataFrame) -> tuple[dict[int, int], list[dict[str, Any]]]:
    """Choose recorded prompts for looking at tokens one by one.

    Parameters
    ----------
    tokens : DataFrame
        ``prompt_id, domain`` of the tokens to choose from.

    Returns
    -------
    dict of prompt_id to text_id
        Numbered after the texts of a live comparison.
    list of dict
        Rows of table ``texts``.
    """
    prompts = tokens.drop_duplicates("prompt_id").reset_index(drop=True)
    chosen = prompts.iloc[shared_texts(prompts["domain"].astype(str).tolist())]
    text_ids, rows = {}, []
    for number, (prompt, domain) in enumerate(
        zip(chosen["prompt_id"], chosen["domain"], strict=True)
    ):
        text_ids[int(prompt)] = SHARED_TEXTS + number
        found = run.query(
            "SELECT position, token, text FROM tokens WHERE prompt_id = ? AND phase = 'prompt' "
            "AND position < ? ORDER BY position",
            [int(prompt), SHARED_TOKENS],
        )
        shared = {"text_id": SHARED_TEXTS + number, "mode": "replay", "domain": str(domain)}
        rows += [{**shared, **row} for row in found.to_dict("records")]
    return text_ids, rows


def split_texts(
    run: Run,
    loaded: LoadedModel,
    *,
    fit_tokens: int,
    tokens: int,
    seed: int = 0,
    validation: bool = False,
) -> FitAndReport:
    """Choose the texts of a live comparison.

    The demo model comes with texts that it was never trained on: routers are fitted on
    ``demo-fit``, and reported on the run's own prompts, or on ``demo-heldout`` where the run
    holds the demo prompts. Another model's run is divided by prompts, each domain by itself; with
    too few prompts the fit split is empty.

    Parameters
    ----------
    run : Run
    loaded : LoadedModel
    fit_tokens, tokens : int
        How many tokens each split has at most, in equal shares per domain, whole texts.
    seed : int
    validation : bool
        Divide the fit split instead, and report on a quarter of it: what is chosen there, such as
        a price, saw nothing of the texts that are reported in the end.

    Raises
    ------
    ComparisonError
        If the run has no prompt of two tokens, or too few to validate on.
    """
    check_text(run)
    own = _of_run(run)
    if loaded.name == DEMO:
        fit = _of_set("demo-fit", loaded)
        texts = set(run.query("SELECT text FROM prompts")["text"])
        report = _of_set("demo-heldout", loaded) if texts <= _texts_of("demo") else own
        if texts & _texts_of("demo-fit"):
            fit, report = _divided(own, seed)
    else:
        fit, report = _divided(own, seed)
    fit = _sampled(fit, fit_tokens, seed)
    if validation:
        fit, report = _divided(fit, seed, share=FIT_SHARE, parts=("most", "the rest"))
        if not fit.sequences:
            raise ComparisonError(
                f"{run.path.name} has too few texts to choose settings on texts that are not "
                "reported. Record more prompts, or name one setting."
            )
    return FitAndReport(fit, _sampled(report, tokens, seed + 1))


def _texts_of(name: str) -> set[str | None]:
    return {prompt.text for prompt in read_prompts(name)}


def _of_set(name: str, loaded: LoadedModel) -> TokenTexts:
    tokenized = tokenize(
        read_prompts(name),
        loaded.tokenizer,
        vocab_size=vocabulary(loaded.model),
        max_length=LONGEST,
    )
    kept = [one for one in tokenized if len(one.ids) > 1]
    return TokenTexts(
        [one.ids for one in kept],
        [one.domain or UNLABELLED for one in kept],
        [one.pieces() for one in kept],
        name,
    )


def _of_run(run: Run) -> TokenTexts:
    """Return the prompts of a run as they were fed to the model."""
    tokens = run.query(
        "SELECT prompt_id, token, text, coalesce(domain, $none) AS domain FROM tokens "
        "JOIN (SELECT prompt_id, domain FROM prompts) USING (prompt_id) "
        f"WHERE phase = 'prompt' AND position < {LONGEST} ORDER BY prompt_id, position",
        {"none": UNLABELLED},
    )
    texts = TokenTexts([], [], [], f"prompts of {run.path.name}")
    for _, one in tokens.groupby("prompt_id", sort=True):
        if len(one) > 1:
            pieces = one["text"].tolist()
            texts.sequences.append(one["token"].to_numpy(np.int32))
            texts.domains.append(one["domain"].iloc[0])
            texts.pieces.append(pieces if all(isinstance(p, str) for p in pieces) else None)
    if not texts.sequences:
        raise ComparisonError(
            f"{run.path.name} has no prompt of two tokens or more, so there is no next token to "
            "predict. Record longer prompts."
        )
    return texts


def _divided(
    texts: TokenTexts, seed: int, *, share: float = 0.5, parts: tuple[str, str] = ("half", "half")
) -> FitAndReport:
    """Divide texts in two, ``share`` of them for fitting; copies of one text stay together."""
    same: dict[bytes, int] = {}
    groups = [same.setdefault(one.tobytes(), n) for n, one in enumerate(texts.sequences)]
    frame = pd.DataFrame({"prompt_id": groups, "domain": texts.domains})
    try:
        chosen = fit_split(frame, share=share, seed=seed)
    except RouterError:
        chosen = np.zeros(len(groups), dtype=np.bool_)
    halves = [np.flatnonzero(half).tolist() for half in (chosen, ~chosen)]
    return FitAndReport(
        texts.take(halves[0], f"{parts[0]} of the {texts.source}"),
        texts.take(halves[1], f"{parts[1]} of the {texts.source}" if halves[0] else texts.source),
    )


def _sampled(texts: TokenTexts, budget: int, seed: int) -> TokenTexts:
    """Return texts of at most ``budget`` tokens together, domain after domain in turn."""
    random = np.random.default_rng(seed)
    waiting: dict[str, list[int]] = {}
    for number in random.permutation(len(texts.sequences)).tolist():
        waiting.setdefault(texts.domains[number], []).append(number)
    chosen: list[int] = []
    left = budget
    for turn in range(max(map(len, waiting.values()), default=0)):
        for domain in sorted(waiting):
            if turn < len(waiting[domain]):
                number = waiting[domain][turn]
                if len(texts.sequences[number]) <= left or not chosen:
                    left -= len(texts.sequences[number])
                    chosen.append(number)
    return texts.take(sorted(chosen))
