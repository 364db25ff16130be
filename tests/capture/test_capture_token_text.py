"""Every character stands on the token that holds its first byte, whatever the tokenizer."""

import functools
import json
import unicodedata

import duckdb
import pytest
import tiny_models
from tokenizers import (
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import ByT5Tokenizer, PreTrainedTokenizer, PreTrainedTokenizerFast

import capture
from capture.model.token_text import piece_ends
from capture.model.tokens import decode_pieces, tokenize
from capture.prompts import Prompt

TEXTS = {
    "latin": "The quick brown fox, naïve café.",
    "mixed": "7 a 日本 x",
    "cjk": "日本語 中文，汉字。",
    "emoji": "hi 👩‍👩‍👧‍👦 🙂🙂! 🙂",
    "crlf": "one\r\ntwo\r\n\r\nthree",
    "marks": "e\u0301a\u0308\u0323 n\u0303 \u00c5",
    "spaces": "  two lead, tab\t\t end  ",
    "lines": "\n\nstart\n",
    "dashes": "–—… “x”",
}
CORPUS = [
    "the quick brown fox jumps over the lazy dog, one two three a x hi start end lead tab"
] * 3
LETTERS = sorted({c for text in TEXTS.values() for c in text if c not in " \r\n\t"})
BYTES = [f"<0x{value:02X}>" for value in range(256)]


def changed(tokenizer, change):
    """Return a tokenizer after a change to its JSON."""
    state = json.loads(tokenizer.to_str())
    change(state)
    return Tokenizer.from_str(json.dumps(state))


def sentencepiece_bpe(*, fallback, prefix, letters):
    words = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=fallback, fuse_unk=True))
    steps = [normalizers.Replace(" ", "▁")]
    words.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), *steps] if prefix else steps)
    special = ["<unk>", "<s>", *(BYTES if fallback else [])]
    words.train_from_iterator(
        CORPUS,
        trainers.BpeTrainer(
            vocab_size=600, special_tokens=special, initial_alphabet=letters, show_progress=False
        ),
    )

    def bytes_are_plain(state):
        state["added_tokens"] = [t for t in state["added_tokens"] if t["content"] not in BYTES]

    words = changed(words, bytes_are_plain)
    words.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            *([decoders.ByteFallback()] if fallback else []),
            decoders.Fuse(),
            *([decoders.Strip(" ", 1, 0)] if prefix else []),
        ]
    )
    return PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>", bos_token="<s>")


def unigram(*, fallback, prefix, letters):
    words = Tokenizer(models.Unigram())
    scheme = "always" if prefix else "never"
    words.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)
    words.train_from_iterator(
        CORPUS,
        trainers.UnigramTrainer(
            vocab_size=300, special_tokens=["<unk>", "<s>"], unk_token="<unk>",
            initial_alphabet=letters, show_progress=False,
        ),
    )  # fmt: skip

    def with_bytes(state):
        have = {piece for piece, _ in state["model"]["vocab"]}
        more = [piece for piece in ["▁", *letters] if piece not in have]
        state["model"]["vocab"] += [[piece, -9.0] for piece in more]
        state["model"]["byte_fallback"] = fallback
        if fallback:
            state["model"]["vocab"] += [[piece, -20.0] for piece in BYTES]

    words = changed(words, with_bytes)
    blanks = decoders.Metaspace(prepend_scheme=scheme)
    words.decoder = decoders.Sequence([decoders.ByteFallback(), blanks]) if fallback else blanks
    return PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>", bos_token="<s>")


