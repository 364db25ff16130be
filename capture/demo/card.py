"""Write the model card from the measured figures."""

from pathlib import Path
from typing import Any


def write_card(figures: dict[str, Any], path: Path) -> None:
    """Write the card."""
