"""What the numbers of a comparison can and cannot show, in words; needs no torch."""

from collections.abc import Mapping
from typing import Any


def reach(info: Mapping[str, Any]) -> str:
    """Say how much of a model its experts are, and what one checkpoint shows of rules.

    Parameters
    ----------
    info : mapping
        ``Comparison.info``; of files of older formats, and of replay alone, less is known.
    """
    parts = []
    head, experts = info["head_flops_share"], info["expert_flops_share"]
    if head is not None and experts is not None:
        parts.append(
            f"Of all operations of the unchanged model {head:.0%} are its output layer's and "
            f"{experts:.0%} its experts', so that FLOPs × cannot fall below {1 - experts:.2f} "
            "by leaving experts out."
        )
    if info["n_experts"]:
        parts.append(
            f"One checkpoint with {info['n_experts']} experts in a layer can show how a rule "
            "works and whether it beats chance here; it cannot show which rule is best in models "
            "with more experts, of other sizes, or trained with the rule."
        )
    return " ".join(parts)
