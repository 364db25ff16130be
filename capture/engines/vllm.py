"""``capture.engines.vllm``: the routing of vLLM's own forward passes in a run file.

    with capture.engines.vllm.recording(llm, "run.duckdb") as run:
        llm.generate(prompts, sampling)

or, on the command line, ``python -m capture MODEL --engine vllm``, which is ``record``.

Every router of vLLM decides in ``BaseRouter._compute_routing``, before ids of experts become those
of replicas: that call is followed, and the batch of the model runner says which row is which token
of which request, in prefill, chunked prefill and decoding. Both are private to vLLM, so that the
versions that were tried are named here, and what was seen is counted against what was scheduled.
"""

import importlib.util
import os
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from capture.demo import WEIGHTS
from capture.errors import CaptureError, ConfigError, SiteError, TraceError, first_line
from capture.model.tokens import TokenizedPrompt, tokenize
from capture.paths import given_path
from capture.progress import Reporter
from capture.prompts import PromptSource, read_prompts
from capture.recorder.config import CaptureConfig, described
from capture.recorder.record import template_of
from capture.store.files import check_new
from capture.traces.importing import Imported, import_routing
from capture.traces.sequences import Sequence, Trace

TRIED = ("0.32.0",)
# options of a capture that mean something here
OPTIONS = (
    *("generate", "max_length", "dtype", "revision", "trust_remote_code", "seed"),
    *("text_column", "domain_column", "encoding", "chat_template"),
)
_IN_PROCESS = (
    "vLLM's engine runs in another process, where nothing can be followed. Set the environment "
    "variable VLLM_ENABLE_V1_MULTIPROCESSING=0 before vllm is imported."
)


