"""Clustering-based routers: what region of the hidden space a token lies in decides."""

from abc import abstractmethod
from dataclasses import dataclass, field, replace
from typing import Literal

import torch

from capture.swap.rules import Decision, RouterInputs, Routing
from explorer.errors import RouterError
from explorer.routers.clusters import (
    SPANNING,
    GaussianClusters,
    KMeansClusters,
    Level,
    points_of,
)
from explorer.routers.contract import RoutingRouter, registered
from explorer.routers.native import choice_scores, choose, host_choice
from explorer.routers.scores import (
    slots,
    student_scores,
    target_logits,
    target_scores,
    weigh,
)
from explorer.routers.selectors import Selector, TopK

MAX_POINTS = 20_000


class ClusterTableRouter(RoutingRouter):
    """A router that mixes one row of expert scores per cluster, by the token's shares in them."""

    level: Level = "token"
    selector: Selector | None = None

    def responsibilities(self, inputs: RouterInputs) -> torch.Tensor:
        """Return each token's shares in the clusters, [T, C], rows sum to 1.

        Also of a router whose choice is hard: the shares say how clear the choice was.
        """
        self.check(inputs)
        if not self.fitted:
            raise RouterError(f"Router {self.info.name!r} has no clusters yet. Call fit first.")
        with torch.no_grad():
            return self._shares(points_of(inputs, self.level))

    def spanning(self, inputs: RouterInputs, threshold: float = SPANNING) -> torch.Tensor:
        """Return which tokens lie between clusters, [T] bool: no share reaches the threshold."""
        return self.responsibilities(inputs).amax(dim=-1) < threshold

    def spanning_rate(self, inputs: RouterInputs, threshold: float = SPANNING) -> float:
        """Return the share of tokens that lie between clusters, nan without tokens."""
        return float(self.spanning(inputs, threshold).double().mean())

    def _fit(self, inputs: RouterInputs, target: Decision | None) -> None:
        points = points_of(inputs, self.level)
        self._fit_clusters(points)
        scores = target_scores(inputs, target)
        shares = self._mixed(self._shares(points))
        total = shares.sum(dim=0).unsqueeze(-1)
        mean = scores.mean(dim=0)
        # a cluster without a token knows no better than the mean of all
        self.table_ = (shares.T @ scores / total.clamp_min(1e-12)).where(total > 1e-9, mean)

    def _mixed(self, shares: torch.Tensor) -> torch.Tensor:
        """Return the shares that the table is mixed by."""
        return shares

    def _scores(self, shares: torch.Tensor) -> torch.Tensor:
        """Return the rows of the table, mixed by the shares [T, C]: scores [T, E]."""
        return self._mixed(shares) @ self.table_

    def _route(self, inputs: RouterInputs) -> Routing:
        scores = self._scores(self._shares(points_of(inputs, self.level)))
        ids = choose(scores, inputs, selector=self.selector)
        return slots(scores, ids, weigh(scores, ids, inputs))

    @abstractmethod
    def _fit_clusters(self, points: torch.Tensor) -> None:
        """Find the clusters of points [N, D]."""

    @abstractmethod
    def _shares(self, points: torch.Tensor) -> torch.Tensor:
        """Return how much each cluster has of points, [N, C], rows sum to 1."""


@dataclass(kw_only=True, eq=False)
class _LevelTable(ClusterTableRouter):
    """A table whose clusters are of tokens or prompts, and whose experts a selector may choose.

    Parameters
    ----------
    level : {"token", "prompt"}
        Whether a token is clustered by its own hidden state or by the mean of its prompt so far.
    selector : Selector, optional
        How experts are chosen; None = as many of the best as the model takes.
    seed : int
    """

    level: Level = "token"
    selector: Selector | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        """Fit the card to what was given."""
        needs = {"hidden", "starts"} if self.level == "prompt" else {"hidden"}
        variable = self.selector is not None and self.selector.variable
        self.info = replace(self.info, needs=frozenset(needs), variable_k=variable)


