"""From the corpus to training windows: tokenizer, token streams, and draws from them."""

import itertools
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from tqdm import tqdm

from capture.demo.corpus import read_lines
from capture.demo.sources import DOMAIN_NAMES, DOMAINS
from capture.errors import CaptureError

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
WINDOW = 256  # tokens
LONG_WINDOW = CONTEXT
LONG_EVERY = 4  # every fourth step draws long windows


def _training_texts(corpus: Path) -> Iterator[str]:
    for domain in DOMAIN_NAMES:
        size = 0
        for document in read_lines(corpus / "train" / f"{domain}.jsonl"):
            yield document["text"][:DOCUMENT_CHARACTERS]
            size += len(document["text"].encode())
            if size > BYTES_PER_DOMAIN:
                break


def train_tokenizer(corpus: Path, folder: Path) -> None:
    """Train a byte-level BPE on an equal share of every domain, and write its files."""
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
    """Encode the train and validation splits to ``SPLIT/DOMAIN.npy`` in the folder ``encoded``."""
    tokenizer = Tokenizer.from_file(str(tokenizer_folder / "tokenizer.json"))
    for domain in tqdm(DOMAIN_NAMES, desc="encode", unit="domain"):
        for split in ("train", "validation"):
            texts = [line["text"] for line in read_lines(corpus / split / f"{domain}.jsonl")]
            path = encoded / split / f"{domain}.npy"
            path.parent.mkdir(parents=True, exist_ok=True)
            np.save(path, encode_texts(tokenizer, texts))


def load_streams(encoded: Path, split: str) -> list[np.ndarray]:
    """Open the token stream of every domain, in the order of `DOMAINS`.

    Raises
    ------
    CaptureError
        If the corpus was not prepared.
    """
    paths = [encoded / split / f"{domain.name}.npy" for domain in DOMAINS]
    missing = next((path for path in paths if not path.is_file()), None)
    if missing is not None:
        raise CaptureError(
            f"The prepared corpus was expected, but there is no {missing}. Make it with: "
            f"python -m capture.demo.train --corpus-only --work '{encoded.parent}'"
        )
    return [np.load(path, mmap_mode="r") for path in paths]


def domain_order(weights: list[float], seed: int) -> Iterator[int]:
    """Yield domain numbers for ever, each domain once a round before any repeats.

    A domain of weight ``w < 1`` takes part in a share ``w`` of the rounds.
    """
    generator = np.random.default_rng(seed)
    for round_number in itertools.count():
        present = [
            number
            for number, weight in enumerate(weights)
            if int((round_number + 1) * weight) > int(round_number * weight)
        ]
        yield from generator.permutation(present).tolist()


class WindowSampler:
    """Training batches for one process of ``world``, the same after a restart at any step.

    ``batch`` are windows of `WINDOW` tokens; the seed decides the order of domains and the places.
    """

    def __init__(
        self,
        streams: list[np.ndarray],
        *,
        batch: int,
        rank: int,
        world: int,
        seed: int,
        first_step: int = 0,
    ) -> None:
        self._streams = streams
        self._batch, self._rank, self._world, self._seed = batch, rank, world, seed
        self._step = first_step
        self._order = domain_order([domain.weight for domain in DOMAINS], seed)
        # draw what the earlier steps drew
        for step in range(first_step):
            for _ in range(self._shape(step)[0] * world):
                next(self._order)

    def _shape(self, step: int) -> tuple[int, int]:
        # windows and their length; long ones take about as many tokens in all
        if (step + 1) % LONG_EVERY:
            return self._batch, WINDOW
        return max(1, self._batch * WINDOW // LONG_WINDOW), LONG_WINDOW

    def draw(self) -> torch.Tensor:
        """Draw the next batch, [windows, length + 1] int64; the last of each row is only a target.

        ``length`` is `WINDOW`, and `LONG_WINDOW` at every `LONG_EVERY`-th step, with fewer windows.
        """
        windows, length = self._shape(self._step)
        domains = list(itertools.islice(self._order, windows * self._world))
        places = np.random.default_rng([self._seed, self._step, self._rank])
        rows = []
        for number in domains[self._rank :: self._world]:
            stream = self._streams[number]
            start = int(places.integers(0, len(stream) - length - 1))
            rows.append(stream[start : start + length + 1].astype(np.int64))
        self._step += 1
        return torch.from_numpy(np.stack(rows))


def cut_windows(stream: np.ndarray, limit: int | None = None) -> torch.Tensor:
    """Cut a stream into neighbouring windows, [windows, WINDOW + 1] int64.

    Of more than ``limit``, as many are taken, evenly spread over the stream.
    """
    count = (len(stream) - 1) // WINDOW
    starts = np.arange(count) * WINDOW
    if limit is not None and limit < count:
        starts = starts[np.linspace(0, count - 1, limit).astype(int)]
    rows = [stream[start : start + WINDOW + 1].astype(np.int64) for start in starts]
    return torch.from_numpy(np.stack(rows))
