"""Regions of the hidden space: K-means, Gaussian mixtures, and the nearest recorded tokens."""

import warnings
from typing import Literal

import torch
from sklearn.cluster import KMeans
from sklearn.exceptions import ConvergenceWarning
from sklearn.mixture import GaussianMixture

from capture.swap.rules import Decision, RouterInputs, Routing
from explorer.errors import RouterError
from explorer.routers.contract import RoutingRouter, registered
from explorer.routers.native import choose
from explorer.routers.scores import slots, target_scores, weigh
from explorer.routers.sequences import prefix_mean

Level = Literal["token", "prompt"]

SPANNING = 0.7  # a token whose largest share is below this lies between clusters


def points_of(inputs: RouterInputs, level: Level) -> torch.Tensor:
    """Return what is clustered, [T, D] float32.

    A token's hidden state; or, at the level of prompts, the mean of its prompt's hidden states so
    far, which no later token has a part in.
    """
    hidden = inputs.tensor("hidden").float()
    return prefix_mean(hidden, inputs) if level == "prompt" else hidden


def sample_rows(n_tokens: int, at_most: int, seed: int) -> torch.Tensor:
    """Return the row numbers of a sample without replacement, in order."""
    if n_tokens <= at_most:
        return torch.arange(n_tokens)
    generator = torch.Generator().manual_seed(seed)
    return torch.randperm(n_tokens, generator=generator)[:at_most].sort().values


class KMeansClusters:
    """Centroids, and how far the fitted points lie from theirs.

    Parameters
    ----------
    n_clusters : int
        Fewer are made of fewer distinct points.
    seed : int
    max_points : int
        A larger fit split is sampled.

    Attributes
    ----------
    centroids : Tensor [C, D], float32
    spread : float
        Mean squared distance of a fitted point to its centroid.
    inertia : float
        The sum that K-means minimises, over the points that it saw.
    """

    def __init__(self, n_clusters: int, seed: int, max_points: int) -> None:
        if n_clusters < 1:
            raise RouterError(f"Expected at least one cluster, got n_clusters={n_clusters}.")
        self.n_clusters = n_clusters
        self.seed = seed
        self.max_points = max_points

    def fit(self, points: torch.Tensor) -> None:
        """Find the centroids of points [T, D]."""
        seen = points[sample_rows(len(points), self.max_points, self.seed)].cpu()
        distinct = len(torch.unique(seen, dim=0))
        model = KMeans(min(self.n_clusters, distinct), n_init=1, random_state=self.seed)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)
            model.fit(seen.numpy())
        self.centroids = torch.from_numpy(model.cluster_centers_).float()
        self.inertia = float(model.inertia_)
        self.spread = self.inertia / len(seen)

    @property
    def count(self) -> int:
        """Clusters that were found, at most ``n_clusters``."""
        return len(self.centroids)

    def distances(self, points: torch.Tensor) -> torch.Tensor:
        """Return squared distances to the centroids, [T, C]."""
        centroids = self.centroids.to(points.device)
        square = points.square().sum(-1, keepdim=True) + centroids.square().sum(-1)
        return (square - 2 * points @ centroids.T).clamp_min(0)

    def shares(self, points: torch.Tensor, temperature: float) -> torch.Tensor:
        """Return softmax(-distance / (temperature * spread)), [T, C]."""
        scale = max(temperature * self.spread, 1e-12)
        return (-self.distances(points) / scale).softmax(dim=-1)


