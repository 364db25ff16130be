"""Prompt readers: every format, and errors that name file, line, column and the way out."""

import gzip
import json

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from capture.errors import PromptError
from capture.prompts import Prompt, read_prompts, read_prompts_bytes


def texts(prompts):
    return [prompt.text for prompt in prompts]


def test_lists_hold_strings_ids_and_records():
    prompts = read_prompts(
        ["a", [3, np.int64(4)], {"text": "b", "domain": "law"}, {"ids": [1], "source": "x"}]
    )
    assert prompts == [
        Prompt("a", None, None, "given"),
        Prompt(None, (3, 4), None, "given"),
        Prompt("b", None, "law", "given"),
        Prompt(None, (1,), None, "x"),
    ]


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("one\ntwo\n", ["one", "two"]),
        ("one\r\ntwo", ["one", "two"]),
        ("\ufeffone\n", ["one"]),
        ("one\nstill one\n\n\ntwo\n\n", ["one\nstill one", "two"]),
        ("\n\none\n", ["one"]),
        ("line\u2028separator\x0b\n", ["line\u2028separator\x0b"]),
    ],
)
def test_txt_is_lines_or_blocks(tmp_path, content, expected):
    path = tmp_path / "p.txt"
    path.write_bytes(content.encode("utf-8"))
    assert texts(read_prompts(path)) == expected


def test_txt_sources_name_the_line(tmp_path):
    (tmp_path / "p.txt").write_text("a\nb\n\n\nc\n", encoding="utf-8")
    assert [p.source for p in read_prompts(str(tmp_path / "p.txt"))] == ["p.txt:1", "p.txt:5"]


def test_csv_keeps_commas_quotes_and_line_breaks(tmp_path):
    path = tmp_path / "p.csv"
    path.write_text('Text,domain,n\n"a, ""b""\nc",law,1\nplain,,2\n', encoding="utf-8")
    prompts = read_prompts(path)
    assert texts(prompts) == ['a, "b"\nc', "plain"]
    assert [p.domain for p in prompts] == ["law", None]
    assert [p.source for p in prompts] == ["p.csv:2", "p.csv:4"]


@pytest.mark.parametrize("delimiter", [";", "\t", "|"])
def test_csv_finds_the_delimiter(delimiter):
    data = f"domain{delimiter}text\nlaw{delimiter}a,b\n".encode()
    assert read_prompts_bytes("p.csv", data) == [Prompt("a,b", None, "law", "p.csv:2")]


def test_csv_takes_a_field_of_a_megabyte():
    data = ("text\n" + "x" * 1_000_000 + "\n").encode()
    assert len(read_prompts_bytes("p.csv", data)[0].text) == 1_000_000


def test_jsonl_takes_records_strings_and_ids():
    data = b'{"text": "a", "domain": null, "other": 1}\n\n"b"\n[1, 2]\n'
    assert read_prompts_bytes("p.jsonl", data) == [
        Prompt("a", None, None, "p.jsonl:1"),
        Prompt("b", None, None, "p.jsonl:3"),
        Prompt(None, (1, 2), None, "p.jsonl:4"),
    ]


def test_parquet_takes_text_of_any_string_type(tmp_path):
    for kind in (pa.string(), pa.large_string(), pa.dictionary(pa.int32(), pa.string())):
        table = pa.table(
            {"text": pa.array(["a", "b"]).cast(kind), "domain": ["x", None], "n": [1, 2]}
        )
        pq.write_table(table, tmp_path / "p.parquet")
        prompts = read_prompts(tmp_path / "p.parquet")
        assert prompts == [
            Prompt("a", None, "x", "p.parquet:1"),
            Prompt("b", None, None, "p.parquet:2"),
        ]


