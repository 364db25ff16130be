"""Traces of counts: every format against the counts it was made from, windows of time included."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from published_counts import COUNTS, N_TOKENS
from safetensors.numpy import save_file

from capture.__main__ import main
from capture.errors import StoreError, TraceError
from capture.store import check_run, counts_only
from capture.traces import import_routing
from explorer.run import open_run

pytestmark = pytest.mark.slow

LAYERS, EXPERTS, TOP_K = 4, 6, 2


@pytest.fixture
def counts():
    """Counts [steps, L, E]; layer 0 is dense."""
    found = np.random.default_rng(0).integers(0, 50, (3, LAYERS, EXPERTS))
    found[:, 0] = 0
    return found


@pytest.fixture
def out(tmp_path):
    return tmp_path / "run.duckdb"


def stored(path):
    """Read loads [L - 1, E] and windows {step: [L - 1, E]} with plain DuckDB."""
    check_run(path)
    with duckdb.connect(str(path), read_only=True) as connection:
        load = connection.sql(
            "SELECT list(assignments ORDER BY expert_id) FROM expert_load GROUP BY layer"
            " ORDER BY layer"
        ).fetchall()
        windows = connection.sql(
            "SELECT step, layer, list(assignments ORDER BY expert_id) FROM load_windows"
            " GROUP BY ALL ORDER BY step, layer"
        ).fetchall()
    by_step = {}
    for step, _, one in windows:
        by_step.setdefault(step, []).append(one)
    return [row[0] for row in load], by_step


def check(path, counts, steps=None):
    load, windows = stored(path)
    assert load == counts.sum(0)[1:].tolist()
    assert windows == {
        step: one[1:].tolist() for step, one in zip(steps or (), counts, strict=bool(steps))
    }
    with open_run(path) as run:
        assert run.layers == [1, 2, 3] and run.sites[0].n_experts == EXPERTS
        assert not run.records_ids and run.domains == run.phases == []
        assert run.info["level"] == "counts"


def rows(counts, **more):
    step, layer, expert = (index.ravel() for index in np.indices(counts.shape))
    found = {"iteration": step, "layer": layer, "expert": expert, "count": counts.ravel(), **more}
    order = np.random.default_rng(1).permutation(len(step))
    return pa.table({name: np.asarray(values)[order] for name, values in found.items()})


@pytest.mark.parametrize("kind", ["csv", "parquet", "jsonl"])
def test_a_table_of_counts(tmp_path, out, counts, kind):
    source, table = tmp_path / f"counts.{kind}", rows(counts)
    if kind == "parquet":
        pq.write_table(table, source)
    elif kind == "csv":
        table.to_pandas().to_csv(source, index=False)
    else:
        table.to_pandas().to_json(source, orient="records", lines=True)
    made = import_routing(source, out, top_k=TOP_K)
    check(out, counts, [0, 1, 2])
    assert (made.rows, made.windows, made.tokens) == (counts.sum(), 3, 0)
    assert "3 windows of time" in str(made)


def test_published_counts_have_the_same_sum_in_every_layer(tmp_path, out):
    """OLMoE's tables: 208,896 tokens a domain, 8 experts each; the rows of a layer prove it."""
    table = {}
    for (model, domain, layer), counts in COUNTS.items():
        if model == "olmoe":
            table.setdefault(domain, {})[layer] = counts
    source = tmp_path / "olmoe.json"
    source.write_text(json.dumps(table))
    import_routing(source, out, top_k=8)
    with open_run(out) as run:
        sums = run.query(
            "SELECT domain, layer, sum(assignments)::BIGINT AS n FROM expert_load_by GROUP BY ALL"
        )
        assert sums["n"].value_counts().to_dict() == {N_TOKENS * 8: 4, 0: 2}  # github: layer 7
        assert run.domains == ["c4", "github"] and run.info["n_tokens"] == 2 * N_TOKENS


def test_sglang_expert_location(tmp_path, out, counts):
    source = tmp_path / "location.json"
    source.write_text(json.dumps({"logical_count": counts[0].tolist()}, indent=1))
    import_routing(source, out, top_k=TOP_K)
    check(out, counts[:1])
    source.write_text(json.dumps({"physical_to_logical_map": [[0, 1]]}))
    with pytest.raises(TraceError, match="is a placement of experts, which holds no counts"):
        import_routing(source, tmp_path / "other.duckdb", top_k=TOP_K)


def recorded(counts, **more):
    return {"rank": 0, "logical_count": torch.tensor(counts, dtype=torch.int32), **more}


