"""Train the byte-level tokenizer and encode the corpus to token streams."""

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from tqdm import tqdm

from capture.demo.corpus import read_lines
from capture.demo.sources import DOMAIN_NAMES

VOCABULARY = 6144
BYTES_PER_DOMAIN = 1_200_000
DOCUMENT_CHARACTERS = 20_000
MAX_TOKEN_LENGTH = 16
CONTEXT = 1024
SPECIAL_TOKENS = ("<pad>", "<bos>", "<eos>", "<unk>")
BOS, EOS = 1, 2
# the GPT-4 pattern with numbers in at most two digits
PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,2}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def _training_texts(corpus: Path) -> Iterator[str]:
    for domain in DOMAIN_NAMES:
        size = 0
        for document in read_lines(corpus / "train" / f"{domain}.jsonl"):
            yield document["text"][:DOCUMENT_CHARACTERS]
            size += len(document["text"].encode())
            if size > BYTES_PER_DOMAIN:
                break


def train_tokenizer(corpus: Path, folder: Path) -> None:
    """Train a byte-level BPE on an equal share of every domain.

    Parameters
    ----------
    corpus : Path
        The corpus folder.
    folder : Path
        Where ``tokenizer.json`` and ``tokenizer_config.json`` go.
    """
    tokenizer = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(PATTERN), "isolated")
    bytes_only = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, bytes_only])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        max_token_length=MAX_TOKEN_LENGTH,
    )
    tokenizer.train_from_iterator(_training_texts(corpus), trainer)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    roles = ("pad_token", "bos_token", "eos_token", "unk_token")
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": CONTEXT,
        **dict(zip(roles, SPECIAL_TOKENS, strict=True)),
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=1) + "\n")


def encode_texts(tokenizer: Tokenizer, texts: list[str]) -> np.ndarray:
    """Encode documents to one stream, each between ``<bos>`` and ``<eos>``."""
    parts = [
        np.array([BOS, *encoding.ids, EOS], dtype=np.uint16)
        for start in range(0, len(texts), 256)
        for encoding in tokenizer.encode_batch(texts[start : start + 256])
    ]
    return np.concatenate(parts)


def encode_corpus(corpus: Path, tokenizer_folder: Path, encoded: Path) -> None:
    """Encode the train and validation splits to ``SPLIT/DOMAIN.npy``.

    Parameters
    ----------
    corpus : Path
        The corpus folder.
    tokenizer_folder : Path
        Folder of ``tokenizer.json``.
    encoded : Path
        Where the streams go.
    """
    tokenizer = Tokenizer.from_file(str(tokenizer_folder / "tokenizer.json"))
    for domain in tqdm(DOMAIN_NAMES, desc="encode", unit="domain"):
        for split in ("train", "validation"):
            texts = [line["text"] for line in read_lines(corpus / split / f"{domain}.jsonl")]
            path = encoded / split / f"{domain}.npy"
            path.parent.mkdir(parents=True, exist_ok=True)
            np.save(path, encode_texts(tokenizer, texts))