class GaussianClusters:
    """A Gaussian mixture and the posterior of its components.

    Parameters
    ----------
    n_components : int
        Fewer are made of fewer than twice as many points.
    covariance : {"diag", "full"}
    seed : int
    max_points : int
        A larger fit split is sampled.

    Attributes
    ----------
    bounds : list of float
        Lower bound of the mean log-likelihood after each step of the fit, nats.
    """

    def __init__(
        self, n_components: int, covariance: Literal["diag", "full"], seed: int, max_points: int
    ) -> None:
        if n_components < 1 or covariance not in ("diag", "full"):
            raise RouterError(
                "Expected at least one component and a covariance 'diag' or 'full', got "
                f"{n_components} and {covariance!r}."
            )
        self.n_components = n_components
        self.covariance = covariance
        self.seed = seed
        self.max_points = max_points

    def fit(self, points: torch.Tensor) -> None:
        """Fit the mixture to points [T, D]."""
        seen = points[sample_rows(len(points), self.max_points, self.seed)].double().cpu()
        distinct = len(torch.unique(seen, dim=0))
        model = GaussianMixture(
            max(1, min(self.n_components, distinct // 2)),
            covariance_type=self.covariance,
            reg_covar=1e-3,
            max_iter=60,
            random_state=self.seed,
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)
            model.fit(seen.numpy())
        self.bounds = [float(bound) for bound in model.lower_bounds_]
        self.log_weights = torch.from_numpy(model.weights_).log()
        self.means = torch.from_numpy(model.means_)
        # Cholesky factors of the precisions: [C, D] diagonals, or [C, D, D]
        self.factors = torch.from_numpy(model.precisions_cholesky_)
        if self.covariance == "full":
            self.at_means = torch.einsum("cd,cde->ce", self.means, self.factors)

    @property
    def count(self) -> int:
        """Components that were fitted, at most ``n_components``."""
        return len(self.means)

    def posterior(self, points: torch.Tensor) -> torch.Tensor:
        """Return the probability of each component given the point, [T, C] float32."""
        x = points.double()
        if self.covariance == "diag":
            precision = self.factors.square()
            square = x.square() @ precision.T - 2 * x @ (self.means * precision).T
            square = square + (self.means.square() * precision).sum(-1)
            log_det = self.factors.log().sum(-1)
        else:
            parts = [
                (x @ factor - mean).square().sum(-1)
                for factor, mean in zip(self.factors, self.at_means, strict=True)
            ]
            square = torch.stack(parts, dim=-1)
            log_det = self.factors.diagonal(dim1=1, dim2=2).log().sum(-1)
        return (self.log_weights + log_det - square / 2).softmax(dim=-1).float()


@registered("nearest_neighbours")
class NeighbourRouter(RoutingRouter):
    """Average the expert scores of the most similar recorded tokens.

    Parameters
    ----------
    neighbours : int
    max_points : int
        Recorded tokens that are kept; a larger fit split is sampled.
    seed : int
    """

    _rows = 2048  # tokens compared at a time, which bounds memory

    neighbours: int = 8
    max_points: int = 8192
    seed: int = 0

    def _fit(self, inputs: RouterInputs, target: Decision | None) -> None:
        rows = sample_rows(inputs.n_tokens, self.max_points, self.seed)
        self.points_ = inputs.tensor("hidden")[rows].float().clone()
        self.scores_ = target_scores(inputs, target)[rows].clone()

    def _route(self, inputs: RouterInputs) -> Routing:
        hidden = inputs.tensor("hidden").float()
        scores = torch.zeros(len(hidden), self.scores_.shape[-1], device=hidden.device)
        count = min(self.neighbours, len(self.points_))
        for start in range(0, len(hidden), self._rows):
            here = slice(start, start + self._rows)
            nearest = torch.cdist(hidden[here], self.points_).topk(count, largest=False).indices
            scores[here] = self.scores_[nearest].mean(dim=1)
        ids = choose(scores, inputs)
        return slots(scores, ids, weigh(scores, ids, inputs))

    def flops(self, n_experts: int, d: int, top_k: int) -> float:
        """Return the operations of the distances to all kept inputs, and of the mean."""
        n_points = len(self.points_) if self.fitted else self.max_points
        return 2.0 * d * n_points + float(min(self.neighbours, n_points) * n_experts)
