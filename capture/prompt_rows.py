"""Rows of prompts, out of files of every format and encoding, packed or not, and of tables."""

import codecs
import csv
import gzip
import io
import json
import lzma
import re
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, TypeAlias

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from capture.errors import PromptError, cut, first_line, quoted

TABLES = (".csv", ".tsv")
LINES = (".jsonl", ".ndjson")
FORMATS = (".txt", *TABLES, *LINES, ".json", ".parquet")
COMPRESSIONS = (".xz", ".gz", ".zst")
# what a file of prompts may come to, whatever it takes on disk
MAX_BYTES = 2**30

# which columns are read, of the names of all and of those that hold strings
Choose: TypeAlias = Callable[[str, Sequence[str], Sequence[str]], Sequence[str]]

_DELIMITERS = (",", ";", "\t", "|")
_MAX_FIELD = 2**31 - 1  # csv refuses fields above 128 KiB unless told
_SHOWN = 5  # names of columns in an error
_ROWS, _FEW_ROWS = 1_024, 16  # read at a time
_OBJECT = 100  # bytes that a row takes at least
_CHUNK = 2**20
_DICTIONARY = 2**28  # bytes that unpacking .xz may take for itself
_BEGINNINGS = {b"\x1f\x8b": ".gz", b"\xfd7zXZ": ".xz", b"\x28\xb5\x2f\xfd": ".zst"}
_SPACE = re.compile(r"\s*")
_NUMBER = re.compile(r"\s*[-+]?[\d.,]+([eE][-+]?\d+)?%?\s*")
_CONTROL = re.compile(r"[\x00-\x08\x0e-\x19\x1b-\x1f\x7f]")
# names of lists that are one prompt
IDS, CONVERSATIONS = ("ids", "input_ids"), ("messages", "conversations", "conversation")


class Row(NamedTuple):
    """One row of a file: where it is, its number there, and its record, string or token ids."""

    place: str
    number: int
    value: Any


class PromptFile(NamedTuple):
    """What a file holds: its name and ending without those of a compression, and its bytes."""

    name: str
    ending: str
    data: bytes


def suffixes(name: str) -> tuple[str, str]:
    """Return the ending of a name that says the format, and that of the compression around it."""
    parts = ["", *(suffix.lower() for suffix in Path(name).suffixes)]
    compression = parts.pop() if parts[-1] in COMPRESSIONS else ""
    return parts[-1], compression


def unpack(name: str, file: BinaryIO, most: int) -> PromptFile:
    """Read a file, unpacked; a few kilobytes can stand for gigabytes.

    Nothing is unpacked far beyond ``most`` bytes.

    Raises
    ------
    PromptError
        If it is broken or holds more.
    """
    ending, compression = suffixes(name)
    found = bytearray()
    try:
        for part in _parts(file, compression):
            found += part
            if len(found) > most:
                raise PromptError(
                    f"{name} holds more than {most / 1e6:,.0f} MB when it is unpacked, and no "
                    "more can be read. Divide it into several files."
                )
    except (gzip.BadGzipFile, lzma.LZMAError, zlib.error, EOFError) as error:
        raise PromptError(f"{name} cannot be unpacked: {first_line(error)}.") from None
    except OSError as error:
        what = "unpacked" if error.strerror is None else "read"
        reason = error.strerror or first_line(error)
        raise PromptError(f"{name} cannot be {what}: {reason}.") from None
    return PromptFile(name, ending, bytes(found))


def recognised(name: str, file: BinaryIO, most: int) -> PromptFile:
    """Read a stream without an ending: compression and format are found in what it holds.

    Raises
    ------
    PromptError
        As :func:`unpack`.
    """
    data = unpack(name, file, most).data
    for beginning, compression in _BEGINNINGS.items():
        if data.startswith(beginning):
            data = unpack(f"{name}{compression}", io.BytesIO(data), most).data
    head = data[:_CHUNK].removeprefix(codecs.BOM_UTF8).lstrip()
    if data.startswith(b"PAR1"):
        ending = ".parquet"
    elif head[:1] in b'{["' and head:
        ending = ".json" if head[:1] == b"[" and not _is_lines(head) else ".jsonl"
    else:
        header = head.splitlines()[0].decode("utf-8", "replace") if head else ""
        cells = next(csv.reader([header], delimiter=_delimiter(header)), [])
        is_table = len(cells) > 1 and "text" in [cell.strip().lower() for cell in cells]
        ending = ".csv" if is_table else ".txt"
    return PromptFile(name, ending, data)


