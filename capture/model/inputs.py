"""What a language model can be fed, and where its token ids go."""

from typing import Any

import torch
from torch import nn

from capture.errors import ModelError
from capture.model.wrappers import inner


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
