"""The run file: one DuckDB database per capture, written once, read by many."""

from capture.store.merge import merge
from capture.store.partition import partition
from capture.store.reader import RunReader, check_run
from capture.store.records import (
    RECORDED_LEVELS,
    AttentionLayer,
    ForwardRows,
    LayerAttention,
    Level,
    PairSums,
    Phase,
    PromptAttention,
    PromptInfo,
    RunInfo,
    SiteBlock,
    SiteInfo,
    SiteRows,
    TokenRows,
    next_sites,
)
from capture.store.rewrite import MIN_PROMPTS, MIN_TOKENS, counts_only, migrate, recover
from capture.store.schema import SCHEMA_VERSION
from capture.store.writer import RunWriter

__all__ = [
    "MIN_PROMPTS",
    "MIN_TOKENS",
    "RECORDED_LEVELS",
    "SCHEMA_VERSION",
    "AttentionLayer",
    "ForwardRows",
    "LayerAttention",
    "Level",
    "PairSums",
    "Phase",
    "PromptAttention",
    "PromptInfo",
    "RunInfo",
    "RunReader",
    "RunWriter",
    "SiteBlock",
    "SiteInfo",
    "SiteRows",
    "TokenRows",
    "check_run",
    "counts_only",
    "merge",
    "migrate",
    "next_sites",
    "partition",
    "recover",
]
