r"""vLLM's own routing in a run, held against transformers; where vLLM is installed.

In the environment of vLLM, with pytest, pytest-timeout, hypothesis and what
capture/engines/requirements-vllm.txt lists:

    python -m pytest -o addopts= -o filterwarnings=default \
        tests/capture/test_capture_engines_vllm.py
"""

import importlib.util
import json

import duckdb
import numpy as np
import pytest
import torch
import transformers

from capture.__main__ import main
from capture.engines.vllm import recording
from capture.errors import ConfigError, StoreError, TraceError

missing = importlib.util.find_spec("vllm") is None
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(missing, reason="vLLM is in an environment of its own"),
]

SIZES = {
    **{"vocab_size": 512, "hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4},
    **{"max_position_embeddings": 256, "tie_word_embeddings": False},
}
PROMPTS = [[1, 5, 9, 33, 77, 100, 200], list(range(20, 90)), [7] * 5 + [300, 301]]
FLIPS = 1 / 500  # rows that may choose other experts: an engine adds in another order


def qwen():
    return transformers.Qwen3MoeForCausalLM(
        transformers.Qwen3MoeConfig(
            **SIZES,
            intermediate_size=128,
            moe_intermediate_size=32,
            num_key_value_heads=2,
            head_dim=32,
            num_experts=16,
            num_experts_per_tok=4,
            mlp_only_layers=[0],
        )
    )


def mixtral():
    return transformers.MixtralForCausalLM(
        transformers.MixtralConfig(
            **SIZES,
            intermediate_size=64,
            num_key_value_heads=2,
            head_dim=32,
            num_local_experts=8,
            num_experts_per_tok=2,
        )
    )


def glm():
    """DeepSeek's router, with a bias, groups and scaling, before attention that a CPU computes."""
    return transformers.Glm4MoeForCausalLM(
        transformers.Glm4MoeConfig(
            **SIZES,
            num_key_value_heads=2,
            head_dim=32,
            intermediate_size=128,
            moe_intermediate_size=32,
            n_routed_experts=16,
            n_shared_experts=1,
            num_experts_per_tok=4,
            n_group=4,
            topk_group=2,
            routed_scaling_factor=2.5,
            norm_topk_prob=True,
            first_k_dense_replace=1,
        )
    )


@pytest.fixture(scope="module")
def vllm():
    """Return vLLM, whose engine runs in the process that first imports it with this variable."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
        yield pytest.importorskip("vllm")


@pytest.fixture(scope="module", params=[qwen, mixtral, glm])
def model(request, tmp_path_factory):
    torch.manual_seed(0)
    made = request.param().eval()
    for name, value in made.named_parameters():
        if name.endswith("gate.weight"):
            torch.nn.init.normal_(value, std=0.5)
    for name, value in made.named_buffers():
        if name.endswith("e_score_correction_bias"):
            torch.nn.init.normal_(value, std=0.05)
    folder = tmp_path_factory.mktemp("model")
    made.save_pretrained(folder)
    return made, folder


def engine(vllm, folder, **options):
    options = {"enforce_eager": True, "enable_prefix_caching": False} | options
    return vllm.LLM(
        str(folder),
        skip_tokenizer_init=True,
        dtype="float32",
        max_model_len=256,
        max_num_seqs=8,
        gpu_memory_utilization=0.1,
        kv_cache_memory_bytes=2**27,
        **options,
    )


def generate(vllm, llm, prompts=PROMPTS, tokens=4):
    sampling = vllm.SamplingParams(
        max_tokens=tokens, temperature=0.0, detokenize=False, ignore_eos=True
    )
    return llm.generate([{"prompt_token_ids": ids} for ids in prompts], sampling, use_tqdm=False)


def truth(model, tokens):
    """Return what transformers' experts were handed, [T, L, K] ids and weights."""
    seen = []
    handles = [
        module.register_forward_pre_hook(lambda _, args: seen.append((args[1], args[2])))
        for name, module in model.named_modules()
        if name.endswith("mlp.experts")
    ]
    with torch.no_grad():
        model(torch.tensor([tokens]))
    for handle in handles:
        handle.remove()
    return [torch.stack(part, 1).numpy() for part in zip(*seen, strict=True)]


def rows_of(run):
    """Return each prompt's tokens, and ids and weights by (position, layer)."""
    with duckdb.connect(str(run), read_only=True) as db:
        tokens = db.execute(
            "SELECT prompt_id, list(token ORDER BY position) FROM tokens GROUP BY 1 ORDER BY 1"
        ).fetchall()
        rows = db.execute(
            "SELECT prompt_id, position, layer, list(expert_id ORDER BY slot), "
            "list(weight ORDER BY slot) FROM assignments JOIN tokens USING (token_id) GROUP BY ALL"
        ).fetchall()
    return dict(tokens), {tuple(row[:3]): row[3:] for row in rows}


def test_ids_and_weights_are_those_of_transformers(vllm, model, tmp_path):
    made, folder = model
    # 32 tokens a pass: the long prompt comes in chunks, beside tokens that are decoded
    llm = engine(vllm, folder, max_num_batched_tokens=32, enable_chunked_prefill=True)
    with recording(llm, tmp_path / "run.duckdb") as run:
        answers = generate(vllm, llm)
    generate(vllm, llm)  # after the block nothing is followed
    tokens, rows = rows_of(run.path)
    whole = sorted(list(a.prompt_token_ids) + list(a.outputs[0].token_ids) for a in answers)
    assert sorted(tokens.values()) == whole
    layers = sorted({layer for _, _, layer in rows})
    # vLLM scales the sum of the experts, transformers their weights
    factor = getattr(made.config, "routed_scaling_factor", 1.0)
    with duckdb.connect(str(run.path), read_only=True) as db:
        (notes,) = db.execute("SELECT notes FROM run").fetchone()
    found = json.loads(notes)["import"].get("factor_after_sum", {})
    assert set(found.values()) == ({factor} if factor != 1 else set())
    compared = differing = 0
    for prompt_id, ids in tokens.items():
        expected, weights = truth(made, ids)
        # the last token is generated, and nothing was computed of it
        for position in range(len(ids) - 1):
            for at, layer in enumerate(layers):
                got = dict(zip(*rows[prompt_id, position, layer], strict=True))
                wanted = dict(
                    zip(
                        expected[position, at].tolist(), weights[position, at].tolist(), strict=True
                    )
                )
                compared += 1
                if set(got) != set(wanted):
                    differing += 1
                    continue
                assert [got[e] for e in got] == pytest.approx(
                    [wanted[e] / factor for e in got], abs=2e-3
                )
        assert (prompt_id, len(ids) - 1, layers[0]) not in rows
    assert compared == sum(len(ids) - 1 for ids in tokens.values()) * len(layers)
    assert differing <= compared * FLIPS, f"{differing} of {compared} rows choose other experts"
    assert (
        run.result.layers
        == len(layers)
        == (3 if isinstance(made, transformers.MixtralForCausalLM) else 2)
    )


def test_what_cannot_be_followed_is_refused_and_leaves_no_file(vllm, model, tmp_path):
    _, folder = model
    out = tmp_path / "run.duckdb"
    llm = engine(vllm, folder, enable_prefix_caching=True)
    with pytest.raises(TraceError, match="computed nothing"), recording(llm, out):
        pass
    assert not list(tmp_path.iterdir())
    with recording(llm, out) as run:
        generate(vllm, llm, [PROMPTS[1], PROMPTS[1]], tokens=1)
    # the second prompt's head came from the cache of the first, or both were computed
    tokens, rows = rows_of(run.path)
    assert len(tokens) == 2
    assert rows[0, 0, max(layer for *_, layer in rows)]
    with pytest.raises(StoreError), recording(llm, out):
        generate(vllm, llm)
    llm.llm_engine.vllm_config.model_config.enforce_eager = False
    with pytest.raises(ConfigError, match="enforce_eager"), recording(llm, tmp_path / "b.duckdb"):
        generate(vllm, llm)
    assert np.isfinite([w for _, weights in rows.values() for w in weights]).all()


def test_the_command_records_the_demo_model_with_its_prompts(vllm, tmp_path, monkeypatch, capsys):
    """Texts, domains and the order of prompts are those of the command without an engine.

    vLLM's OLMoE leaves out ``norm_topk_prob``, which the demo was trained with: the first router
    chooses alike, its weights differ by their sum, and later layers route another residual stream.
    """
    prompts = tmp_path / "p.csv"
    prompts.write_text("text,domain\nThe fox runs.,a\nx = 12,\nThe fox runs.,b\n")
    given = ["demo", "--prompts", str(prompts), "--quiet", "--dtype", "float32", "--out"]
    engine = {"max_model_len": 256, "kv_cache_memory_bytes": 2**27, "gpu_memory_utilization": 0.1}
    inside = ["--engine", "vllm", "--engine-options", json.dumps(engine)]
    assert main([*given, str(tmp_path / "vllm.duckdb"), *inside]) == 0
    assert main([*given, str(tmp_path / "own.duckdb")]) == 0
    (tokens, rows), (own_tokens, own_rows) = (
        rows_of(tmp_path / f"{name}.duckdb") for name in ("vllm", "own")
    )
    assert tokens == own_tokens and rows.keys() == own_rows.keys()
    first = [key for key in rows if key[-1] == 0]
    assert len(first) == sum(map(len, tokens.values()))
    for key in first:
        (ids, weights), (own_ids, own_weights) = rows[key], own_rows[key]
        assert ids == own_ids
        assert [w / sum(weights) for w in weights] == pytest.approx(own_weights, abs=2e-3)
    for name in ("vllm", "own"):
        with duckdb.connect(str(tmp_path / f"{name}.duckdb"), read_only=True) as db:
            said = db.execute("SELECT text, domain FROM prompts ORDER BY prompt_id").fetchall()
        assert said == [("The fox runs.", "a"), ("x = 12", None), ("The fox runs.", "b")]
    assert main([*given, str(tmp_path / "c.duckdb"), *inside, "--level", "scores"]) == 2
    assert "level='scores' is not for it" in capsys.readouterr().err
