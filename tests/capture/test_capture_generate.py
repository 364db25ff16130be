"""Decoding with the cache: the model's own greedy text, and the routing of each of its tokens."""

import pytest
import tiny_models
import torch
from test_capture_session import (
    STORED,
    TOLERANCE,
    assert_same_routing,
    demo,
    ids_by_token,
    margins,
    record,
    table,
    tiny,
    unequal,
)

from capture.store import RunReader

pytestmark = pytest.mark.slow

TOKENS = "SELECT prompt_id, position, token, text, loss, phase, token_id FROM tokens ORDER BY ALL"


def generated(path):
    """Token ids of each prompt's generated part."""
    rows = table(path, TOKENS)
    result = {}
    for prompt, token, phase in zip(rows["prompt_id"], rows["token"], rows["phase"], strict=True):
        result.setdefault(prompt, [])
        if phase == "generated":
            result[prompt].append(token)
    return [result[prompt] for prompt in sorted(result)]


def greedy(model, prompt, n, end_ids=()):
    """Decode one prompt without a cache, by the definition."""
    ids = list(prompt)
    for _ in range(n):
        with torch.inference_mode():
            logits = model(input_ids=torch.tensor([ids]), use_cache=False).logits
        ids.append(int(logits[0, -1].argmax()))
        if ids[-1] in end_ids:
            break
    return ids[len(prompt) :]


@pytest.mark.parametrize(
    "model_type", ["olmoe", "deepseek_v3", "gpt_oss", "qwen3_next", "granitemoe"]
)
def test_generated_tokens_and_their_routing_are_the_models_own(tmp_path, model_type):
    model, prompts = tiny(model_type), unequal(5, longest=12)
    path = record(model, prompts, tmp_path / "a.duckdb", generate=6, batch_tokens=60)
    end = model.generation_config.eos_token_id
    expected = [greedy(model, prompt, 6, {end}) for prompt in prompts]
    assert generated(path) == expected

    whole = [prompt + text for prompt, text in zip(prompts, expected, strict=True)]
    other = record(model, whole, tmp_path / "b.duckdb", batch_tokens=1)
    mine = table(path, TOKENS)
    place = {
        (prompt, position): token_id
        for prompt, position, token_id in zip(
            mine["prompt_id"], mine["position"], mine["token_id"], strict=True
        )
    }
    losses = dict(zip(mine["token_id"], mine["loss"], strict=True))
    routing, gates = ids_by_token(path), margins(path)
    again, again_gates = ids_by_token(other), margins(other)
    rows = table(other, TOKENS)
    assert len(rows["token_id"]) == len(losses)
    for prompt, position, loss, token_id in zip(
        rows["prompt_id"], rows["position"], rows["loss"], rows["token_id"], strict=True
    ):
        at = place[prompt, position]
        for layer in {layer for _, layer, _ in routing}:
            ids, weights = routing[at, layer, 0]
            margin = gates[at, layer, 0][0]
            if margin is not None and abs(margin) < TOLERANCE:
                continue
            other_ids, other_weights = again[token_id, layer, 0]
            assert sorted(ids) == sorted(other_ids), (prompt, position, layer)
            assert sorted(weights) == pytest.approx(sorted(other_weights), rel=STORED, abs=1e-3)
            assert gates[at, layer, 0] == pytest.approx(
                again_gates[token_id, layer, 0], rel=STORED, abs=1e-3
            )
        if position != len(prompts[prompt]) - 1:
            assert losses[at] == (None if loss is None else pytest.approx(loss, abs=1e-3))
        else:
            assert losses[at] is None, "the last token of a prompt has no next one"


def test_prompts_are_recorded_as_without_decoding(tmp_path):
    """Left padding and position ids change nothing for the prompt's own tokens."""
    prompts = unequal()
    plain = record(tiny("mixtral"), prompts, tmp_path / "a.duckdb", batch_tokens=500)
    decoded = record(tiny("mixtral"), prompts, tmp_path / "b.duckdb", batch_tokens=500, generate=1)
    n_tokens = sum(map(len, prompts))
    with RunReader.open(decoded) as run:
        assert run.info["n_generated"] == len(prompts)
        assert run.info["n_tokens"] == n_tokens + len(prompts)
    kept = {k: v for k, v in ids_by_token(decoded).items() if k[0] < n_tokens}
    assert kept.keys() == ids_by_token(plain).keys()
    margin = margins(plain)
    for key, (ids, weights) in ids_by_token(plain).items():
        if abs(margin[key][0]) >= TOLERANCE:
            assert kept[key][0] == ids
            assert kept[key][1] == pytest.approx(weights, rel=STORED)


