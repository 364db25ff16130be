"""Recording inside one's own loop: each text that the model reads, against that text alone."""

import duckdb
import pytest
import tiny_models
import torch
from own_loop import assert_recorded, padded

import capture
from capture.errors import CaptureError

pytestmark = pytest.mark.slow

TEXTS = [[5, 6, 7, 9, 11], [8, 9], [20, 21, 22, 23]]


def model(name="olmoe", **changes):
    return tiny_models.build(name, **changes)


@pytest.mark.parametrize(
    ("name", "side"),
    [("mixtral", "right"), ("deepseek_v3", "left"), ("qwen3_moe", "right"), ("gpt_oss", "left")],
)
def test_a_padded_batch_is_the_texts_in_it(tmp_path, name, side):
    own = model(name)
    ids, mask = padded(TEXTS, side=side)
    positions = (mask.cumsum(-1) - 1).clamp_min(0)
    with torch.no_grad():
        expected = own(input_ids=ids, attention_mask=mask, position_ids=positions).logits
        with capture.recording(own, tmp_path / "a.duckdb"):
            logits = own(input_ids=ids, attention_mask=mask, position_ids=positions).logits
            own(ids[:1], mask[:1])
    assert torch.equal(logits, expected), "the call computes what it computes without"
    assert_recorded(own, tmp_path / "a.duckdb", [(t, len(t)) for t in (*TEXTS, TEXTS[0])])


@pytest.mark.parametrize("name", ["olmoe", "deepseek_v3", "qwen3_next", "gpt_oss"])
def test_generate_records_prompts_and_what_was_fed_back(tmp_path, name):
    own = model(name)
    own.generation_config.eos_token_id = None
    ids, mask = padded(TEXTS, side="left")
    given = {"input_ids": ids, "attention_mask": mask, "max_new_tokens": 5, "do_sample": False}
    expected = own.generate(**given)
    with capture.recording(own, tmp_path / "a.duckdb") as run:
        out = own.generate(**given)
    assert run.error is None and torch.equal(out, expected)
    # the last token is generated, but never read
    whole = [(row + out[i, 5:-1].tolist(), len(row)) for i, row in enumerate(TEXTS)]
    assert_recorded(own, tmp_path / "a.duckdb", whole)


def test_what_cannot_be_followed_is_one_error_at_the_end(tmp_path):
    own = model()
    ids = torch.tensor([TEXTS[0]])
    with torch.no_grad():
        cache = own(ids, use_cache=True).cache
        with (
            pytest.raises(CaptureError, match="not seen reading") as error,
            capture.recording(own, tmp_path / "a.duckdb") as run,
        ):
            own(ids)
            logits = own(torch.tensor([[30]]), cache=cache).logits
            assert run.error is not None
            own(ids)
    assert logits.shape == (1, 1, 64), "the call went on"
    assert "incomplete run" in str(error.value)
    assert_recorded(own, tmp_path / "a.duckdb", [(TEXTS[0], 5)])


@pytest.mark.parametrize("how", ["lengths", "positions", "mask"])
def test_packed_texts_are_apart(tmp_path, how):
    own = model()
    ids = torch.tensor([[token for text in TEXTS for token in text]])
    places = torch.tensor([[n for text in TEXTS for n in range(len(text))]])
    given = {"input_ids": ids, "use_cache": False}
    if how == "positions":
        given["position_ids"] = places
    elif how == "lengths":
        # sdpa takes the positions, flash attention the lengths
        lengths = torch.tensor([0, *(len(text) for text in TEXTS)]).cumsum(0)
        given |= {"position_ids": places, "cu_seq_lens_q": lengths, "cu_seq_lens_k": lengths}
    else:
        of = torch.repeat_interleave(torch.arange(3), torch.tensor([len(t) for t in TEXTS]))
        seen = (of[:, None] == of[None]) & torch.ones(len(of), len(of), dtype=torch.bool).tril()
        given |= {"attention_mask": seen[None, None], "position_ids": places}
    with torch.no_grad(), capture.recording(own, tmp_path / "a.duckdb") as run:
        run.prompts([{"text": "a", "domain": "x"}, {"domain": "y"}, "c"])
        own(**given)
    assert_recorded(own, tmp_path / "a.duckdb", [(t, len(t)) for t in TEXTS])
    with duckdb.connect(str(tmp_path / "a.duckdb"), read_only=True) as file:
        said = file.sql("SELECT text, domain FROM prompts ORDER BY prompt_id").fetchall()
        tokens = file.sql(
            "SELECT domain, sum(assignments) / 9, sum(prob_sum) / 3 FROM expert_load_by"
            " GROUP BY domain ORDER BY domain"
        ).fetchall()
    assert said == [("a", "x"), (None, "y"), ("c", None)]
    assert [row[:2] for row in tokens] == [("x", 5), ("y", 2), (None, 4)]
    assert [row[2] for row in tokens] == pytest.approx([5, 2, 4], rel=1e-5)


