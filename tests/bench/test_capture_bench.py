import json
import re

import processes
import pytest

from capture.bench import __main__ as command
from capture.bench import overhead, store
from capture.store import RunReader, writer

pytestmark = pytest.mark.slow


def test_the_store_is_measured_against_plain_lists(capsys, tmp_path):
    small = "--rows 1500 --layers 3 --experts 16 --top-k 2 --batch-tokens 100 --repeats 1"
    arguments = ["store", *small.split(), "--folder", str(tmp_path), "--keep"]

    assert command.main(arguments) == 0

    lines = capsys.readouterr().out.splitlines()
    for name in ("packed (RunWriter)", "lists (baseline)"):
        (line,) = [line for line in lines if line.startswith(name)]
        rows, speed, per_cpu, size = map(
            float,
            re.search(
                r"(\d+) rows .* ([\d.]+) M rows/s +([\d.]+) M rows/CPU s +([\d.]+) bytes/row", line
            ).groups(),
        )
        assert rows == 1500
        assert speed >= 0 and per_cpu >= 0 and size > 0
    assert [path.name for path in tmp_path.iterdir()] == ["bench.duckdb"]


def test_a_capture_too_large_to_try_is_worked_out(capsys):
    few = "--tokens 7.2e6 --layers 2 --experts 16 --top-k 2 --hidden 10 --processes 2 --sample 9"
    rates = "--tokens-per-second 1000 --rows-per-second 10000"
    assert command.main(["arithmetic", *few.split(), *rates.split()]) == 0
    first, *table, last = capsys.readouterr().out.splitlines()
    # 7.2 M tokens at 2 x 1,000 tokens/s; 2 layers of rows
    assert "1.00 h of the model alone, 2,000 rows/s for a writer that does 10,000." in first
    rows = {
        line.split("|")[1].strip(): [c.strip() for c in line.split("|")[2:-1]] for line in table
    }
    # a token: 15; a row: 2 of place, 8 of statistics, 8 of ids and 8 of weights; a score: 4, and 2
    assert [rows[level][0] for level in ("stats", "ids", "scores")] == ["15", "67", "199"]
    assert rows["ids"][3:] == ["67.0 kB/s", "20%"] and rows["scores"][4] == ""
    # of each of the 9: its scores at 2 layers, and 10 inputs
    assert last.startswith(f"At levels stats and ids {9 * (132 + 2 * 42) / 1000:.1f} kB of it")


def test_imports_are_measured_in_rows_and_memory(capsys):
    small = "--mb 0 --layers 2 --experts 8 --top-k 2 --formats token-log"
    assert command.main(["import", *small.split()]) == 0
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "token-log" in line]
    cells = [float(cell.replace(",", "")) for cell in line.split("|")[3:-1]]
    # 512 tokens of warm-up before the first sequence of 256, at 2 layers
    assert cells[:4] == [2 * (512 + 256), 2 * 256, 0, 2 * 512]
    assert cells[-1] > 50  # MB


def test_a_slow_capture_does_not_grow_with_its_commits(monkeypatch, tmp_path):
    shape = store.Shape(layers=12, experts=128, slots=8, tokens=512)
    pool = store.make_forwards(shape, count=2, seed=0)
    once = store.write_run(tmp_path / "once", shape, pool, 12)
    monkeypatch.setattr(writer, "COMMIT_SECONDS", 0.0)
    often = store.write_run(tmp_path / "often", shape, pool, 12)
    # with a copy of the pairs for each commit it would be 2.4 times as large
    assert often.size < 1.4 * once.size


