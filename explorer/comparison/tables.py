"""The tables of a comparison file, spelled once."""

from typing import Any

Rows = dict[str, list[dict[str, Any]]]

FORMAT_VERSION = 1

# of one router, seed and mode; a result is computed again when its fingerprint changes
UNIT = {"router": "VARCHAR", "seed": "INTEGER", "mode": "VARCHAR"}

_AGREEMENT = ("agreement", "jaccard", "exact_set", "top_1", "weighted_overlap")
_BALANCE = (
    *("max_violation", "max_violation_floor", "cv", "gini", "dead_experts", "load_entropy"),
)

TABLES: dict[str, dict[str, str]] = {
    "comparison": {
        "format_version": "INTEGER",
        "created_at": "VARCHAR",
        "run_name": "VARCHAR",
        "run_fingerprint": "VARCHAR",
        "model": "VARCHAR",
        "model_fingerprint": "VARCHAR",
        "architecture": "VARCHAR",
        "dtype": "VARCHAR",
        "device": "VARCHAR",
        "n_layers": "INTEGER",
        "n_experts": "INTEGER",
        "top_k": "INTEGER",
        "fit_source": "VARCHAR",
        "fit_sequences": "BIGINT",
        "fit_tokens": "BIGINT",
        "report_source": "VARCHAR",
        "report_sequences": "BIGINT",
        "report_tokens": "BIGINT",
        "native_loss": "DOUBLE",
        "seed": "INTEGER",
        "settings": "VARCHAR",
        "packages": "VARCHAR",
        "complete": "BOOLEAN",
    },
    "routers": {
        "router": "VARCHAR",
        "name": "VARCHAR",
        "family": "VARCHAR",
        "title": "VARCHAR",
        "summary": "VARCHAR",
        "formula": "VARCHAR",
        "paper": "VARCHAR",
        "fits": "VARCHAR",
        "part": "VARCHAR",
        "causal_declared": "BOOLEAN",
        "batch_dependent_declared": "BOOLEAN",
        "variable_k": "BOOLEAN",
        "control": "VARCHAR",
        "control_of": "VARCHAR",
    },
    "results": {
        **UNIT,
        "family": "VARCHAR",
        "layer": "INTEGER",
        "site": "INTEGER",
        "condition": "VARCHAR",
        "control": "VARCHAR",
        "control_of": "VARCHAR",
        "part": "VARCHAR",
        "loss": "DOUBLE",
        "loss_change": "DOUBLE",
        "loss_se": "DOUBLE",
        "perplexity_ratio": "DOUBLE",
        "experts_per_token": "DOUBLE",
        "parts_per_token": "DOUBLE",
        "parts_share": "DOUBLE",
        "distinct_experts": "DOUBLE",
        "flops_per_token": "DOUBLE",
        "flops_ratio": "DOUBLE",
        "expert_flops_ratio": "DOUBLE",
        "router_flops": "DOUBLE",
        "counted_flops_ratio": "DOUBLE",
        "latency_ms": "DOUBLE",
        "latency_ratio": "DOUBLE",
        "latency_low": "DOUBLE",
        "latency_high": "DOUBLE",
        "bytes_ratio": "DOUBLE",
        "energy_ratio": "DOUBLE",
        **dict.fromkeys(_AGREEMENT, "DOUBLE"),
        "js": "DOUBLE",
        "entropy": "DOUBLE",
        **dict.fromkeys(_BALANCE, "DOUBLE"),
        "causal": "BOOLEAN",
        "batch_dependent": "BOOLEAN",
        "simulated": "BOOLEAN",
        "fit_tokens": "BIGINT",
        "tokens": "BIGINT",
        "sequences": "BIGINT",
        "fit_seconds": "DOUBLE",
        "seconds": "DOUBLE",
    },
    "domains": {
        **UNIT,
        "domain": "VARCHAR",
        "loss_change": "DOUBLE",
        "loss_se": "DOUBLE",
        "experts_per_token": "DOUBLE",
        "agreement": "DOUBLE",
        "tokens": "BIGINT",
        "sequences": "BIGINT",
    },
    "sequences": {
        **UNIT,
        "layer": "INTEGER",
        "sequence": "INTEGER",
        "domain": "VARCHAR",
        "tokens": "INTEGER",
        "loss": "DOUBLE",
        "loss_change": "DOUBLE",
    },
    "texts": {
        "text_id": "INTEGER",
        "domain": "VARCHAR",
        "position": "INTEGER",
        "token": "INTEGER",
        "text": "VARCHAR",
    },
    "choices": {
        **UNIT,
        "text_id": "INTEGER",
        "position": "INTEGER",
        "layer": "INTEGER",
        "site": "INTEGER",
        "expert_ids": "SMALLINT[]",
        "weights": "FLOAT[]",
    },
    "token_losses": {
        **UNIT,
        "text_id": "INTEGER",
        "position": "INTEGER",
        "loss": "FLOAT",
    },
    "curves": {
        "router": "VARCHAR",
        "seed": "INTEGER",
        "lambda": "DOUBLE",
        "step": "INTEGER",
        "layer": "INTEGER",
        "reward": "DOUBLE",
        "policy_entropy": "DOUBLE",
        "gate_rate": "DOUBLE",
    },
    "units": {**UNIT, "fingerprint": "VARCHAR", "error": "VARCHAR"},
}


def empty_rows() -> Rows:
    """Return every table without a row."""
    return {name: [] for name in TABLES}