@pytest.mark.parametrize(("chunk", "cache"), [(2, None), (None, "static"), (2, "static")])
def test_chunked_prefill_and_static_caches(tmp_path, chunk, cache):
    own = model("mixtral")
    own.generation_config.eos_token_id = None
    ids, mask = padded(TEXTS, side="left")
    with capture.recording(own, tmp_path / "a.duckdb"):
        out = own.generate(
            input_ids=ids, attention_mask=mask, max_new_tokens=4, do_sample=False,
            prefill_chunk_size=chunk, cache_implementation=cache,
        )  # fmt: skip
    whole = [(row + out[i, 5:-1].tolist(), len(row)) for i, row in enumerate(TEXTS)]
    assert_recorded(own, tmp_path / "a.duckdb", whole)


@pytest.mark.parametrize("keeps", [True, False])
def test_the_beams_that_are_returned_are_kept(tmp_path, keeps):
    own = model("mixtral")
    own.generation_config.eos_token_id = [40, 41, 42]
    ids, mask = padded(TEXTS, side="left")
    with capture.recording(own, tmp_path / "a.duckdb"):
        out = own.generate(
            input_ids=ids, attention_mask=mask, max_new_tokens=6, num_beams=4,
            num_return_sequences=2, do_sample=False, use_cache=keeps,
        )  # fmt: skip
    whole = []
    for number, row in enumerate(out[:, 5:].tolist()):
        end = next((n for n, t in enumerate(row) if t in (40, 41, 42)), None)
        text = TEXTS[number // 2]
        whole.append((text + (row[:-1] if end is None else row[:end]), len(text)))
    assert len({len(text) for text, _ in whole}) > 1
    assert_recorded(own, tmp_path / "a.duckdb", whole)


@pytest.mark.parametrize("keeps", [True, False])
def test_nothing_counts_after_an_end_token(tmp_path, keeps):
    own = model()
    own.generation_config.eos_token_id = None
    ids, mask = padded(TEXTS, side="left")
    given = {"input_ids": ids, "attention_mask": mask, "max_new_tokens": 6, "do_sample": False}
    free = own.generate(**given)[:, 5:].tolist()
    end = next(row[2] for row in free if row[2] not in row[:2])
    with capture.recording(own, tmp_path / "a.duckdb"):
        out = own.generate(**given, eos_token_id=end, use_cache=keeps)[:, 5:].tolist()
    whole = []
    for text, row in zip(TEXTS, out, strict=True):
        stop = row.index(end) + 1 if end in row else len(row) - 1
        whole.append((text + row[: min(stop, len(row) - 1)], len(text)))
    assert len({len(text) - n for text, n in whole}) > 1, "rows should end at different steps"
    assert_recorded(own, tmp_path / "a.duckdb", whole)


@pytest.mark.parametrize("how", ["model", "lookup"])
def test_rejected_candidates_do_not_count(tmp_path, how):
    own, small = model("mixtral"), model("mixtral", seed=0, num_hidden_layers=2)
    own.generation_config.eos_token_id = None
    ids = torch.tensor([[5, 6, 7, 5, 6, 7, 5]])
    given = {"input_ids": ids, "max_new_tokens": 9, "do_sample": False}
    expected = own.generate(**given)
    helper = {"assistant_model": small} if how == "model" else {"prompt_lookup_num_tokens": 3}
    passes = []
    handle = own.model.register_forward_hook(lambda *_: passes.append(1))
    with capture.recording(own, tmp_path / "a.duckdb") as run:
        out = own.generate(**given, **helper)
    handle.remove()
    assert run.error is None and torch.equal(out, expected)
    text = out[0, :-1].tolist()
    assert_recorded(own, tmp_path / "a.duckdb", [(text, 7)])