def byte_level(*, prefix=False, trim=False):
    words = Tokenizer(models.BPE())
    words.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix)
    words.train_from_iterator(
        [*CORPUS, "日本 日本 🙂🙂"],
        trainers.BpeTrainer(
            vocab_size=330, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )  # fmt: skip
    words.decoder = decoders.ByteLevel()
    words.post_processor = processors.ByteLevel(trim_offsets=trim)
    return PreTrainedTokenizerFast(tokenizer_object=words)


def wordpiece():
    words = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    words.normalizer = normalizers.BertNormalizer(lowercase=True)
    words.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    words.train_from_iterator(
        CORPUS,
        trainers.WordPieceTrainer(
            vocab_size=200, special_tokens=["[UNK]", "[CLS]", "[SEP]"], show_progress=False
        ),
    )
    words.decoder = decoders.WordPiece(cleanup=False)
    words.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=words, unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]"
    )


EXACT = {
    f"{name}{' fallback' if fallback else ''}{' prefix' if prefix else ''}": functools.partial(
        make, fallback=fallback, prefix=prefix, letters=[] if fallback else [*LETTERS, *"\r\n\t"]
    )
    for name, make in (("bpe", sentencepiece_bpe), ("unigram", unigram))
    for fallback in (False, True)
    for prefix in (False, True)
} | {
    f"byte level{' prefix' if prefix else ''}{' trimmed' if trim else ''}": functools.partial(
        byte_level, prefix=prefix, trim=trim
    )
    for prefix in (False, True)
    for trim in (False, True)
}
UNKNOWN = {
    f"{name}{' prefix' if prefix else ''}": functools.partial(
        make, fallback=False, prefix=prefix, letters=[]
    )
    for name, make in (("bpe", sentencepiece_bpe), ("unigram", unigram))
    for prefix in (False, True)
} | {"wordpiece": wordpiece}


@functools.cache
def made(name, kinds):
    return {"exact": EXACT, "unknown": UNKNOWN}[kinds][name]()


def recorded(tokenizer, text):
    (prompt,) = tokenize(
        [Prompt(text, None, None, "x")], tokenizer, vocab_size=10**6, max_length=None
    )
    return prompt.ids.tolist(), prompt.pieces()


def bytes_of(tokenizer, token):
    """Return the bytes that a piece of a vocabulary stands for."""
    if token in BYTES:
        return bytes([int(token[3:5], 16)])
    if "ByteLevel" in str(tokenizer.backend_tokenizer.decoder):
        return bytes(ALPHABET[letter] for letter in token)
    return token.replace("▁", " ").encode()


