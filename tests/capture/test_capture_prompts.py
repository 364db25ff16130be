"""Prompt readers: every format, and errors that name file, line, column and the way out."""

import gzip
import io
import json
import lzma
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import BatchEncoding

from capture.__main__ import main
from capture.errors import PromptError
from capture.prompts import Prompt, read_prompts, read_prompts_bytes

CHAT = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]


def texts(prompts):
    return [prompt.text for prompt in prompts]


def packed(data, ending):
    """Return data as a file of such an ending holds it."""
    if ending != ".zst":
        return {".gz": gzip, ".xz": lzma}[ending].compress(data)
    out = pa.BufferOutputStream()
    with pa.CompressedOutputStream(out, "zstd") as stream:
        stream.write(data)
    return out.getvalue().to_pybytes()


def parquet(columns):
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table(columns), sink)
    return sink.getvalue().to_pybytes()


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


@pytest.mark.parametrize("ending", [".gz", ".xz", ".zst"])
def test_compressed_files_and_uploads_are_read(tmp_path, ending):
    data = packed(b'{"text": "a"}\n', ending)
    (tmp_path / f"p.jsonl{ending}").write_bytes(data)
    assert texts(read_prompts(tmp_path / f"p.jsonl{ending}")) == ["a"]
    assert texts(read_prompts_bytes(f"p.jsonl{ending}", data)) == ["a"]
    with pytest.raises(PromptError, match="cannot be unpacked"):
        read_prompts_bytes(f"broken.txt{ending}", b"not packed")


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        (
            "p.txt",
            b"ok\nb\xe9d\n",
            r"p\.txt, line 2, column 2: byte 0xe9 is not UTF-8\. As windows-1252 it reads "
            r"'b\u00e9d'; .*--encoding windows-1252.*Otherwise save",
        ),
        ("p.txt", "aü\n".encode("utf-16"), r"line 1, column 1: byte 0xff .* As utf-16 it reads 'a"),
        ("p.txt", "aü\n".encode("utf-16-le"), r"As utf-16-le it reads 'aü'"),
        ("p.txt", "ab\n".encode("utf-16-be"), r"a zero byte.* As utf-16-be it reads 'ab'"),
        ("p.txt", b"ok\x81\n", r"byte 0x81 is not UTF-8\. Save the file as UTF-8 text\.$"),
        ("p.txt", b"a\n\x00b\n", r"p\.txt, line 2: a zero byte; the file is not text"),
        ("p.txt", b"\n \n", r"p\.txt holds no prompt"),
        (
            "p.csv",
            b"title,label\na,b\n",
            r"p\.csv, line 1: .*column 'text'.*'title', 'label'.*--text-column title",
        ),
        ("p.csv", b"text,text\na,b\n", r"p\.csv, line 1: the column 'text' appears twice"),
        ("p.csv", b"text,domain\na,b\nc\n", r"p\.csv, line 3: expected 2 columns .*found 1"),
        ("p.csv", b'text\n"a\n', r"p\.csv, line \d: not valid csv"),
        ("p.csv", b"text,domain\n,law\n", r"p\.csv holds no prompt \(.*1 empty row was left out"),
        ("p.jsonl", b'{"text": "a"}\n{"text": }\n', r"p\.jsonl, line 2, column 10: not valid JSON"),
        ("p.jsonl", b'{"a": "a", "b": "b"}\n', r"line 1: .*a record with 'text'.*fields 'a', 'b'"),
        ("p.jsonl", b'{"text": 3}\n', r"line 1: 'text' must be a string, got int"),
        ("p.jsonl", b'{"text": ""}\n', r"p\.jsonl holds no prompt"),
        ("p.jsonl", b'{"text": "a", "domain": [3]}\n', r"'domain' must be a string or null, got"),
        ("p.jsonl", rb'{"text": "ab\ud800"}', r"line 1, 'text', character 3: half of a surrogate"),
        ("p.jsonl", b'{"ids": "abc"}', r"line 1: 'ids' must be a list of whole numbers, got 'abc'"),
        ("p.jsonl", b'{"messages": ["hi"]}', r"line 1: 'messages' must be a list of messages such"),
        (
            "p.jsonl",
            b'{"messages": [{"role": "user", "content": "a"}, {"content": "b"}]}',
            r"line 1, 'messages', message 2: expected a 'role' .*found the fields 'content'",
        ),
        (
            "p.jsonl",
            b'{"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}',
            r"message 1: a part of type 'image_url' is not text",
        ),
        (
            "p.jsonl",
            b'{"conversations": [{"from": "human", "value": null}]}',
            r"line 1, 'conversations', message 1: 'content' must be a string \(or ShareGPT's",
        ),
        (
            "p.jsonl",
            b'{"prompt": "a", "completion": []}\n{"prompt": ["b"]}',
            r"line 2, 'prompt', pos",
        ),
        ("p.json", b'[{"text": "a"},\n {"text": }]', r"p\.json, line 2, column 11: not valid JSON"),
        ("p.json", b"[" * 100_000, r"line 1, column 1: not valid JSON"),
        ("p.json", b'[{"text": "a"}', r"line 1, column 15: not valid JSON"),
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
        ({"a": ["a"], "b": ["b"]}, r"expected a column 'text'.*found the fields 'a', 'b'"),
        ({"text": [[1]]}, r"row 1: 'text' must be a string, got list"),
        ({"ids": [[1, None]]}, r"row 1, 'ids', position 1: a token id"),
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
        (pd.DataFrame({"n": [1]}), r"the table: expected a column 'text'.*found the fields 'n'"),
        ([{"role": "user", "content": "a"}], r"one message of a conversation.*Put it into a list"),
        ("nothing/here/*.jsonl", r"There is no prompt file 'nothing/here"),
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
    for other in ("notes.md", "b.txt.bak", "dataset_info.json"):
        (tmp_path / other).write_text("no prompt", encoding="utf-8")
    (tmp_path / "folder.txt").mkdir()
    found = read_prompts(tmp_path)
    assert texts(found) == ["zero", "one", "two"]
    assert [prompt.domain for prompt in found] == ["law", None, None]


