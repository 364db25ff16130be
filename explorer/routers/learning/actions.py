"""What a reinforcement-learning router sees and may do: states and actions."""

import itertools
from dataclasses import dataclass
from typing import Literal

import torch

from capture.swap.rules import RouterInputs, Routing
from explorer.errors import RouterError
from explorer.routers.native import choose
from explorer.routers.scores import host_scores, slots, weigh

ActionKind = Literal["count", "subset", "skip"]
StateKind = Literal["full", "gate"]

STATISTICS = ("p1", "p2", "margin", "entropy")
MOST_SUBSETS = 256


@dataclass(frozen=True, eq=False)
class Actions:
    """The actions of one layer: which of a token's ``M`` best experts run.

    Attributes
    ----------
    used : Tensor [A, M], bool
        Ascending by the number of experts. The best experts are those of the model's own rule.
    native : int
        The action that runs what the model's own rule runs.
    """

    used: torch.Tensor
    native: int

    @property
    def n_experts(self) -> torch.Tensor:
        """Experts that each action runs, [A] int64."""
        return self.used.sum(dim=-1)

    def best(self, scores: torch.Tensor, inputs: RouterInputs) -> torch.Tensor:
        """Return the experts that actions choose among, best first, [T, M] int64, -1 = none."""
        return choose(scores, inputs, k=self.used.shape[1])

    def allowed(self, best: torch.Tensor) -> torch.Tensor:
        """Return which actions a token may take, [T, A] bool: those whose experts are there."""
        used = self.used.to(best.device)
        return ~(used & (best < 0).unsqueeze(1)).any(dim=-1)

    def routing(
        self, scores: torch.Tensor, best: torch.Tensor, actions: torch.Tensor, inputs: RouterInputs
    ) -> Routing:
        """Return the routing of the actions [T], weighed as the model weighs its experts."""
        ids = best.where(self.used.to(best.device)[actions], -1)
        return slots(scores, ids, weigh(scores, ids, inputs))


def make_actions(kind: ActionKind, top_k: int, *, most: int | None, least: int | None) -> Actions:
    """Make the actions of a layer.

    Parameters
    ----------
    kind : {"count", "subset", "skip"}
        How many of the best experts run, which of them run, or whether all or none do.
    top_k : int
        Experts that the model's own rule takes.
    most : int, optional
        Experts that actions choose among; None = ``top_k``.
    least : int, optional
        Actions with fewer experts do not exist; None = 1, or 0 for ``"skip"``.

    Raises
    ------
    RouterError
        If no such set of actions holds the model's own.
    """
    wide = top_k if most is None else most
    least = int(kind != "skip") if least is None else least
    if wide < top_k or not 0 <= least <= top_k:
        raise RouterError(
            f"Expected most >= {top_k} and 0 <= least <= {top_k}, so that the model's own choice "
            f"is among the actions, got most={most}, least={least}."
        )
    if kind == "count":
        rows = [tuple(slot < n for slot in range(wide)) for n in range(wide + 1)]
    elif kind == "subset":
        if 2**wide > MOST_SUBSETS:
            raise RouterError(
                f"{wide} experts have {2**wide} subsets, more than {MOST_SUBSETS}. "
                "Use actions='count', or a smaller `most`."
            )
        rows = sorted(itertools.product((False, True), repeat=wide), key=lambda r: (sum(r), r))
    elif kind == "skip":
        rows = [(False,) * wide, tuple(slot < top_k for slot in range(wide))]
    else:
        raise RouterError(f"Expected actions 'count', 'subset' or 'skip', got {kind!r}.")
    rows = [row for row in rows if sum(row) >= least]
    own = tuple(slot < top_k for slot in range(wide))
    return Actions(torch.tensor(rows), rows.index(own))


def statistics_of(scores: torch.Tensor) -> torch.Tensor:
    """Return what is known of a token from its gate's scores [T, E], named in ``STATISTICS``.

    The two largest shares, their difference, and the entropy of the shares in nats.
    """
    shares = scores / scores.sum(dim=-1, keepdim=True).clamp_min(1e-20)
    first, second = shares.topk(min(2, shares.shape[-1]), dim=-1).values[:, [0, -1]].unbind(-1)
    entropy = -(shares * shares.clamp_min(1e-20).log()).sum(dim=-1)
    return torch.stack([first, second, first - second, entropy], dim=-1)


def state_of(inputs: RouterInputs, scores: torch.Tensor, kind: StateKind) -> torch.Tensor:
    """Return a token's state, float32: [hidden, p1, p2, p1 - p2, H(p)], or the last four only.

    Parameters
    ----------
    inputs : RouterInputs
    scores : Tensor [T, E]
        On the host's scale.
    kind : {"full", "gate"}
        ``"gate"`` leaves the hidden state out: the ablation of what it adds.

    Returns
    -------
    Tensor [T, D + 4] or [T, 4]
    """
    known = statistics_of(scores)
    return known if kind == "gate" else torch.cat([inputs.tensor("hidden").float(), known], -1)


def state_and_best(
    inputs: RouterInputs, actions: Actions, kind: StateKind
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return state [T, F], the host's scores [T, E] and the best experts [T, M] of tokens."""
    scores = host_scores(inputs.tensor("logits"), inputs)
    return state_of(inputs, scores, kind), scores, actions.best(scores, inputs)
