import re

import pytest

from capture import bench


def test_the_store_is_measured_against_plain_lists(capsys, tmp_path):
    small = "--rows 1500 --layers 3 --experts 16 --top-k 2 --batch-tokens 100 --repeats 1"
    arguments = ["store", *small.split(), "--folder", str(tmp_path), "--keep"]

    assert bench.main(arguments) == 0

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


def test_an_unknown_measurement_lists_the_known_ones(capsys):
    with pytest.raises(SystemExit):
        bench.main(["nonsense"])
    assert "store" in capsys.readouterr().err


def test_memory_of_attention_is_measured_beside_a_capture_without(capsys):
    assert bench.main(["attention-memory", "--tokens", "200"]) == 0
    line = capsys.readouterr().out.splitlines()[-1]
    tokens, plain, attention, more, *_ = (float(n) for n in re.findall(r"-?[\d.]+", line))
    assert tokens == 200 and plain > 0 and attention > 0
    assert more == pytest.approx(attention - plain, abs=0.11)