@registered("kmeans")
class KMeansRouter(_LevelTable):
    """Send a token to the experts that its K-means cluster scored highest on average.

    Parameters
    ----------
    n_clusters : int
    soft : bool
        Whether a token mixes the rows of all clusters by its shares in them.
    temperature : float
        Of the shares, times the mean squared distance to the centroid; towards 0 the choice is
        hard.
    **options
        Level, selector and seed.

    Notes
    -----
    Differs from the source (a language model per cluster of documents): clusters of one layer's
    hidden states choose among experts that exist, and K-means is not balanced.
    """

    n_clusters: int = 128
    soft: bool = False
    temperature: float = 0.1

    def _fit_clusters(self, points: torch.Tensor) -> None:
        self.clusters_ = KMeansClusters(self.n_clusters, self.seed, MAX_POINTS)
        self.clusters_.fit(points)

    def _shares(self, points: torch.Tensor) -> torch.Tensor:
        return self.clusters_.shares(points, self.temperature)

    def _mixed(self, shares: torch.Tensor) -> torch.Tensor:
        if self.soft or not shares.numel():
            return shares
        return torch.zeros_like(shares).scatter(-1, shares.argmax(-1, keepdim=True), 1.0)

    def _scores(self, shares: torch.Tensor) -> torch.Tensor:
        # one row of the table needs no product
        return super()._scores(shares) if self.soft else self.table_[shares.argmax(-1)]

    def flops(self, n_experts: int, d: int, top_k: int) -> float:
        """Return the operations of the distances, and of mixing the rows where it is soft."""
        n_clusters = self.clusters_.count if self.fitted else self.n_clusters
        return 2.0 * n_clusters * (d + (n_experts if self.soft else 0))


@registered("kmeans_soft")
class SoftKMeansRouter(KMeansRouter):
    """Mix the experts of several clusters, by the token's shares in them."""

    soft: bool = field(default=True, init=False)


@registered("kmeans_prompt")
class PromptKMeansRouter(SoftKMeansRouter):
    """Cluster prompts: all tokens that continue the same kind of text share experts."""

    n_clusters: int = 32
    level: Level = field(default="prompt", init=False)


@registered("gmm")
class MixtureRouter(_LevelTable):
    """Mix the experts of a Gaussian mixture's components, by their posterior.

    Parameters
    ----------
    n_components : int
        Few make a poor router; 128 or more are needed for a drop-in.
    covariance : {"diag", "full"}
    **options
        Level, selector and seed.

    Notes
    -----
    Differs from the source, which trains the mixture with the model and gives each expert
    components of its own: here they share a table of scores.
    """

    n_components: int = 128
    covariance: Literal["diag", "full"] = "diag"

    def _fit_clusters(self, points: torch.Tensor) -> None:
        self.mixture_ = GaussianClusters(self.n_components, self.covariance, self.seed, MAX_POINTS)
        self.mixture_.fit(points)

    def _shares(self, points: torch.Tensor) -> torch.Tensor:
        return self.mixture_.posterior(points)

    def flops(self, n_experts: int, d: int, top_k: int) -> float:
        """Return the operations of the densities and of mixing the rows."""
        n_components = self.mixture_.count if self.fitted else self.n_components
        density = 4.0 * d if self.covariance == "diag" else 2.0 * d * d
        return n_components * (density + 2.0 * n_experts)


@registered("cluster_shortlist")
class ShortlistRouter(ClusterTableRouter):
    """Let the model's own gate choose, but only among the experts of the token's cluster.

    Parameters
    ----------
    n_clusters : int
    shortlist : int, optional
        Experts per cluster, at most all; None = twice as many as a token takes.
    seed : int
    """

    n_clusters: int = 128
    shortlist: int | None = None
    seed: int = 0

    def _fit_clusters(self, points: torch.Tensor) -> None:
        self.clusters_ = KMeansClusters(self.n_clusters, self.seed, MAX_POINTS)
        self.clusters_.fit(points)

    def _shares(self, points: torch.Tensor) -> torch.Tensor:
        return self.clusters_.shares(points, 0.1)

    def _fit(self, inputs: RouterInputs, target: Decision | None) -> None:
        super()._fit(inputs, target)
        wanted = 2 * inputs.top_k if self.shortlist is None else self.shortlist
        if wanted < inputs.top_k:
            raise RouterError(
                f"Expected a shortlist of at least {inputs.top_k} experts, got {wanted}."
            )
        self.listed_ = TopK(min(wanted, inputs.n_experts)).mask(self.table_)

    def _mixed(self, shares: torch.Tensor) -> torch.Tensor:
        best = shares.argmax(-1, keepdim=True)
        return torch.zeros_like(shares).scatter(-1, best, 1.0)

    def _route(self, inputs: RouterInputs) -> Routing:
        cluster = self.clusters_.distances(inputs.tensor("hidden").float()).argmin(dim=-1)
        scores, choice = host_choice(inputs)
        listed = self.listed_[cluster]
        # experts outside the model's groups come after all others: where the short list holds too
        # few of these groups, it goes before the groups
        anywhere = choice_scores(scores, replace(inputs, n_groups=None))
        inside = choice > -torch.inf
        worst = choice.where(inside, 0.0).amin(dim=-1, keepdim=True)
        last = worst - 1.0 - anywhere.amax(dim=-1, keepdim=True) + anywhere
        order = choice.where(inside, last).masked_fill(~listed, -torch.inf)
        ids = TopK(inputs.top_k).ids(scores, order)
        return slots(scores, ids, weigh(scores, ids, inputs))

    def flops(self, n_experts: int, d: int, top_k: int) -> float:
        """Return the operations of the distances and of the model's own gate."""
        n_clusters = self.clusters_.count if self.fitted else self.n_clusters
        return 2.0 * d * (n_clusters + n_experts)


