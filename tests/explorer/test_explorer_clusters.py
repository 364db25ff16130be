"""Maps: vectors, layout, clusters, quality, cache, and the questions asked of their points."""

import os
from pathlib import Path

import duckdb
import numpy as np
import pyarrow as pa
import pytest
from synthetic import write_run

from explorer import open_run
from explorer.errors import ExplorerError, RunError
from explorer.maps import data as queries
from explorer.maps import map_cache, point_table
from explorer.maps.data import NOISE, Source, point_facts, prepare, read_points
from explorer.maps.make import make_clusters, make_map, project
from explorer.maps.map_cache import MapOptions
from explorer.maps.pca import FEWEST, pca
from explorer.maps.point_clusters import cluster, cluster_domain, trustworthiness
from explorer.maps.point_table import PointTable, Region, inside
from explorer.metrics.specialization import MIN_WHOLE, lift

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
# a hundred epochs of a few hundred points take a tenth of a second
FAST = MapOptions(n_landmarks=300, n_epochs=100)


@pytest.fixture(scope="module")
def known(tmp_path_factory):
    return write_run(tmp_path_factory.mktemp("runs") / "known.duckdb", level="scores")


@pytest.fixture(scope="module")
def run(known):
    with open_run(known.path) as opened:
        yield opened


@pytest.fixture(scope="module")
def blobs():
    random = np.random.default_rng(1)
    centres = 12 * random.normal(size=(5, 20))
    truth = random.integers(0, 5, 600)
    return (centres[truth] + random.normal(size=(600, 20))).astype(np.float32), truth


@pytest.fixture(scope="module")
def laid_out(blobs):
    """Lay the blobs out; the first map of a process takes over five seconds, to compile UMAP."""
    return project(blobs[0], FAST)


@pytest.mark.slow(seconds=5)
def test_separated_groups_stay_together_on_the_map(blobs, laid_out):
    values, truth = blobs
    assert laid_out.shape == (600, 2) and laid_out.dtype == np.float32
    assert trustworthiness(values, laid_out) >= 0.9
    # the nearest other point is of the same group, also for points that were placed
    distance = np.linalg.norm(laid_out[:, None] - laid_out[None], axis=2)
    np.fill_diagonal(distance, np.inf)
    assert (truth[distance.argmin(axis=1)] == truth).mean() > 0.98


@pytest.mark.slow(seconds=5)
def test_the_same_seed_gives_the_same_map_and_another_seed_another(blobs, laid_out):
    assert np.array_equal(project(blobs[0], FAST), laid_out)
    assert not np.array_equal(project(blobs[0], FAST._replace(seed=1)), laid_out)


@pytest.mark.slow(seconds=5)
def test_landmarks_stay_where_umap_put_them(blobs):
    values = blobs[0][:300]
    few = np.sort(np.random.default_rng(0).choice(300, 100, replace=False))
    options = FAST._replace(n_landmarks=100)
    both = project(values, options)
    alone = project(values[few], options)
    assert np.array_equal(both[few], alone)
    # every other point lies among the landmarks
    assert (both.min(0) >= alone.min(0)).all() and (both.max(0) <= alone.max(0)).all()


@pytest.mark.slow(seconds=5)
def test_progress_rises_and_an_error_in_it_ends_the_work(blobs):
    seen = []
    project(blobs[0], FAST, lambda text, part: seen.append((text, part)))
    parts = [part for _, part in seen]
    assert (np.diff(parts) > -1e-9).all() and parts[0] >= 0 and parts[-1] <= 1
    assert {"Finding neighbours", "Laying out", "Placing the other points"} <= {t for t, _ in seen}

    def stop(text, part):
        if text == "Laying out":
            raise InterruptedError

    with pytest.raises(InterruptedError):
        project(blobs[0], FAST, stop)


def test_pca_is_what_a_full_decomposition_says(blobs):
    values = blobs[0]
    centred = values - values.mean(0)
    left, sizes, _ = np.linalg.svd(centred, full_matrices=False)
    for column in range(2):
        expected = left[:, column] * sizes[column]
        found = pca(values)[:, column]
        assert min(abs(found - expected).max(), abs(found + expected).max()) < 1e-2
    assert np.array_equal(pca(values), pca(values))


