"""Readers of the four prompt file formats; each prompt knows its file and line."""

import csv
import io
import json
import re
from collections.abc import Iterable, Mapping, Sequence

from capture.errors import PromptError
from capture.prompts import Prompt, to_prompt

DELIMITERS = (",", ";", "\t", "|")
MAX_FIELD = 2**31 - 1  # csv refuses fields above 128 KiB unless told


def read_txt(name: str, data: bytes) -> list[Prompt]:
    """Read one prompt a line, or one a block when the file has blank lines between blocks."""
    text = decode(name, data).replace("\r\n", "\n").replace("\r", "\n")
    lines = text.split("\n")
    while lines and not lines[-1].strip():
        lines.pop()
    filled = [bool(line.strip()) for line in lines]
    first = filled.index(True) if any(filled) else 0
    if all(filled[first:]):
        return [
            to_prompt(line, where=f"{name}, line {number}", source=f"{name}:{number}")
            for number, line in enumerate(lines, start=1)
            if line.strip()
        ]
    prompts: list[Prompt] = []
    start: int | None = None
    for number in range(len(lines) + 1):
        inside = number < len(lines) and filled[number]
        if inside and start is None:
            start = number
        elif not inside and start is not None:
            where = f"{name}, line {start + 1}"
            block = "\n".join(lines[start:number])
            prompts.append(to_prompt(block, where=where, source=f"{name}:{start + 1}"))
            start = None
    return prompts


def read_csv(name: str, data: bytes) -> list[Prompt]:
    """Read a table with a header line, a column ``text`` and perhaps ``domain`` and ``source``."""
    text = decode(name, data)
    csv.field_size_limit(MAX_FIELD)
    delimiter = _delimiter(text)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    prompts: list[Prompt] = []
    header: list[str] | None = None
    end = 0
    try:
        for row in reader:
            line, end = end + 1, reader.line_num
            if not row:
                continue
            if header is None:
                header = _header(name, row)
                continue
            if len(row) != len(header):
                raise PromptError(
                    f"{name}, line {line}: expected {len(header)} columns "
                    f"({', '.join(header)}), found {len(row)}. Put quotes around text that holds "
                    f"{delimiter!r} or a line break."
                )
            record = dict(zip(header, row, strict=True))
            prompts.append(_table_row(name, f"line {line}", line, record))
    except csv.Error as error:
        raise PromptError(f"{name}, line {reader.line_num}: not valid csv ({error}).") from None
    return prompts


def read_jsonl(name: str, data: bytes) -> list[Prompt]:
    """Read one JSON value a line: a record, a string or a list of token ids."""
    text = decode(name, data)
    prompts: list[Prompt] = []
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except (ValueError, RecursionError) as error:  # ValueError also for a number too long
            column = getattr(error, "colno", 1)
            reason = getattr(error, "msg", str(error))
            raise PromptError(
                f"{name}, line {number}, column {column}: not valid JSON ({reason}). Expected one "
                'value a line, such as {"text": "...", "domain": "..."}.'
            ) from None
        where = f"{name}, line {number}"
        prompts.append(to_prompt(value, where=where, source=f"{name}:{number}"))
    return prompts


def read_parquet(name: str, data: bytes) -> list[Prompt]:
    """Read the columns ``text`` (or ``ids``), ``domain`` and ``source`` of a Parquet table."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        file = pq.ParquetFile(pa.BufferReader(data))
        columns = _known_columns(name, file.schema_arrow.names)
        table = file.read(columns=columns)
        for column in columns:
            wanted = pa.list_(pa.int64()) if column == "ids" else pa.string()
            index = table.schema.get_field_index(column)
            try:
                values = table.column(index).cast(wanted)
            except (pa.ArrowInvalid, pa.ArrowNotImplementedError):
                raise PromptError(
                    f"{name}, column {column!r}: expected {wanted}, found "
                    f"{table.column(index).type}."
                ) from None
            table = table.set_column(index, column, values)
        rows = table.to_pylist()
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise PromptError(f"{name} is not a readable Parquet file: {error}.") from None
    return [_table_row(name, f"row {n}", n, row) for n, row in enumerate(rows, start=1)]


def decode(name: str, data: bytes) -> str:
    """Decode UTF-8, with or without a byte-order mark, or say where the file stops being text."""
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        column = error.start - (data.rfind(b"\n", 0, error.start) + 1) + 1
        raise PromptError(
            f"{name}, line {line}, column {column}: byte 0x{data[error.start]:02x} is not UTF-8. "
            "Save the file as UTF-8 text."
        ) from None
    if "\0" in text:
        line = text.count("\n", 0, text.index("\0")) + 1
        raise PromptError(
            f"{name}, line {line}: a zero byte; the file is not text. Expected UTF-8 text."
        )
    return text


def _table_row(name: str, place: str, number: int, record: Mapping[str, object]) -> Prompt:
    where = f"{name}, {place}"
    given = {key: value for key, value in record.items() if value not in (None, "")}
    if "text" in record and "text" not in given and "ids" not in given:
        raise PromptError(f"{where}, column 'text': empty. Remove the row, or write a prompt.")
    return to_prompt(given, where=where, source=f"{name}:{number}")


def _delimiter(text: str) -> str:
    """Return the delimiter under which the header has a column ``text``."""
    header = next((line for line in re.split(r"[\r\n]", text) if line.strip()), "")
    for delimiter in DELIMITERS:
        row = next(csv.reader([header], delimiter=delimiter), [])
        if "text" in [cell.strip().lower() for cell in row]:
            return delimiter
    return ","


def _header(name: str, row: Sequence[str]) -> list[str]:
    header = [cell.strip().lower() for cell in row]
    twice = sorted({column for column in header if header.count(column) > 1})
    if twice:
        raise PromptError(f"{name}, line 1: the column {twice[0]!r} appears twice.")
    if "text" not in header:
        raise PromptError(
            f"{name}, line 1: expected a header with a column 'text' (and perhaps 'domain'), "
            f"found {', '.join(map(repr, row[:20]))}. Rename the column or add a header line."
        )
    return ["" if column == "ids" else column for column in header]


def _known_columns(name: str, columns: Iterable[str]) -> list[str]:
    found = list(columns)
    if "text" not in found and "ids" not in found:
        raise PromptError(
            f"{name}: expected a column 'text' (and perhaps 'domain'), found "
            f"{', '.join(map(repr, found[:20])) or 'no column'}. Rename the column."
        )
    return [column for column in ("text", "ids", "domain", "source") if column in found]