class EngineRun:
    """What is recorded; ``result`` once the block has ended.

    Attributes
    ----------
    path : Path
    result : Imported or None
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.result: Imported | None = None


class _Scheduled(NamedTuple):
    """Consecutive tokens of a request in one pass: N tokens, L routers, K experts each."""

    first: int
    ids: npt.NDArray[np.int32]
    weights: npt.NDArray[np.float32]


class _Request:
    """What the passes so far did with one request."""

    def __init__(self, state: Any) -> None:
        self.state = state  # vLLM's, which goes on to grow until the request ends
        self.passes: list[_Scheduled] = []

    def sequence(self, name: str) -> Sequence:
        """Return its tokens in order; what a cache of prefixes spared has no row."""
        first = min(part.first for part in self.passes)
        last = max(part.first + len(part.ids) for part in self.passes)
        shape = (last - first, *self.passes[0].ids.shape[1:])
        ids, weights = np.full(shape, -1, np.int32), np.zeros(shape, np.float32)
        for part in self.passes:  # a request that was preempted is computed again: the last counts
            here = slice(part.first - first, part.first - first + len(part.ids))
            ids[here], weights[here] = part.ids, part.weights
        known = [*(self.state.prompt_token_ids or ()), *self.state.output_token_ids]
        tokens = np.asarray([token for token in known if token >= 0], np.int32)
        return Sequence(
            name,
            ids,
            weights,
            first=first,
            n_prompt=int(self.state.num_prompt_tokens),
            tokens=tokens if len(tokens) == len(known) and len(known) >= last else None,
        )


_Dress = Callable[[Iterator[Sequence]], Iterator[Sequence]]


class _Follower:
    """Follows the routers and the batches of the one worker of an engine."""

    def __init__(self) -> None:
        self.requests: dict[str, _Request] = {}
        self.layers: tuple[int, ...] = ()
        self.factors: dict[int, float] = {}  # of layers that scale the sum of their experts
        self.n_experts = self.scheduled = self.passes = 0
        self._seen: list[tuple[torch.Tensor, torch.Tensor] | None] = []
        self._undo: list[Callable[[], None]] = []
        self.error: CaptureError | None = None

    def attach(self, worker: Any) -> None:
        """Find the routers of a worker's model and follow them; called inside vLLM."""
        runner = worker.model_runner
        model = runner.get_model()
        found = [
            (name, module)
            for name, module in model.named_modules()
            if hasattr(getattr(module, "router", None), "_compute_routing")
        ]
        if not found:
            raise SiteError(
                f"{type(model).__name__} has no router that vLLM chooses experts with, so there is "
                "no routing to record."
            )
        self.layers = tuple(_layer_of(name) for name, _ in found)
        factors = [float(getattr(module, "routed_scaling_factor", 1.0)) for _, module in found]
        self.factors = {
            layer: factor for layer, factor in zip(self.layers, factors, strict=True) if factor != 1
        }
        if len(set(self.layers)) < len(found):
            raise SiteError(
                f"{type(model).__name__} has several routers in a layer, which cannot be told "
                "apart in a run of an engine yet. Record it with python -m capture."
            )
        routers = [module.router for _, module in found]
        self.n_experts = max(int(router.global_num_experts) for router in routers)
        self._seen = [None] * len(routers)
        for number, router in enumerate(routers):
            self._follow(router, number)
        inner = runner.execute_model

        def execute_model(scheduler_output: Any, *args: Any, **more: Any) -> Any:
            self._seen = [None] * len(self.layers)
            result = inner(scheduler_output, *args, **more)
            try:
                self._take(runner, scheduler_output)
            except CaptureError as error:  # never vLLM's: its answer goes to whoever asked
                self.error = self.error or error
            return result

        runner.execute_model = execute_model
        self._undo.append(lambda: runner.__dict__.pop("execute_model"))

    def detach(self, worker: Any) -> None:
        """Leave the model as it was."""
        while self._undo:
            self._undo.pop()()

    def _follow(self, router: Any, number: int) -> None:
        inner = router._compute_routing

        def compute_routing(*args: Any, **more: Any) -> tuple[torch.Tensor, torch.Tensor]:
            weights, ids = inner(*args, **more)
            self._seen[number] = ids.to("cpu", copy=True), weights.to("cpu", copy=True)
            return weights, ids

        router._compute_routing = compute_routing
        self._undo.append(lambda: router.__dict__.pop("_compute_routing"))

    def _take(self, runner: Any, scheduled: Any) -> None:
        """Hand the rows of a pass to the requests that they are of."""
        total = int(scheduled.total_num_scheduled_tokens)
        if not total or self.error:
            return
        silent = [layer for layer, seen in zip(self.layers, self._seen, strict=True) if not seen]
        seen = [one for one in self._seen if one]
        if silent or any(len(ids) < total for ids, _ in seen):
            raise SiteError(
                f"vLLM scheduled {total} tokens, and "
                + (f"the routers of layers {silent} were not" if silent else "fewer were")
                + " seen: a kernel chooses there by itself. Nothing more is recorded."
            )
        ids = torch.stack([ids[:total].int() for ids, _ in seen], 1).numpy()
        weights = torch.stack([weights[:total].float() for _, weights in seen], 1).numpy()
        at = 0
        for name in runner.input_batch.req_ids:
            n, state = int(scheduled.num_scheduled_tokens[name]), runner.requests[name]
            request = self.requests.setdefault(name, _Request(state))
            rows = slice(at, at + n)
            request.passes.append(
                _Scheduled(int(state.num_computed_tokens), ids[rows], weights[rows])
            )
            at += n
        if at != total:
            raise SiteError(f"vLLM scheduled {total} tokens, but its batch has {at}.")
        self.scheduled += total
        self.passes += 1

    def trace(self, model: str, version: str, dress: "_Dress") -> Trace:
        """Return what was followed, as traces of other programs come."""
        return Trace(
            "vLLM",
            lambda: dress(request.sequence(name) for name, request in self.requests.items()),
            layers=self.layers,
            n_experts=self.n_experts,
            model=model,
            facts={
                "engine": f"vLLM {version}",
                "forward_passes": self.passes,
                **({"factor_after_sum": self.factors} if self.factors else {}),
            },
        )


