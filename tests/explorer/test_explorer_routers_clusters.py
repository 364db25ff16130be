"""Clustering-based routers against scikit-learn, against a linear teacher, and at their limits."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from causality_probe import toy_layers, toy_tokens
from checks import assert_close
from sklearn.cluster import KMeans
from sklearn.metrics import adjusted_rand_score, normalized_mutual_info_score
from sklearn.mixture import GaussianMixture
from test_explorer_routers_rules import sets

from explorer.errors import RouterError
from explorer.routers import ROUTERS, RouterInputs, TopP
from explorer.routers.clustering import regress
from explorer.routers.clusters import GaussianClusters, KMeansClusters, points_of

FIT = toy_layers(toy_tokens(40, 40, 1))[1, 0]
HELD_OUT = toy_layers(toy_tokens(20, 40, 2))[1, 0]


def blobs(n_blobs=4, each=60, distance=20.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(n_blobs, 8, generator=generator) * distance
    label = torch.arange(n_blobs).repeat_interleave(each)
    return centres[label] + torch.randn(len(label), 8, generator=generator), label, centres


def blob_inputs(hidden, seed=1, **options):
    generator = torch.Generator().manual_seed(seed)
    logits = hidden @ torch.randn(8, 6, generator=generator) / 10
    fields = {"score_function": "softmax", "n_experts": 6, "top_k": 2} | options
    return RouterInputs(layer=0, hidden=hidden, logits=logits, **fields)


def agreement(routing, inputs):
    pairs = zip(sets(routing), sets(inputs.native), strict=True)
    return float(np.mean([len(a & b) / inputs.top_k for a, b in pairs]))


def test_centroids_are_scikit_learns_and_inertia_falls():
    hidden, _, _ = blobs()
    inertia = []
    for n_clusters in (1, 2, 4, 16):
        clusters = KMeansClusters(n_clusters, seed=0, max_points=10_000)
        clusters.fit(hidden)
        theirs = KMeans(n_clusters, n_init=1, random_state=0).fit(hidden.numpy())
        ours = clusters.distances(hidden).argmin(-1)
        assert adjusted_rand_score(ours, theirs.labels_) > 0.99
        assert clusters.inertia == pytest.approx(theirs.inertia_)
        assert float(clusters.distances(hidden).amin(-1).sum()) == pytest.approx(
            clusters.inertia, rel=1e-3
        )
        inertia.append(clusters.inertia)
    assert inertia == sorted(inertia, reverse=True)


def test_there_are_no_more_clusters_than_distinct_points():
    points = torch.eye(4).repeat(5, 1)
    clusters = KMeansClusters(64, seed=0, max_points=100)
    clusters.fit(points)
    assert len(clusters.centroids) == 4
    assert bool(clusters.shares(points, 0.1).isfinite().all())


def test_a_hard_table_holds_the_mean_scores_of_its_cluster():
    hidden, label, _ = blobs()
    inputs = blob_inputs(hidden)
    router = ROUTERS["kmeans"](n_clusters=4).fit(inputs)
    routing = router.route(inputs)
    probs = inputs.logits.softmax(-1)
    for blob in range(4):
        mean = probs[label == blob].mean(0).expand(60, -1)
        assert_close("table", routing.scores[label == blob], mean, atol=1e-5)
    assert len(set(sets(routing))) <= 4


def test_a_soft_table_becomes_the_hard_one_as_the_temperature_falls():
    hard = ROUTERS["kmeans"](n_clusters=16).fit(FIT).route(HELD_OUT)
    cold = ROUTERS["kmeans_soft"](n_clusters=16, temperature=1e-6).fit(FIT).route(HELD_OUT)
    warm = ROUTERS["kmeans_soft"](n_clusters=16, temperature=0.5).fit(FIT).route(HELD_OUT)
    assert_close("scores", cold.scores, hard.scores, atol=1e-4)
    assert not torch.equal(warm.expert_ids, hard.expert_ids)


def test_more_clusters_come_closer_to_the_model_and_beat_chance():
    for name in ("kmeans", "kmeans_soft"):
        found = [
            agreement(ROUTERS[name](n_clusters=n).fit(FIT).route(HELD_OUT), HELD_OUT)
            for n in (1, 8, 64, 512)
        ]
        assert found == sorted(found), (name, found)
        assert found[1] > 0.25 + 0.05  # 2 of 8 experts by chance


def test_one_component_or_cluster_is_the_static_router():
    static = ROUTERS["static_best"]().fit(FIT).route(HELD_OUT)
    for router in (
        ROUTERS["gmm"](n_components=1),
        ROUTERS["kmeans"](n_clusters=1),
        ROUTERS["kmeans_soft"](n_clusters=1),
    ):
        routing = router.fit(FIT).route(HELD_OUT)
        assert torch.equal(routing.expert_ids, static.expert_ids)
        assert_close("scores", routing.scores, static.scores, atol=1e-5)


@pytest.mark.parametrize("covariance", ["diag", "full"])
def test_posteriors_are_scikit_learns_and_likelihood_rises(covariance):
    hidden, _, _ = blobs(distance=1.0)
    ours = GaussianClusters(5, covariance, seed=0, max_points=1000)
    ours.fit(hidden)
    theirs = GaussianMixture(
        5, covariance_type=covariance, reg_covar=1e-3, max_iter=60, random_state=0
    ).fit(hidden.double().numpy())
    expected = torch.from_numpy(theirs.predict_proba(hidden.double().numpy())).float()
    posterior = ours.posterior(hidden)
    assert_close("posterior", posterior, expected, atol=1e-5)
    assert_close("rows", posterior.sum(-1), torch.ones(len(hidden)), atol=1e-6)
    assert len(ours.bounds) > 2
    assert bool((np.diff(ours.bounds) > -1e-9).all())


def test_tokens_between_clusters_are_counted():
    hidden, _, centres = blobs(n_blobs=2, each=90)
    router = ROUTERS["kmeans"](n_clusters=2).fit(blob_inputs(hidden))
    assert router.spanning_rate(blob_inputs(hidden)) == 0
    between = centres.mean(0).expand(20, -1)
    mixed = blob_inputs(torch.cat([hidden, between + 0]))
    shares = router.responsibilities(mixed)
    assert_close("rows", shares.sum(-1), torch.ones(200), atol=1e-6)
    spanning = router.spanning(mixed, threshold=0.999)
    assert not bool(spanning[:180].any())
    middle = (router.clusters_.centroids.mean(0)).expand(20, -1)
    halfway = router.responsibilities(blob_inputs(middle))
    assert_close("halves", halfway, torch.full((20, 2), 0.5), atol=1e-3)
    assert router.spanning_rate(blob_inputs(torch.cat([hidden, middle]))) == pytest.approx(0.1)
    with pytest.raises(RouterError, match="fit"):
        ROUTERS["kmeans"]().responsibilities(blob_inputs(hidden))


def test_prompt_clusters_are_of_the_mean_so_far():
    hidden = torch.arange(12.0).view(6, 2)
    inputs = RouterInputs(
        layer=0,
        n_experts=4,
        top_k=2,
        score_function="softmax",
        hidden=hidden,
        starts=torch.tensor([True, False, False, True, False, False]),
    )
    expected = torch.tensor([[0.0, 1], [1, 2], [2, 3], [6, 7], [7, 8], [8, 9]])
    assert_close("means", points_of(inputs, "prompt"), expected, atol=1e-6)
    gap = replace(inputs, positions=torch.tensor([0, 1, 5, 0, 1, 2]))
    assert points_of(gap, "prompt")[2].tolist() == [4.0, 5.0]  # a gap begins anew
    assert points_of(inputs, "token") is hidden


def test_prompt_clusters_find_the_kinds_of_text():
    """NMI of clusters and domains, well above that of shuffled labels."""
    generator = torch.Generator().manual_seed(0)
    domain = torch.arange(4).repeat_interleave(10 * 16)  # ten prompts of 16 tokens each
    hidden = torch.randn(4, 8, generator=generator)[domain]
    hidden = hidden + 2 * torch.randn(len(domain), 8, generator=generator)
    starts = torch.arange(len(domain)) % 16 == 0
    inputs = replace(blob_inputs(hidden), starts=starts)
    router = ROUTERS["kmeans_prompt"](n_clusters=4).fit(inputs)
    last = torch.arange(len(domain)) % 16 == 15
    found = router.responsibilities(inputs).argmax(-1)[last]
    score = normalized_mutual_info_score(domain[last], found)
    order = torch.randperm(40, generator=generator)
    chance = normalized_mutual_info_score(domain[last][order], found)
    assert score > 0.5 > chance + 0.2, (score, chance)
    tokens = ROUTERS["kmeans"](n_clusters=4).fit(inputs).responsibilities(inputs).argmax(-1)
    assert normalized_mutual_info_score(domain, tokens) < score  # single tokens say less


def test_a_linear_teacher_is_recovered_by_linear_routers():
    for n_clusters in (1, 8):
        router = ROUTERS["cluster_linear"](n_clusters=n_clusters, ridge=1e-6).fit(FIT)
        assert agreement(router.route(HELD_OUT), HELD_OUT) > 0.98
    biased = {"score_function": "sigmoid", "biased": True}
    fit = toy_layers(toy_tokens(40, 40, 1), **biased)[1, 0]
    held_out = toy_layers(toy_tokens(20, 40, 2), **biased)[1, 0]
    router = ROUTERS["cluster_linear"](ridge=1e-6).fit(fit)
    assert agreement(router.route(held_out), held_out) > 0.98


def test_several_small_routers_say_what_one_cannot():
    one = ROUTERS["cluster_low_rank"](n_clusters=1, rank=2).fit(FIT).route(HELD_OUT)
    many = ROUTERS["cluster_low_rank"](n_clusters=12, rank=2).fit(FIT).route(HELD_OUT)
    full = ROUTERS["cluster_low_rank"](n_clusters=1, rank=8, ridge=1e-6).fit(FIT).route(HELD_OUT)
    assert agreement(one, HELD_OUT) + 0.03 < agreement(many, HELD_OUT)
    assert agreement(many, HELD_OUT) < agreement(full, HELD_OUT)


def test_reduced_rank_regression_against_its_definition():
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(300, 6, generator=generator).double()
    logits = hidden @ torch.randn(6, 5, generator=generator).double() + 3
    nothing = torch.zeros(6, 5).double()
    (full,), bias = regress(hidden, logits, nothing, 1e-9, None)
    assert_close("full", hidden @ full + bias, logits, atol=1e-5)
    for rank in (1, 2, 3):
        (left, right), bias = regress(hidden, logits, nothing, 1e-9, rank)
        assert (left.shape, right.shape) == ((6, rank), (rank, 5))
        weight = left @ right
        assert int(torch.linalg.matrix_rank(weight, atol=1e-6)) == rank
        centred = logits - logits.mean(0)
        singular = torch.linalg.svdvals(centred)
        error = (hidden @ weight + bias - logits).square().sum()
        assert float(error) == pytest.approx(float(singular[rank:].square().sum()), rel=1e-4)


def test_a_shortlist_of_all_experts_is_the_model():
    everything = ROUTERS["cluster_shortlist"](n_clusters=8, shortlist=8).fit(FIT).route(HELD_OUT)
    assert torch.equal(everything.expert_ids, HELD_OUT.native.expert_ids)
    assert_close("weights", everything.weights, HELD_OUT.native.weights, atol=1e-6)
    found = [
        agreement(
            ROUTERS["cluster_shortlist"](n_clusters=8, shortlist=m).fit(FIT).route(HELD_OUT),
            HELD_OUT,
        )
        for m in (2, 4, 6, 8)
    ]
    assert found == sorted(found) and found[-1] == 1.0 and found[0] < 0.9
    with pytest.raises(RouterError, match="shortlist"):
        ROUTERS["cluster_shortlist"](shortlist=1).fit(FIT)


def test_the_nearest_neighbour_of_a_recorded_token_is_itself():
    router = ROUTERS["nearest_neighbours"](neighbours=1).fit(FIT)
    routing = router.route(FIT)
    # float32 distances cannot tell a few nearly equal tokens apart
    assert_close("scores", routing.scores, FIT.logits.softmax(-1), atol=2e-3)
    eight = ROUTERS["nearest_neighbours"]().fit(FIT).route(HELD_OUT)
    assert agreement(eight, HELD_OUT) > 0.5
    distance = torch.cdist(HELD_OUT.hidden, FIT.hidden).topk(8, largest=False).indices
    mean = FIT.logits.softmax(-1)[distance].mean(1)
    assert_close("mean", eight.scores, mean, atol=1e-5)


def test_selectors_choose_for_tables_too():
    routing = ROUTERS["gmm"](n_components=8, selector=TopP(0.7)).fit(FIT).route(HELD_OUT)
    mask = TopP(0.7).mask(routing.scores)
    assert torch.equal((routing.expert_ids >= 0).sum(-1), mask.sum(-1))
    assert len(mask.sum(-1).unique()) > 1
