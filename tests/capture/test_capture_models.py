"""Loading: names, folders, loaded models, and one clear error for each thing that goes wrong."""

import importlib.metadata
import json

import pytest
import tiny_models
import torch
from torch import nn

from capture.errors import ModelError, SiteError
from capture.model.load import DEMO, load_model, refuse_kernels_package
from capture.model.selftest import attach


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A folder with a tiny Mixtral in bfloat16 and no tokenizer."""
    folder = tmp_path_factory.mktemp("model") / "tiny"
    tiny_models.build("mixtral", dtype=torch.bfloat16).save_pretrained(folder)
    return folder


@pytest.fixture
def offline(monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)


def copy_of(folder, to):
    for path in folder.iterdir():
        (to / path.name).write_bytes(path.read_bytes())
    return to


def test_the_demo_model():
    loaded = load_model("demo")
    assert loaded.name == "demo"
    assert loaded.revision is None
    assert not loaded.model.training
    assert loaded.tokenizer is not None
    ids = loaded.tokenizer("two words").input_ids
    assert loaded.tokenizer.decode(ids, skip_special_tokens=True) == "two words"
    if not torch.cuda.is_available():
        assert loaded.model.dtype == torch.float32
    sites = attach(loaded.model)
    config = json.loads((DEMO / "config.json").read_text())
    assert [s.info.layer for s in sites] == list(range(config["num_hidden_layers"]))
    assert {s.info.n_experts for s in sites} == {config["num_experts"]}
    assert {s.info.top_k for s in sites} == {config["num_experts_per_tok"]}
    assert {s.info.score_function for s in sites} == {"softmax"}
    assert all(s.margin_known for s in sites)


@pytest.mark.parametrize("kind", [str, lambda p: p])
def test_a_local_folder(saved, kind):
    loaded = load_model(kind(saved), device="cpu")
    assert loaded.name == str(saved)
    assert loaded.tokenizer is None
    assert loaded.model.dtype == torch.float32
    assert type(loaded.model).__name__ == "MixtralForCausalLM"


@pytest.mark.parametrize("dtype", ["bfloat16", torch.bfloat16])
def test_dtype_is_what_was_asked_for(saved, dtype):
    loaded = load_model(saved, device="cpu", dtype=dtype)
    assert loaded.model.dtype == torch.bfloat16
    assert [s.info.score_function for s in attach(loaded.model)] == ["softmax"] * 3


@pytest.mark.parametrize("device", ["cpu", "cpu:0", "auto"])
@pytest.mark.skipif(torch.cuda.is_available(), reason="auto takes the CUDA device")
def test_on_a_cpu_a_model_stored_in_half_precision_runs_in_float32(saved, tmp_path, device):
    load_model(saved, device="cpu", dtype="bfloat16").model.save_pretrained(tmp_path)
    assert load_model(tmp_path, device=device).model.dtype == torch.float32


def test_a_loaded_model_is_used_as_it_is():
    model = tiny_models.build("olmoe", dtype=torch.bfloat16)
    loaded = load_model(model)
    assert loaded.model is model
    assert model.dtype == torch.bfloat16
    assert loaded.tokenizer is None
    assert loaded.name == "OlmoeForCausalLM"


def test_a_loaded_model_brings_its_tokenizer():
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(DEMO)
    loaded = load_model(model)
    assert loaded.model is model
    assert loaded.tokenizer is not None
    assert loaded.name == str(DEMO)


def test_a_loaded_model_in_training_mode_is_refused():
    model = tiny_models.build("olmoe").train()
    with pytest.raises(ModelError, match=r"OlmoeForCausalLM is in training mode.*model\.eval\(\)"):
        load_model(model)
    assert model.training


@pytest.mark.parametrize("options", [{"dtype": "float32"}, {"device": "cpu"}])
def test_a_loaded_model_is_neither_moved_nor_converted(options):
    with pytest.raises(ModelError, match="used as it is"):
        load_model(tiny_models.build("olmoe"), **options)


@pytest.mark.parametrize("thing", [42, None, nn.Linear(2, 2)])
def test_something_else_is_refused(thing):
    with pytest.raises(ModelError, match="PreTrainedModel was expected, got"):
        load_model(thing)


@pytest.mark.parametrize("name", ["./nowhere", "/no/such/folder", "a/b/c", "~/no-such", " ", ""])
def test_a_missing_folder(name):
    with pytest.raises(ModelError, match=r"A model folder was expected, but .* does not exist"):
        load_model(name)


def test_a_file_is_no_folder(tmp_path):
    file = tmp_path / "model.gguf"
    file.write_text("x")
    with pytest.raises(ModelError, match="is a file"):
        load_model(str(file))


def test_a_folder_without_a_model(tmp_path):
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(ModelError, match=r"config\.json was expected, but .* holds notes\.txt"):
        load_model(tmp_path)


def test_a_folder_without_weights(saved, tmp_path):
    (copy_of(saved, tmp_path) / "model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"Weights in \*\.safetensors were expected"):
        load_model(tmp_path)


def test_pickled_weights_need_a_flag(saved, tmp_path):
    from safetensors.torch import load_file

    weights = copy_of(saved, tmp_path) / "model.safetensors"
    torch.save(load_file(weights), tmp_path / "pytorch_model.bin")
    weights.unlink()
    with pytest.raises(ModelError, match=r"only pickled \.bin files.*allow_pickle=True"):
        load_model(tmp_path)
    loaded = load_model(tmp_path, device="cpu", allow_pickle=True)
    assert len(attach(loaded.model)) == 3


def test_incomplete_weights_are_refused(saved, tmp_path):
    from safetensors.torch import load_file, save_file

    weights = load_file(copy_of(saved, tmp_path) / "model.safetensors")
    gone = [name for name in weights if name.endswith("gate.weight")]
    kept = {name: value for name, value in weights.items() if name not in gone}
    save_file(kept, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match=r"has none for model\.layers\.0\.mlp\.gate\.weight and 2"):
        load_model(tmp_path, device="cpu")


def test_remote_code_stays_off(saved, tmp_path):
    folder = copy_of(saved, tmp_path)
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "own", "auto_map": {"AutoConfig": "own.Own"}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "own.py").write_text("raise SystemError('this must not run')")
    with pytest.raises(ModelError, match="trust_remote_code=True"):
        load_model(folder)


def test_an_unknown_model_type(saved, tmp_path):
    folder = copy_of(saved, tmp_path)
    config = json.loads((folder / "config.json").read_text()) | {"model_type": "unheard_of"}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match=r"A causal language model was expected.*unheard_of"):
        load_model(folder)


@pytest.mark.slow
def test_a_model_that_also_sees_is_recorded_on_text(tmp_path):
    from transformers import Qwen3VLMoeConfig, Qwen3VLMoeForConditionalGeneration

    text = tiny_models.config_of("qwen3_vl_moe").to_dict()
    text["rope_parameters"] = {
        "rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1],
    }  # fmt: skip
    vision = {
        "depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2,
        "out_hidden_size": 32, "num_position_embeddings": 16, "deepstack_visual_indexes": [0],
    }  # fmt: skip
    ids = {"image_token_id": 5, "video_token_id": 6}
    config = Qwen3VLMoeConfig(text_config=text, vision_config=vision, **ids)
    Qwen3VLMoeForConditionalGeneration(config).save_pretrained(tmp_path)
    sites = attach(load_model(tmp_path, device="cpu").model)
    assert [s.info.layer for s in sites] == [0, 1, 2]
    assert sites[0].info.module == "model.language_model.layers.0.mlp"


def test_a_broken_file(saved, tmp_path):
    weights = copy_of(saved, tmp_path) / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(ModelError, match="could not be loaded"):
        load_model(tmp_path, device="cpu")


def test_an_encoder_decoder_without_experts_is_refused(tmp_path):
    from transformers import T5Config, T5Model

    config = T5Config(d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2, vocab_size=16)
    T5Model(config).save_pretrained(tmp_path)
    with pytest.raises(SiteError, match="T5ForConditionalGeneration is an encoder-decoder"):
        attach(load_model(tmp_path).model)


def test_a_hub_id_that_cannot_be_reached(offline):
    with pytest.raises(ModelError, match=r"No model 'nobody/nothing'.*Check the spelling"):
        load_model("nobody/nothing")
    with pytest.raises(ModelError, match="at revision v9"):
        load_model("nobody/nothing", revision="v9")


@pytest.mark.parametrize("trusted", [False, True])
def test_what_a_hub_model_may_do_follows_the_flags(monkeypatch, trusted):
    from transformers import AutoModelForCausalLM

    asked = {}

    def refuse(source, **options):
        asked.update(options)
        raise OSError("not here")

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", refuse)
    with pytest.raises(ModelError, match="No model 'some/model'"):
        load_model("some/model", device="cpu", trust_remote_code=trusted, allow_pickle=trusted)
    assert asked["trust_remote_code"] is trusted
    assert asked["use_safetensors"] is (None if trusted else True)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "int3"}, "dtype must be one of float32"),
        ({"device": "abacus"}, "A device such as 'cpu'"),
    ],
)
def test_options_that_make_no_sense(saved, options, message):
    with pytest.raises(ModelError, match=message):
        load_model(saved, **options)


@pytest.mark.skipif(torch.cuda.is_available(), reason="shows what happens without a CUDA device")
def test_a_device_that_is_not_there(saved):
    with pytest.raises(ModelError, match="torch sees no CUDA device"):
        load_model(saved, device="cuda")


def test_the_kernels_distribution_is_refused_before_transformers_is_imported(monkeypatch):
    real = importlib.metadata.version
    monkeypatch.setattr(
        importlib.metadata, "version", lambda name: "0.18.5" if name == "kernels" else real(name)
    )
    with pytest.raises(ModelError, match=r"version 0\.18\.5 .* pip uninstall kernels"):
        load_model("demo")


def test_without_the_kernels_distribution_nothing_is_refused():
    refuse_kernels_package()