@pytest.mark.parametrize(
    "shape",
    [
        *((0, 5), (1, 5), (2, 5), (7, 1), (FEWEST - 1, 3)),
        pytest.param((FEWEST, 2), marks=pytest.mark.slow(seconds=5)),
    ],
)
def test_few_points_and_dimensions_have_a_map_too(shape):
    values = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    xy = project(values, FAST)
    assert xy.shape == (shape[0], 2) and np.isfinite(xy).all()
    assert np.isfinite(trustworthiness(values, xy)) == (shape[0] >= 10)


def test_equal_vectors_have_a_map(blobs):
    same = np.repeat(blobs[0][:2], 20, axis=0)
    assert np.isfinite(project(same, FAST)).all()
    assert np.isfinite(pca(same)).all()


@pytest.mark.parametrize("method", ["kmeans", "gmm", "hdbscan"])
def test_clusters_are_the_groups_that_are_there(blobs, method):
    values, truth = blobs
    found = cluster(values, method, n_clusters=5)
    assert found.n_clusters == 5 and found.converged and found.n_fitted == 600
    grouped = found.labels != NOISE
    assert grouped.mean() > 0.9
    for label in range(5):
        assert len(set(truth[found.labels == label])) == 1
    sizes = np.bincount(found.labels[grouped])
    assert (np.diff(sizes) <= 0).all()
    assert np.array_equal(cluster(values, method, n_clusters=5).labels, found.labels)


def test_clusters_are_found_in_all_dimensions_not_on_the_picture():
    """Two groups that the third dimension alone tells apart."""
    random = np.random.default_rng(0)
    values = random.normal(size=(400, 3)).astype(np.float32)
    values[:, :2] *= 2
    values[:200, 2] += 30
    found = cluster(values, "kmeans", n_clusters=2).labels
    assert len(set(found[:200])) == len(set(found[200:])) == 1


def test_points_beyond_the_fitted_ones_join_their_cluster(blobs, monkeypatch):
    from explorer.maps import point_clusters

    few = {"kmeans": 200, "gmm": 200, "hdbscan": 200}
    monkeypatch.setattr(point_clusters, "FITTED", few)
    for method in few:
        found = cluster(blobs[0], method, n_clusters=5)
        assert found.n_fitted == 200 and len(found.labels) == 600
        for label in range(found.n_clusters):
            assert len(set(blobs[1][found.labels == label])) == 1


def test_noise_belongs_to_no_cluster():
    random = np.random.default_rng(0)
    values = np.concatenate([random.normal(size=(300, 2)), random.uniform(-80, 80, (60, 2))])
    found = cluster(values.astype(np.float32), "hdbscan")
    assert (found.labels[:300] == 0).mean() > 0.9
    assert (found.labels[300:] == NOISE).mean() > 0.2
    assert (found.labels[300:] == 0).mean() < 0.1


def test_a_wrong_number_of_clusters_is_one_clear_error(blobs):
    with pytest.raises(ExplorerError, match="2 to 64 clusters, got 1"):
        cluster(blobs[0], "kmeans", n_clusters=1)
    assert cluster(blobs[0][:3], "gmm").n_clusters == 1


