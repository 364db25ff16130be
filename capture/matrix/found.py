"""Which architectures with routed experts the installed transformers has: looked up, not listed."""

import re
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from capture.model.load import transformers_library

# how modelling code says that a block routes to experts
ROUTES = re.compile(r"self\.(experts|router|router_gate)\b")
# what a model is loaded for, best first; a model that also sees is not its text part alone
ALONE = (
    "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES",
    "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES",
    "MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES",
    "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES",
    "MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES",
)
COMPOSED = (*ALONE[1:3], ALONE[0], *ALONE[3:])


class Architecture(NamedTuple):
    """One kind of model that is loaded by its own name.

    Attributes
    ----------
    model_type : str
        As ``config.json`` says it.
    class_name : str
        What transformers loads it as.
    """

    model_type: str
    class_name: str

    @property
    def model_class(self) -> Any:
        """The class of transformers."""
        return getattr(transformers_library(), self.class_name)

    @property
    def config_class(self) -> Any:
        """The class of its configuration."""
        return _auto().configuration_auto.CONFIG_MAPPING[self.model_type]


@cache
def architectures() -> tuple[Architecture, ...]:
    """Return every architecture whose modelling code routes to experts and that reads text.

    Parts of a model, such as its vision tower, are found with the whole.
    """
    auto = _auto().configuration_auto
    folder = Path(transformers_library().__file__).parent / "models"
    routed = {
        path.parent.name
        for path in folder.glob("*/modeling_*.py")
        if ROUTES.search(path.read_text(encoding="utf-8"))
    }
    found = (
        _found(model_type)
        for model_type in auto.CONFIG_MAPPING_NAMES
        if auto.model_type_to_module_name(model_type) in routed
    )
    return tuple(sorted(one for one in found if one is not None))


def architecture(model_type: str) -> Architecture:
    """Return one of them by its name.

    Raises
    ------
    KeyError
        If transformers has none.
    """
    found = _found(model_type)
    if found is None:
        raise KeyError(model_type)
    return found


def _found(model_type: str) -> Architecture | None:
    """Return what a model type is loaded as, None for a part of a model."""
    modeling = _auto().modeling_auto
    names = {name: getattr(modeling, name).get(model_type) for name in ALONE}
    if not any(names.values()):
        return None
    kind = _auto().configuration_auto.CONFIG_MAPPING[model_type]
    parts = getattr(kind, "sub_configs", None)
    name = next(names[one] for one in (COMPOSED if parts else ALONE) if names[one])
    return Architecture(model_type, name if isinstance(name, str) else name[0])


def _auto() -> Any:
    return transformers_library().models.auto