def _is_lines(head: bytes) -> bool:
    """Whether the first line is a value of its own, and another one follows."""
    first, _, rest = head.partition(b"\n")
    try:
        json.loads(first)
    except (ValueError, RecursionError):
        return False
    return bool(rest.strip())


def read_rows(
    opened: PromptFile, *, most: int, encoding: str | None, choose: Choose
) -> Iterator[Row]:
    """Yield the rows of a file; those of Parquet and tables with the columns of ``choose``.

    Raises
    ------
    PromptError
        With the file, line and column, and what was expected.
    """
    name, ending, data = opened
    if ending not in FORMATS:
        raise PromptError(
            f"{name}: the ending {cut(ending, 20) or '(none)'} is not a prompt format. "
            f"Expected {', '.join(FORMATS)}, or one of them with {', '.join(COMPRESSIONS)}."
        )
    if len(data) > most:
        raise too_large(name, len(data), most)
    if ending == ".parquet":
        return _parquet(name, data, most, choose)
    text = decode(name, data, encoding)
    if ending in TABLES:
        return _table(name, text, "\t" if ending == ".tsv" else None, choose)
    if ending in LINES:
        return _json_lines(name, text)
    return _json(name, text) if ending == ".json" else _txt(text)


def too_large(name: str, size: int, most: int) -> PromptError:
    """Make the error for a file whose prompts come to more than can be held."""
    return PromptError(
        f"{name} holds {size / 1e6:,.0f} MB of prompts or more, and up to {most / 1e6:,.0f} MB can "
        "be read. Divide it into several files."
    )


def names_of(columns: Sequence[str]) -> str:
    """Write the first names of columns for an error."""
    more = ", …" if len(columns) > _SHOWN else ""
    return ", ".join(quoted(column, 20) for column in columns[:_SHOWN]) + more


def _txt(text: str) -> Iterator[Row]:
    """Yield one prompt a line, or one a block when the file has blank lines between blocks."""
    lines = text.replace("\r\n", "\n").replace("\r", "\n").split("\n")
    while lines and not lines[-1].strip():
        lines.pop()
    filled = [bool(line.strip()) for line in lines]
    first = filled.index(True) if any(filled) else 0
    if all(filled[first:]):
        for number, line in enumerate(lines[first:], start=first + 1):
            yield Row(f"line {number}", number, line)
        return
    start: int | None = None
    for number in range(len(lines) + 1):
        inside = number < len(lines) and filled[number]
        if inside and start is None:
            start = number
        elif not inside and start is not None:
            yield Row(f"line {start + 1}", start + 1, "\n".join(lines[start:number]))
            start = None


def _table(name: str, text: str, delimiter: str | None, choose: Choose) -> Iterator[Row]:
    """Yield the rows below a header line, as records of strings."""
    csv.field_size_limit(_MAX_FIELD)
    delimiter = delimiter or _delimiter(next(filter(str.strip, re.split(r"[\r\n]", text)), ""))
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    header: list[str] | None = None
    kept: Sequence[str] = ()
    end = first = 0
    try:
        for row in reader:
            line, end = end + 1, reader.line_num
            if not row:
                continue
            if header is None:
                header, first = _header(name, row), line
                continue
            if len(row) != len(header):
                raise PromptError(
                    f"{name}, line {line}: expected {len(header)} columns "
                    f"({names_of(header)}), found {len(row)}. Put quotes around text that holds "
                    f"{delimiter!r} or a line break."
                )
            record = dict(zip(header, row, strict=True))
            if not kept:
                strings = [column for column in header if not _NUMBER.fullmatch(record[column])]
                kept = choose(f"{name}, line {first}", header, strings)
            yield Row(f"line {line}", line, {column: record[column] for column in kept})
    except csv.Error as error:
        raise PromptError(
            f"{name}, line {reader.line_num}: not valid csv ({first_line(error)})."
        ) from None


def _delimiter(header: str) -> str:
    """Return the delimiter under which the header has a column ``text``, or else the most cells."""

    def fits(delimiter: str) -> tuple[bool, int]:
        cells = next(csv.reader([header], delimiter=delimiter), [])
        return "text" in [cell.strip().lower() for cell in cells], len(cells)

    return max(_DELIMITERS, key=fits)


