"""What a language model can be fed, and how to run it plainly, whatever its configuration adds."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from capture.errors import ModelError
from capture.model.attributes import inner

# what a forward pass puts out besides its logits; none of it changes what the model computes,
# but it costs memory, moves the outputs' places and breaks decoding (aux losses need no cache)
EXTRAS = (
    "output_attentions", "output_cross_attentions", "output_hidden_states",
    "output_router_logits", "output_router_probs", "output_auxiliary_logits",
)  # fmt: skip
PLAIN: Mapping[str, Any] = {
    **dict.fromkeys(EXTRAS, False),
    "return_dict": True,
    # callers say with every call whether they want a cache; this one is for modules further down
    "use_cache": True,
}


def embedding_weight(model: nn.Module) -> torch.Tensor:
    """Return the weight [V, D] of the input embedding; without values while it is offloaded.

    Raises
    ------
    ModelError
        If the model has no embedding of tokens.
    """
    try:
        embedding: Any = model.get_input_embeddings()  # type: ignore[operator]
    except (AttributeError, NotImplementedError):
        embedding = None
    if isinstance(embedding, nn.Module):
        weight = getattr(inner(embedding), "weight", None)
        if isinstance(weight, torch.Tensor):
            return weight
    raise ModelError(
        f"A causal language model was expected, but {type(model).__name__} has no embedding of "
        "tokens. Give the part of it that reads and writes text."
    )


def vocabulary(model: nn.Module) -> int:
    """Return the rows of the input embedding, the ids that a model can be fed."""
    return int(embedding_weight(model).shape[0])


def width(model: nn.Module) -> int:
    """Return the width of the embedding and, with it, of the router inputs."""
    return int(embedding_weight(model).shape[1])


def input_device(model: nn.Module) -> torch.device:
    """Return where token ids go: beside the embedding, or the CPU while that is offloaded."""
    device = embedding_weight(model).device
    return torch.device("cpu") if device.type == "meta" else device


def is_sharded(model: nn.Module) -> bool:
    """Whether each of several processes holds a part of the weights (FSDP, tensor parallelism)."""
    return any(type(one).__name__ == "DTensor" for one in model.parameters()) or any(
        type(one).__name__ == "FullyShardedDataParallel" for one in model.modules()
    )


@contextmanager
def without_gradients(model: nn.Module) -> Iterator[None]:
    """Compute without gradients while the block runs.

    Weights that FSDP has gathered outlive the pass: made in inference mode they would break the
    next training step, and left gathered they would change its gradients.
    """
    if not is_sharded(model):
        with torch.inference_mode():
            yield
        return
    try:
        with torch.no_grad():
            yield
    finally:
        for module in model.modules():
            reshard = getattr(module, "reshard", None)
            if callable(reshard):
                reshard()


def has_two_sides(model: nn.Module) -> bool:
    """Whether a model is an encoder-decoder."""
    return bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))


def decoder_inputs(
    model: nn.Module, ids: torch.Tensor, mask: torch.Tensor | None
) -> dict[str, torch.Tensor | None]:
    """Return the arguments that let a decoder read ids [B, S] too; none where there is no encoder.

    For tests of a model, which need no sense in what is read.
    """
    if not has_two_sides(model):
        return {}
    return {"decoder_input_ids": ids, "decoder_attention_mask": mask}


@contextmanager
def plain_forward(model: nn.Module) -> Iterator[None]:
    """Switch off what a configuration adds to the forward pass, until the block is left.

    Switches live in the model's configuration, in those nested in it, in those that modules keep
    for themselves, and on modules. All are as before afterwards, whatever happens inside.

    Parameters
    ----------
    model : PreTrainedModel
        Or any module; without a configuration nothing happens.

    Notes
    -----
    Values are changed in the objects' own dictionaries: setters of a configuration refuse some
    combinations, such as attention maps beside a fast implementation, that a user may have made.
    """
    changed: list[tuple[dict[str, Any], str, Any]] = []
    # an encoder refuses a cache
    left = {"use_cache"} if has_two_sides(model) else set()
    for owner in _owners(model):
        for name, plain in PLAIN.items():
            if name in left:
                continue
            for key in (name, f"_{name}"):  # configurations keep some behind a property
                value = owner.get(key)
                if (isinstance(value, bool | int | list) or value is None) and key in owner:
                    changed.append((owner, key, value))
                    owner[key] = plain
    try:
        yield
    finally:
        for owner, key, value in reversed(changed):
            owner[key] = value


def _owners(model: nn.Module) -> list[dict[str, Any]]:
    """Return the attributes of every module and of every configuration below the model."""
    owners: list[dict[str, Any]] = []
    waiting: list[object] = []
    for module in model.modules():
        own = vars(module)
        owners.append(own)
        waiting += [own[name] for name in ("config", "generation_config") if name in own]
    seen: set[int] = set()
    while waiting:
        config = waiting.pop()
        if id(config) in seen or not hasattr(config, "__dict__"):
            continue
        seen.add(id(config))
        own = vars(config)
        owners.append(own)
        waiting += [value for value in own.values() if hasattr(type(value), "get_text_config")]
    return owners
