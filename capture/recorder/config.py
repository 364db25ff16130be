"""The options of one capture, checked once and saved in the run file."""

from dataclasses import asdict, dataclass
from typing import Any

from capture.errors import ConfigError, quoted
from capture.store.records import DTYPES, LEVELS, Level

DEFAULT_SAMPLE_TOKENS = 50_000
DEFAULT_ATTENTION_PROMPTS = 64
DEFAULT_ATTENTION_BINS = 64
DEFAULT_ATTENTION_TOP_KEYS = 4


@dataclass(frozen=True)
class CaptureConfig:
    """What to record and how to run the model.

    Attributes
    ----------
    level : {"stats", "ids", "scores", "attention"}
        How much is kept of every token. ``stats``: per-expert sums only. ``ids``: also expert ids,
        combine weights and four statistics per token. ``scores``: also every expert's score.
        ``attention``: also where the heads look, for some of the prompts.
    sample_tokens : int, tokens
        Tokens of which scores and router inputs are kept as well, at any level; 0 = none.
    generate : int, tokens
        Tokens to decode greedily after each prompt; 0 = none.
    batch_tokens : int or None, tokens
        Upper bound of one forward pass, padding included; None = by device.
    max_length : int or None, tokens
        Prompts are cut to this length, and in any case to the model's context.
    dtype : {"float32", "bfloat16", "float16"} or None
        None = float32 on CPU, the stored dtype on CUDA.
    device : str or None
        As torch spells it; None = CUDA when there is one.
    revision : str or None
        Branch, tag or commit of a Hugging Face model.
    trust_remote_code : bool
        Run Python code that comes with the model.
    allow_pickle : bool
        Load weights that are not safetensors; unpickling can run code.
    compile : bool
        Run the model's decoder through torch.compile.
    seed : int
        Seeds the choice of the sampled tokens and of the prompts of level ``attention``.
    attention_prompts : int, prompts
        How many prompts have their attention kept, equal shares for every domain and at least
        one for each. This and the following matter at level ``attention`` only.
    attention_layers, attention_heads : tuple of int or None
        Keep these only; None = all.
    attention_every : int
        Use every n-th block of 64 queries.
    attention_bins : int
        A map has at most so many bins of positions to a side.
    attention_top_keys : int
        Heaviest keys that are kept of a query, for the first 512 queries used; 0 = none.
    """

    level: Level = "ids"
    sample_tokens: int = DEFAULT_SAMPLE_TOKENS
    generate: int = 0
    batch_tokens: int | None = None
    max_length: int | None = None
    dtype: str | None = None
    device: str | None = None
    revision: str | None = None
    trust_remote_code: bool = False
    allow_pickle: bool = False
    compile: bool = False
    seed: int = 0
    attention_prompts: int = DEFAULT_ATTENTION_PROMPTS
    attention_layers: tuple[int, ...] | None = None
    attention_heads: tuple[int, ...] | None = None
    attention_every: int = 1
    attention_bins: int = DEFAULT_ATTENTION_BINS
    attention_top_keys: int = DEFAULT_ATTENTION_TOP_KEYS

    def __post_init__(self) -> None:
        """Refuse what cannot work, before a model is loaded."""
        if self.level not in LEVELS:
            raise ConfigError(
                f"level must be one of {', '.join(LEVELS)}, got {quoted(self.level)}. "
                "'ids' is the usual choice."
            )
        _check_count("sample_tokens", self.sample_tokens, least=0, none="0 samples nothing")
        _check_count("generate", self.generate, least=0, none="0 generates nothing")
        _check_count("seed", self.seed, least=0, none="any whole number seeds the sample")
        if self.batch_tokens is not None:
            _check_count("batch_tokens", self.batch_tokens, least=1, none="leave it out to choose")
        if self.max_length is not None:
            _check_count("max_length", self.max_length, least=1, none="leave it out not to cut")
        if self.dtype is not None and self.dtype not in DTYPES:
            raise ConfigError(
                f"dtype must be one of {', '.join(DTYPES)}, got {quoted(self.dtype)}. "
                "Leave it out for float32 on CPU and the stored dtype on CUDA."
            )

        self._check_attention()
        if self.compile and self.level == "attention":
            raise ConfigError(
                "Level 'attention' looks into attention functions, which compiled code does not "
                "call. Leave out compile, or choose level 'scores'."
            )

    def _check_attention(self) -> None:
        one = "leave it out for the default"
        _check_count("attention_prompts", self.attention_prompts, least=1, none=one)
        _check_count("attention_every", self.attention_every, least=1, none="1 uses all queries")
        _check_count("attention_bins", self.attention_bins, least=1, none=one)
        _check_count("attention_top_keys", self.attention_top_keys, least=0, none="0 keeps none")
        for name in ("attention_layers", "attention_heads"):
            values = getattr(self, name)
            if values is None:
                continue
            if not isinstance(values, list | tuple) or not values:
                raise ConfigError(
                    f"{name} must be whole numbers such as (0, 3), got "
                    f"{quoted(values)}; leave it out "
                    "for all."
                )
            for value in values:
                _check_count(name, value, least=0, none="leave it out for all")
            # a list reads well in a call, but options are compared and saved
            object.__setattr__(self, name, tuple(sorted(set(values))))

    def to_json(self) -> dict[str, Any]:
        """Return the options as plain values, for the run file."""
        return asdict(self)


def _check_count(name: str, value: object, *, least: int, none: str) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ConfigError(
            f"{name} must be a whole number of at least {least}, got {quoted(value)}; {none}."
        )