def test_an_end_token_ends_its_row_only(tmp_path):
    model = tiny_models.build("olmoe")
    prompts = unequal(6)
    free = [greedy(model, prompt, 8) for prompt in prompts]
    end = next(text[2] for text in free if text[2] not in text[:2])
    model.generation_config.eos_token_id = [end, 63]
    expected = [greedy(model, prompt, 8, {end, 63}) for prompt in prompts]
    assert len({len(text) for text in expected}) > 1, "rows should end at different steps"

    path = record(model, prompts, tmp_path / "a.duckdb", generate=8, batch_tokens=10_000)

    assert generated(path) == expected
    counts = table(path, "SELECT layer, count(DISTINCT token_id) n FROM gates GROUP BY layer")
    total = sum(map(len, prompts)) + sum(map(len, expected))
    assert set(counts["n"]) == {total}
    ids = table(path, "SELECT token_id FROM tokens ORDER BY token_id")["token_id"]
    assert ids == list(range(total)), "prompt tokens first, no gaps"
    first_generated = table(path, "SELECT min(token_id) n FROM tokens WHERE phase = 'generated'")
    assert first_generated["n"] == [sum(map(len, prompts))]
    last = table(
        path,
        "SELECT count(loss) n FROM tokens JOIN (SELECT prompt_id, max(position) position FROM "
        "tokens GROUP BY ALL) USING (prompt_id, position)",
    )
    assert last["n"] == [0], "the last token of a text has no next one"


def test_generated_text_continues_the_prompt_exactly(tmp_path):
    loaded = demo()
    texts = ["The sun", "Ein", "👩‍", "def f(x):\n    return"]
    path = record(
        loaded.model, texts, tmp_path / "a.duckdb", tokenizer=loaded.tokenizer, generate=16
    )
    rows = table(path, TOKENS)
    joined, ids = [""] * len(texts), [[] for _ in texts]
    for prompt, token, text in zip(rows["prompt_id"], rows["token"], rows["text"], strict=True):
        joined[prompt] += text
        ids[prompt].append(token)
    for prompt, text in enumerate(texts):
        decoded = loaded.tokenizer.decode(
            ids[prompt], skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        assert joined[prompt] == decoded
        assert joined[prompt].startswith(text)


def test_batches_of_decoding_hold_the_rows_that_count(tmp_path):
    path = record(tiny("olmoe"), [[5, 6], [7]], tmp_path / "a.duckdb", generate=3)
    batches = table(path, "SELECT batch_id, phase, tokens FROM batches ORDER BY batch_id")
    assert batches["phase"] == ["prompt", *["generated"] * (len(batches["phase"]) - 1)]
    assert batches["tokens"][0] == 3
    assert max(batches["tokens"][1:]) <= 2
    load = table(path, "SELECT phase, sum(assignments) n FROM expert_load_by GROUP BY ALL")
    by_phase = dict(zip(load["phase"], load["n"], strict=True))
    assert by_phase["prompt"] == 3 * 3 * 3
    assert by_phase["generated"] == sum(batches["tokens"][1:]) * 3 * 3


def test_scores_of_generated_tokens_at_level_scores(tmp_path):
    path = record(tiny("olmoe"), [[5, 6], [7]], tmp_path / "a.duckdb", generate=3, level="scores")
    counts = table(path, "SELECT (SELECT count(*) FROM scores) s, (SELECT count(*) FROM gates) g")
    assert counts["s"] == counts["g"]


def test_the_same_input_decodes_the_same(tmp_path):
    runs = [
        record(tiny("glm4_moe"), unequal(4), tmp_path / name, generate=5, batch_tokens=40)
        for name in ("a", "b")
    ]
    assert_same_routing(*runs)
    assert table(runs[0], TOKENS) == table(runs[1], TOKENS)