@registered("cluster_linear")
class ClusterLinearRouter(RoutingRouter):
    """Give every cluster of hidden states a linear router of its own, fitted to the model's logits.

    Parameters
    ----------
    n_clusters : int
        One is a single linear router for all tokens.
    rank : int, optional
        Of each router's matrix; None = full.
    ridge : float
        Pulls each cluster's router towards the one fitted on all tokens, relative to the spread
        of the cluster's hidden states; with a rank, towards no dependence on the token.
    seed : int

    Notes
    -----
    Differs from the source, whose routers are trained with their experts. A linear teacher is
    recovered exactly by one full router, so the family's point shows at low rank only: there the
    clusters' routers together say what one of the same rank cannot.
    """

    n_clusters: int = 8
    rank: int | None = None
    ridge: float = 0.001
    seed: int = 0

    def __post_init__(self) -> None:
        """Check what was given."""
        if self.rank is not None and self.rank < 1:
            raise RouterError(f"Expected a rank of at least 1, got {self.rank}. None is full rank.")

    def _fit(self, inputs: RouterInputs, target: Decision | None) -> None:
        hidden = inputs.tensor("hidden").double()
        logits = target_logits(inputs, target).double()
        self.clusters_ = KMeansClusters(self.n_clusters, self.seed, MAX_POINTS)
        self.clusters_.fit(hidden.float())
        cluster = self.clusters_.distances(hidden.float()).argmin(dim=-1)
        nothing = torch.zeros(hidden.shape[1], logits.shape[1], dtype=torch.float64)
        overall = regress(hidden, logits, nothing, self.ridge, self.rank)
        prior = overall[0][0] if self.rank is None else nothing
        self.gates_ = []
        for number in range(self.clusters_.count):
            mine = cluster == number
            if not bool(mine.any()):
                factors, bias = overall
            else:
                factors, bias = regress(hidden[mine], logits[mine], prior, self.ridge, self.rank)
            self.gates_.append(([each.float() for each in factors], bias.float()))

    def _route(self, inputs: RouterInputs) -> Routing:
        hidden = inputs.tensor("hidden").float()
        cluster = self.clusters_.distances(hidden).argmin(dim=-1)
        logits = torch.zeros(len(hidden), inputs.n_experts, device=hidden.device)
        for number, (factors, bias) in enumerate(self.gates_):
            mine = cluster == number
            values = hidden[mine]
            for factor in factors:
                values = values @ factor
            logits[mine] = values + bias
        scores = student_scores(logits, inputs)
        ids = choose(scores, inputs)
        return slots(scores, ids, weigh(scores, ids, inputs))

    def flops(self, n_experts: int, d: int, top_k: int) -> float:
        """Return the operations of the distances and of one cluster's router."""
        n_clusters = self.clusters_.count if self.fitted else self.n_clusters
        router = 2.0 * d * n_experts
        if self.rank is not None and self.rank < min(d, n_experts):
            router = 2.0 * self.rank * (d + n_experts)
        return 2.0 * d * n_clusters + router


def regress(
    hidden: torch.Tensor,
    logits: torch.Tensor,
    prior: torch.Tensor,
    ridge: float,
    rank: int | None,
) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Fit logits linearly to hidden states, near a prior, at most of some rank.

    Parameters
    ----------
    hidden : Tensor [N, D], float64
    logits : Tensor [N, E], float64
    prior : Tensor [D, E], float64
    ridge : float
        Relative to the mean square of the centred hidden states' coordinates.
    rank : int or None
        The best approximation of the fitted values by so many directions (reduced-rank
        regression).

    Returns
    -------
    factors : list of Tensor
        Whose product is the weight [D, E]: itself, or [D, rank] and [rank, E].
    bias : Tensor [E]
    """
    centre, level = hidden.mean(dim=0), logits.mean(dim=0)
    x = hidden - centre
    gram = x.T @ x
    size = float(gram.diagonal().mean())
    gram.diagonal().add_(ridge * size + 1e-9)
    weight = prior + torch.linalg.solve(gram, x.T @ (logits - level - x @ prior))
    factors = [weight]
    if rank is not None and rank < min(weight.shape):
        fitted = x @ weight
        directions = torch.linalg.eigh(fitted.T @ fitted).eigenvectors[:, -rank:]
        factors = [weight @ directions, directions.T]
        weight = factors[0] @ factors[1]
    return factors, level - centre @ weight


@registered("cluster_low_rank")
class ClusterLowRankRouter(ClusterLinearRouter):
    """Give every cluster a linear router of low rank."""

    rank: int = 4