@contextmanager
def recording(llm: Any, out: str | Path, *, text: bool = True) -> Iterator[EngineRun]:
    """Record the routing of what a vLLM engine computes inside the block, into a new run file.

    Ids and combine weights as vLLM applies them, of every token that a pass computed: prompts,
    chunks of prompts, and generated tokens. What a cache of prefixes spares is missing in the run.
    Where vLLM scales the sum of a layer's experts, weights are without that factor, which
    ``run.notes`` tells under ``import.factor_after_sum``.

    Parameters
    ----------
    llm : vllm.LLM
        In this process (``VLLM_ENABLE_V1_MULTIPROCESSING=0``), with ``enforce_eager=True``, on one
        device, without speculative decoding and without replicas of experts.
    out : str or Path
        The run file; it must not exist.
    text : bool
        Store the text of tokens, if the engine has a tokenizer.

    Yields
    ------
    EngineRun
        Its ``result`` says after the block what was stored.

    Raises
    ------
    ConfigError
        If the engine is set up so that routing cannot be followed.
    SiteError
        If the model has no router of vLLM's, or one was not seen in a pass. What the engine
        computes is not touched.
    TraceError
        If nothing was computed inside the block.
    StoreError
        If ``out`` exists or cannot be written.
    """
    with _recording(llm, out, text=text, dress=iter) as run:
        yield run


def record(
    model: str | Path,
    prompts: PromptSource,
    out: str | Path,
    *,
    progress: bool = True,
    engine: Mapping[str, Any] | None = None,
    **options: Any,
) -> Path:
    """Record the routing of a model that vLLM loads and runs, as ``capture.record`` does its own.

    Parameters
    ----------
    model : str or Path
        ``"demo"``, a Hugging Face id, or a local folder.
    prompts : str, Path or iterable
        As ``capture.record`` takes them.
    out : str or Path
        The run file; it must not exist.
    progress : bool
        Whether to say on standard error what is being done.
    engine : mapping, optional
        More arguments of ``vllm.LLM``, such as ``{"max_model_len": 4096}``.
    **options
        Those of :class:`capture.CaptureConfig` that :data:`OPTIONS` names. Decoding is greedy.

    Raises
    ------
    ConfigError
        If vLLM is not installed, an option is not for it, or it cannot load the model.
    CaptureError
        If the prompts or the file cannot work, or routing was not seen.
    """
    config, path = CaptureConfig(**options), given_path(out, "the run file")
    _refuse_options(config)
    check_new(path)
    given = read_prompts(
        prompts,
        text_column=config.text_column,
        domain_column=config.domain_column,
        encoding=config.encoding,
    )
    reporter = Reporter(progress)
    reporter.enter("loading", f"Loading {model} into vLLM, and {len(given):,} prompts.")
    llm, sampling = _load(model, config, engine or {})
    tokenizer = None if llm.llm_engine.model_config.skip_tokenizer_init else llm.get_tokenizer()
    asked = tokenize(
        given,
        tokenizer,
        vocab_size=llm.llm_engine.model_config.get_vocab_size(),
        max_length=config.max_length,
        chat_template=config.chat_template and template_of(config.chat_template),
        answers=config.generate > 0,
    )
    reporter.enter("recording", f"vLLM runs {sum(len(one.ids) for one in asked):,} tokens.")
    dress = _dressed(asked, generated=config.generate > 0)
    with _recording(llm, path, text=True, dress=dress) as run:
        llm.generate(
            [{"prompt_token_ids": one.ids.tolist()} for one in asked],
            sampling(max_tokens=max(1, config.generate), temperature=0.0, detokenize=False),
            use_tqdm=progress,
        )
    return run.path


def _refuse_options(config: CaptureConfig) -> None:
    """Refuse what a recording inside vLLM does not know, rather than leave it undone."""
    for name, _, default, _ in described(CaptureConfig):
        if name not in OPTIONS and getattr(config, name) != default:
            raise ConfigError(
                f"Inside vLLM ids and combine weights are recorded, with the options "
                f"{', '.join(OPTIONS)}; {name}={getattr(config, name)!r} is not for it. Leave it "
                "out, or record without an engine."
            )


