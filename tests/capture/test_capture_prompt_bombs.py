"""Files of prompts that come to far more than they take, and errors that quote far too much."""

import gzip
import json
import lzma
import resource
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from capture import prompts
from capture.errors import PromptError
from capture.prompts import read_prompts, read_prompts_bytes
from explorer.worker import uploads
from explorer.worker.uploads import read_upload

pytestmark = pytest.mark.slow

MB = 2**20
ZEROS = b"x" * (64 * MB)
PACK = {
    ".gz": gzip.compress,
    ".xz": lzma.compress,
    ".zst": lambda data: pa.Codec("zstd").compress(data, asbytes=True),
}


def peak_of(code):
    """Run code in a new process and return by how many bytes its memory grew at most."""
    script = (
        "import resource, sys\n"
        "import pyarrow.parquet, capture.prompts\n"
        "from capture.errors import PromptError\n"
        "from capture.prompts import read_prompts\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        f"{code}\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=True,
    )
    return int(done.stdout) * (1 if sys.platform == "darwin" else 1024)


def refused(path, most):
    return (
        f"import capture.prompts; capture.prompts.MAX_BYTES = {most}\n"
        f"try: read_prompts({str(path)!r})\n"
        "except PromptError as error: assert 'Divide' in str(error)\n"
        "else: raise SystemExit('it was read')"
    )


@pytest.mark.parametrize("ending", [".gz", ".xz", ".zst"])
def test_what_unpacks_to_too_much_is_not_unpacked(tmp_path, ending):
    path = tmp_path / f"bomb.txt{ending}"
    path.write_bytes(PACK[ending](ZEROS) * 8)  # streams that follow each other
    assert path.stat().st_size < 2 * MB
    assert peak_of(refused(path, 32 * MB)) < 128 * MB


@pytest.mark.parametrize("ending", [".gz", ".xz", ".zst"])
def test_streams_may_follow_each_other_and_end_early(tmp_path, ending):
    path = tmp_path / f"p.txt{ending}"
    pack = PACK[ending]
    path.write_bytes(pack(b"one\ntw") + pack(b"o\n") + pack(b""))
    assert [prompt.text for prompt in read_prompts(path)] == ["one", "two"]
    if ending != ".zst":  # which knows no padding
        path.write_bytes(path.read_bytes() + b"\0" * 512)
        assert [prompt.text for prompt in read_prompts(path)] == ["one", "two"]
    path.write_bytes(pack(b"text " * 1000)[:-20])
    with pytest.raises(PromptError, match=r"cannot be unpacked: (Compressed file ended|Truncated)"):
        read_prompts(path)


def test_a_dictionary_that_is_larger_than_the_text_is_refused(tmp_path):
    path = tmp_path / "p.txt.xz"
    filters = [{"id": lzma.FILTER_LZMA2, "dict_size": 2**30}]
    with lzma.open(path, "w", filters=filters) as file:
        file.write(b"small")
    with pytest.raises(PromptError, match="cannot be unpacked"):
        read_prompts(path)


@pytest.mark.parametrize("kind", ["dictionary", "nested", "delta", "plain", "list"])
def test_a_small_table_that_stands_for_much_is_refused(tmp_path, kind):
    path = tmp_path / "bomb.parquet"
    text = "y" * MB
    if kind == "list":
        pq.write_table(pa.table({"ids": [[7] * (40 * MB // 8)] * 2}), path, compression="zstd")
    elif kind == "nested":  # a conversation of one long message, many times
        said = [{"role": "user", "content": text[: MB // 16]}] * 1000
        pq.write_table(pa.table({"messages": [said, said]}), path)
    elif kind == "delta":
        table = pa.table({"text": [text] * 80})
        pq.write_table(table, path, use_dictionary=False, column_encoding="DELTA_BYTE_ARRAY")
    elif kind == "plain":
        table = pa.table({"text": [text] * 80})
        pq.write_table(table, path, use_dictionary=False, compression="zstd")
    else:
        table = pa.table({"text": pa.array([text]).dictionary_encode().take(pa.array([0] * 4000))})
        pq.write_table(table, path)
    assert path.stat().st_size < 2 * MB
    assert peak_of(refused(path, 40 * MB)) < 160 * MB


def test_a_table_of_equal_values_is_read(tmp_path):
    path = tmp_path / "p.parquet"
    columns = {"text": ["same"] * 3000, "domain": [None, "law", "law"] * 1000}
    pq.write_table(pa.table(columns), path, row_group_size=1000)
    found = read_prompts(path)
    assert [prompt.domain for prompt in found] == columns["domain"]
    assert found[2999].text == "same" and found[2999].source == "p.parquet:3000"


def test_an_upload_is_read_in_another_process(tmp_path):
    path = tmp_path / "p.jsonl"
    path.write_text('{"text": "Größe \U0001f642", "domain": "law"}\n[1, 2]\n', encoding="utf-8")
    assert read_upload("p.jsonl", path.read_bytes()) == read_prompts(path)
    with pytest.raises(PromptError, match="line 1, column 1: not valid JSON"):
        read_upload("p.jsonl", b"nonsense")


def test_an_upload_that_gets_past_the_readers_ends_its_own_process(monkeypatch):
    before = resource.getrlimit(resource.RLIMIT_AS)
    # the list of prompts is too long for what the process may have
    data = b'"a"\n' * (4 * MB)
    monkeypatch.setattr(uploads, "SECONDS", 60.0)
    script = uploads.__file__.replace(".py", "")
    assert script.endswith("uploads")
    limited = [sys.executable, "-c", _LIMITED]
    done = subprocess.run(limited, input=data, capture_output=True, cwd=uploads.ROOT, check=False)
    assert done.returncode != 0 or b"memory" in done.stdout, done.stdout[:200]
    assert resource.getrlimit(resource.RLIMIT_AS) == before


_LIMITED = (
    "import sys; sys.argv = ['x', 'a.jsonl']\n"
    "from explorer.worker import uploads\n"
    "uploads.MEMORY = 512 * 2**20\n"
    "uploads.main()"
)


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("p.csv", b",".join(b"c%d" % n + b"x" * 10_000 for n in range(1000)) + b"\na\n"),
        ("p.csv", b"text," + b"y" * 100_000 + b"\na\n"),
        ("p.jsonl", json.dumps({"x" * 100_000: 1}).encode()),
        ("p.jsonl", json.dumps({"text": "a", "domain": ["d" * 100_000]}).encode()),
        ("p.jsonl", json.dumps({"ids": "i" * 100_000}).encode()),
        ("p.jsonl", json.dumps(["i" * 100_000]).encode()),
        ("p.jsonl", json.dumps({"text": "a", "domain": "d" * 100_000}).encode()),
        ("p." + "e" * 5_000, b"a"),
    ],
)
def test_errors_quote_a_line_at_most(name, data):
    with pytest.raises(PromptError) as caught:
        read_prompts_bytes(name, data)
    said = str(caught.value).replace(name, "")
    assert len(said) < 400 and "\n" not in said


def test_texts_and_domains_that_no_run_can_hold_are_refused():
    with pytest.raises(PromptError, match=r"prompt 1: expected up to 16,000,000 bytes"):
        read_prompts(["ä" * 8_000_001])
    many = [{"text": "a", "domain": str(n)} for n in range(prompts.MAX_DOMAINS + 1)]
    with pytest.raises(PromptError, match=r"10,001 domains"):
        read_prompts(many)
    assert len(read_prompts(many[:-1])) == prompts.MAX_DOMAINS
