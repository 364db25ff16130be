"""The options of a capture, each written down once.

``capture.record``, the command line, the request to the app's worker and the form on the Capture
page are made from the fields here: a new option is one field, and the code that uses it.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any, NamedTuple, get_type_hints

from capture.errors import ConfigError, quoted
from capture.store.records import DTYPES, RECORDED_LEVELS, Level

_LEVEL_TEXTS = (
    "Totals per expert only; the smallest file.",
    "Experts, weights and four statistics of every token. The usual choice.",
    "Also every expert's score for every token.",
    "Also where the attention heads look, for some of the prompts; takes longer.",
)


class Form(NamedTuple):
    """How a form asks for an option.

    Attributes
    ----------
    label, hint : str
        Of the field; the hint says more than the label has room for.
    most, step : int
        Bounds of a whole number in a form; ``most`` 0 = none.
    values : tuple of int
        Offered to choose from, instead of any number.
    """

    label: str
    hint: str
    most: int = 0
    step: int = 1
    values: tuple[int, ...] = ()


class Option(NamedTuple):
    """What there is to know of an option besides its name, type and default.

    Attributes
    ----------
    help : str
        For the command line, where ``%(default)s`` stands for the default.
    metavar : str
        What the command line calls a value.
    least : int
        The smallest whole number.
    advice : str
        The end of the message about a wrong value.
    choices : mapping
        Allowed values, each with what it means.
    form : Form or None
        None where no form asks for it.
    """

    help: str
    metavar: str = "N"
    least: int = 0
    advice: str = "leave it out for the default"
    choices: Mapping[str, str] | None = None
    form: Form | None = None


class Described(NamedTuple):
    """One option of a config: its name, its type as written, its default and its description."""

    name: str
    kind: Any
    default: Any
    option: Option


def _option(help: str, **more: Any) -> dict[str, Option]:
    return {"option": Option(help, **more)}


@dataclass(frozen=True, kw_only=True)
class RecordingOptions:
    """What a capture records, whatever the model and the machine."""

    level: Level = field(
        default="ids",
        metadata=_option(
            "stats: sums per expert; ids: also expert ids, weights and statistics of every token; "
            "scores: also every expert's score; attention: also where the heads look, for some "
            "prompts (default: %(default)s)",
            metavar="LEVEL",
            choices=dict(zip(RECORDED_LEVELS, _LEVEL_TEXTS, strict=True)),
            advice="'ids' is the usual choice",
        ),
    )
    generate: int = field(
        default=0,
        metadata=_option(
            "tokens to decode after each prompt",
            advice="0 generates nothing",
            form=Form(
                "Generate per prompt",
                "Tokens that the model writes after each prompt; they are recorded too.",
                most=512,
            ),
        ),
    )
    sample_tokens: int = field(
        default=50_000,
        metadata=_option(
            "tokens whose scores and router inputs are kept at any level, for clusters and replay; "
            "0 = none (default: %(default)s)",
            advice="0 samples nothing",
            form=Form(
                "Sampled tokens",
                "For so many tokens every expert's score and the router's input are kept as well, "
                "whatever the level. 0 = none.",
                step=10_000,
            ),
        ),
    )
    attention_prompts: int = field(
        default=64,
        metadata=_option(
            "prompts whose attention is kept, equal shares for every domain and at least one for "
            "each (default: %(default)s)",
            least=1,
            form=Form(
                "Prompts with attention",
                "Maps grow with prompts, layers and heads, so they are kept for some prompts: "
                "equal shares of every domain, at least one of each.",
            ),
        ),
    )
    attention_layers: Sequence[int] | None = field(
        default=None,
        metadata=_option(
            "these layers only",
            metavar="L",
            advice="leave it out for all",
            form=Form("Layers", "all, or 0, 5, 11"),
        ),
    )
    attention_heads: Sequence[int] | None = field(
        default=None,
        metadata=_option(
            "these heads only",
            metavar="H",
            advice="leave it out for all",
            form=Form("Heads", "all, or 0, 1"),
        ),
    )
    attention_every: int = field(
        default=1,
        metadata=_option(
            "use every N-th block of 64 queries (default: %(default)s)",
            least=1,
            advice="1 uses all queries",
            form=Form(
                "Use every n-th block",
                "Queries come in blocks of 64 tokens; 1 uses all of them, 8 is eight times "
                "quicker. Prompts of up to 64 tokens are not affected.",
            ),
        ),
    )
    attention_bins: int = field(
        default=64,
        metadata=_option(
            "bins to a side of a map, at most (default: %(default)s)",
            least=1,
            form=Form(
                "Bins of a map",
                "A map has at most so many blocks of tokens to a side; a prompt of no more "
                "tokens has an exact map.",
                values=(16, 32, 64, 128),
            ),
        ),
    )
    attention_top_keys: int = field(
        default=4,
        metadata=_option(
            "heaviest keys kept of each of a prompt's first 512 queries; 0 = none "
            "(default: %(default)s)",
            advice="0 keeps none",
            form=Form(
                "Heaviest keys",
                "For each token and head, the keys that it attends to most, exactly. 0 = none.",
                most=16,
            ),
        ),
    )

    def recorded(self) -> dict[str, Any]:
        """Return what is recorded, as arguments of ``capture.record``."""
        return {one.name: getattr(self, one.name) for one in described(RecordingOptions)}


@dataclass(frozen=True, kw_only=True)
class CaptureConfig(RecordingOptions):
    """What to record and how to run the model."""

    batch_tokens: int | None = field(
        default=None,
        metadata=_option(
            "tokens of a forward pass, padding included",
            least=1,
            advice="leave it out to choose",
        ),
    )
    max_length: int | None = field(
        default=None,
        metadata=_option("cut prompts to N tokens", least=1, advice="leave it out not to cut"),
    )
    text_column: str | None = field(
        default=None,
        metadata=_option(
            "the column of tables, or field of records, that holds the prompts (default: text, or "
            "the one that it must be)",
            metavar="NAME",
        ),
    )
    domain_column: str | None = field(
        default=None,
        metadata=_option("the column or field of the domains (default: domain)", metavar="NAME"),
    )
    encoding: str | None = field(
        default=None,
        metadata=_option(
            "of text files, such as windows-1252 or utf-16 (default: utf-8)", metavar="NAME"
        ),
    )
    chat_template: str | None = field(
        default=None,
        metadata=_option(
            "a file with a Jinja template for conversations (default: the tokenizer's own)",
            metavar="FILE",
        ),
    )
    dtype: str | None = field(
        default=None,
        metadata=_option(
            f"{', '.join(DTYPES)} (default: float32 on CPU, as stored on CUDA)",
            metavar="DTYPE",
            choices=dict.fromkeys(DTYPES, ""),
            advice="Leave it out for float32 on CPU and the stored dtype on CUDA",
        ),
    )
    device: str | None = field(
        default=None,
        metadata=_option("cpu, cuda, cuda:1, or auto (default: CUDA if any)", metavar="DEVICE"),
    )
    revision: str | None = field(
        default=None, metadata=_option("branch, tag or commit of a hub model", metavar="REV")
    )
    trust_remote_code: bool = field(
        default=False, metadata=_option("run Python code that the model brings")
    )
    allow_pickle: bool = field(
        default=False, metadata=_option("load weights that are not safetensors")
    )
    compile: bool = field(default=False, metadata=_option("run the model through torch.compile"))
    shard: str | None = field(
        default=None,
        metadata=_option(
            "record share I of N of the prompts, counted from 0, or 'slurm' for a task of a job "
            "array (default: torchrun's rank); the last process to end merges the parts",
            metavar="I/N",
        ),
    )
    parts: int | None = field(
        default=None,
        metadata=_option(
            "commit the shares in N parts; a kill costs the part at hand (default: one a process)",
            least=1,
            advice="leave it out for one a process",
        ),
    )
    seed: int = field(
        default=0,
        metadata=_option(
            "of the sampled tokens (default: %(default)s)",
            advice="any whole number seeds the sample",
        ),
    )

    def __post_init__(self) -> None:
        """Refuse what cannot work, before a model is loaded."""
        for name, kind, default, option in described(type(self)):
            value = getattr(self, name)
            if value is None and default is None:
                continue
            if option.choices is not None:
                _check_choice(name, value, option)
            elif kind == Sequence[int] | None:
                # a list reads well in a call, but options are compared and saved
                object.__setattr__(self, name, _checked_list(name, value, option))
            elif kind in (int, int | None):
                _check_count(name, value, option)
        if self.compile and self.level == "attention":
            raise ConfigError(
                "Level 'attention' looks into attention functions, which compiled code does not "
                "call. Leave out compile, or choose level 'scores'."
            )

    def to_json(self) -> dict[str, Any]:
        """Return the options as plain values, for the run file."""
        return asdict(self)


def described(config: type[RecordingOptions]) -> Iterator[Described]:
    """Yield the options of a config, in the order in which they are shown."""
    kinds = get_type_hints(config)
    for one in fields(config):
        if "option" in one.metadata:
            yield Described(one.name, kinds[one.name], one.default, one.metadata["option"])


def _check_choice(name: str, value: object, option: Option) -> None:
    if value not in list(option.choices or ()):
        raise ConfigError(
            f"{name} must be one of {', '.join(option.choices or ())}, got {quoted(value)}. "
            f"{option.advice}."
        )


def _checked_list(name: str, values: object, option: Option) -> tuple[int, ...]:
    listed = [*values] if isinstance(values, Iterable) and not isinstance(values, str) else []
    if not listed:
        raise ConfigError(
            f"{name} must be whole numbers such as (0, 3), got {quoted(values)}; {option.advice}."
        )
    for value in listed:
        _check_count(name, value, option)
    return tuple(sorted(set(listed)))


def _check_count(name: str, value: object, option: Option) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < option.least:
        raise ConfigError(
            f"{name} must be a whole number of at least {option.least}, got {quoted(value)}; "
            f"{option.advice}."
        )


def _attributes(config: type[RecordingOptions]) -> str:
    """Write the options down for ``help()``."""
    lines = ["", "", "Attributes", "----------"]
    for name, kind, default, option in described(config):
        spelled = getattr(kind, "__name__", None) if isinstance(kind, type) else str(kind)
        lines += [
            f"{name} : {spelled}, default {default!r}",
            f"    {option.help % {'default': default}}",
        ]
    return "\n".join(lines)


for _config in (RecordingOptions, CaptureConfig):
    _config.__doc__ = f"{_config.__doc__}{_attributes(_config)}"
