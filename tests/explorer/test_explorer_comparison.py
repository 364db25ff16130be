"""Names of routers, files of comparisons, and the command line, without running a model."""

import json
import math
import subprocess
import sys
from pathlib import Path

import duckdb
import numpy as np
import pytest
import router_checks
import tiny_models
from synthetic import write_run

import capture
from capture.model.flops import model_flops
from capture.model.sites import find_sites
from explorer import open_comparison, open_run
from explorer.__main__ import main
from explorer.comparison.cost import Usage, cost_of
from explorer.comparison.replay import recorded_split
from explorer.comparison.results_file import (
    FORMAT_VERSION,
    SUFFIX,
    TABLES,
    comparisons_of,
    empty_rows,
    write_comparison,
)
from explorer.comparison.session import SENSIBLE
from explorer.comparison.verdicts import against_controls, paired
from explorer.errors import ComparisonError, RouterError, UnknownNameError
from explorer.router_cards import parse_router, split_routers
from explorer.routers import ROUTERS, TopP, fit_layers
from explorer.routers.by_name import arguments_of, load_router_file, make_router, takes_seed

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
MY_ROUTER = '''
"""The heaviest expert of the token before, and the token's own."""
from dataclasses import replace
from explorer.routers import ROUTERS
from explorer.routers.native import TopKRouter

@ROUTERS.add("{name}")
class MyRouter(TopKRouter):
    info = replace(TopKRouter.info, name="{name}", title="Mine", family="gating")

    def __init__(self, *, k: int = {k}) -> None:
        super().__init__(k=k)
'''


@pytest.mark.parametrize(
    ("text", "label", "options"),
    [
        ("top_k", "top_k", {}),
        (" top_k( k = 1 ) ", "top_k(k=1)", {"k": 1}),
        ("kmeans(soft=True, n_clusters=4)", "kmeans(n_clusters=4, soft=True)", None),
        ("random(choose='best')", "random(choose='best')", {"choose": "best"}),
        ("base(window=-1)", "base(window=-1)", {"window": -1}),
    ],
)
def test_a_router_is_read_with_its_arguments(text, label, options):
    spec = parse_router(text)
    assert spec.label == label and parse_router(spec.label) == spec
    if options is not None:
        assert spec.options == options


def test_a_selector_may_be_an_argument():
    spec = parse_router("top_k(selector=TopP(p=0.3))")
    assert spec.label == "top_k(selector=TopP(p=0.3))"
    assert make_router(spec).selector == TopP(0.3)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("top_k(1)", "every argument with its name"),
        ("top_k(k=", "Expected a router"),
        ("top_k(k=[1])", "Expected a number"),
        ("top_k(k=__import__('os').getpid())", "Expected a router"),
        ("top_k(selector=open(file='x'))", "one of the selectors"),
        ("a.b(k=1)", "Expected a router"),
        ("", "Expected a router"),
    ],
)
def test_what_is_no_router_is_refused_and_nothing_is_run(text, message):
    with pytest.raises(RouterError, match=message):
        parse_router(text)


def test_a_router_is_made_or_refused_with_what_it_takes():
    assert make_router(parse_router("kmeans(n_clusters=5)"), seed=3).seed == 3
    assert make_router(parse_router("kmeans(seed=1)"), seed=3).seed == 1
    # arguments that a class hands on are its own too
    assert arguments_of(ROUTERS["cosine"])["steps"] == 400
    assert make_router(parse_router("cosine(steps=7, width=4)")).steps == 7
    with pytest.raises(RouterError, match=r"takes no argument 'kk'.*k, selector"):
        make_router(parse_router("top_k(kk=1)"))
    with pytest.raises(UnknownNameError, match="Did you mean"):
        make_router(parse_router("top_kk"))
    assert takes_seed(parse_router("kmeans")) and not takes_seed(parse_router("kmeans(seed=0)"))
    assert not takes_seed(parse_router("top_k"))


def test_routers_are_divided_outside_brackets():
    text = "a, top_k(k=1), kmeans(n_clusters=2, soft=True),"
    assert split_routers(text) == ["a", "top_k(k=1)", "kmeans(n_clusters=2, soft=True)"]