def _header(name: str, row: Sequence[str]) -> list[str]:
    header = [cell.strip().lower() for cell in row]
    twice = sorted({column for column in header if header.count(column) > 1})
    if twice:
        raise PromptError(f"{name}, line 1: the column {quoted(twice[0])} appears twice.")
    return header


def _json_lines(name: str, text: str) -> Iterator[Row]:
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except (ValueError, RecursionError) as error:  # ValueError also for a number too long
            raise _not_json(name, error, number, "one value a line") from None
        yield Row(f"line {number}", number, value)


def _json(name: str, text: str) -> Iterator[Row]:
    """Yield the items of a list, those of an object of columns, or one JSON value a line."""
    start = at = _after_space(text, 0)
    decoder = json.JSONDecoder()
    try:
        if text[at : at + 1] == "[":
            at = _after_space(text, at + 1)
            number = 0
            while text[at : at + 1] != "]":
                number += 1
                value, at = decoder.raw_decode(text, at)
                yield Row(f"item {number}", number, value)
                at = _after_space(text, at)
                if text[at : at + 1] not in (",", "]"):
                    raise json.JSONDecodeError("Expecting ',' delimiter", text, at)
                at = _after_space(text, at + 1) if text[at] == "," else at
            at += 1
        elif text[at:]:
            value, at = decoder.raw_decode(text, at)
            if text[_after_space(text, at) :]:
                yield from _json_lines(name, text)
                return
            yield from _of_object(value)
        if text[_after_space(text, at) :]:
            raise json.JSONDecodeError("one value after another; name it .jsonl", text, at)
    except (ValueError, RecursionError) as error:
        line = text.count("\n", 0, start) + 1
        raise _not_json(name, error, getattr(error, "lineno", line), "a list of records") from None


def _after_space(text: str, at: int) -> int:
    found = _SPACE.match(text, at)
    return found.end() if found else at


def _not_json(name: str, error: Exception, line: int, expected: str) -> PromptError:
    column, reason = getattr(error, "colno", 1), getattr(error, "msg", str(error))
    record = '{"text": "...", "domain": "..."}'
    example = f"[{record}, ...]" if "list" in expected else record
    return PromptError(
        f"{name}, line {line}, column {column}: not valid JSON ({cut(reason)}). Expected "
        f"{expected}, such as {example}."
    )


def _of_object(value: Any) -> Iterator[Row]:
    """Yield the rows of an object: of its columns, of the list in it, or the object itself."""
    rows: Iterable[Any] | None = None
    if isinstance(value, Mapping):
        rows = rows_of_columns(value)
        inner = [
            listed
            for key, listed in value.items()
            if isinstance(listed, list) and listed and key not in CONVERSATIONS
            if all(isinstance(item, Mapping) for item in listed)
        ]
        if rows is None and len(inner) == 1:
            rows = inner[0]
    for number, row in enumerate([value] if rows is None else rows, start=1):
        yield Row(f"item {number}", number, row)


def rows_of_columns(columns: Mapping[Any, Any]) -> Iterator[dict[str, Any]] | None:
    """Return the rows of columns of one length, or None for what is a record."""
    listed = {
        str(name): [*values.values()] if isinstance(values, Mapping) else _listed(values)
        for name, values in columns.items()
    }
    if not listed or len({None if v is None else len(v) for v in listed.values()}) > 1:
        return None
    for name, values in listed.items():
        first = values[0] if values else None
        is_one = (name in IDS and hasattr(first, "__index__")) or (
            isinstance(first, Mapping) and ("role" in first or "from" in first)
        )
        if values is None or is_one:
            return None
    return (dict(zip(listed, row, strict=True)) for row in zip(*listed.values(), strict=True))


def _listed(values: Any) -> list[Any] | None:
    if hasattr(values, "tolist"):
        values = values.tolist()
    return list(values) if isinstance(values, list | tuple) else None