def test_a_ring_of_the_recorder(tmp_path, out, counts):
    """Unfilled steps are no steps; a full ring may begin anywhere, and that is said."""
    ring = np.concatenate([counts, np.zeros((2, LAYERS, EXPERTS), np.int64)])
    torch.save(recorded(ring), tmp_path / "expert_distribution_recorder_1.pt")
    torch.save({**recorded(ring), "rank": 1}, tmp_path / "expert_distribution_recorder_2.pt")
    import_routing(tmp_path, out, top_k=TOP_K)  # ranks reduce before they write
    check(out, counts, [0, 1, 2])
    with open_run(out) as run:
        note = run.notes["import"]
    assert (note["unfilled"], note["rotated"], note["files"]) == (2, False, 1)
    torch.save(recorded(counts), tmp_path / "full.pt")
    full = tmp_path / "full.duckdb"
    import_routing(tmp_path / "full.pt", full, top_k=TOP_K)
    with open_run(full) as run:
        assert run.notes["import"]["rotated"] is True


@pytest.mark.parametrize("per_token", [False, True])
def test_passes_of_several_ranks(tmp_path, out, counts, per_token):
    """Physical experts are brought back; ranks that hold the same tokens count once."""
    # expert 0 has two copies, of which each pass uses both
    to_logical = torch.tensor([[*range(EXPERTS), 0]] * LAYERS)
    physical = np.concatenate([counts - 0, np.zeros((3, LAYERS, 1), np.int64)], -1)
    physical[..., -1] = counts[..., 0] // 3
    physical[..., 0] -= physical[..., -1]

    def record(step, rank, counts):
        found = {"forward_pass_id": step, "rank": rank, "gatherer_key": "primary"}
        found["global_physical_count"] = torch.tensor(counts, dtype=torch.int32)
        if per_token:
            ids = np.full((LAYERS, 4, 8), -1)
            ids[:, :, :TOP_K] = np.arange(TOP_K)
            ids[0] = 0
            found |= {"input_ids": [1, 2], "positions": [0, 1], "forward_mode": 1}
            found["topk_ids_of_layer"] = torch.tensor(ids, dtype=torch.int32)
        return found

    half = physical // 2
    # pass 7: two ranks with tokens of their own; 8 and 9: the same tokens twice
    ranks = [
        [record(7, 0, half[0]), record(8, 0, physical[1]), record(9, 0, physical[2])],
        [record(9, 1, physical[2]), record(8, 1, physical[1]), record(7, 1, (physical - half)[0])],
    ]
    for rank, records in enumerate(ranks):
        dump = {"records": records, "last_physical_to_logical_map": to_logical}
        torch.save(dump, tmp_path / f"expert_distribution_recorder_1_{rank}.pt")
    import_routing(tmp_path, out, top_k=None if per_token else TOP_K)
    check(out, counts, [7, 8, 9])


def test_a_pickle_is_never_run(tmp_path, out):
    torch.save({"logical_count": Path("x")}, tmp_path / "strange.pt")
    with pytest.raises(TraceError, match=r"strange.pt is no file of tensors alone: .*never loaded"):
        import_routing(tmp_path / "strange.pt", out, top_k=TOP_K)
    assert not list(tmp_path.glob("run*"))