def test_compressed_files_are_read_and_compressed_uploads_refused(tmp_path):
    data = gzip.compress(b'{"text": "a"}\n')
    (tmp_path / "p.jsonl.gz").write_bytes(data)
    assert texts(read_prompts(tmp_path / "p.jsonl.gz")) == ["a"]
    with pytest.raises(PromptError, match=r"p\.jsonl\.gz: unpack the file first"):
        read_prompts_bytes("p.jsonl.gz", data)
    (tmp_path / "broken.txt.xz").write_bytes(b"not xz")
    with pytest.raises(PromptError, match="cannot be unpacked"):
        read_prompts(tmp_path / "broken.txt.xz")


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("p.txt", b"ok\nb\xe9d\n", r"p\.txt, line 2, column 2: byte 0xe9 is not UTF-8.*Save"),
        ("p.txt", b"a\n\x00b\n", r"p\.txt, line 2: a zero byte; the file is not text"),
        ("p.txt", b"\n \n", r"p\.txt holds no prompt"),
        ("p.csv", b"prompt,label\na,b\n", r"p\.csv, line 1: .*column 'text'.*'prompt', 'label'"),
        ("p.csv", b"text,text\na,b\n", r"p\.csv, line 1: the column 'text' appears twice"),
        ("p.csv", b"text,domain\na,b\nc\n", r"p\.csv, line 3: expected 2 columns .*found 1"),
        ("p.csv", b'text\n"a\n', r"p\.csv, line \d: not valid csv"),
        ("p.csv", b"text,domain\n,law\n", r"p\.csv, line 2, column 'text': empty"),
        ("p.jsonl", b'{"text": "a"}\n{"text": }\n', r"p\.jsonl, line 2, column 10: not valid JSON"),
        ("p.jsonl", b'{"prompt": "a"}\n', r"line 1: .*either 'text'.*the fields prompt"),
        ("p.jsonl", b'{"text": 3}\n', r"line 1: 'text' must be a string, got int"),
        ("p.jsonl", b'{"text": ""}\n', r"p\.jsonl, line 1 is empty"),
        ("p.jsonl", b'{"text": "a", "domain": 3}\n', r"'domain' must be a string or null, got 3"),
        ("p.jsonl", rb'{"text": "ab\ud800"}', r"line 1, character 3: half of a surrogate pair"),
        ("p.jsonl", b"[1, -2]\n", r"line 1, position 1: a token id is .*got -2"),
        ("p.jsonl", b"[" * 100_000, r"line 1, column 1: not valid JSON"),
        ("p.jsonl", b"[" + b"9" * 5000 + b"]", r"line 1, column 1: not valid JSON .*limit"),
        ("p.jsonl", b"[3, 1180591620717411303424]", r"line 1, position 1: a token id is .*got 118"),
        ("p.parquet", b"PAR1", r"p\.parquet is not a readable Parquet file"),
        ("p.docx", b"", r"p\.docx: the ending \.docx is not a prompt format\. Expected \.txt"),
        ("README", b"", r"README: the ending \(none\) is not a prompt format"),
    ],
)
def test_errors_name_place_and_remedy(name, data, message):
    with pytest.raises(PromptError, match=message):
        read_prompts_bytes(name, data)


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"prompt": ["a"]}, r"expected a column 'text'.*found 'prompt'"),
        ({"text": [[1]]}, r"column 'text': expected string, found list"),
        ({"text": ["a", None]}, r"row 2, column 'text': empty"),
        ({"ids": [[1, None]]}, r"row 1, position 1: a token id"),
    ],
)
def test_parquet_errors(tmp_path, columns, message):
    pq.write_table(pa.table(columns), tmp_path / "p.parquet")
    with pytest.raises(PromptError, match=message):
        read_prompts(tmp_path / "p.parquet")


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (["a", ""], r"prompt 2 is empty"),
        ([], r"the list holds no prompt"),
        ([[]], r"prompt 1 is empty"),
        ([1.5], r"prompt 1: expected a string.*got float"),
        ([b"x"], r"prompt 1: expected a string.*got bytes"),
        ([{"text": "a", "ids": [1]}], r"prompt 1: .*found both"),
        ([[True]], r"position 0: a token id"),
        ([[1.0]], r"position 0: a token id is a whole number from 0 to \d+, got 1\.0"),
        (pd.DataFrame({"text": ["a"]}), r"must be a list, got a table \(DataFrame\)"),
        ("one whole text " * 1000, r"There is no prompt file 'one whole"),
        ({"text": "a"}, r"must be a list.*got dict"),
        (3, r"must be a list.*got int"),
        (
            "What is routing?",
            r"There is no prompt file 'What is routing\?'.*\['What is routing\?'\]",
        ),
        ("capture/store", r"is a folder without a .*\.txt"),
    ],
)
def test_what_is_not_a_prompt_is_refused(source, message):
    with pytest.raises(PromptError, match=message):
        read_prompts(source)


def test_a_folder_is_read_file_by_file(tmp_path):
    (tmp_path / "b.txt").write_text("one\ntwo\n", encoding="utf-8")
    packed = gzip.compress(b'{"text": "zero", "domain": "law"}\n')
    (tmp_path / "a.jsonl.gz").write_bytes(packed)
    for other in ("notes.md", "b.txt.bak", "c.jsonl.zst"):
        (tmp_path / other).write_text("no prompt", encoding="utf-8")
    (tmp_path / "folder.txt").mkdir()
    found = read_prompts(tmp_path)
    assert texts(found) == ["zero", "one", "two"]
    assert [prompt.domain for prompt in found] == ["law", None, None]


@given(st.lists(st.text(min_size=1).filter(lambda s: s.isprintable()), min_size=1, max_size=5))
def test_jsonl_and_parquet_give_the_text_back(items):
    lines = "\n".join(json.dumps({"text": item}) for item in items).encode()
    assert texts(read_prompts_bytes("p.jsonl", lines)) == items
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table({"text": items}), sink)
    assert texts(read_prompts_bytes("p.parquet", sink.getvalue().to_pybytes())) == items