def rows_of_table(source: Any, choose: Choose) -> Iterator[Row] | None:
    """Return the rows of a table in memory, or None for what is none."""
    if isinstance(source, Mapping):
        splits = [name for name, split in source.items() if hasattr(split, "column_names")]
        if splits:
            raise PromptError(
                f"prompts must be one data set, got one for each of {names_of(splits)}. Choose "
                f"one: prompts[{splits[0]!r}]."
            )
        records = rows_of_columns(source)
        return None if records is None else _numbered(records)
    if isinstance(source, pa.Table | pa.RecordBatch):
        whole = source if isinstance(source, pa.Table) else pa.Table.from_batches([source])
        strings = [field.name for field in whole.schema if is_text(field.type)]
        chosen = choose("the table", whole.schema.names, strings)
        batches = whole.select(chosen).to_batches(max_chunksize=1024)
        return _numbered(record for batch in batches for record in batch.to_pylist())
    if hasattr(source, "column_names") and hasattr(source, "features"):  # datasets
        names = source.column_names
        if names is None:  # a stream
            return _numbered(iter(source))
        kinds = {name: getattr(kind, "dtype", "") for name, kind in source.features.items()}
        strings = [name for name in names if str(kinds[name]).endswith("string")]
        return _numbered(iter(source.select_columns(choose("the table", names, strings))))
    if hasattr(source, "columns") and hasattr(source, "head"):  # pandas and polars
        names = [*map(str, source.columns)]
        if len(set(names)) < len(names):
            raise PromptError("The table has several columns of one name. Rename them.")
        head = source.head(100)
        strings = [name for name in names if any(isinstance(value, str) for value in head[name])]
        chosen = choose("the table", names, strings)
        values = [source[name] for name in chosen]
        return _numbered(dict(zip(chosen, row, strict=True)) for row in zip(*values, strict=True))
    return None


def _numbered(records: Iterable[Any]) -> Iterator[Row]:
    return (Row(f"row {number}", number, row) for number, row in enumerate(records, start=1))


def _parquet(name: str, data: bytes, most: int, choose: Choose) -> Iterator[Row]:
    """Yield the rows of a Parquet table.

    A value that is there often is stored once, so that the table is read in pieces whose values
    stay stored once until their size is known.
    """
    left, number = most, 0
    try:
        file = pq.ParquetFile(pa.BufferReader(data))
        whole = file.schema_arrow
        columns = choose(
            name, whole.names, [c for c in whole.names if is_text(whole.field(c).type)]
        )
        _check_metadata(name, file.metadata, most)
        rows = _FEW_ROWS
        if not _may_repeat(file.metadata):
            leaves = [file.schema.column(n) for n in range(len(file.schema))]
            strings = [leaf.path for leaf in leaves if leaf.physical_type == "BYTE_ARRAY"]
            file = pq.ParquetFile(pa.BufferReader(data), read_dictionary=strings)
            rows = _ROWS
        for batch in file.iter_batches(rows, columns=list(columns)):
            left -= sum(_expanded(column) for column in batch.columns) + _OBJECT * batch.num_rows
            if left < 0:
                raise too_large(name, most - left, most)
            for record in batch.select(list(columns)).to_pylist():
                number += 1
                yield Row(f"row {number}", number, record)
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise PromptError(f"{name} is not a readable Parquet file: {first_line(error)}.") from None


def is_text(kind: Any) -> bool:
    """Whether a column of this Arrow type holds strings."""
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    return bool(
        pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)
    )


def _check_metadata(name: str, metadata: Any, most: int) -> None:
    """Refuse a table that says itself that it is too large."""
    groups = [metadata.row_group(number) for number in range(metadata.num_row_groups)]
    chunks = [group.column(n) for group in groups for n in range(group.num_columns)]
    size = max(
        sum(chunk.total_uncompressed_size for chunk in chunks),
        metadata.num_rows,
        max((chunk.num_values for chunk in chunks), default=0),
    )
    if size > most:
        raise too_large(name, size, most)


def _may_repeat(metadata: Any) -> bool:
    """Return whether a text may be stored as what it adds to the one before it.

    Such a column cannot be read with its values stored once; where the file says that there is
    none, and there is one, the reader refuses it.
    """
    groups = [metadata.row_group(number) for number in range(metadata.num_row_groups)]
    return any(
        "DELTA_BYTE_ARRAY" in group.column(n).encodings
        for group in groups
        for n in range(group.num_columns)
    )


def _expanded(column: Any) -> int:
    """Return the bytes that the values of a column take when each stands for itself."""
    kind = column.type
    if pa.types.is_dictionary(kind):
        lengths = pc.binary_length(column.dictionary).cast(pa.int64())
        return int(pc.sum(lengths.take(column.indices)).as_py() or 0)
    if pa.types.is_struct(kind):
        parts = column.flatten()
        return sum(_expanded(part) for part in parts) + _OBJECT * len(column)
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        return _expanded(column.flatten())
    return int(column.nbytes)