@pytest.fixture
def router_file(tmp_path):
    path = tmp_path / "my_router.py"
    path.write_text(MY_ROUTER.format(name="mine_for_tests", k=1), encoding="utf-8")
    yield path
    ROUTERS.discard("mine_for_tests")


def test_a_router_of_ones_own_file_joins_and_passes_the_conformance_suite(router_file):
    assert load_router_file(router_file) == ["mine_for_tests"]
    for check in router_checks.CHECKS:
        check(ROUTERS["mine_for_tests"])
    assert load_router_file(router_file) == ["mine_for_tests"]  # again: nothing twice
    router_file.write_text(MY_ROUTER.format(name="mine_for_tests", k=3), encoding="utf-8")
    load_router_file(router_file)
    assert ROUTERS["mine_for_tests"]().k == 3


def test_a_file_without_a_router_is_refused(tmp_path):
    path = tmp_path / "empty.py"
    with pytest.raises(RouterError, match="there is none"):
        load_router_file(path)
    path.write_text("x = 1\n", encoding="utf-8")
    with pytest.raises(RouterError, match="adds no router"):
        load_router_file(path)
    path.write_text("1 / 0\n", encoding="utf-8")
    with pytest.raises(RouterError, match="ZeroDivisionError"):
        load_router_file(path)


def some_rows():
    rows = empty_rows()
    rows["comparison"] = [
        {"format_version": FORMAT_VERSION, "run_name": "r", "settings": '{"a": 1}',
         "packages": "{}", "complete": True}
    ]  # fmt: skip
    unit = {"router": "top_k(k=1)", "seed": None, "mode": "live"}
    rows["results"] = [
        {**unit, "layer": None, "loss_change": 0.5, "causal": True},
        {**unit, "layer": 3, "causal": False},
    ]
    rows["choices"] = [{**unit, "text_id": 0, "position": 1, "layer": 0, "site": 0,
                        "expert_ids": [5, 2], "weights": [0.75, 0.25]}]  # fmt: skip
    return rows


def test_a_file_comes_back_as_it_was_written(tmp_path):
    path = tmp_path / "r.0123abcd.comparison"
    write_comparison(path, some_rows())
    with open_comparison(path) as comparison:
        assert comparison.info["settings"] == {"a": 1} and comparison.info["complete"]
        table = comparison.table
        assert table["layer"].isna().tolist() == [True, False] and table["layer"][1] == 3
        assert table["loss_change"][0] == 0.5 and table["seed"].isna().all()
        assert list(table.columns) == list(TABLES["results"])
        # what somebody does with a table is his own
        mine = comparison.table
        mine["more"] = 1
        mine.loc[0, "loss_change"] = 9.0
        assert comparison.table["loss_change"][0] == 0.5 and "more" not in comparison.table
        chosen = comparison.query("SELECT expert_ids FROM choices WHERE router = ?", ["top_k(k=1)"])
        assert list(chosen["expert_ids"][0]) == [5, 2]
        with pytest.raises(ComparisonError, match="disabled"):
            comparison.query("SELECT * FROM read_text('/etc/hostname')")
        with pytest.raises(ComparisonError, match="Expected one of"):
            comparison.rows("secrets")
        again = comparison.records()
    other = tmp_path / "r.9999abcd.comparison"
    write_comparison(other, again)
    assert open_comparison(other).table.equals(table)
    assert set(comparisons_of(tmp_path / "r.duckdb")) == {path, other}
    assert comparisons_of(tmp_path / "r2.duckdb") == []
    with duckdb.connect(str(path), read_only=True) as plain:
        assert plain.sql("SELECT count(*) FROM results").fetchall() == [(2,)]