def _load(model: str | Path, config: CaptureConfig, engine: Mapping[str, Any]) -> tuple[Any, Any]:
    """Return a ``vllm.LLM`` in this process, and vLLM's class of sampling parameters."""
    if importlib.util.find_spec("vllm") is None:
        raise ConfigError(
            "vLLM is not installed in this environment. In one of its own, run: pip install vllm "
            "-r capture/engines/requirements-vllm.txt"
        )
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # read when vllm is imported
    import vllm

    arguments = {
        **{"dtype": config.dtype or "auto", "seed": config.seed, "revision": config.revision},
        # what a cache of prefixes spares would be missing
        **{"trust_remote_code": config.trust_remote_code, "enable_prefix_caching": False},
        **engine,
    }
    try:
        llm = vllm.LLM(
            str(WEIGHTS if model == "demo" else model), **arguments | {"enforce_eager": True}
        )
    except Exception as error:
        raise ConfigError(
            f"vLLM cannot load {model}: {first_line(error)}. Arguments of vllm.LLM can be given "
            "(--engine-options '{\"max_model_len\": 4096}')."
        ) from error
    return llm, vllm.SamplingParams


def _dressed(asked: list[TokenizedPrompt], *, generated: bool) -> _Dress:
    """Return what puts requests into the order of their prompts and gives them their domains."""

    def dress(sequences: Iterator[Sequence]) -> Iterator[Sequence]:
        waiting = defaultdict(list)  # equal prompts are taken in turn
        for number, prompt in enumerate(asked):
            waiting[tuple(prompt.ids.tolist())].append(number)
        found = {}
        for one in sequences:
            if one.tokens is None or one.n_prompt is None:
                raise TraceError(f"vLLM does not know all tokens of its request {one.name}.")
            number = waiting[tuple(one.tokens[: one.n_prompt].tolist())].pop(0)
            tokens = one.tokens if generated else one.tokens[: one.n_prompt]
            found[number] = one._replace(
                name=str(number), tokens=tokens, domain=asked[number].domain
            )
        return (found[number] for number in sorted(found))

    return dress


@contextmanager
def _recording(llm: Any, out: str | Path, *, text: bool, dress: _Dress) -> Iterator[EngineRun]:
    version = _checked(llm)
    path = given_path(out, "the run file")
    check_new(path)
    follower, run = _Follower(), EngineRun(path)
    _inside(llm, follower.attach)
    if not follower.layers:
        raise ConfigError(_IN_PROCESS)
    try:
        yield run
    finally:
        _inside(llm, follower.detach)
    if follower.error:
        raise follower.error
    if not follower.requests:
        raise TraceError("vLLM computed nothing inside the block, so there is nothing to store.")
    config = llm.llm_engine.model_config
    run.result = import_routing(
        follower.trace(str(config.model), version, dress),
        path,
        keep_warm_up=True,
        tokenizer=llm.get_tokenizer() if text and not config.skip_tokenizer_init else None,
    )


def _checked(llm: Any) -> str:
    """Return vLLM's version, or refuse a set-up in which routing cannot be followed."""
    # vLLM is in an environment of its own, and only whoever records there has it
    import vllm

    version = str(vllm.__version__)
    if version not in TRIED:
        warnings.warn(
            f"vLLM {version} was not tried, {' and '.join(TRIED)} were: compare a few tokens.",
            stacklevel=4,
        )
    config = llm.llm_engine.vllm_config
    parallel = config.parallel_config
    refused = {
        "enforce_eager=True is needed: a compiled model does not call what is followed": (
            not config.model_config.enforce_eager
        ),
        "more than one device is not followed: tensor, pipeline and data parallel sizes of 1": (
            parallel.world_size_across_dp > 1
        ),
        "speculative decoding is not followed: leave speculative_config out": (
            config.speculative_config is not None
        ),
        "replicas of experts are not followed: leave enable_eplb out": parallel.enable_eplb,
    }
    for reason, holds in refused.items():
        if holds:
            raise ConfigError(f"This engine cannot be recorded: {reason}.")
    return version


def _inside(llm: Any, act: Callable[[Any], None]) -> None:
    """Let the engine's worker act; it must be in this process."""
    try:
        llm.collective_rpc(act)
    except CaptureError:
        raise
    except Exception as error:
        raise ConfigError(f"{_IN_PROCESS} (It said: {first_line(error)}.)") from error


def _layer_of(name: str) -> int:
    """Return the number of the decoder layer in a module's name."""
    numbers = [int(part) for part in name.split(".") if part.isdecimal()]
    if not numbers:
        raise SiteError(f"The name of the router {name!r} does not say its layer.")
    return numbers[0]
