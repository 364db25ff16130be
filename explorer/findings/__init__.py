"""What is worth knowing in a run: at most seven sentences, each a test that could have failed.

Every other prompt suggests: of each kind of finding the strongest candidate, such as the expert
that leans most to one domain. The prompts that did not suggest it test it against its own null,
with the prompt as the unit, because tokens of a prompt are alike. So the thousands of experts,
domains and words that were looked through cost nothing, and what is corrected for are the few tests
that are left (Benjamini and Hochberg 1995).
"""

import json
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from explorer.findings.halves import MIN_PROMPTS, Half, read_halves
from explorer.findings.kinds import KINDS, Tested
from explorer.run import Run
from explorer.text import counted

MOST = 7
RATE = 0.01  # false discovery rate


class Finding(NamedTuple):
    """One thing that holds in prompts that did not suggest it.

    Attributes
    ----------
    kind : str
    sentence : str
        Plain text, with the effect and its 95% interval.
    effect, low, high : float
        In the unit that the sentence gives it, from the prompts that test.
    p, q : float
        One-sided; ``q`` is adjusted for all kinds that were tested.
    n : int
        Prompts that tested it: the unit, as tokens of a prompt are alike.
    page : str
        Where it is seen, as pages are called in addresses.
    address : dict of str
        Choices of that page; ``domain`` as the run has it, ``""`` for none.
    """

    kind: str
    sentence: str
    effect: float
    low: float
    high: float
    p: float
    q: float
    n: int
    page: str
    address: dict[str, str]


class Findings(NamedTuple):
    """What holds, and how much was looked at.

    Attributes
    ----------
    found : list of Finding
    tested : list of str
        Kinds of which there was a candidate.
    n_prompts, n_tokens : int
        That were read, both halves.
    first : int or None
        Tokens of each prompt that were read, of a run that is too large to be read whole.
    """

    found: list[Finding]
    tested: list[str]
    n_prompts: int
    n_tokens: int
    first: int | None = None

    @property
    def summary(self) -> str:
        """How the sentences came about, in one."""
        read = f"{counted(self.n_tokens, 'token')} of {counted(self.n_prompts, 'prompt')}"
        if self.first is not None:
            read += f" (the first {self.first} of each, as the run is large)"
        if not self.tested:
            return (
                f"Nothing can be tested in {read}: half of the prompts suggest and the others "
                f"test, and each half needs {MIN_PROMPTS}."
            )
        kinds = f"{len(self.tested)} kinds of finding" if len(self.tested) > 1 else "1 kind"
        hold = f"{len(self.found)} of them hold" if self.found else "none of them holds"
        return (
            f"In {read}, every other prompt suggested {kinds} and the rest, whose figures these "
            f"are, tested them: {hold} at a false discovery rate of {RATE:.0%}."
        )

    def to_json(self) -> str:
        """Return everything as JSON."""
        return json.dumps(
            {
                "summary": self.summary,
                "findings": [one._asdict() for one in self.found],
                "tested": self.tested,
                "n_prompts": self.n_prompts,
                "n_tokens": self.n_tokens,
                "first": self.first,
            },
            indent=1,
        )


def findings(run: Run) -> Findings:
    """Return what is worth knowing in a run.

    Raises
    ------
    RunError
        If the run was recorded at level ``stats``, which keeps no experts per token.
    """
    return judge(*read_halves(run))


def adjusted(p: Sequence[float]) -> npt.NDArray[np.float64]:
    """Return p values corrected for their number, in their order.

    As ``scipy.stats.false_discovery_control``, whose module loads for as long as all of a page's
    others together.

    References
    ----------
    Benjamini and Hochberg 1995, "Controlling the false discovery rate".
    """
    values = np.asarray(p, dtype=np.float64)
    order = np.argsort(values)[::-1]
    ranks = np.arange(len(values), 0, -1)
    found = np.empty_like(values)
    found[order] = np.minimum.accumulate(values[order] * len(values) / ranks)
    return found.clip(max=1.0)


def judge(suggests: Half, tests: Half) -> Findings:
    """Let one half of the prompts suggest findings, and keep those that hold in the other."""
    halves = (suggests, tests)
    n_prompts = sum(len(half.tokens) for half in halves)
    n_tokens = sum(len(half.token) for half in halves)
    if min(len(half.tokens) for half in halves) < MIN_PROMPTS:
        return Findings([], [], n_prompts, n_tokens, suggests.first)
    tested: dict[str, Tested] = {}
    for kind, suggest in KINDS.items():
        strongest = max(suggest(suggests), key=lambda one: one.strength, default=None)
        result = strongest and strongest.test(tests)
        if result is not None:
            tested[kind] = result
    rates = adjusted([one.p for one in tested.values()])
    found = [
        Finding(
            kind,
            *one[:5],
            float(q),
            len(tests.tokens) if one.prompts is None else one.prompts,
            one.page,
            one.address,
        )
        for (kind, one), q in zip(tested.items(), rates, strict=True)
        if q <= RATE
    ]
    return Findings(found[:MOST], list(tested), n_prompts, n_tokens, suggests.first)