def test_files_of_older_formats_are_read(tmp_path):
    path = tmp_path / "r.0123abcd.comparison"
    write_comparison(path, some_rows())
    with duckdb.connect(str(path)) as connection:
        for column in ("hit_rate", "draft_experts"):
            connection.execute(f"ALTER TABLE results DROP {column}")
            connection.execute(f"ALTER TABLE conditions DROP {column}")
        connection.execute("ALTER TABLE conditions DROP max_violation")
        connection.execute("UPDATE comparison SET format_version = 5")
    with open_comparison(path) as comparison:
        assert comparison.table["hit_rate"].isna().all()
    with duckdb.connect(str(path)) as connection:
        for column in ("loss_margin", "loss_se_domain"):
            connection.execute(f"ALTER TABLE results DROP {column}")
        for column in ("head_flops_share", "expert_flops_share"):
            connection.execute(f"ALTER TABLE comparison DROP {column}")
        connection.execute("UPDATE comparison SET format_version = 4")
    with open_comparison(path) as comparison:
        assert comparison.table["loss_margin"].isna().all()
    with duckdb.connect(str(path)) as connection:
        connection.execute("ALTER TABLE texts DROP mode")
        connection.execute("UPDATE comparison SET format_version = 3")
    with open_comparison(path) as comparison:
        assert list(comparison.rows("texts").columns) == list(TABLES["texts"])
    with duckdb.connect(str(path)) as connection:
        connection.execute("UPDATE comparison SET format_version = 4")
        connection.execute("DROP TABLE spanning")
        connection.execute("DROP TABLE gate_values")
    with pytest.raises(ComparisonError, match="another format"):
        open_comparison(path)
    with duckdb.connect(str(path)) as connection:
        connection.execute("UPDATE comparison SET format_version = 2")
        # not ours in this format, so not read
        connection.execute("CREATE TABLE spanning AS SELECT 1 AS strange")
    with open_comparison(path) as comparison:
        assert comparison.rows("spanning").empty and comparison.table["loss_change"][0] == 0.5
    with duckdb.connect(str(path)) as connection:
        connection.execute("ALTER TABLE results DROP spanning_rate")
        connection.execute("DROP TABLE oracle")
    with pytest.raises(ComparisonError, match="another format"):
        open_comparison(path)
    with duckdb.connect(str(path)) as connection:
        connection.execute("UPDATE comparison SET format_version = 1")
    with open_comparison(path) as comparison:
        table = comparison.table
        assert list(table.columns) == list(TABLES["results"])
        assert table["spanning_rate"].isna().all() and table["loss_change"][0] == 0.5
        assert comparison.rows("oracle").empty


def test_what_is_no_comparison_is_refused(tmp_path):
    path = tmp_path / "r.0123abcd.comparison"
    with pytest.raises(ComparisonError, match="there is none"):
        open_comparison(path)
    path.write_bytes(b"no database at all")
    with pytest.raises(ComparisonError, match="no comparison file"):
        open_comparison(path)
    write_comparison(path, some_rows())
    with duckdb.connect(str(path)) as connection:
        connection.execute("ALTER TABLE results RENAME TO kept")
        connection.execute("CREATE VIEW results AS SELECT * FROM kept")
    with pytest.raises(ComparisonError, match="other tables"):
        open_comparison(path)
    rows = some_rows()
    rows["results"][0]["loss_chanje"] = 1
    with pytest.raises(ComparisonError, match="no column loss_chanje"):
        write_comparison(path, rows)


