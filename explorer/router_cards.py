"""The cards of routers, from ``router_cards.toml``, and how routers are named; without torch."""

import ast
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

from capture.errors import cut, quoted
from explorer.errors import RouterError

Family = Literal["attention", "clustering", "gating", "rl", "literature", "control"]
Fits = Literal["statistics", "distilled", "trained"]
CardPart = Literal["expert", "head", "layer"]
Weighing = Literal["host", "at_most", "own"]

# stands in ``RouterInfo.identity`` for the number of experts that the model takes
MODEL_K = "the model's k"

# all four families, the literature beside them, and chance
SENSIBLE = (
    *("native", "top_k(k=1)", "top_p(p=0.5)", "expert_skipping"),
    *("expert_key_attention", "yuan_attention", "head_attention"),
    *("kmeans(n_clusters=128)", "cluster_shortlist", "cluster_linear"),
    *("layer_gate_trained", "gru_recurrent"),
    *("policy_gradient", "q_learning"),
    *("hash_fitted", "expert_choice", "static_best", "random"),
)

FAMILIES: tuple[Family, ...] = ("attention", "clustering", "gating", "rl", "literature", "control")


@dataclass(frozen=True, slots=True)
class RouterInfo:
    """What a router's card says.

    Attributes
    ----------
    name : str
        Name in ``ROUTERS``.
    family : {"attention", "clustering", "gating", "rl", "literature", "control"}
    title : str
    summary : str
        What it does, in at most two sentences.
    formula : str
        In plain characters.
    paper : str
        arXiv id and equation or section; ``""`` for rules without a paper.
    differs : str or None
        How the rule differs from the paper, in a sentence; ``""`` = as published. Every rule with
        a paper declares one or the other.
    needs : frozenset of str
        Fields of :class:`capture.swap.rules.RouterInputs` that ``route`` cannot do without.
    part : {"expert", "head", "layer"}
        What it decides about.
    fits : {"statistics", "distilled", "trained"} or None
        What ``fit`` does: nothing (None), counts and means, gradient steps towards the target's
        decisions, or, with ``train`` in its place, learning on the model's own loss; see
        :mod:`explorer.routers.learning.training`.
    causal : bool
        Whether a token's decision depends on itself and earlier tokens of its sequence only.
        Declared here; :mod:`explorer.comparison.causality` finds out.
    batch_dependent : bool
        Whether other sequences of the batch change a token's decision.
    variable_k : bool
        Whether tokens differ in their number of experts.
    across_layers : bool
        Whether one router serves all layers and is fitted on them together.
    weighing : {"host", "at_most", "own"}
        On which scale its combine weights are. Experts were trained with the model's, and another
        one changes what the layer adds, whoever is chosen.

        - ``"host"``: by the model's convention, as :func:`explorer.routers.scores.weigh` does it.
          Where the model renormalises (``RouterInputs.renormalize``), the weights of a token with
          any expert sum to ``scaling``; elsewhere a weight is the router's own score of the expert
          times ``scaling``.
        - ``"at_most"``: as in ``"host"``, but never more: some of it is missing for some tokens,
          because assignments were dropped or a raw score stands for a sum (Switch). On a model
          that renormalises, sums are at most ``scaling``; elsewhere a weight is at most the score
          times ``scaling``.
        - ``"own"``: on a scale of the rule's own, at least on models that do not renormalise; its
          summary or formula gives it.

        Rules about parts weigh nothing: their gates, 0..1, multiply what the model's weights are.
    identity : mapping of str to value, or str
        The arguments with which the rule repeats the model's own decision exactly, ids and weights,
        whatever the model chooses and weighs by; ``{}`` = its defaults, ``MODEL_K`` as a value =
        as many as the model takes. A rule about parts then leaves every part as it is. A rule that
        no arguments make so says why, in a sentence. Every rule declares one or the other.
    shelved : str
        Why the rule is out of the default set: lists name it last, and pages offer it only to
        those who type it. ``""`` for all others.
    """

    name: str
    family: Family
    title: str
    summary: str
    formula: str
    paper: str
    needs: frozenset[str]
    part: CardPart = "expert"
    fits: Fits | None = None
    causal: bool = True
    batch_dependent: bool = False
    variable_k: bool = False
    across_layers: bool = False
    weighing: Weighing = "host"
    identity: Mapping[str, Any] | str | None = field(default=None, hash=False)
    shelved: str = ""
    differs: str | None = None


