"""What somebody uploads as prompts: a thousand malformed files, each read or refused in a line."""

import io
import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from malformed_prompts import ENDINGS, malformed, sound

from explorer import writing
from explorer.errors import ExplorerError, NotAllowedError
from explorer.worker import uploads
from explorer.worker.client import ROOT

pytestmark = pytest.mark.slow

COUNT = 1000
MB = 2**20
# what the process of an upload does, for many files in turn
_READ = """
import json, resource, sys
import pyarrow.parquet, capture.prompts
from malformed_prompts import malformed
from explorer.worker import uploads
uploads.limit_memory(uploads.MEMORY)
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
before = peak()
for name, data in malformed(int(sys.argv[1])):
    print(name, uploads.answer(name, data), flush=True)
print("grew", (peak() - before) * (1 if sys.platform == "darwin" else 1024))
"""


def test_the_files_before_their_mutation_are_read():
    for ending, data in sound().items():
        assert len(json.loads(uploads.answer(f"a{ending}", data))["prompts"]) >= 5


def test_a_thousand_malformed_uploads_are_read_or_refused_in_one_line():
    done = subprocess.run(
        [sys.executable, "-c", _READ, str(COUNT)],
        cwd=ROOT,
        env={"PYTHONPATH": f"{ROOT}:{Path(__file__).parent.parent}", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    *lines, last = done.stdout.splitlines()
    assert done.returncode == 0, (len(lines), last[:200], done.stderr[-2000:])
    assert int(last.removeprefix("grew ")) < 256 * MB
    assert len(lines) == COUNT
    outcomes = Counter()
    for line in lines:
        name, _, answer = line.partition(" ")
        found = json.loads(answer)
        outcomes[Path(name).suffix, next(iter(found))] += 1
        if "error" in found:
            said = found["error"]
            # it names the file, is one line, and quotes a line of it at most
            assert name in said and len(said.splitlines()) == 1 and len(said) < 400, said
        else:
            assert found["prompts"]
            for text, ids, domain, source, messages in found["prompts"]:
                assert [text, ids, messages].count(None) == 2, name
                assert text is None or text.encode(), name
                assert ids is None or all(0 <= one < 2**31 for one in ids), name
                assert source and (domain is None or domain.strip()), name
    # mutations that all pass, or that all fail, show nothing
    for ending in ENDINGS:
        assert outcomes[ending, "error"] > 40 and outcomes[ending, "prompts"] > 10, outcomes


def test_the_mutations_are_the_same_each_time():
    assert list(malformed(40)) == list(malformed(40))


@pytest.mark.slow(seconds=5)
def test_a_trace_is_looked_at_and_kept_or_refused(tmp_path, monkeypatch):
    """In a process of its own; nothing of it stays beside the runs."""
    rows = "layer,expert,count\n0,0,3\n0,1,5\n2,3,8\n"
    files = [("counts.csv", io.BytesIO(rows.encode()))]
    found = writing.read_trace(tmp_path, None, files)
    assert (found["format"], found["level"], found["layers"]) == ("table of counts", "counts", 2)
    assert (found["n_experts"], found["top_k"], found["rows"]) == (4, None, 16)
    files[0][1].seek(0)
    with pytest.raises(ExplorerError, match="Say it with --top-k"):
        writing.read_trace(tmp_path, "mine", files)
    files[0][1].seek(0)
    assert "16 assignments" in writing.read_trace(tmp_path, "mine", files, top_k=1)["made"]
    assert [path.name for path in tmp_path.iterdir()] == ["mine.duckdb"]
    for name, words in (
        ("mine", "never overwritten"),
        ("../x", "must start with a letter"),
        (None, "is no"),
    ):
        with pytest.raises(ExplorerError, match=words):
            writing.read_trace(tmp_path, name, [("bad.csv", io.BytesIO(b"a,b\n1,2\n"))], top_k=1)
    with pytest.raises(ExplorerError, match="leads out of it"):
        writing.read_trace(tmp_path, None, [("../bad.csv", io.BytesIO(b"x"))])
    monkeypatch.setattr(writing, "MAX_UPLOAD", 0)
    with pytest.raises(ExplorerError, match="Uploads have at most 0 MB"):
        writing.read_trace(tmp_path, None, [("big.csv", io.BytesIO(b"x"))])
    monkeypatch.setattr(writing, "_policy", writing.Policy(read_only=True))
    with pytest.raises(NotAllowedError, match="Importing a trace needs a server that may write"):
        writing.read_trace(tmp_path, None, files)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.duckdb"]
