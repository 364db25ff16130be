"""Token texts join to the prompt, whatever the script; sampling shares tokens out fairly."""

import functools
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from capture.errors import PromptError
from capture.model.tokens import decode_pieces, piece_ends, tokenize
from capture.prompts import Prompt
from capture.recorder.estimate import plan_sample, quotas
from capture.recorder.record import template_of

WEIGHTS = Path(__file__).parents[2] / "capture" / "demo" / "weights"
HARD = [
    "👩‍👩‍👧‍👦 family",  # emoji joined by zero-width joiners
    "e\u0301a\u0308\u0323 n\u0303",  # combining marks
    "שלום עולם مرحبا",
    "中文 汉字，標點。",
    "<script>alert('&amp;')</script>",
    "  two leading, tabs\t\t and trailing  \n\n",
    "nul\x00 and \x7f controls \x1b[0m",
    "\ufeffbyte-order mark",
    "\ufffd already replaced",
    "<eos> spelled out <bos>",
]


@functools.cache
def demo_tokenizer():
    return AutoTokenizer.from_pretrained(WEIGHTS)


def tokenized(prompts, tokenizer=None, **options):
    options = {"vocab_size": 10**6, "max_length": None, **options}
    return tokenize(
        [p if isinstance(p, Prompt) else Prompt(p, None, None, "given") for p in prompts],
        tokenizer or demo_tokenizer(),
        **options,
    )


class WordTokenizer:
    """A double: splits at spaces, drops them, adds a first and a last token."""

    is_fast = True

    def __call__(self, texts, **options):
        assert options["return_offsets_mapping"]
        rows = {"input_ids": [], "offset_mapping": [], "special_tokens_mask": []}
        for text in texts:
            spans, cursor = [], 0
            for word in text.split(" "):
                if word:
                    spans.append((cursor, cursor + len(word)))
                cursor += len(word) + 1
            rows["input_ids"].append([1, *range(5, 5 + len(spans)), 2])
            rows["offset_mapping"].append([(0, 0), *spans, (0, 0)])
            rows["special_tokens_mask"].append([1, *[0] * len(spans), 1])
        return rows


@pytest.mark.parametrize("text", HARD)
def test_hard_texts_join(text):
    (prompt,) = tokenized([text])
    pieces = prompt.pieces()
    assert "".join(pieces) == text
    assert len(pieces) == len(prompt.ids)


@settings(max_examples=200, deadline=None)
@given(st.text(st.characters(codec="utf-8"), min_size=1, max_size=60))
@example("é" * 3)
def test_any_text_joins_and_decoding_gives_the_same_pieces(text):
    (prompt,) = tokenized([text])
    assert "".join(prompt.pieces()) == text
    tokenizer = demo_tokenizer()
    decoded = decode_pieces(tokenizer, prompt.ids.tolist())
    whole = tokenizer.decode(
        prompt.ids.tolist(), skip_special_tokens=True, clean_up_tokenization_spaces=False
    )
    assert "".join(decoded) == whole
    if not set(tokenizer.all_special_ids) & set(prompt.ids.tolist()):
        assert decoded == prompt.pieces()


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(0, 6143), min_size=1, max_size=40))
def test_any_ids_join_to_what_they_decode_to(ids):
    tokenizer = demo_tokenizer()
    pieces = decode_pieces(tokenizer, ids)
    whole = tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    assert len(pieces) == len(ids)
    assert "".join(pieces) == whole


def test_a_split_character_is_the_text_of_its_first_token():
    (prompt,) = tokenized(["a👧b"])
    pieces = prompt.pieces()
    assert len(pieces) > 3, "the emoji should take several tokens"
    assert [p for p in pieces if p] == ["a", "👧", "b"]
    assert pieces[1] == "👧"


def test_dropped_spaces_go_to_the_next_token_and_special_tokens_have_no_text():
    (prompt,) = tokenized(["  two words "], WordTokenizer())
    assert prompt.pieces() == ["", "  two", " words ", ""]


def test_a_text_without_tokens_of_its_own_keeps_its_text():
    assert piece_ends([(0, 0), (0, 0)], 3, [True, True]).tolist() == [0, 3]


def test_offsets_that_overlap_or_overshoot_still_join():
    assert piece_ends([(0, 2), (1, 2), (1, 9)], 4, [False] * 3).tolist() == [2, 2, 4]


def test_context_keeps_a_generated_character_whole():
    tokenizer = demo_tokenizer()
    ids = tokenizer("say 中文👧 now")["input_ids"]
    pieces = decode_pieces(tokenizer, ids[2:], ids[:2])
    assert tokenizer.decode(ids[:2]) + "".join(pieces) == "say 中文👧 now"


def test_words_after_special_tokens_keep_their_space():
    words = Tokenizer(models.WordLevel({"a": 0, "b": 1, "[UNK]": 2}, unk_token="[UNK]"))
    words.pre_tokenizer, words.decoder = pre_tokenizers.Whitespace(), decoders.WordPiece()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="[UNK]")
    assert decode_pieces(tokenizer, [0, 2, 2, 1, 1]) == ["a", "", "", " b", " b"]


def test_tokens_that_end_one_character_and_begin_the_next_lose_none():
    byte = list(pre_tokenizers.ByteLevel.alphabet())
    level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    spelled = level.pre_tokenize_str("日日日日日日日日")[0][0]
    parts = [spelled[0:2], *(spelled[i : i + 3] for i in range(2, 23, 3)), spelled[23:]]
    vocabulary = {piece: i for i, piece in enumerate(dict.fromkeys([*byte, *parts]))}
    model = Tokenizer(models.BPE(vocabulary, []))
    model.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=model)
    pieces = decode_pieces(tokenizer, [vocabulary[part] for part in parts])
    assert pieces == ["日"] * 8 + [""]


