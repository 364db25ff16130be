"""What a comparison will do: which routers, with which seeds, in which modes."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, NamedTuple

from capture.errors import quoted
from explorer.comparison.names import RouterSpec, parse_router, takes_seed
from explorer.errors import ComparisonError

Mode = Literal["replay", "live", "live-layer"]

# all four families, the literature beside them, and chance
SENSIBLE = (
    *("native", "top_k(k=1)", "top_p(p=0.5)", "expert_skipping"),
    *("expert_key_attention", "yuan_attention", "head_attention"),
    *("kmeans(n_clusters=128)", "cluster_shortlist", "cluster_linear"),
    *("layer_gate_trained", "gru_recurrent"),
    *("policy_gradient", "q_learning"),
    *("hash_fitted", "expert_choice", "static_best", "random"),
)


@dataclass(frozen=True)
class Settings:
    """What the numbers of a comparison depend on, beside run, model and routers.

    Attributes
    ----------
    tokens, fit_tokens : int
        At most so many to report on, and to fit on.
    seed : int
        Chooses texts and splits; routers have seeds of their own.
    skip : {"block", "layer"}
        What rules about layers skip: the MoE block, or the whole layer.
    validation : bool
        Whether reported on a part of the fit split, on which settings are chosen.
    """

    tokens: int = 10_000
    fit_tokens: int = 20_000
    seed: int = 0
    skip: Literal["block", "layer"] = "block"
    validation: bool = False

    def __post_init__(self) -> None:
        """Refuse what cannot work."""
        if self.tokens < 2 or self.fit_tokens < 2:
            raise ComparisonError(
                f"At least 2 tokens are needed to report on and to fit on, got {self.tokens} and "
                f"{self.fit_tokens}."
            )
        if self.skip not in ("block", "layer"):
            raise ComparisonError(f"Expected skip 'block' or 'layer', got {quoted(self.skip)}.")

    def as_dict(self) -> dict[str, Any]:
        """Return the settings by name."""
        return asdict(self)


class Unit(NamedTuple):
    """One router with one seed in one mode: what is computed at a time, and found again."""

    spec: RouterSpec
    seed: int | None
    mode: Mode

    @property
    def name(self) -> tuple[str, int | None, str]:
        """Router, seed and mode as the tables write them."""
        return self.spec.label, self.seed, self.mode


def read_specs(routers: Sequence[str] | None) -> list[RouterSpec]:
    """Return routers by name, the sensible set for None, each once.

    Raises
    ------
    UnknownNameError
        If there is no such router.
    RouterError
        If a name cannot be read.
    """
    from explorer.routers import ROUTERS

    specs = [parse_router(text) for text in (SENSIBLE if routers is None else routers)]
    if not specs:
        raise ComparisonError(f"Expected at least one router. There are: {', '.join(ROUTERS)}.")
    for spec in specs:
        _ = ROUTERS[spec.name]
    return list({spec.label: spec for spec in specs}.values())


def units_of(
    specs: Sequence[RouterSpec], *, modes: Sequence[Mode], seeds: Sequence[int]
) -> list[Unit]:
    """Return what there is to compute, router after router."""
    if not seeds:
        raise ComparisonError("Expected at least one seed, got none.")
    return [
        Unit(spec, seed, mode)
        for spec in specs
        for seed in (seeds if takes_seed(spec) else (None,))
        for mode in modes
    ]
