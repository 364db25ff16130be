"""Comparisons in the worker: recorded first where asked, reported on, cancelled, found again."""

import pickle

import duckdb
import pytest
from synthetic import write_run

from capture.errors import CaptureError
from explorer import open_comparison, open_run
from explorer.errors import (
    ComparisonCancelled,
    ComparisonError,
    ExplorerError,
    JobCancelled,
)
from explorer.worker import CaptureRequest, CompareRequest
from explorer.worker.__main__ import run_job

pytestmark = pytest.mark.slow

TEXTS = [
    {"text": "In the beginning God created the heaven and the earth.", "domain": "a"},
    {"text": "int main(void) { return 0; } /* a small program */", "domain": "b"},
]


def request(path, **changes):
    return CompareRequest(
        str(path),
        ["top_k(k=1)"],
        **{"tokens": 200, "fit_tokens": 200, "controls": False, "latency": False, **changes},
    )


def test_requests_survive_the_pipe(tmp_path):
    run = str(tmp_path / "a.duckdb")
    for one in (request(run), request(run, capture=CaptureRequest(run, prompts=TEXTS))):
        assert pickle.loads(pickle.dumps(one)) == one
    assert request(run).out != run  # a capture and a comparison are no doubles
    assert request(run, capture=CaptureRequest(run)).out == run


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """One button: two prompts are recorded and compared live on themselves."""
    run = tmp_path_factory.mktemp("runs") / "typed.duckdb"
    reports = []
    capture = CaptureRequest(str(run), prompts=TEXTS, sample_tokens=100)
    path = run_job(request(run, capture=capture), reports.append, lambda: False)
    return run, path, reports


def test_prompts_are_recorded_and_then_compared(done):
    run, path, reports = done
    with open_run(run) as opened, open_comparison(path) as found:
        assert found.info["run_fingerprint"] == opened.fingerprint and found.info["complete"]
        assert found.info["report_source"] == "prompts of typed.duckdb"
        assert found.info["fit_source"] == "demo-fit" and found.info["report_sequences"] == 2
        live = found.table.query("mode == 'live' and layer.isna()").set_index("router")
        assert live.loc["top_k(k=1)", "experts_per_token"] == 1
        assert live.loc["top_k(k=1)", "loss_change"] != 0
        pieces = found.rows("texts").query("text_id == 0")["text"]
        assert "".join(pieces) in {text["text"] for text in TEXTS}
    stages = [report.stage for report in reports]
    assert stages.index("recording") < stages.index("comparing") and stages[-1] == "done"
    assert any(r.stage == "comparing" and r.done == r.total > 0 for r in reports)


def test_the_same_request_finds_its_rows_again(done):
    run, path, _ = done
    reports = []
    assert run_job(request(run), reports.append, lambda: False) == path
    assert "comparing" not in [report.stage for report in reports]


def test_a_cancelled_comparison_says_so(done):
    run, _, _ = done
    with pytest.raises(JobCancelled, match="before it began"):
        run_job(request(run, tokens=100), lambda report: None, lambda: True)
    stop = []
    with pytest.raises(ComparisonCancelled, match="before the first router") as cancelled:
        run_job(request(run, tokens=100), stop.append, lambda: bool(stop))
    assert cancelled.value.path is None


@pytest.mark.parametrize(
    "changes", [{}, {"model": "other/model"}, {"live": False, "conditions": ["merge(keep=0.5)"]}]
)
def test_a_model_that_only_the_run_names_is_not_loaded(tmp_path, changes):
    run = tmp_path / "theirs.duckdb"
    write_run(run)
    with pytest.raises(ComparisonError, match="names, 'synthetic', and nobody said"):
        run_job(request(run, **changes), lambda report: None, lambda: False)


def test_who_names_the_model_gets_as_far_as_loading_it(tmp_path):
    run, missing = tmp_path / "theirs.duckdb", str(tmp_path / "no" / "model")
    write_run(run)
    with duckdb.connect(str(run)) as connection:
        connection.execute("UPDATE packed.run SET model = ?", [missing])
    with pytest.raises((CaptureError, ExplorerError)) as caught:
        run_job(request(run, model=missing), lambda report: None, lambda: False)
    assert "nobody said" not in str(caught.value)
