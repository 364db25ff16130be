"""A checkpoint without its pruned experts, of the model's own class, as ``from_pretrained`` loads.

Nothing is known of families here: a model of the same class with fewer experts is made, and every
tensor that has another shape there gets the slices of the experts that stay.
"""

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from capture.model.load import LoadedModel
from capture.model.sites import Site
from capture.store.records import Place
from capture.swap.routers import site_key
from explorer.comparison.conditions.condition import Subject
from explorer.errors import ConditionError

# what configurations call the number of routed experts
COUNTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")


def write_pruned(
    loaded: LoadedModel, subject: Subject, pruned: Mapping[Place, Sequence[int]], folder: Path
) -> Path:
    """Write a model without some experts, with its tokenizer.

    Parameters
    ----------
    loaded : LoadedModel
    subject : Subject
        The same model.
    pruned : mapping of (layer, site) to sequence of int
    folder : Path
        Must not exist.

    Raises
    ------
    ConditionError
        If the folder exists, or the model cannot be pruned uniformly.
    """
    if folder.exists():
        raise ConditionError(f"{folder} exists already and is not overwritten. Choose another one.")
    smaller = pruned_model(subject, pruned)
    smaller.save_pretrained(folder)
    if loaded.tokenizer is not None:
        loaded.tokenizer.save_pretrained(folder)
    return folder


def pruned_model(subject: Subject, pruned: Mapping[Place, Sequence[int]]) -> Any:
    """Return a new model of the same class that has only the experts that stay.

    Raises
    ------
    ConditionError
        If layers would keep different numbers of experts, experts are chosen by groups, or the
        configuration does not say how many there are.
    """
    model: Any = subject.model
    kept = _kept(subject.sites, pruned)
    config = copy.deepcopy(model.config)
    text = config.get_text_config()
    n_experts = subject.sites[0].info.n_experts
    names = [name for name in COUNTS if getattr(text, name, None) == n_experts]
    if not names:
        raise ConditionError(
            f"The configuration of {type(model).__name__} does not say under a known name that "
            f"there are {n_experts} experts ({', '.join(COUNTS)}), so a smaller one cannot be "
            "written. The mask as JSON says which experts go."
        )
    for name in names:
        setattr(text, name, len(next(iter(kept.values()))))
    try:
        smaller = type(model)(config).to(next(model.parameters()).dtype).eval()
    except Exception as error:  # any kind: a configuration that its class does not accept
        raise ConditionError(
            f"{type(model).__name__} cannot be made with fewer experts ({error}). The mask as JSON "
            "says which experts go."
        ) from error
    values = model.state_dict()
    sites = {site.info.module: kept[site_key(site)] for site in subject.sites}
    wanted = smaller.state_dict()
    smaller.load_state_dict(
        {
            name: _sliced(name, tensor.shape, values, sites, n_experts)
            for name, tensor in wanted.items()
        }
    )
    smaller.generation_config = model.generation_config
    return smaller


def _kept(sites: Sequence[Site], pruned: Mapping[Place, Sequence[int]]) -> dict[Place, list[int]]:
    """Return the experts that stay at each site; as many everywhere."""
    kept = {}
    for site in sites:
        gone, info = set(pruned.get(site_key(site), ())), site.info
        kept[site_key(site)] = [e for e in range(info.n_experts) if e not in gone]
        if site.n_groups is not None and site.n_groups > 1:
            raise ConditionError(
                f"{info.module} chooses among {site.n_groups} equal groups of experts, which "
                "pruning would leave uneven. The mask as JSON says which experts go."
            )
    sizes = {(site.info.n_experts, len(kept[site_key(site)])) for site in sites}
    if len(sizes) > 1:
        raise ConditionError(
            "A configuration has one number of experts for all layers, but the layers have "
            f"{', '.join(f'{a} and would keep {b}' for a, b in sorted(sizes))}. The mask as JSON "
            "says which experts go."
        )
    return kept


def _sliced(
    name: str,
    shape: torch.Size,
    values: Mapping[str, torch.Tensor],
    sites: Mapping[str, list[int]],
    n_experts: int,
) -> torch.Tensor:
    """Return a tensor of the smaller model: slices, or modules, of the experts that stay."""
    inside = [module for module in sites if name.startswith(f"{module}.")]
    if not inside:
        return _same(name, values.get(name), shape)
    kept = sites[max(inside, key=len)]
    # a list of experts has one module for each, numbered anew
    parts = name.split(".")
    for at, part in enumerate(parts):
        if part.isdecimal() and at and parts[at - 1] == "experts":
            parts[at] = str(kept[int(part)])
    found = values.get(".".join(parts))
    if found is None or found.shape == shape:
        return _same(name, found, shape)
    axes = [
        axis
        for axis, (a, b) in enumerate(zip(found.shape, shape, strict=True))
        if (a, b) == (n_experts, len(kept))
    ]
    if len(axes) != 1:
        return _same(name, found, shape)
    return _same(name, found.index_select(axes[0], torch.tensor(kept, device=found.device)), shape)


def _same(name: str, found: torch.Tensor | None, shape: torch.Size) -> torch.Tensor:
    if found is None or found.shape != shape:
        have = "nothing" if found is None else list(found.shape)
        raise ConditionError(
            f"{name} should have the shape {list(shape)} in the smaller model, and the model gives "
            f"{have}: its experts are stored in a way that cannot be cut. The mask as JSON says "
            "which experts go."
        )
    return found
