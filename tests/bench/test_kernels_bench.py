"""The benchmarks: nothing wrong is timed, and rows and tables say what was measured."""

import dataclasses
import math

import pytest
import torch

import kernels
from kernels.bench import cases, results
from kernels.bench.__main__ import main
from kernels.bench.cases import BenchError, Problem, Tolerance, disagreement
from kernels.bench.results import measure, quantiles, time_in_turns
from kernels.ops.coactivation import CoactivationOutput
from kernels.ops.gate import gate

CPU = torch.device("cpu")
README = results.README
TINY = cases.Size(
    gate=((40, 8, 2),),
    decode=((3, 4, 8, 2),),
    coactivation=((2, 30, 8, 2), (1, 30, 300, 2)),
    project_topk=((20, 16, 2, 8, 3),),
    attention=((130, 2, 1, 16),),
    dtype=torch.float32,
)


@pytest.mark.slow
@pytest.mark.parametrize("op", kernels.__all__)
def test_every_problem_runs_and_is_correct(op):
    """The problems of a GPU differ from these in their sizes and their type only."""
    for problem in cases.problems(op, TINY, CPU):
        rows = measure(problem, CPU, repeats=2)
        timed = {row.backend for row in rows}
        assert {"torch", results.COPY, *problem.baselines} < timed
        assert len(timed) == len(rows) and len(set(problem.backends) & timed) == 1
        for row in rows:
            assert 0 < row.p20 <= row.p50 <= row.p80
            assert row.bandwidth == pytest.approx(row.bytes / row.p50 / 1e3, rel=0.01, abs=0.01)
            assert (row.op, row.shape) == (op, problem.shape)
        assert next(row.copy_share for row in rows if row.backend == results.COPY) == 1


def test_bytes_of_a_problem_on_paper():
    """40 tokens: 8 logits of 4, 2 ids of 8, 2 weights of 4; out 2 x 1 + 2 x 2 + 4 x 2 a token."""
    problem = next(iter(cases.problems("gate", TINY, CPU)))
    sums = 8 * 8 + 8 * 4  # load and weight sums of eight experts
    assert problem.n_bytes() == 40 * (32 + 16 + 8) + 40 * (2 + 4 + 8) + sums


@pytest.mark.parametrize("more", [False, True])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_every_device_has_sizes_for_every_op(device, more):
    sizes = cases.sizes(torch.device(device), more=more)
    assert len(sizes) == 1 + more
    for part in dataclasses.fields(cases.Size):
        assert any(getattr(size, part.name) for size in sizes)


def wrong_in(part):
    """A problem whose backend is off by one in one element of ``part``."""

    def run(backend):
        out = CoactivationOutput(torch.zeros(2, 3, dtype=torch.int64), torch.ones(4))
        if backend != "torch":
            getattr(out, part)[-1] += 1
        return out

    return Problem("coactivation", "tiny", run, ("numba",), ())


@pytest.mark.parametrize("part", ["pairs", "transitions"])
def test_what_disagrees_is_not_timed(part):
    with pytest.raises(BenchError, match=rf"tiny.*'numba'.*in {part}: .*is not timed"):
        measure(wrong_in(part), CPU, repeats=1)


def test_disagreement_says_where_and_knows_nan():
    nan, one = torch.tensor([1.0, torch.nan]), torch.tensor([1.0, 2.0])
    assert disagreement(nan, nan.clone()) is None
    assert "1 of 2 elements, the first at [1]: nan instead of 2" in disagreement(nan, one)
    assert "2 instead of nan" in disagreement(one, nan)
    assert "torch.int32" in disagreement(torch.zeros(2), torch.zeros(2).int())
    assert "shape [3] instead" in disagreement(torch.zeros(3), torch.zeros(2))
    assert disagreement(None, None) is None
    assert "only one" in disagreement(None, one)
    infinite = torch.tensor([torch.inf, -torch.inf])
    assert disagreement(infinite, infinite.clone()) is None
    assert disagreement(infinite, -infinite) is not None
    assert disagreement(one, infinite.abs()) is not None


def test_tolerances_are_relative_above_one_and_shares_are_of_all_elements():
    expected, near = torch.tensor([1000.0, 0.0]), torch.tensor([1000.9, 0.0])
    assert disagreement(near, expected, Tolerance(1e-3)) is None
    assert disagreement(near, expected, Tolerance(1e-4)) is not None
    assert disagreement(near, expected, Tolerance(1e-4, share=0.5)) is None
    assert disagreement(torch.tensor([0.0, 0.01]), torch.zeros(2), Tolerance(1e-3)) is not None


