"""Prepare the corpus: documents per domain, split so that held-out text is never trained on."""

import hashlib
import json
import lzma
import random
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

from capture.demo.extract import EXTRACTORS, MORE_TRAINING
from capture.demo.sources import DOMAINS, PACKAGES, Domain

HELD_OUT_PERCENT = 4
SHUFFLE_SEED = 1234
TRAIN_BYTES = 10_000_000  # cap a domain
VALIDATION_BYTES = 150_000  # cap a domain; the prototype's held-out split
FIT_BYTES = 250_000  # cap a domain
HELDOUT_BYTES = 110_000  # cap a domain
FIT_SHARE = 3  # of every four held-out documents, three fit routers and one judges them
# about 190 tokens: the model was trained on windows of 256 and reads badly beyond about 300
PIECE_BYTES = 560


class Document(NamedTuple):
    """One document: all texts of one key stay on the same side of every split.

    Attributes
    ----------
    key : str
        Path or name within the source.
    text : str
        The text.
    """

    key: str
    text: str


class Split(NamedTuple):
    """The documents of one domain.

    Attributes
    ----------
    train : list of Document
        Trained on.
    validation : list of Document
        The prototype's held-out split, where bits per byte are compared.
    fit : list of Document
        Held out; for fitting routers.
    heldout : list of Document
        Held out; for judging routers. Shares no document with ``fit``.
    """

    train: list[Document]
    validation: list[Document]
    fit: list[Document]
    heldout: list[Document]


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
    """Split the documents of one domain.

    Parameters
    ----------
    documents : iterable of (key, text)
        The documents that the prototype saw, in its order: its shuffle is repeated here.
    more_training : iterable of (key, text)
        Further documents, for training only.

    Returns
    -------
    Split
        Training text, the prototype's held-out split, and the texts for fit and heldout.
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


def describe_source(domain: Domain) -> str:
    """Name the packages of a domain."""
    return ", ".join(
        f"{package.client} {package.name} {package.version}".strip()
        for package in PACKAGES
        if package.folder in domain.packages
    )


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
    """Write ``SPLIT/DOMAIN.jsonl`` for every split and domain.

    Parameters
    ----------
    unpacked : Path
        The folder that `capture.demo.fetch.fetch` returned.
    corpus : Path
        Where to write.
    """
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