def test_prompts_of_the_bench_are_texts_that_its_tokens_join_to(tmp_path):
    shape = store.Shape(layers=2, experts=8, slots=2, tokens=700)
    for seed in (0, 1):
        pool = store.make_forwards(shape, count=2, seed=seed)
        store.write_run(tmp_path / f"{seed}", shape, pool, 3)
    with RunReader.open(tmp_path / "0") as first, RunReader.open(tmp_path / "1") as second:
        prompts, joined, other = (
            run.query(sql).to_pylist()
            for run, sql in (
                (first, "SELECT text, domain FROM prompts ORDER BY prompt_id"),
                (
                    first,
                    "SELECT string_agg(text, '' ORDER BY position) AS text FROM tokens "
                    "GROUP BY prompt_id ORDER BY prompt_id",
                ),
                (second, "SELECT text, domain FROM prompts ORDER BY prompt_id"),
            )
        )
        routes = [run.query("SELECT * FROM assignments").to_pylist() for run in (first, second)]
    assert [row["text"] for row in prompts] == [row["text"] for row in joined]
    assert len({row["text"] for row in prompts}) == len(prompts) == 6
    assert {row["domain"] for row in prompts} == {"domain 0", "domain 1"}
    assert other == prompts and routes[0] != routes[1]


def test_an_unknown_measurement_lists_the_known_ones(capsys):
    with pytest.raises(SystemExit):
        command.main(["nonsense"])
    assert "store" in capsys.readouterr().err


MEASURE = "import runpy; runpy.run_module('capture.bench.overhead', run_name='__main__')"


@pytest.mark.slow(seconds=5)
def test_memory_of_attention_is_measured_beside_a_capture_without(capsys, tmp_path, monkeypatch):
    def in_own_process(cell):
        process = processes.start(tmp_path, [json.dumps(cell._asdict())], code=MEASURE)
        assert process.wait() == 0, process.stderr
        return json.loads(process.stdout.splitlines()[-1])

    # as the one below, without importing everything twice more
    monkeypatch.setattr(overhead, "_in_own_process", in_own_process)
    assert command.main(["attention-memory", "--tokens", "200"]) == 0
    line = capsys.readouterr().out.splitlines()[-1]
    tokens, plain, attention, more, *_ = (float(n) for n in re.findall(r"-?[\d.]+", line))
    assert tokens == 200 and plain > 0 and attention > 0
    assert more == pytest.approx(attention - plain, abs=0.11)


CELL = overhead.Cell("ids", "tiny", "cpu", 24, 48, None, 1, 0, 64, 1)


@pytest.mark.parametrize("row", overhead.ROWS)
def test_every_level_is_measured_against_plain_passes(row):
    found = overhead.measure(CELL._replace(row=row))
    assert len(found["wall"]) == len(found["cores"]) == 1
    assert found["wall"][0] > 0 and found["cores"][0] > 0 and found["plain"] > 0
    assert isinstance(found["peak"], int)


def test_eager_attention_is_put_back():
    bench, _ = overhead._benches(CELL)
    before = bench.loaded.model.config._attn_implementation
    overhead._with_outputs(bench)
    assert bench.loaded.model.config._attn_implementation == before != "eager"


@pytest.mark.slow(seconds=5)
def test_a_cell_is_measured_in_a_process_of_its_own(capsys):
    options = "levels --shape tiny --lengths 8 --tokens 16 --repeats 1 --decode 3 --rows ids"
    assert command.main(options.split()) == 0
    (row,) = capsys.readouterr().out.splitlines()[2:]
    assert row.split()[:2] == ["8", "ids"] and row.split()[-1] == "MiB"


def test_overhead_is_measured_in_pairs(capsys, tmp_path):
    prompts = tmp_path / "few.txt"
    prompts.write_text("Two short prompts\nare enough here\n", encoding="utf-8")
    options = f"overhead --prompts {prompts} --copies 1 --repeats 1 --level stats"
    assert command.main(options.split()) == 0
    lines = capsys.readouterr().out.splitlines()
    assert re.search(r"pair 1: plain [\d.]+ s, capture [\d.]+ s, ratio [\d.]+", "\n".join(lines))
    assert lines[-2].startswith("overhead, wall: median")


def test_ones_own_loop_is_timed_recorded_and_watched(capsys):
    small = "--rows 1 --width 8 --steps 1 --repeats 1"
    assert command.main(["own-loop", *small.split()]) == 0
    lines = capsys.readouterr().out.splitlines()[1:]
    found = [re.fullmatch(r"(\w+).*, (wall|cores): median ([\d.]+), .* of 1", one) for one in lines]
    assert [(one[1], one[2]) for one in found] == [
        (what, kind) for what in ("recording", "statistics") for kind in ("wall", "cores")
    ]
    assert all(float(one[3]) > 0 for one in found)