@pytest.mark.parametrize("importance", [False, True])
def test_the_chain_of_torch_calls_computes_what_the_gate_does(importance):
    """A baseline that does less would make the op look slow, one that does other things fast."""
    logits = torch.randn(50, 12, generator=torch.Generator().manual_seed(0)) * 3
    weights, ids = logits.softmax(-1).topk(3)
    out = gate(
        logits, top_k=3, score_function="softmax", expert_ids=ids, weights=weights, backend="torch"
    )
    slots, ordered, statistics, sums = cases.observe_chain(logits, ids, weights, importance)()
    assert torch.equal(slots.int(), out.expert_ids)
    torch.testing.assert_close(ordered, out.weights)
    expected = (out.entropy, out.margin, out.logsumexp, out.topk_mass)
    for actual, wanted in zip(statistics, expected, strict=True):
        torch.testing.assert_close(actual.float(), wanted, atol=2e-3, rtol=2e-3)
    torch.testing.assert_close(sums[:2], (out.load, out.weight_sum))
    assert (sums[2] is None) != importance


def test_the_selecting_chain_computes_what_the_gate_does():
    logits = torch.randn(50, 12, generator=torch.Generator().manual_seed(1)) * 3
    out = gate(logits, top_k=3, score_function="softmax", backend="torch")
    ids, weights, entropy, margin, lse, mass, sums = cases.select_chain(logits, 3)()
    assert torch.equal(ids, out.expert_ids)
    expected = (out.weights, out.entropy, out.margin, out.logsumexp, out.topk_mass)
    torch.testing.assert_close((weights, entropy, margin, lse, mass), expected)
    torch.testing.assert_close(sums, (out.load, out.weight_sum, out.importance))


def test_logsumexp_of_scores_on_paper():
    """One head, keys 0 and ln 2: the second query sees 1 + 2 = 3."""
    query, key = torch.ones(1, 1, 2, 1), torch.tensor([[[[0.0], [math.log(2)]]]])
    lse = cases.logsumexp_of_scores(query, key, 1.0)
    torch.testing.assert_close(lse, torch.tensor([[[0.0, math.log(3)]]]))


def test_the_layer_of_the_baseline_runs():
    query = torch.zeros(1, 4, 3, 8)
    out = cases.decoder_layer(3, 4, 2, 8, query)()
    assert out.shape == (3, cases.HIDDEN) and bool(out.isfinite().all())


def test_quantiles_on_paper():
    assert quantiles([4.0, 1.0, 2.0, 3.0, 5.0]) == pytest.approx((1.8, 3.0, 4.2))


def test_functions_take_turns():
    calls = []
    functions = {name: lambda name=name: calls.append(name) for name in "ab"}
    times = time_in_turns(functions, CPU, repeats=3)
    assert "".join(calls) == "abababab"[:4] + "ab" * 3
    assert set(times) == {"a", "b"}


def row(**changes):
    values = {
        "op": "gate", "shape": "T=1, E=2", "backend": "torch", "p20": 900.0, "p50": 1000.0,
        "p80": 1500.0, "bytes": 4, "bandwidth": 0.5, "copy_share": 0.25, "device": "a CPU",
        "versions": "torch 2", "date": "2026-11-24",
    }  # fmt: skip
    return results.Measurement(**{**values, **changes})


def test_rows_survive_the_file_and_newer_ones_replace(tmp_path):
    path = tmp_path / "results.csv"
    assert results.read(path) == []
    old = [row(), row(backend="numba", p50=500.0), row(device="a GPU", p50=1.0)]
    results.write(old, path)
    assert results.read(path) == old
    new = row(p50=800.0, date="2026-11-25")
    merged = results.merge(results.read(path), [new])
    assert merged == [new, old[2]], "all rows of that input and device go, others stay"


def test_the_table_shows_ratios_within_one_input_and_device():
    rows = [row(), row(backend="numba", p50=500.0), row(shape="T=9", backend="copy")]
    lines = results.markdown([*rows, row(device="a GPU", p50=10.0)]).splitlines()
    assert lines[0] == "a CPU; torch 2; 2026-11-24"
    assert "| gate | T=1, E=2 | torch | 0.9 | 1 | 1.5 | 1.00 | 0.250 |" in lines
    assert "| gate | T=1, E=2 | numba | 0.9 | 0.5 | 1.5 | 2.00 | 0.250 |" in lines
    assert "| gate | T=9 | copy | 0.9 | 1 | 1.5 |  | 0.250 |" in lines
    assert sum(line.startswith("| op |") for line in lines) == 2


def test_the_command_refuses_what_it_does_not_know(capsys):
    commands = [(["softmax"], "no such op: softmax")]
    if not torch.cuda.is_available():
        commands.append((["gate", "--device", "cuda"], "no CUDA device"))
    for arguments, said in commands:
        with pytest.raises(SystemExit) as caught:
            raise SystemExit(main(arguments))
        assert caught.value.code == 2 and said in capsys.readouterr().err


@pytest.mark.parametrize(
    ("part", "table"),
    [
        ("results", lambda: results.markdown(results.read())),
        ("compile", lambda: results.compiled_markdown(results.read_compiled())),
    ],
)
def test_the_readme_shows_the_files(part, table):
    """Run `python -m kernels.bench --readme` after a measurement."""
    assert results.section(README.read_text(encoding="utf-8"), part) == table()