@pytest.mark.slow
@given(st.lists(st.text(min_size=1).filter(lambda s: s.isprintable()), min_size=1, max_size=5))
@settings(max_examples=40, deadline=None)
def test_jsonl_and_parquet_give_the_text_back(items):
    lines = "\n".join(json.dumps({"text": item}) for item in items).encode()
    assert texts(read_prompts_bytes("p.jsonl", lines)) == items
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table({"text": items}), sink)
    assert texts(read_prompts_bytes("p.parquet", sink.getvalue().to_pybytes())) == items


@pytest.mark.parametrize(
    ("record", "messages", "text"),
    [
        ({"messages": CHAT}, CHAT, None),
        (CHAT, CHAT, None),
        ({"prompt": CHAT[:1], "completion": CHAT[1:]}, CHAT, None),
        (
            {"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "ho"}]},
            CHAT,
            None,
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "text", "text": "hi"}]}]},
            CHAT[:1],
            None,
        ),
        ({"prompt": "2 + 2 =", "completion": " 4"}, None, "2 + 2 = 4"),
        ({"prompt": "2 + 2 ="}, None, "2 + 2 ="),
        (
            {"instruction": "Add.", "input": "2 2", "output": "4"},
            None,
            "Below is an instruction that describes a task, paired with an input that provides "
            "further context. Write a response that appropriately completes the request.\n\n"
            "### Instruction:\nAdd.\n\n### Input:\n2 2\n\n### Response:\n4",
        ),
        (
            {"instruction": "Sing.", "input": "", "output": "la"},
            None,
            "Below is an instruction that describes a task. Write a response that appropriately "
            "completes the request.\n\n### Instruction:\nSing.\n\n### Response:\nla",
        ),
    ],
)
def test_records_of_training_sets(record, messages, text):
    """From lists, JSON lines, JSON, Parquet and DataFrames alike."""
    expected = (text, None if messages is None else tuple(messages))
    line = json.dumps(record).encode()
    sources = [read_prompts([record]), read_prompts_bytes("p.jsonl", line)]
    if isinstance(record, dict):
        columns = {name: [value] for name, value in record.items()}
        sources += [
            read_prompts_bytes("p.json", b"[" + line + b"]"),
            read_prompts_bytes("p.json", line),
            read_prompts_bytes("p.parquet", parquet(columns)),
            read_prompts(pd.DataFrame(columns)),
            read_prompts(pa.table(columns)),
        ]
    assert [(p.text, p.messages) for (p,) in sources] == [expected] * len(sources)


def test_tables_in_memory():
    frame = pd.DataFrame({"id": [7, 8, 9], "review": ["a", None, "b"], "label": [1, 2, 3]})
    for table in (frame, pa.table(frame), pa.table(frame).to_batches()[0], frame.to_dict("list")):
        found = read_prompts(table, domain_column="label")
        assert [(p.text, p.domain, p.source) for p in found] == [
            ("a", "1", "the table:1"),
            ("b", "3", "the table:3"),
        ]
        assert found.notes == [
            "the table: the prompts are the column 'review'.",
            "the table: 1 empty row was left out.",
        ]
    ids = {"input_ids": [[3, 4, 0], [5, 0, 0]], "attention_mask": [[1, 1, 0], [1, 0, 0]]}
    for batch in (BatchEncoding(ids), BatchEncoding(ids, tensor_type="pt"), pd.DataFrame(ids)):
        assert [p.ids for p in read_prompts(batch)] == [(3, 4), (5,)]
    assert [p.ids for p in read_prompts([BatchEncoding({"input_ids": [1, 2]})])] == [(1, 2)]