def test_ids_get_text_from_the_tokenizer_and_none_without():
    ids = tuple(demo_tokenizer()("straße")["input_ids"])
    (prompt,) = tokenized([Prompt(None, ids, None, "given")])
    assert (prompt.text, "".join(prompt.pieces())) == ("straße", "straße")
    (bare,) = tokenize([Prompt(None, ids, "d", "s")], None, vocab_size=6144, max_length=None)
    assert (bare.text, bare.pieces(), bare.domain, bare.source) == (None, None, "d", "s")


def test_a_tokenizer_without_offsets_gives_no_text():
    class Slow:
        is_fast = False

        def __call__(self, texts, **options):
            assert not options["return_offsets_mapping"]
            return {"input_ids": [[1, 2] for _ in texts]}

    (prompt,) = tokenized(["ab"], Slow())
    assert (prompt.text, prompt.pieces(), prompt.ids.tolist()) == ("ab", None, [1, 2])


def test_long_prompts_are_cut_and_counted():
    text = "one two three four five"
    (whole,) = tokenized([text])
    (cut,) = tokenized([text], max_length=3)
    assert cut.ids.tolist() == whole.ids[:3].tolist()
    assert cut.truncated == len(whole.ids) - 3
    assert "".join(cut.pieces()) == "".join(whole.pieces()[:3])
    assert cut.text == text


@pytest.mark.parametrize(
    ("prompt", "tokenizer", "message"),
    [
        (
            Prompt(None, (1, 99), None, "f:1"),
            None,
            r"Prompt 1 \(f:1\), position 1: token id 99 .*64",
        ),
        (
            Prompt("a", None, None, "given"),
            None,
            r"Prompt 1 is text, but the model has no tokenizer",
        ),
        (Prompt("  ", None, None, "given"), "empty", r"Prompt 1 \(given\) gives no token"),
    ],
)
def test_errors(prompt, tokenizer, message):
    class Empty:
        is_fast = True

        def __call__(self, texts, **_):
            return {"input_ids": [[]], "offset_mapping": [[]], "special_tokens_mask": [[]]}

    with pytest.raises(PromptError, match=message):
        tokenize([prompt], Empty() if tokenizer else None, vocab_size=64, max_length=None)


@given(st.lists(st.integers(0, 50), max_size=12), st.integers(0, 300))
def test_quotas_are_equal_where_they_can_be(sizes, total):
    shares = quotas(sizes, total)
    assert sum(shares) == min(total, sum(sizes))
    assert all(0 <= share <= size for share, size in zip(shares, sizes, strict=True))
    not_full = [share for share, size in zip(shares, sizes, strict=True) if share < size]
    if not_full:
        assert max(shares) <= min(not_full) + 1


def test_a_small_domain_leaves_its_share_to_the_others():
    sample = plan_sample(["law", "maths", None, "law"], [10, 2, 100, 10], 42, seed=3)
    taken = {entry["domain"]: entry["sampled"] for entry in sample.record["strata"]}
    assert taken == {"law": 20, "maths": 2, None: 20}
    assert sample.record["planned"] == int(sample.is_sampled.sum()) == 42
    assert sample.is_sampled[10:12].all()


def test_the_seed_decides_the_sample():
    plans = [plan_sample(["a"], [1000], 10, seed).is_sampled for seed in (0, 0, 1)]
    assert np.array_equal(plans[0], plans[1])
    assert not np.array_equal(plans[0], plans[2])


def test_no_sample_says_so():
    sample = plan_sample(["a"], [5], 0, seed=0)
    assert not sample.is_sampled.any()
    assert "sample_tokens=0" in sample.record["why"]


def test_a_conversation_has_the_tokens_of_its_chat_template(tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(WEIGHTS)
    chat = [{"role": "user", "content": "hi there"}]
    turns = "{% for m in messages %}[{{ m.role }}] {{ m.content }}{% endfor %}"
    turns += "{% if add_generation_prompt %}[assistant]{% endif %}"
    begins = TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 1)])
    assert tokenizer.convert_tokens_to_ids("<bos>") == 1
    prompt = Prompt(None, None, None, "given", tuple(chat))
    # what the tokenizer adds by itself, and what the template writes
    for added, template in ((begins, "<bos>" + turns), (begins, turns), (None, "<bos>" + turns)):
        if added is not None:
            tokenizer._tokenizer.post_processor = added
        for answers in (False, True):
            right = tokenizer.apply_chat_template(
                chat, chat_template=template, add_generation_prompt=answers
            )["input_ids"]
            found, plain = tokenized(
                [prompt, "hi"], tokenizer, chat_template=template, answers=answers
            )
            assert found.ids.tolist() == right and right.count(1) == template.count("<bos>")
            assert "".join(found.pieces()) == found.text and plain.text == "hi"
    for template, message in (
        (None, "a tokenizer without a chat template. Give one with --chat-template"),
        ("{{ raise_exception('roles must take turns') }}", "roles must take turns. Change"),
    ):
        with pytest.raises(PromptError, match=message):
            tokenized([prompt], tokenizer, chat_template=template)
    file = tmp_path / "turns.jinja"
    file.write_text(turns)
    assert template_of(turns) == template_of(file) == template_of(str(file)) == turns