def _read(path: Path) -> dict[str, RouterInfo]:
    """Return the cards of a file by name; what a card leaves out has its default."""
    found = tomllib.loads(path.read_text("utf-8"))
    return {
        name: RouterInfo(name=name, **{"paper": "", **card, "needs": frozenset(card["needs"])})
        for name, card in found.items()
    }


CARDS: Mapping[str, RouterInfo] = _read(Path(__file__).with_suffix(".toml"))


SELECTORS = ("TopK", "Threshold", "TopP")
_HOW = "Write a name, or a name with arguments, such as top_k(k=1) or kmeans(n_clusters=128)."


class SelectorCall(NamedTuple):
    """A selector among the arguments of a router, such as ``TopP(p=0.5)``."""

    name: str
    options: dict[str, Any]

    def __str__(self) -> str:
        return _written(self.name, self.options)


class RouterSpec(NamedTuple):
    """A router that is yet to be made.

    Attributes
    ----------
    name : str
        In ``ROUTERS``.
    options : dict
        Arguments of its constructor: numbers, strings, booleans, None, or a :class:`SelectorCall`.
    """

    name: str
    options: dict[str, Any]

    @property
    def label(self) -> str:
        """How it is called in tables, always the same for the same router."""
        return _written(self.name, self.options) if self.options else self.name


def _written(name: str, options: dict[str, Any]) -> str:
    values = (
        f"{k}={v if isinstance(v, SelectorCall) else repr(v)}" for k, v in sorted(options.items())
    )
    return f"{name}({', '.join(values)})"


def parse_router(text: str) -> RouterSpec:
    """Read a router's name and arguments; nothing is evaluated, only values are read.

    Raises
    ------
    RouterError
        If the text is anything else.
    """
    try:
        tree = ast.parse(text.strip(), mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        raise RouterError(f"Expected a router, got {quoted(text)}. {_HOW}") from None
    if isinstance(tree, ast.Name):
        return RouterSpec(tree.id, {})
    return RouterSpec(*_call(tree, text))


def _call(tree: ast.expr, text: str) -> tuple[str, dict[str, Any]]:
    if not isinstance(tree, ast.Call) or not isinstance(tree.func, ast.Name):
        raise RouterError(f"Expected a router, got {quoted(text)}. {_HOW}")
    if tree.args or any(keyword.arg is None for keyword in tree.keywords):
        raise RouterError(f"Expected every argument with its name in {quoted(text)}. {_HOW}")
    return tree.func.id, {str(k.arg): _value(k.value, text) for k in tree.keywords}


def _value(tree: ast.expr, text: str) -> Any:
    if isinstance(tree, ast.Call):
        name, options = _call(tree, text)
        if name not in SELECTORS:
            raise RouterError(
                f"Expected one of the selectors {', '.join(SELECTORS)} in "
                f"{quoted(text)}, got {name}."
            )
        return SelectorCall(name, options)
    try:
        value = ast.literal_eval(tree)
    except ValueError:
        value = ...
    if not isinstance(value, str | int | float | bool | None):
        raise RouterError(
            f"Expected a number, text in quotes, True, False or None for an "
            f"argument in {quoted(text)}, "
            f"got {cut(ast.unparse(tree), 80)}. {_HOW}"
        )
    return value


def split_routers(text: str) -> list[str]:
    """Divide a list of routers at the commas that lie outside brackets."""
    parts, depth = [""], 0
    for sign in text:
        depth += (sign == "(") - (sign == ")")
        if sign == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += sign
    return [part.strip() for part in parts if part.strip()]