def test_tensorrt_llm_adds_its_ranks(tmp_path, out, counts):
    about = {"num_experts": EXPERTS, "num_experts_per_token": TOP_K}
    (tmp_path / "meta_info.json").write_text(json.dumps(about))
    for rank, part in enumerate((counts // 3, counts - counts // 3)):
        tensors = {f"{5 + s}_{n}": part[s, n] for s in range(3) for n in range(1, LAYERS)}
        save_file(tensors, tmp_path / f"rank{rank}.safetensors")
    import_routing(tmp_path, out)
    check(out, counts, [5, 6, 7])


def test_megatron_ranks_hold_a_part_of_the_experts_each(tmp_path, out, counts):
    folder = tmp_path / "tokens_per_expert"
    folder.mkdir()
    for rank in range(4):  # two groups of expert-parallel ranks
        half = slice(3 * (rank % 2), 3 * (rank % 2) + 3)
        share = counts // 2 if rank < 2 else counts - counts // 2
        lines = [
            {"iter": 10 + step, "block": "decoder", "layer": layer}
            | {"tpe": [one[layer, half].tolist(), [0, 0, 0]]}
            for step, one in enumerate(share)
            for layer in range(1, LAYERS)
        ]
        (folder / f"rank{rank}.jsonl").write_text("\n".join(map(json.dumps, lines)))
    with pytest.raises(TraceError, match="4 ranks of Megatron count the experts that each of them"):
        import_routing(folder, out, top_k=TOP_K)
    import_routing(folder, out, top_k=TOP_K, n_experts=EXPERTS)
    check(out, counts, [10, 11, 12])


def test_reap_and_coactivation_tables(tmp_path, out, counts):
    total = np.full((LAYERS, EXPERTS), 10)
    layers = {
        layer: {"total_tokens": 30, "expert_frequency": torch.tensor(total[layer])}
        for layer in range(1, LAYERS)
    }
    torch.save(layers, tmp_path / "observer.pt")
    assert import_routing(tmp_path / "observer.pt", out).top_k == 2  # 60 assignments of 30 tokens
    check(out, np.concatenate([total[:1] * 0, total[1:]])[None])
    tables = [{"layer": n, "heat": counts[0, n].tolist(), "pairs": []} for n in range(1, LAYERS)]
    (tmp_path / "pairs.json").write_text(json.dumps({"layers": tables}))
    import_routing(tmp_path / "pairs.json", tmp_path / "heat.duckdb", top_k=TOP_K)
    check(tmp_path / "heat.duckdb", counts[:1])


def test_imatrix(tmp_path, out, counts, monkeypatch):
    monkeypatch.setitem(sys.modules, "gguf", None)
    source = tmp_path / "imatrix.gguf"
    source.write_bytes(b"GGUF")
    with pytest.raises(TraceError, match=r"the package gguf reads\. Install it: pip install gguf"):
        import_routing(source, out)
    monkeypatch.undo()
    gguf = pytest.importorskip("gguf", reason="the optional package gguf is not installed")
    writer = gguf.GGUFWriter(source, "imatrix")
    writer.add_type("imatrix")
    writer.add_uint32("imatrix.chunk_count", 3)
    writer.add_uint32("imatrix.chunk_size", 10)
    each = np.full((1, EXPERTS), 10, np.float32)
    for layer in range(1, LAYERS):
        for name in ("gate", "up", "down"):
            writer.add_tensor(f"blk.{layer}.ffn_{name}_exps.weight.counts", each)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    assert import_routing(source, out).top_k == 2
    load, _ = stored(out)
    assert load == [[10] * EXPERTS] * 3


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("layer,expert,count\n0,1,0.25\n", r"whole numbers of 0 or more, got 0.25. Shares"),
        ("layer,expert,count\n0,1,3\n0,1,4\n", "the same layer and expert 1 times over"),
        ("layer,expert,count\n0,,3\n", "1 rows without a layer, an expert or a count"),
        ("layer,expert,count\n0,1,0\n", "counts no assignment"),
    ],
)
def test_bad_counts_are_refused_and_leave_nothing(tmp_path, out, text, words):
    source = tmp_path / "bad.csv"
    source.write_text(text)
    with pytest.raises(TraceError, match=words):
        import_routing(source, out, top_k=1)
    assert not out.exists() and not list(tmp_path.glob("*.partial"))


def test_the_command_asks_for_the_top_k(tmp_path, out, capsys):
    source = tmp_path / "counts.csv"
    source.write_text("layer,expert,count\n3,0,5\n3,1,3\n")
    arguments = ["import", str(source), "--out", str(out)]
    assert main(arguments) == 2
    assert "Say it with --top-k: it is num_experts_per_tok" in capsys.readouterr().err
    assert main([*arguments, "--top-k", "1", "--experts", "4"]) == 0
    assert "8 assignments, 1 layers, 1 of 4 experts; sums only" in capsys.readouterr().out
    with pytest.raises(StoreError, match="holds sums only, as its trace did"):
        counts_only(out, tmp_path / "shared.duckdb")


def test_a_run_of_counts_that_contradicts_itself_is_refused(tmp_path, out, counts):
    source = tmp_path / "counts.parquet"
    pq.write_table(rows(counts), source)
    import_routing(source, out, top_k=TOP_K)
    for change, words in (
        ("UPDATE packed.load_window SET step = 9 WHERE step = 1", None),
        (
            "UPDATE packed.load_window SET assignments = [999, 0, 0, 0, 0, 0] WHERE step = 0",
            "do not add up",
        ),
        ("DELETE FROM packed.load_window WHERE step = 0 AND layer = 1", "do not add up"),
        ("UPDATE packed.rollup SET phase = 'prompt'", "unknown phases"),
        ("INSERT INTO packed.prompt VALUES (0, 'x', NULL, NULL, 1, 0)", "at level counts"),
    ):
        changed = tmp_path / "changed.duckdb"
        changed.write_bytes(out.read_bytes())
        with duckdb.connect(str(changed)) as connection:
            connection.execute(change)
        if words is None:
            check_run(changed)
        else:
            with pytest.raises(StoreError, match=words):
                check_run(changed)


def test_arrays_stay_choices(out):
    """Counts in memory have no axis of tokens: they are refused rather than read as ids."""
    with pytest.raises(TraceError):
        import_routing([SimpleNamespace(counts=1)], out)
