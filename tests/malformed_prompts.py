"""A list of malformed prompt files, the same each time: mutations of five formats."""

import io
import json
import random

import pyarrow as pa
import pyarrow.parquet as pq

ENDINGS = (".txt", ".csv", ".jsonl", ".json", ".parquet")
_TEXTS = ["Größe 🙂 e\u0301", "one two", 'a "quoted", b', "line\nbreak", "x" * 300]
_CHAT = [{"role": "user", "content": "Größe"}, {"from": "gpt", "value": [{"text": "x"}]}]
_DOMAINS = ["law", None, "code", "law", "日本"]
# what stands where it should not: of text, of tables and of JSON
_PIECES = (
    *(
        b"\0",
        b"\xff",
        b"\xef\xbb\xbf",
        b"\xed\xa0\x80",
        b"\r",
        b"\r\n\r\n",
        b"\x1a",
        b"\xe2\x80\xa8",
    ),
    *(b'"', b'""', b",", b";", b"\t", b"|", b"text", b"text,text\n", b"=1+1", b"'", b"\\"),
    *(b"{", b"}", b"[", b"]", b"[" * 3000, b'{"a":' * 3000, b"null", b"NaN", b"Infinity", b"-1"),
    *(b"1e999", b"9" * 5000, b"true", b'"\\ud800"', b'"\\u0000"', b":", b'{"ids": [2147483648]}'),
    *(b'{"text": "a", "ids": [1]}', b'"text": 1,', b"y" * 20_000, b"\n" * 2000, b"PAR1"),
    *(b"\xff\xff\xff\x7f", b"\x80\x80\x80\x80\x80\x80\x80\x80\x80\x01"),
)


def sound():
    """Return a readable file of each format, by its ending."""
    rows = [{"text": t, "domain": d} for t, d in zip(_TEXTS, _DOMAINS, strict=True)]
    table = "text,domain\n" + "".join(
        '"{}",{}\n'.format(row["text"].replace('"', '""'), row["domain"] or "") for row in rows
    )
    lines = [*map(json.dumps, rows), "[1, 2, 3]", '"a string"']
    return {
        ".txt": "\n".join(_TEXTS).encode(),
        ".csv": table.encode(),
        ".jsonl": "\n".join(lines).encode(),
        ".json": f"[{', '.join([*lines, json.dumps({'messages': _CHAT})])}]".encode(),
        ".parquet": _parquet(rows),
    }


def _parquet(rows):
    out = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), out, compression="zstd")
    return out.getvalue()


def malformed(count, seed=0):
    """Yield ``count`` names and contents, as many of each format."""
    draw = random.Random(seed)
    files = sound()
    for number in range(count):
        ending = ENDINGS[number % len(ENDINGS)]
        data = bytearray(files[ending])
        for _ in range(draw.choice((1, 1, 1, 2, 5))):
            data = draw.choice(_MUTATIONS)(draw, data)
        # a file may also be named as another format
        named = draw.choice(ENDINGS) if draw.random() < 0.1 else ending
        yield f"{number}{named}", bytes(data)


def _flip_a_bit(draw, data):
    if data:
        data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
    return data


def _end_early(draw, data):
    return data[: draw.randrange(len(data) + 1)]


def _begin_late(draw, data):
    return data[draw.randrange(len(data) + 1) :]


def _put_in(draw, data):
    place = draw.randrange(len(data) + 1)
    return data[:place] + draw.choice(_PIECES) + data[place:]


def _put_over(draw, data):
    place, piece = draw.randrange(len(data) + 1), draw.choice(_PIECES)
    return data[:place] + piece + data[place + len(piece) :]


def _leave_out(draw, data):
    place = draw.randrange(len(data) + 1)
    return data[:place] + data[place + draw.randrange(40) :]


def _repeat(draw, data):
    place = draw.randrange(len(data) + 1)
    piece = data[place : place + draw.randrange(200)]
    return data[:place] + piece * draw.choice((2, 50)) + data[place:]


def _other_bytes(draw, data):
    place = draw.randrange(len(data) + 1)
    return data[:place] + draw.randbytes(draw.randrange(1, 60)) + data[place:]


def _other_encoding(draw, data):
    return bytearray(data.decode("latin-1").encode(draw.choice(("utf-16", "utf-32", "utf-8"))))


_MUTATIONS = (
    *(_flip_a_bit, _end_early, _begin_late, _put_in, _put_over, _leave_out, _repeat),
    *(_other_bytes, _other_encoding),
)
