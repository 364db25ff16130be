"""Clustering-based routers: what region of the hidden space a token lies in decides."""

from abc import abstractmethod
from dataclasses import replace
from typing import Literal

import torch

from explorer.errors import RouterError
from explorer.routers.base import (
    ROUTERS,
    Decision,
    RouterInfo,
    RouterInputs,
    Routing,
    RoutingRouter,
)
from explorer.routers.clusters import (
    SPANNING,
    GaussianClusters,
    KMeansClusters,
    Level,
    points_of,
)
from explorer.routers.native import choose
from explorer.routers.scores import slots, target_scores, weigh
from explorer.routers.selectors import Selector

MAX_POINTS = 20_000


class TableRouter(RoutingRouter):
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


@ROUTERS.add("kmeans")
class KMeansRouter(TableRouter):
    """Send a token to the experts that its K-means cluster scored highest on average.

    Parameters
    ----------
    n_clusters : int
    soft : bool
        Whether a token mixes the rows of all clusters by its shares in them.
    temperature : float
        Of the shares, times the mean squared distance to the centroid; towards 0 the choice is
        hard.
    level : {"token", "prompt"}
        Whether a token is clustered by its own hidden state or by the mean of its prompt so far.
    selector : Selector, optional
        How experts are chosen; None = as many of the best as the model takes.
    seed : int

    Notes
    -----
    Differs from the source (a language model per cluster of documents): clusters of one layer's
    hidden states choose among experts that exist, and K-means is not balanced.
    """

    info = RouterInfo(
        name="kmeans",
        family="clustering",
        title="K-means table, hard",
        summary=(
            "Tokens of one cluster of hidden states share their experts: those that the cluster "
            "scored highest on average."
        ),
        formula="c = argmin |h - mu_c|;  S = TopK(T_c, k),  T_c = mean of p_t in c",
        paper="2303.14177",
        differs=(
            "The source divides whole documents and trains a language model for each cluster; "
            "here tokens of one cluster share experts of one model. The source's own: python -m "
            "explorer.survey.from_scratch.ensemble."
        ),
        needs=frozenset({"hidden"}),
        fits="statistics",
        identity="Tokens of a cluster share their scores.",
    )

    def __init__(
        self,
        *,
        n_clusters: int = 128,
        soft: bool = False,
        temperature: float = 0.1,
        level: Level = "token",
        selector: Selector | None = None,
        seed: int = 0,
    ) -> None:
        self.n_clusters = n_clusters
        self.soft = soft
        self.temperature = temperature
        self.level = level
        self.selector = selector
        self.seed = seed
        needs = {"hidden", "starts"} if level == "prompt" else {"hidden"}
        variable = selector is not None and selector.variable
        self.info = replace(self.info, needs=frozenset(needs), variable_k=variable)

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


@ROUTERS.add("kmeans_soft")
class SoftKMeansRouter(KMeansRouter):
    """Mix the experts of several clusters, by the token's shares in them."""

    info = replace(
        KMeansRouter.info,
        name="kmeans_soft",
        differs=(
            "The source mixes the predictions of language models trained on clusters of "
            "documents; here the expert scores of one model's clusters of tokens are mixed."
        ),
        title="K-means table, soft",
        summary=(
            "As the hard table, but a token between clusters mixes their experts by its shares "
            "in them."
        ),
        formula="p = sum_c r_c T_c,  r = softmax(-|h - mu_c|^2 / (T s^2));  S = TopK(p, k)",
    )

    def __init__(
        self,
        *,
        n_clusters: int = 128,
        temperature: float = 0.1,
        level: Level = "token",
        selector: Selector | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(
            n_clusters=n_clusters,
            soft=True,
            temperature=temperature,
            level=level,
            selector=selector,
            seed=seed,
        )


@ROUTERS.add("kmeans_prompt")
class PromptKMeansRouter(SoftKMeansRouter):
    """Cluster prompts: all tokens that continue the same kind of text share experts."""

    info = replace(
        SoftKMeansRouter.info,
        name="kmeans_prompt",
        title="K-means table of prompts",
        summary=(
            "Clusters the mean hidden state of the prompt so far, so that all tokens of one kind "
            "of text use the same experts."
        ),
        formula="m_t = mean of h_1..h_t;  p = sum_c r_c(m_t) T_c;  S = TopK(p, k)",
        paper="2509.10513",
        differs=(
            "The source gives each cluster of texts its own experts and router, trained together; "
            "here each has a table of a trained model's experts, and reads the prompt so far."
        ),
    )

    def __init__(
        self,
        *,
        n_clusters: int = 32,
        temperature: float = 0.1,
        selector: Selector | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(
            n_clusters=n_clusters,
            temperature=temperature,
            level="prompt",
            selector=selector,
            seed=seed,
        )


@ROUTERS.add("gmm")
class MixtureRouter(TableRouter):
    """Mix the experts of a Gaussian mixture's components, by their posterior.

    Parameters
    ----------
    n_components : int
        Few make a poor router; 128 or more are needed for a drop-in.
    covariance : {"diag", "full"}
    level : {"token", "prompt"}
        Whether a token is clustered by its own hidden state or by the mean of its prompt so far.
    selector : Selector, optional
        How experts are chosen; None = as many of the best as the model takes.
    seed : int

    Notes
    -----
    Differs from the source, which trains the mixture with the model and gives each expert
    components of its own: here they share a table of scores.
    """

    info = RouterInfo(
        name="gmm",
        family="clustering",
        title="Gaussian-mixture posterior",
        summary=(
            "A Gaussian mixture over hidden states; a token mixes the expert scores of its "
            "components by their posterior."
        ),
        formula="p = sum_c P(c | h) T_c;  S = TopK(p, k)",
        paper="2510.16448",
        differs=(
            "The source's components belong to experts and are learned while the model trains; "
            "here one mixture of router inputs looks up what the model's own gate scored."
        ),
        needs=frozenset({"hidden"}),
        fits="statistics",
        identity="Tokens mix the scores of few components.",
    )

    def __init__(
        self,
        *,
        n_components: int = 128,
        covariance: Literal["diag", "full"] = "diag",
        level: Level = "token",
        selector: Selector | None = None,
        seed: int = 0,
    ) -> None:
        self.n_components = n_components
        self.covariance = covariance
        self.level = level
        self.selector = selector
        self.seed = seed
        needs = {"hidden", "starts"} if level == "prompt" else {"hidden"}
        variable = selector is not None and selector.variable
        self.info = replace(self.info, needs=frozenset(needs), variable_k=variable)

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