def byte_alphabet():
    """Return the byte of each letter of a byte-level vocabulary, from published GPT-2 code."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in printable]
    letters = {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}
    assert set(letters) == set(pre_tokenizers.ByteLevel.alphabet())
    return letters


ALPHABET = byte_alphabet()


def on_first_bytes(tokenizer, ids, text):
    """Return the text of each token: the characters whose first byte it holds."""
    parts = [bytes_of(tokenizer, token) for token in tokenizer.convert_ids_to_tokens(ids)]
    added = len(b"".join(parts)) - len(text.encode())
    assert b"".join(parts) == b" " * added + text.encode()
    owner = [i for i, part in enumerate(parts) for _ in part][added:]
    pieces, place = [""] * len(parts), 0
    for character in text:
        pieces[owner[place]] += character
        place += len(character.encode())
    return pieces


@pytest.mark.parametrize("kind", EXACT)
def test_texts_stand_on_their_first_bytes(kind):
    tokenizer = made(kind, "exact")
    for text in TEXTS.values():
        ids, pieces = recorded(tokenizer, text)
        assert pieces == on_first_bytes(tokenizer, ids, text)
        decoded = decode_pieces(tokenizer, ids)
        whole = tokenizer.decode(ids, clean_up_tokenization_spaces=False)
        assert "".join(decoded) == whole
        if whole == text:
            assert decoded == pieces
        else:  # decoding keeps or drops one blank at the start, whoever put it there
            added = len(whole) - len(text)
            assert abs(added) == 1
            assert whole.lstrip() == text.lstrip()
            assert [p for p in decoded if p.strip()][1:] == [p for p in pieces if p.strip()][1:]


@pytest.mark.parametrize("kind", UNKNOWN)
def test_unknown_characters_stand_on_the_unknown_token(kind):
    tokenizer = made(kind, "unknown")

    def plain(text):
        parts = unicodedata.normalize("NFD", text.strip()).lower()
        return "".join(c for c in parts if not unicodedata.combining(c))

    for text in TEXTS.values():
        ids, pieces = recorded(tokenizer, text)
        assert "".join(pieces) == text
        for token, piece in zip(tokenizer.convert_ids_to_tokens(ids), pieces, strict=True):
            if token == tokenizer.unk_token:
                assert piece
            elif token not in tokenizer.all_special_tokens:
                assert plain(piece) == plain(token.removeprefix("##").replace("▁", " "))


def test_a_prefix_in_the_middle_of_a_text_has_no_text():
    tokenizer = made("bpe prefix", "exact")
    ids, pieces = recorded(tokenizer, "a<s>7 x")
    named = tokenizer.convert_ids_to_tokens(ids)
    assert dict(zip(named, pieces, strict=True))["<s>"] == "<s>"
    assert "".join(pieces) == "a<s>7 x"
    assert pieces[named.index("7")] == "7"


def test_a_prefix_spelled_in_bytes_has_no_text():
    """The blank that is put before a text is no piece of this vocabulary, so bytes spell it."""
    vocabulary = {piece: i for i, piece in enumerate(["<unk>", "7", "a", *BYTES])}
    words = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>", byte_fallback=True))
    words.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    words.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>")
    assert recorded(tokenizer, "7 a")[1] == ["", "", "", "7", " ", "", "", "a"]
    assert recorded(tokenizer, "日a")[1] == ["", "", "", "日", "", "", "a"]


def test_several_tokens_of_one_span_share_its_characters():
    """A unigram model gives all bytes of an unknown stretch the span of the whole stretch."""
    tokenizer = made("unigram fallback", "exact")
    encoded = tokenizer("日本", return_offsets_mapping=True)
    assert encoded["offset_mapping"] == [(0, 2)] * 6
    assert recorded(tokenizer, "日本")[1] == ["日", "", "", "本", "", ""]


def test_marks_that_a_normaliser_drops_stay_with_their_letter():
    _, pieces = recorded(made("wordpiece", "unknown"), "e\u0301a\u0308\u0323 x")
    assert "".join(pieces) == "e\u0301a\u0308\u0323 x"
    assert not any(unicodedata.combining(piece[:1] or "x") for piece in pieces)


class PythonWords(PreTrainedTokenizer):
    """Whole words in lower case, spaces dropped, with a first token; no offsets."""

    def __init__(self, words, **options):
        self._words = ["<unk>", "<s>", *words]
        super().__init__(unk_token="<unk>", bos_token="<s>", **options)

    @property
    def vocab_size(self):
        return len(self._words)

    def get_vocab(self):
        return {word: i for i, word in enumerate(self._words)}

    def _tokenize(self, text, **_):
        return text.lower().split()

    def _convert_token_to_id(self, token):
        return self._words.index(token) if token in self._words else 0

    def _convert_id_to_token(self, index):
        return self._words[index]

    def convert_tokens_to_string(self, tokens):
        return " ".join(tokens)

    def build_inputs_with_special_tokens(self, token_ids_0, token_ids_1=None):
        return [1, *token_ids_0]


@pytest.mark.parametrize("name", TEXTS)
def test_a_tokenizer_without_offsets_that_keeps_every_byte(name):
    text = TEXTS[name]
    ids, pieces = recorded(ByT5Tokenizer(), text)
    expected = [
        part for c in text for part in [c, *[""] * (len(c.encode()) - 1)]
    ]  # one token a byte, and one more that ends the text
    assert pieces == [*expected, ""]
    assert decode_pieces(ByT5Tokenizer(), ids) == pieces


def test_a_tokenizer_without_offsets_that_changes_the_text():
    tokenizer = PythonWords(["the", "fox", "is", "quick"])
    assert not tokenizer.is_fast
    ids, pieces = recorded(tokenizer, " The  FOX über Is\r\nquick ")
    assert tokenizer.convert_ids_to_tokens(ids) == ["<s>", "the", "fox", "<unk>", "is", "quick"]
    assert pieces == ["", " The", "  FOX", " über", " Is", "\r\nquick "]
    assert recorded(tokenizer, "<s> the wolf")[1] == ["<s>", " the", " wolf"]


def test_offsets_alone_are_enough_where_no_span_is_shared():
    assert piece_ends([(0, 1), (1, 3)], 3, [False, False]).tolist() == [1, 3]


def llama_like():
    """Return a tokenizer that begins every text with <s> and ends it with </s>."""
    tokenizer = byte_level()
    tokenizer.add_special_tokens({"bos_token": "<s>", "eos_token": "</s>"})
    ids = [(name, tokenizer.convert_tokens_to_ids(name)) for name in ("<s>", "</s>")]
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=ids
    )
    return tokenizer


@pytest.mark.parametrize(
    ("text", "names", "pieces"),
    [
        ("x", ["<s>", "x", "</s>"], ["", "x", ""]),
        ("<s>x", ["<s>", "x", "</s>"], ["<s>", "x", ""]),
        ("x</s>", ["<s>", "x", "</s>"], ["", "x", "</s>"]),
        ("<s>x</s>", ["<s>", "x", "</s>"], ["<s>", "x", "</s>"]),
        ("<s>", ["<s>", "</s>"], ["<s>", ""]),
        ("<s><s>x", ["<s>", "<s>", "x", "</s>"], ["<s>", "<s>", "x", ""]),
        ("a<s>x", ["<s>", "a", "<s>", "x", "</s>"], ["", "a", "<s>", "x", ""]),
    ],
)
def test_a_special_token_that_a_text_spells_out_is_not_added_again(text, names, pieces):
    tokenizer = llama_like()
    ids, found = recorded(tokenizer, text)
    assert tokenizer.convert_ids_to_tokens(ids) == names
    assert found == pieces


def test_a_tokenizer_without_offsets_does_not_repeat_its_first_token_either():
    tokenizer = PythonWords(["the", "fox"])
    assert recorded(tokenizer, "<s> the fox") == ([1, 2, 3], ["<s>", " the", " fox"])


def test_a_run_says_that_special_tokens_were_spelled_out(tmp_path):
    out = tmp_path / "run.duckdb"
    model = tiny_models.build("mixtral", vocab_size=400)
    texts = ["<s>x", "x", "<s>x</s>"]
    capture.record(model, texts, out, tokenizer=llama_like(), progress=False)
    with duckdb.connect(str(out), read_only=True) as run:
        notes = json.loads(run.execute("select notes from run").fetchone()[0])
        counts = run.execute("select count(*) from tokens group by prompt_id").fetchall()
    assert notes["special_tokens"].startswith("2 prompts spell out special tokens")
    assert counts == [(3,)] * 3


def test_generated_tokens_of_a_tokenizer_without_offsets_have_text(tmp_path):
    out = tmp_path / "run.duckdb"
    tokenizer = PythonWords([f"w{i}" for i in range(62)])
    model = tiny_models.build("mixtral", eos_token_id=None)
    capture.record(model, ["w5 W7"], out, tokenizer=tokenizer, generate=2, progress=False)
    with duckdb.connect(str(out), read_only=True) as run:
        rows = run.execute("select token, text from tokens order by position").fetchall()
        notes = json.loads(run.execute("select notes from run").fetchone()[0])
    assert [text for _, text in rows[:3]] == ["", "w5", " W7"]
    assert [text.strip() for _, text in rows[3:]] == [
        "" if token < 2 else f"w{token - 2}" for token, _ in rows[3:]
    ]
    assert notes["text"].endswith("the text of tokens was found by decoding.")
