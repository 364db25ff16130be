"""Look through the wrappers that adapters (PEFT) put around modules."""

from torch import nn

# names of a wrapper's children: the module inside, and trained copies that run in its place
INNER = "base_layer"
ORIGINAL, SAVED = "original_module", "modules_to_save"


def child(module: nn.Module, name: str) -> nn.Module | None:
    """Return a module's own child, where a trained copy replaces it that copy.

    Wrappers hand on attributes of what they wrap, so ``getattr`` would find a child of a child.
    """
    found = module._modules.get(name)
    return None if found is None else running(found)


def running(module: nn.Module) -> nn.Module:
    """Return the copy that runs in place of ``module``, or the module itself."""
    copies = module._modules.get(SAVED)
    original = module._modules.get(ORIGINAL)
    if original is None or not isinstance(copies, nn.ModuleDict):
        return module
    active = getattr(module, "active_adapters", [])
    if getattr(module, "disable_adapters", False) or not active or active[0] not in copies:
        return original
    return copies[active[0]]


def inner(module: nn.Module) -> nn.Module:
    """Return the module inside all wrappers: its counts and buffers are the model's own."""
    while True:
        following = module._modules.get(INNER)
        if following is None:
            following = running(module)
            if following is module:
                return module
        module = following


def idle(model: nn.Module) -> set[nn.Module]:
    """Return the modules that do not run, as a copy of them runs in their place."""
    found: set[nn.Module] = set()
    for module in model.modules():
        chosen = running(module)
        if chosen is not module:
            copies = [module._modules[ORIGINAL], *module._modules[SAVED].children()]  # type: ignore[union-attr]
            found.update(m for c in copies if c and c is not chosen for m in c.modules())
    return found