def test_data_sets_of_the_library():
    datasets = pytest.importorskip("datasets")
    data = datasets.Dataset.from_dict({"n": [1, 2], "messages": [CHAT, []], "domain": ["a", "b"]})
    found = read_prompts(data)
    assert [(list(p.messages), p.domain) for p in found] == [(CHAT, "a")]
    assert found.notes == ["the table: 1 empty row was left out."]
    stream = datasets.Dataset.from_dict({"review": ["a", "b"]}).to_iterable_dataset()
    assert texts(read_prompts(stream)) == ["a", "b"]
    with pytest.raises(PromptError, match=r"got one for each of 'train'.*prompts\['train'\]"):
        read_prompts(datasets.DatasetDict({"train": data}))


@pytest.mark.parametrize(
    ("name", "data", "options", "expected"),
    [
        ("p.ndjson", b'{"text": "a"}\n{"text": null}\n{"text": ""}\n', {}, ["a"]),
        ("p.tsv", b"Text\tdomain\na,b\tlaw\n", {}, ["a,b"]),
        ("p.json", b'{"version": 1, "data": [{"text": "a"}, {"text": "b"}]}', {}, ["a", "b"]),
        ("p.json", b'{"text": {"0": "a", "1": "b"}}', {}, ["a", "b"]),  # pandas
        ("p.json", b'{"text": "a"}\n{"text": "b"}', {}, ["a", "b"]),
        ("p.json", b'["a", {"text": "b"}]', {}, ["a", "b"]),
        ("p.csv", b"id,review,stars\n1,good,5\n", {}, ["good"]),
        ("p.csv", b"title,content\nA,good\n", {}, ["good"]),
        ("p.csv", b"title,Body\nA,good\n", {"text_column": "Title"}, ["A"]),
        ("p.jsonl", b'{"a": "x", "b": "y"}', {"text_column": "b"}, ["y"]),
        (
            "p.txt",
            "caf\u00e9 \u201cx\u201d".encode("cp1252"),
            {"encoding": "windows-1252"},
            ["caf\u00e9 \u201cx\u201d"],
        ),
        ("p.csv", "text\n\u00fc\n".encode("utf-16"), {"encoding": "utf-16"}, ["\u00fc"]),
        ("p.parquet", parquet({"review": ["a"], "stars": [5]}), {}, ["a"]),
        ("p.parquet", parquet({"text": pa.array([b"a"], pa.binary())}), {}, ["a"]),
    ],
)
def test_files_as_people_have_them(name, data, options, expected):
    assert texts(read_prompts_bytes(name, data, **options)) == expected


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b'{"text": "a"}\n{"text": "b"}\n', ["a", "b"]),
        (b'[{"text": "a"}]', ["a"]),
        (b"one\ntwo\n", ["one", "two"]),
        (packed(b"text,domain\na,b\n", ".gz"), ["a"]),
        (packed(b'{"text": "a"}', ".zst"), ["a"]),
        (parquet({"text": ["a"]}), ["a"]),
    ],
    ids=["jsonl", "json", "text", "gzip", "zstd", "parquet"],  # not the bytes: gzip holds the time
)
def test_standard_input_and_pipes_say_by_themselves_what_they_are(data, expected, monkeypatch):
    monkeypatch.setattr("sys.stdin", SimpleNamespace(buffer=io.BytesIO(data)))
    assert texts(read_prompts("-")) == expected


def test_patterns_and_several_files(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name in "ba":
        (tmp_path / f"{name}.jsonl").write_text(json.dumps({"text": name}), encoding="utf-8")
    (tmp_path / "[x].txt").write_text("brackets", encoding="utf-8")
    assert texts(read_prompts("*.jsonl")) == ["a", "b"]
    assert texts(read_prompts("[x].txt")) == ["brackets"]
    assert texts(read_prompts([Path("b.jsonl"), "c", Path("a.jsonl")])) == ["b", "c", "a"]
    assert main(["demo", "--prompts", "a.jsonl", "--prompts", "", "--out", "x.duckdb"]) == 2
    assert "A name was expected for the prompts" in capsys.readouterr().err


def test_an_encoding_is_one_that_python_knows():
    for wrong in ("nonsense", "base64"):
        with pytest.raises(PromptError, match="encoding must be the name of one"):
            read_prompts_bytes("p.txt", b"a", encoding=wrong)
    with pytest.raises(PromptError, match="byte 0x81 is not windows-1252"):
        read_prompts_bytes("p.txt", b"\x81", encoding="windows-1252")
    with pytest.raises(PromptError, match=r"line 1: there is no column 'x'.*'a'.*--text-column"):
        read_prompts_bytes("p.csv", b"a\nb\n", text_column="x")
