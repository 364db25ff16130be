"""Model folders with one wrong value each: a sentence names the file, the field or the tensor."""

import json
import shutil

import duckdb
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import FineGrainedFP8Config, MixtralConfig, MixtralForCausalLM
from transformers.integrations.finegrained_fp8 import replace_with_fp8_linear

from capture import record
from capture.errors import ModelError
from capture.model.load import _unpickled, load_model
from capture.model.sites import find_sites

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sound")
    config = MixtralConfig(
        vocab_size=64,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        num_local_experts=4,
        num_experts_per_tok=2,
    )
    MixtralForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture
def folder(sound, tmp_path):
    return shutil.copytree(sound, tmp_path / "model")


def configured(**fields):
    def change(folder):
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | fields))

    return change


def written(name, text):
    def change(folder):
        (folder / name).write_text(text)

    return change


def stored(name, tensor):
    def change(folder):
        tensors = load_file(folder / WEIGHTS) | {name: tensor}
        save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})

    return change


def indexed(name):
    """Name another file for all weights; it holds them."""

    def change(folder):
        tensors = load_file(folder / WEIGHTS)
        (folder / WEIGHTS).unlink()
        torch.save(tensors, folder / name)
        (folder / "other.safetensors").write_bytes(b"")
        index = {"metadata": {}, "weight_map": dict.fromkeys(tensors, name)}
        (folder / INDEX).write_text(json.dumps(index))

    return change


EXPERT = "model.layers.1.block_sparse_moe.experts.2.w1.weight"
NAN, ONES = torch.full((64, 16), float("nan")), torch.ones((64, 16), dtype=torch.int64)
NORM = "model.layers.0.input_layernorm.weight"
WRONG = {
    "config": (written("config.json", "{nope"), r"config\.json .*no valid JSON \(line 1, column 2"),
    "list": (written("config.json", "[]"), r"config\.json .*must be a JSON object, got \[\]"),
    "deep": (written("config.json", "[" * 100_000), r"config\.json .*no valid JSON \(maximum"),
    "generation": (written("generation_config.json", "{"), r"generation_config\.json .*no valid"),
    "tokenizer": (written("tokenizer.json", "{nope"), r"tokenizer\.json .*no valid JSON"),
    "model of the tokenizer": (written("tokenizer.json", '{"model": 7}'), r"its tokenizer\.json"),
    "text": (configured(hidden_size="big"), r"'hidden_size' must be a whole number .*'big'"),
    "long text": (configured(hidden_size="b" * 100_000), r"'hidden_size' must be"),
    "negative": (configured(hidden_size=-4), r"'hidden_size' must be a whole number .*-4"),
    "none": (configured(hidden_size=None), r"'hidden_size' expected int"),
    "fraction": (configured(hidden_size=16.5), r"'hidden_size' must be a whole number"),
    "a million layers": (configured(num_hidden_layers=10**6), r"'num_hidden_layers' .* 10,000"),
    "heads": (configured(num_attention_heads=0), r"'num_attention_heads'"),
    "experts": (configured(num_local_experts="4"), r"'num_local_experts' .*'4'"),
    "activation": (configured(hidden_act="nosuch"), r"unknown 'hidden_act'"),
    "number": (configured(rms_norm_eps="x"), r"'rms_norm_eps' expected float"),
    "quantised": (configured(quantization_config=5), r"'quantization_config' must be a JSON obj"),
    "shape": (stored("lm_head.weight", torch.ones(3, 3)), r"lm_head\.weight has \[3, 3\], and"),
    "expert": (stored(EXPERT, torch.ones(3, 3)), rf"{EXPERT} has shape \[3, 3\], others"),
    "nan": (stored("lm_head.weight", NAN), r"lm_head\.weight .* holds nan or infinity"),
    "infinity": (stored(NORM, torch.full((16,), float("inf"))), rf"{NORM} .* holds nan or inf"),
    "whole numbers": (stored("lm_head.weight", ONES), r"'lm_head\.weight' as I64"),
    "pickle": (indexed("weights.bin"), r"index\.json: weights of '.*' must be in a safetensors"),
    "elsewhere": (indexed("../w.safetensors"), r"index\.json: weights of .*\.\./w\.safetensors"),
    "named": (configured(transformers_weights="w.bin"), r"'transformers_weights' must be in"),
}


@pytest.mark.parametrize(("change", "said"), WRONG.values(), ids=WRONG)
def test_what_is_wrong_is_named_in_a_sentence(folder, change, said):
    change(folder)
    with pytest.raises(ModelError, match=said) as caught:
        load_model(folder)
    assert len(str(caught.value)) < 500 and "\n" not in str(caught.value)


def test_pickled_weights_load_where_they_are_trusted(folder):
    indexed("weights.bin")(folder)
    (folder / "other.safetensors").unlink()
    (folder / INDEX).rename(folder / "pytorch_model.bin.index.json")
    loaded = load_model(folder, allow_pickle=True)
    assert loaded.model.config.num_local_experts == 4


def test_a_pickled_adapter_is_refused(folder):
    written("adapter_config.json", '{"peft_type": "LORA"}')(folder)
    (folder / "adapter_model.bin").write_bytes(b"")
    with pytest.raises(ModelError, match=r"An adapter in adapter_model\.safetensors was expected"):
        load_model(folder)


def test_nothing_is_unpickled_whoever_names_it(folder):
    torch.save({}, folder / "w.bin")
    with _unpickled("m", allow_pickle=False), pytest.raises(ModelError, match="m names pickled"):
        torch.load(folder / "w.bin")
    assert torch.load(folder / "w.bin") == {}


def test_a_float8_checkpoint_is_recorded_as_it_is_expanded(folder, tmp_path):
    """Fine-grained FP8 on a CPU: transformers multiplies blocks by their scales when it loads."""
    scale, floats, eights = torch.full((1, 1), 0.25), {}, {}
    for name, tensor in load_file(folder / WEIGHTS).items():
        floats[name] = eights[name] = tensor
        if tensor.shape == (16, 16) and "experts" in name:
            eights[name] = (tensor / scale).to(torch.float8_e4m3fn)
            eights[f"{name}_scale_inv"] = scale.clone()
            floats[name] = eights[name].float() * scale
    runs = []
    for tensors in (floats, eights):
        save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
        path = record(folder, [[5, 6, 7, 8], [9, 10]], tmp_path / f"{len(runs)}.duckdb",
                      generate=2, progress=False)  # fmt: skip
        with duckdb.connect(str(path), read_only=True) as run:
            runs.append(run.sql("SELECT * FROM assignments ORDER BY ALL").fetchall())
        skipped = ["lm_head", "gate", "q_proj", "k_proj", "v_proj", "o_proj"]
        configured(quantization_config={
            "quant_method": "fp8", "weight_block_size": [16, 16], "modules_to_not_convert": skipped,
        })(folder)  # fmt: skip
    assert runs[0] == runs[1] and runs[0]


def test_the_blocks_of_float8_are_found_like_others(sound):
    """On a GPU experts stay in eight bits, as modules of another class."""
    with torch.device("meta"):
        model = MixtralForCausalLM(MixtralConfig.from_pretrained(sound))
    model = replace_with_fp8_linear(
        model, modules_to_not_convert=["gate"], quantization_config=FineGrainedFP8Config(),
        pre_quantized=True,
    )  # fmt: skip
    sites = find_sites(model)
    assert {type(site.experts).__name__ for site in sites} == {"FP8Experts"}
    assert [(site.info.n_experts, site.info.top_k) for site in sites] == [(4, 2)] * 2