def test_the_list_of_routers_says_what_the_cards_say(capsys):
    assert main(["routers", "--json"]) == 0
    cards = {card["name"]: card for card in json.loads(capsys.readouterr().out)}
    assert set(cards) == set(ROUTERS)
    assert not cards["expert_choice"]["causal_declared"]
    assert (
        cards["kmeans"]["fits"] == "statistics" and "n_clusters=128" in cards["kmeans"]["arguments"]
    )
    # rules that did not work are no part of what is offered or compared by default
    shelved = {name for name, card in cards.items() if card["shelved"]}
    assert shelved == {"layer_gate", "attention_given", "q_multistep"}
    assert not shelved & {parse_router(text).name for text in SENSIBLE}
    assert main(["routers"]) == 0
    listed, kept = capsys.readouterr().out.split("kept for the record:")
    assert not shelved & {line.split()[0] for line in listed.splitlines() if line.strip()}
    assert all(f"{name}: " in kept for name in shelved)
    assert main(["routers", "--family", "clustering"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split()[:3] == ["name", "family", "part"]
    assert all("clustering" in line for line in lines[1:]) and len(lines) > 5


def rows_of_texts(losses, tokens=(10, 30)):
    """Return rows of a comparison whose routers have these losses, [seed][text]."""
    rows = some_rows()
    rows["sequences"] = [
        {"router": router, "seed": None if len(seeds) == 1 else seed, "mode": "live",
         "layer": None, "sequence": n, "tokens": tokens[n], "loss": loss}
        for router, seeds in losses.items()
        for seed, texts in enumerate(seeds)
        for n, loss in enumerate(texts)
    ]  # fmt: skip
    return rows


def test_a_reader_that_has_seen_enough_is_no_error(tmp_path):
    path = write_run(tmp_path / "known.duckdb").path
    # a command that loads no model
    command = [sys.executable, "-m", "explorer", "findings", str(path)]
    root = Path(__file__).parents[2]
    with subprocess.Popen(command, cwd=root, stdout=-1, stderr=-1) as process:
        process.stdout.close()
        assert process.stderr.read() == b"" and process.wait() == 0


def test_routers_are_paired_by_text(tmp_path):
    path = tmp_path / f"r.key{SUFFIX}"
    learned, chance = [[1.0, 2.0], [1.2, 2.4]], [[2.0, 2.0]]
    rows = rows_of_texts({"learned": learned, "random for learned": chance, "same": chance})
    rows["results"] = [
        {"router": "random for learned", "mode": "live", "control": "equal_compute",
         "control_of": "learned"},
        {"router": "learned", "mode": "live"},
    ]  # fmt: skip
    write_comparison(path, rows)
    with open_comparison(path) as comparison:
        found = paired(comparison, "learned", "random for learned")
        # means over seeds 1.1 and 2.2: differences -0.9 and +0.2, of 10 and 30 tokens
        change = (-0.9 * 10 + 0.2 * 30) / 40
        assert found.difference == pytest.approx(change)
        # of two texts: (p^2 + q^2) (a - b)^2 / 2, the variance of p a + q b by an unbiased one
        assert found.standard_error == pytest.approx(((0.25**2 + 0.75**2) * 1.1**2 / 2) ** 0.5)
        assert found.texts == 2
        # losses of the seeds: 70 / 40 and 84 / 40
        assert found.spread == pytest.approx((84 - 70) / 40 / 2**0.5) and found.seeds == 2
        assert found.verdict == "not told apart"
        same = paired(comparison, "same", "random for learned")
        assert (same.difference, same.standard_error, same.seeds) == (0, 0, 1)
        assert same.verdict == "not told apart" and math.isnan(same.spread)
        assert paired(comparison, "random for learned", "learned").difference == -found.difference
        table = against_controls(comparison)
        assert table[["router", "other", "control"]].to_numpy().tolist() == [
            ["learned", "random for learned", "equal_compute"]
        ]
        with pytest.raises(ComparisonError, match="Expected a router with a live row, got 'x'"):
            paired(comparison, "x", "learned")


@pytest.mark.parametrize(("sign", "verdict"), [(-1, "better"), (1, "worse")])
def test_a_difference_beyond_two_standard_errors_is_told(tmp_path, sign, verdict):
    path = tmp_path / f"r.key{SUFFIX}"
    losses = {"a": [[3 + sign, 3 + sign * 1.1]], "b": [[3.0, 3.0]]}
    write_comparison(path, rows_of_texts(losses))
    with open_comparison(path) as comparison:
        assert paired(comparison, "a", "b").verdict == verdict


def test_closed_heads_save_what_a_model_without_them_saves():
    """One in four of those that share their keys and values."""
    costs = {}
    for heads, open_share in ((4, 0.75), (3, 1.0)):
        model = tiny_models.build(
            "qwen3_moe", num_attention_heads=heads, num_key_value_heads=1, head_dim=8
        )
        sites = find_sites(model)
        keys = [(site.info.layer, site.info.site) for site in sites]
        used = Usage(
            keys=20.0,
            experts=dict.fromkeys(keys, 2.0),
            load=dict.fromkeys(keys, np.full(sites[0].info.n_experts, 0.25)),
            heads=dict.fromkeys(range(3), open_share),
        )
        costs[heads] = cost_of(model_flops(model, sites), used, itemsize=4)
    assert tuple(costs[4]) == pytest.approx(tuple(costs[3]))


def test_the_command_line_replays_and_prints_rows(tmp_path, capsys):
    model = tiny_models.build("mixtral")
    run = tmp_path / "tiny.duckdb"
    prompts = [
        {"ids": [*range(start, end)], "domain": domain}
        for start, end, domain in ((3, 20, "a"), (20, 44, "a"), (5, 40, "b"), (8, 30, "b"))
    ]
    capture.record(model, prompts, run, sample_tokens=500, progress=False)
    asked = [
        "compare",
        str(run),
        "--routers",
        "top_k(k=1), native, kmeans(n_clusters=2)",
        "--quiet",
    ]
    assert main([*asked, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    whole = {row["router"]: row for row in found["rows"] if row["layer"] is None}
    assert whole["native"]["agreement"] == 1 and whole["native"]["mode"] == "replay"
    assert whole["top_k(k=1)"]["experts_per_token"] == 1
    assert whole["top_k(k=1)"]["agreement"] == pytest.approx(1 / 3)
    router = make_router(parse_router("kmeans(n_clusters=2)"), seed=0)
    with open_run(run) as opened:
        split = recorded_split(opened, seed=0)
        fitted = fit_layers(router, split.fit)
        spanning = [fitted[at].spanning_rate(inputs) for at, inputs in split.held_out.items()]
        routed = {
            at: (inputs.decision().expert_ids.numpy(), fitted[at].route(inputs).expert_ids.numpy())
            for at, inputs in split.held_out.items()
        }
    by_domain = {r["domain"]: r for r in found["domains"] if r["router"] == "kmeans(n_clusters=2)"}
    assert set(by_domain) == {"a", "b"} and by_domain["a"]["mode"] == "replay"
    for domain, row in by_domain.items():
        shares = []
        for at, sides in routed.items():
            of_domain = zip(split.tokens[at]["domain"], *sides, strict=True)
            shares.append([len({*x} & {*y}) / len(x) for one, x, y in of_domain if one == domain])
        assert row["agreement"] == pytest.approx(sum(map(sum, shares)) / sum(map(len, shares)))
        assert row["tokens"] == len(shares[0]) and row["loss_change"] is None
    clusters = [row for row in found["rows"] if row["router"] == "kmeans(n_clusters=2)"]
    assert [row["spanning_rate"] for row in clusters[:-1]] == pytest.approx(spanning)
    assert clusters[-1]["spanning_rate"] == pytest.approx(sum(spanning) / len(spanning))
    assert 0 < sum(spanning) < len(spanning) and whole["native"]["spanning_rate"] is None
    with open_comparison(found["file"]) as comparison:
        texts = comparison.rows("texts")
        assert set(texts["mode"]) == {"replay"} and set(texts["domain"]) == {"a", "b"}
        stored = comparison.rows("choices").query("router == 'kmeans(n_clusters=2)'")
        assert set(comparison.rows("choices")["router"]) == {*whole}
    assert len(stored) == sum(len(tokens) for tokens in split.tokens.values())
    prompt_of = {}
    with open_run(run) as opened:
        prompts = opened.query("SELECT prompt_id, list(token ORDER BY position) AS ids FROM tokens "
                               "GROUP BY prompt_id")  # fmt: skip
    for text_id, one in texts.groupby("text_id"):
        same = [ids.tolist() == one["token"].tolist() for ids in prompts["ids"]]
        prompt_of[text_id] = int(prompts["prompt_id"][same.index(True)])
    for (layer, site), rows in stored.groupby(["layer", "site"]):
        tokens, (_, chosen) = split.tokens[layer, site], routed[layer, site]
        at = tokens.reset_index().set_index(["prompt_id", "position"])["index"]
        for row in rows.itertuples():
            here = chosen[at[prompt_of[row.text_id], row.position]]
            assert row.expert_ids.tolist() == here[here >= 0].tolist()
    needed = "router family mode layer loss_change loss_se experts_per_token flops_ratio"
    needed += " latency_ratio agreement max_violation causal simulated"
    assert set(needed.split()) <= set(found["rows"][0])
    assert Path(found["file"]).parent == tmp_path
    assert main(asked) == 0
    text = capsys.readouterr().out
    assert "top_k(k=1)" in text and found["file"] in text
    assert main(["compare", str(run), "--routers", "nothing", "--quiet"]) == 2
    assert "No router is named" in capsys.readouterr().err
    assert main(["compare", str(run), "--routers", "layer_gate", "--quiet"]) == 2
    assert "--live" in capsys.readouterr().err
    assert main(["compare", str(run), "--routers", "native", "--seeds", "x", "--quiet"]) == 2
    assert "--seeds" in capsys.readouterr().err