def known_encoding(encoding: str | None) -> str | None:
    """Return the encoding, None for UTF-8; refuse what is none of text."""
    if encoding is None:
        return None
    try:
        found = codecs.lookup(encoding)
        "".encode(encoding)
    except (LookupError, TypeError, ValueError):
        raise PromptError(
            f"encoding must be the name of one that Python knows, such as utf-8, windows-1252 or "
            f"utf-16, got {quoted(encoding, 40)}."
        ) from None
    return encoding if found.name != "utf-8" else None


def decode(name: str, data: bytes, encoding: str | None = None) -> str:
    """Decode a file, as UTF-8 with or without a byte-order mark unless told otherwise.

    Raises
    ------
    PromptError
        Where the file stops being text; an encoding in which it is text is offered by name.
    """
    said = encoding or "UTF-8"
    try:
        text = data.decode("utf-8-sig" if codecs.lookup(said).name == "utf-8" else said)
    except UnicodeDecodeError as error:
        raise PromptError(_undecodable(name, data, error.start, said)) from None
    if "\0" in text:
        line = text.count("\n", 0, text.index("\0")) + 1
        offer = _offer(data, data.index(b"\0"), said) or f"Expected {said} text."
        raise PromptError(f"{name}, line {line}: a zero byte; the file is not text. {offer}")
    return text


def _undecodable(name: str, data: bytes, at: int, said: str) -> str:
    line = data.count(b"\n", 0, at) + 1
    column = at - (data.rfind(b"\n", 0, at) + 1) + 1
    offer = _offer(data, at, said)
    save = "Otherwise save the file as UTF-8 text." if offer else "Save the file as UTF-8 text."
    return (
        f"{name}, line {line}, column {column}: byte 0x{data[at]:02x} is not {said}. {offer}"
        f"{' ' if offer else ''}{save}"
    )


def _offer(data: bytes, at: int, said: str) -> str:
    """Offer an encoding in which the bytes are text, and show how the place reads in it."""
    zeros = data[1::2].count(0), data[::2].count(0)
    candidates = ["windows-1252"]
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        candidates = ["utf-16"]
    elif max(zeros) > len(data) // 8:
        candidates = ["utf-16-le" if zeros[0] > zeros[1] else "utf-16-be"]
    for candidate in candidates:
        try:
            text = data.decode(candidate)
        except UnicodeDecodeError:
            continue
        if candidate == said or _CONTROL.search(text):
            continue
        before = len(data[:at].decode(candidate, "ignore"))
        begin = max(before - 15, text.rfind("\n", 0, before) + 1)
        shown = quoted(text[begin : before + 15].split("\n")[0].strip(), 40)
        return (
            f"As {candidate} it reads {shown}; if that is right, choose this encoding "
            f"(--encoding {candidate}, in Python encoding={candidate!r})."
        )
    return ""


def _parts(file: BinaryIO, compression: str) -> Iterator[bytes]:
    """Yield a file piece by piece, unpacked."""
    if compression == ".xz":
        yield from _parts_of_xz(file)
    elif compression == ".zst":
        with pa.CompressedInputStream(pa.PythonFile(file, mode="r"), "zstd") as stream:
            yield from iter(lambda: stream.read(_CHUNK), b"")
    elif compression == ".gz":
        with gzip.open(file) as stream:
            yield from iter(lambda: stream.read(_CHUNK), b"")
    else:
        yield from iter(lambda: file.read(_CHUNK), b"")


def _parts_of_xz(file: BinaryIO) -> Iterator[bytes]:
    # lzma.open has no limit for the dictionary
    rest = file.read(_CHUNK)
    # one compressed stream may follow another
    while rest:
        stream = lzma.LZMADecompressor(memlimit=_DICTIONARY)
        while not stream.eof:
            yield stream.decompress(rest, _CHUNK)
            rest = b""
            if stream.needs_input and not stream.eof:
                rest = file.read(_CHUNK)
                if not rest:
                    raise EOFError("Compressed file ended before the end-of-stream marker")
        # zeros may fill it up
        rest = (stream.unused_data or file.read(_CHUNK)).lstrip(b"\0") or file.read(_CHUNK)