def test_nmi_is_one_for_the_same_groups_and_its_floor_keeps_prompts_together():
    groups = np.repeat(np.arange(40), 25)  # forty prompts of 25 tokens
    names = np.array(["a", "b", "c", "d"], dtype=object)
    domains = names[groups % 4]
    same = cluster_domain((groups % 4).astype(np.int32), domains, groups)
    assert same.nmi == pytest.approx(1.0) and same.n == 1000
    # every prompt its own cluster: shuffled prompts agree as well, which shuffled tokens would not
    own = cluster_domain(groups.astype(np.int32), domains, groups)
    assert own.floor == pytest.approx(own.nmi, abs=0.02) and own.floor > 0.4
    # groups that have nothing to do with domains are at the floor
    apart = cluster_domain((groups // 4 % 2).astype(np.int32), domains, groups)
    assert apart.nmi <= apart.floor_high + 0.02 < 0.3


def test_points_without_a_domain_are_left_out_of_the_nmi():
    domains = np.array(["a", "b", "", ""] * 10, dtype=object)
    labels = np.array([0, 1, 1, 0] * 10, np.int32)
    assert cluster_domain(labels, domains, np.arange(40)).nmi == pytest.approx(1.0)
    assert np.isnan(cluster_domain(labels, np.array(["a"] * 40, object), np.arange(40)).nmi)


# ---- vectors


def test_vectors_of_tokens_are_the_recorded_ones(run, known):
    points = read_points(run, Source("tokens", "scores", 1))
    assert points.n_all == len(known.tokens)
    for row, token in enumerate(points.ids[:, 0].tolist()):
        scores = np.array(known.routes[token, 1, 0]["scores"])
        assert np.allclose(points.values[row], scores - scores.mean(), atol=1e-6)
    prompts = {token["token_id"]: token["prompt_id"] for token in known.tokens}
    assert points.groups.tolist() == [prompts[token] for token in points.ids[:, 0].tolist()]


def test_scores_that_no_softmax_reads_are_left_as_they_are(run, known):
    points = read_points(run, Source("tokens", "scores", 3, 1))
    token = int(points.ids[0, 0])
    assert points.values[0].tolist() == known.routes[token, 3, 1]["scores"]


def test_vectors_that_were_not_recorded_are_one_clear_error(run):
    with pytest.raises(RunError, match=r"holds no hidden of layer 1.*--sample-tokens"):
        read_points(run, Source("tokens", "hidden", 1))
    assert queries.vector_counts(run, 1) == {
        "hidden": 0,
        "scores": len(run.query("SELECT DISTINCT token_id FROM scores WHERE layer = 1")),
    }


def test_a_prompt_is_described_by_how_its_tokens_are_spread(run, known):
    points = read_points(run, Source("prompts"))
    units = [(s.layer, s.site, e) for s in run.sites for e in range(s.n_experts)]
    assert points.values.shape == (len(points.ids), len(units))
    for row, prompt in enumerate(points.ids[:, 0].tolist()):
        for site in run.sites:
            mine = [
                expert
                for token, _, expert, _ in known.assignments(site.layer, site.site)
                if token["prompt_id"] == prompt
            ]
            for expert in range(site.n_experts):
                share = mine.count(expert) / max(1, len(mine))
                column = units.index((site.layer, site.site, expert))
                assert points.values[row, column] == pytest.approx(share**0.5, abs=1e-6)


def test_of_a_large_run_every_nth_prompt_is_counted_whole(run, monkeypatch):
    every = queries.signatures(run)
    # 33 tokens choose 5 experts each
    monkeypatch.setattr(queries, "MAX_ASSIGNMENTS", 100)
    some = queries.signatures(run)
    assert some.prompt_ids.tolist() == [0, 2, 4] and some.n_all == every.n_all == 6
    kept = np.isin(every.prompt_ids, some.prompt_ids)
    assert (some.counts == every.counts[kept]).all() and some.counts.sum() > 0


def test_an_expert_is_described_by_where_its_tokens_come_from(run):
    points = read_points(run, Source("experts"))
    assert np.allclose((points.values**2).sum(axis=1), 1, atol=1e-5)
    assert points.n_all == sum(site.n_experts for site in run.sites)
    # an expert that no token chose has no vector, and is not put at the origin
    used = run.query("SELECT DISTINCT layer, site, expert_id FROM assignments ORDER BY ALL")
    assert points.ids.tolist() == used.to_numpy().tolist()


def test_level_stats_says_that_it_has_no_prompts_to_describe(tmp_path):
    write_run(tmp_path / "stats.duckdb", level="stats")
    with (
        open_run(tmp_path / "stats.duckdb") as stats,
        pytest.raises(RunError, match=r"level stats.*--level ids"),
    ):
        read_points(stats, Source("experts"))


def test_facts_come_in_the_order_of_the_points(run, known):
    prepared = prepare(run, Source("tokens", "scores", 1))
    facts = point_facts(run, Source("tokens", "scores", 1), prepared.ids).to_pylist()
    tokens = {token["token_id"]: token for token in known.tokens}
    for row, fact in zip(prepared.ids[:, 0].tolist(), facts, strict=True):
        route = known.routes[row, 1, 0]
        assert fact["token_id"] == row and fact["text"] == tokens[row]["text"]
        assert fact["expert"] == route["experts"][0][0]
        assert fact["entropy"] == pytest.approx(route["entropy"])
    units = prepare(run, Source("experts"))
    rows = point_facts(run, Source("experts"), units.ids).to_pylist()
    assert [[r["layer"], r["site"], r["expert_id"]] for r in rows] == units.ids.tolist()
    loads = run.query("SELECT * FROM expert_load")
    for row in rows:
        here = loads[(loads["layer"] == row["layer"]) & (loads["site"] == row["site"])]
        share = row["assignments"] / here["assignments"].sum()
        assert row["ratio"] == pytest.approx(share * len(here))


def test_the_typical_domain_of_an_expert_is_the_one_it_is_lifted_most_in(run, known):
    facts = queries.expert_facts(run).to_pandas().set_index(["layer", "site", "expert_id"])
    here = known.assignments(1, 0)
    domains = {token["domain"] or "" for token, *_ in here}
    for expert in range(6):
        mine = [token["domain"] or "" for token, _, e, _ in here if e == expert]
        if not mine:
            assert facts["domain"].isna()[1, 0, expert]
            continue
        lifts = {}
        for domain in domains:
            of_domain = [e for token, _, e, _ in here if (token["domain"] or "") == domain]
            lifts[domain] = of_domain.count(expert) / len(of_domain) / (len(mine) / len(here))
        row = facts.loc[(1, 0, expert)]
        assert row["lift"] == pytest.approx(max(lifts.values()))
        assert lifts[row["domain"]] == pytest.approx(max(lifts.values()))


def test_counts_per_prompt_and_expert(run, known):
    chosen = np.array([0, 3, 9])
    found = queries.expert_counts(run, 1, ids=chosen)
    expected = {}
    for token, _, expert, _ in known.assignments(1, 0):
        if token["token_id"] in chosen:
            key = token["prompt_id"], expert
            expected[key] = expected.get(key, 0) + 1
    assert {(r.prompt_id, r.expert_id): r.assignments for r in found.itertuples()} == expected
    by_prompt = queries.expert_counts(run, 1, ids=np.array([4]), of="prompts")
    everyone = [t for t, *_ in known.assignments(1, 0) if t["prompt_id"] == 4]
    assert by_prompt["assignments"].sum() == len(everyone)
    law = queries.expert_counts(run, 1, domain="law", feature="scores")["assignments"].sum()
    assert law == len(known.assignments(1, 0, domain="law"))


# ---- cache


def test_a_name_in_the_cache_is_of_content_and_of_every_option(run, blobs):
    first = read_points(run, Source("tokens", "scores", 1))
    assert read_points(run, Source("tokens", "scores", 1)).digest == first.digest
    changed = first.values.copy()
    changed[0, 0] += 1
    others = [
        first._replace(values=changed).digest,
        first._replace(ids=first.ids + 1).digest,
        first._replace(values=first.values.reshape(-1, 2)).digest,
        read_points(run, Source("tokens", "scores", 3)).digest,
    ]
    assert len({first.digest, *others}) == 5
    paths = [map_cache.map_path(first.digest, MapOptions())]
    for field, value in (("n_neighbors", 5), ("min_dist", 0.5), ("seed", 1), ("n_epochs", 9)):
        paths.append(map_cache.map_path(first.digest, MapOptions()._replace(**{field: value})))
    for how in (("kmeans", 6, 0), ("kmeans", 12, 0), ("gmm", 12, 0), ("kmeans", 12, 1)):
        paths.append(map_cache.clusters_path(first.digest, *how))
    paths.append(map_cache.router_path(first.digest, "run", "top_k", 0))
    paths.append(map_cache.router_path(first.digest, "other run", "top_k", 0))
    assert len(set(paths)) == len(paths)
    # HDBSCAN is not asked how many
    assert map_cache.clusters_path("d", "hdbscan", 6, 0) == map_cache.clusters_path(
        "d", "hdbscan", 12, 0
    )


def test_a_name_in_the_cache_changes_with_the_libraries(monkeypatch):
    before = map_cache.map_path("d", MapOptions())
    monkeypatch.setattr(map_cache, "versions", lambda: {"umap-learn": "9"})
    assert map_cache.map_path("d", MapOptions()) != before


def test_the_cache_gives_back_what_was_written_and_nothing_else(tmp_path, monkeypatch):
    monkeypatch.setattr(map_cache, "KEPT_FILES", 2)
    column = np.arange(5, dtype=np.float32)
    for name in "abc":
        path = map_cache.write(tmp_path / f"map-{name}.parquet", {"x": column}, {"n": name})
    assert sorted(file.name for file in tmp_path.iterdir()) == ["map-b.parquet", "map-c.parquet"]
    kept = map_cache.read(path, 5)
    assert kept.facts == {"n": "c"} and np.array_equal(kept.columns["x"], column)
    assert map_cache.read(path, 6) is None and map_cache.read(tmp_path / "map-a.parquet", 5) is None
    path.write_bytes(b"no map")
    assert map_cache.read(path, 5) is None


@pytest.mark.slow(seconds=5)
def test_the_worker_makes_a_map_and_clusters_beside_nothing(run, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    before = run.path.read_bytes(), sorted(run.path.parent.iterdir())
    source = Source("tokens", "scores", 1)
    prepared = prepare(run, source)
    seen = []
    path = map_cache.map_path(prepared.digest, FAST)
    make_map(str(run.path), source, path, FAST, lambda text, part: seen.append(text))
    kept = map_cache.read(path, len(prepared.ids))
    assert set(kept.columns) == {"x", "y"} and 0 <= kept.facts["trustworthiness"] <= 1
    out = map_cache.clusters_path(prepared.digest, "kmeans", 3, 0)
    make_clusters(str(run.path), source, out, "kmeans", 3, 0, lambda *_: None)
    grouped = map_cache.read(out, len(prepared.ids))
    assert (
        set(grouped.columns["cluster"]) == {0, 1, 2} and 0 <= grouped.facts["domains"]["nmi"] <= 1
    )
    assert (run.path.read_bytes(), sorted(run.path.parent.iterdir())) == before
    assert Path(os.environ["XDG_CACHE_HOME"]) in path.parents
    with pytest.raises(RunError, match="changed since"):
        make_map(str(run.path), source, tmp_path / "map-of-others", FAST, lambda *_: None)


# ---- regions and points


def crossings(x, y, corners):
    """Whether a point is inside, one crossing at a time, by exact fractions."""
    from fractions import Fraction

    odd = False
    for (ax, ay), (bx, by) in zip(corners, corners[1:] + corners[:1], strict=True):
        ax, ay, bx, by, px, py = map(Fraction, (ax, ay, bx, by, x, y))
        if (ay > py) != (by > py) and px < (bx - ax) * (py - ay) / (by - ay) + ax:
            odd = not odd
    return odd


@pytest.mark.parametrize("seed", range(4))
def test_points_inside_a_line_are_those_of_the_even_odd_rule(seed):
    random = np.random.default_rng(seed)
    corners = [tuple(corner) for corner in random.integers(-8, 9, (9, 2)).tolist()]
    points = random.uniform(-9, 9, (400, 2))
    region = Region(*map(tuple, zip(*corners, strict=True)))
    found = inside(points[:, 0], points[:, 1], region)
    assert found.tolist() == [crossings(x, y, corners) for x, y in points.tolist()]
    assert 0 < found.sum() < 400


def test_a_line_that_crosses_itself_has_a_hole():
    star = [(np.sin(a), np.cos(a)) for a in np.arange(5) * 4 * np.pi / 5]
    region = Region(*map(tuple, zip(*star, strict=True)))
    assert inside([0.0, 0.0], [0.0, 0.7], region).tolist() == [False, True]


def test_a_region_survives_an_address_and_nothing_else_does():
    box = Region((-1.5, 2.0), (3.25, -4.0))
    assert point_table.read_region(point_table.write_region(box)) == box and box.is_box
    assert inside([0, 0, 5], [0, 4, 0], box).tolist() == [True, False, False]
    for text in ("", "1_2", "1_2~3", "a_b~c_d", "1e9_2~3_4", "nan_1~2_3", "1_1~" * 90 + "1_1"):
        assert point_table.read_region(text) is None


def test_what_a_figure_reports_becomes_a_region_of_few_corners():
    angle = np.linspace(0, 2 * np.pi, 500).tolist()
    lasso = {"x": np.cos(angle).tolist(), "y": np.sin(angle).tolist()}
    region = point_table.drawn_region({"points": [], "box": [], "lasso": [lasso]})
    assert 3 < len(region.x) <= point_table.MAX_CORNERS
    assert inside([0.9, 1.01], [0.0, 0.0], region).tolist() == [True, False]
    assert point_table.drawn_region({"box": [{"x": [1, 0], "y": [0, 2]}], "lasso": []}).bounds == (
        0,
        1,
        0,
        2,
    )
    for nothing in ({}, {"box": [], "lasso": []}, {"box": [{"x": ["a", 1], "y": [0, 1]}]}):
        assert point_table.drawn_region(nothing) is None


@pytest.fixture
def points():
    random = np.random.default_rng(3)
    return pa.table(
        {
            "x": random.normal(size=2000).astype(np.float32),
            "y": 2 * random.normal(size=2000).astype(np.float32),
            "shown": random.random(2000) < 0.7,
            "entropy": pa.array(random.random(2000), mask=random.random(2000) < 0.1),
            "domain": random.choice(["a", "b", ""], 2000),
        }
    )


def test_density_counts_the_shown_points_of_each_bin(points):
    table = PointTable(points)
    frame = points.to_pandas()
    shown = frame[frame["shown"]]
    assert (table.n_points, table.n_shown) == (2000, len(shown))
    found = table.density(40)
    assert found.counts.sum() == len(shown) and max(found.counts.shape) == 40
    row, column = np.unravel_index(found.counts.argmax(), found.counts.shape)
    x = found.x0 + column * found.dx + np.array([-0.5, 0.5]) * found.dx
    y = found.y0 + row * found.dy + np.array([-0.5, 0.5]) * found.dy
    here = shown[shown["x"].between(*x) & shown["y"].between(*y)]
    assert len(here) == found.counts.max()
    mean = table.density(40, mean="entropy").values
    assert mean[row, column] == pytest.approx(here["entropy"].mean())
    assert (np.isnan(mean) >= (found.counts == 0)).all()
    share = table.density(40, share=("domain", "a")).values
    assert share[row, column] == pytest.approx((here["domain"] == "a").mean())


def test_a_selection_takes_the_shown_points_inside_alone(points):
    table, frame = PointTable(points), points.to_pandas()
    box = Region((-0.5, 0.7), (1.0, -1.0))
    expected = frame["shown"] & frame["x"].between(-0.5, 0.7) & frame["y"].between(-1, 1)
    assert table.select(box).tolist() == np.flatnonzero(expected).tolist()
    line = Region((0.0, 2.0, 0.0, -1.0), (3.0, 0.0, -2.0, 0.5))
    within = inside(frame["x"], frame["y"], line) & frame["shown"]
    assert table.select(line).tolist() == np.flatnonzero(within).tolist()
    rows = table.rows("domain, x", table.select(line))
    assert rows["domain"].tolist() == frame.loc[within, "domain"].tolist()
    assert len(table.rows("x")) == 2000
    counted = table.values("domain").set_index("value")
    assert counted.loc["b", "n"] == (frame["domain"] == "b").sum()
    assert counted.loc["b", "shown"] == ((frame["domain"] == "b") & frame["shown"]).sum()


def test_points_cannot_be_written_to_by_a_name():
    table = PointTable(pa.table({"x": [0.0], "y": [0.0], "shown": [True], "domain": ["'; DROP"]}))
    assert (
        table.density(4, share=("domain", "'; DROP")).values.max(
            initial=0, where=table.density(4).counts > 0
        )
        == 1
    )
    with pytest.raises(duckdb.Error):
        table.rows("no_such_column")


# ---- lift


def test_lift_is_share_here_over_share_in_all():
    part = np.array([[8, 2, 0], [8, 2, 0]])
    found = lift(part, [40, 40, 20])
    assert found.lift.tolist() == pytest.approx([2.0, 0.5, 0.0])
    assert found.part.tolist() == [16, 4, 0]
    # equal prompts: drawing them anew changes nothing
    assert found.low.tolist() == found.high.tolist() == pytest.approx(found.lift.tolist())


def test_lift_is_unsure_where_prompts_differ_and_unknown_where_counts_are_few():
    part = np.array([[20, 0], [0, 20]] * 3)
    found = lift(part, [500, 500])
    assert found.lift.tolist() == pytest.approx([1, 1])
    assert found.low[0] < 0.8 and found.high[0] > 1.2
    few = lift([[5, 5]], [MIN_WHOLE - 1, 500])
    assert np.isnan(few.lift[0]) and few.lift[1] > 0
    assert np.isnan(lift(np.zeros((0, 2)), [500, 500]).lift).all()
