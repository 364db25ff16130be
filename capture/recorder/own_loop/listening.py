"""On the user's thread: follow every call of a model and send what its routers did.

Whatever fails here is kept as the one error of the recording; the user's call goes on.
"""

import inspect
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple, Self

import torch
from torch import nn

from capture.model.hooks import SiteObservation, Taps, heard, tap
from capture.model.sites import Site
from capture.recorder.own_loop.call import (
    Call,
    CannotFollow,
    ChangeStep,
    EndStep,
    GeneratedStep,
    GenerateStep,
    LastLogits,
    OwnStep,
    read_call,
    read_losses,
)
from capture.recorder.own_loop.intercept import (
    Caches,
    Inner,
    Known,
    calls_of,
    method_of,
    modules_called,
    not_compiled,
    watched_caches,
)
from capture.recorder.transfer import Staging

CACHE_ARGUMENTS = ("cache", "past_key_values", "cache_params", "past_key_value")
STOPS = ("stopping_criteria", "stop_strings", "max_time")


class ObservedCall(NamedTuple):
    """One call that came to its end.

    Attributes
    ----------
    call : Call
    sites : list of SiteObservation
        The model's own tensors.
    key, scope : int or None
        As in :class:`capture.recorder.own_loop.call.OwnCall`.
    losses : dict of Tensor
        From :func:`capture.recorder.own_loop.call.read_losses`.
    """

    call: Call
    sites: list[SiteObservation]
    key: int | None
    scope: int | None
    losses: dict[str, torch.Tensor]


class _Begun(NamedTuple):
    call: Call
    known: Known | None
    keeps_last: bool  # whether its logits are of its last columns


class Failure:
    """Keeps the first error; with ``strict`` errors are raised where they happen.

    Attributes
    ----------
    error : Exception or None
    """

    def __init__(self, *, strict: bool) -> None:
        self.error: Exception | None = None
        self.strict = strict

    @contextmanager
    def kept(self) -> Iterator[None]:
        """Keep what the block raises."""
        try:
            yield
        except Exception as error:
            if self.error is None:
                self.error = error
            if self.strict:
                raise


class CallListener:
    """Follows the calls of one model.

    Parameters
    ----------
    model : PreTrainedModel
        Without wrappers around it.
    sites : sequence of Site
    failure : Failure
    on_call : callable
        Takes every call, as :class:`ObservedCall`, on the user's thread.
    staging : Staging, optional
    stop : Event, optional
    """

    def __init__(
        self,
        model: nn.Module,
        sites: Sequence[Site],
        failure: Failure,
        on_call: Callable[[ObservedCall], None],
        *,
        staging: Staging | None = None,
        stop: threading.Event | None = None,
    ) -> None:
        self._model = model
        self._sites = sites
        self._failure = failure
        self._on_call = on_call
        self._staging = staging or Staging()
        self._stop = stop or threading.Event()
        self._caches = Caches()
        self._signatures: dict[nn.Module, inspect.Signature] = {}
        self._running: int | None = None  # the thread whose call is followed
        self._scope: int | None = None
        self._scopes = 0
        self._taps: Taps | None = None
        # where only calls count, nothing is told of what happens between them
        self._tell: Callable[[OwnStep], None] | None = None
        self._before: Callable[[Call, bool], None] = lambda call, is_new: None
        self._hidden_rows: Callable[[], torch.Tensor | None] | None = None
        self._n_words = 0

    def telling(
        self,
        tell: Callable[[OwnStep], None],
        before: Callable[[Call, bool], None],
        hidden_rows: Callable[[], torch.Tensor | None],
        n_words: int,
    ) -> Self:
        """Follow texts over their calls as well.

        Parameters
        ----------
        tell : callable
            Takes the steps between calls.
        before : callable
            Called before a call runs, with whether its texts begin there.
        hidden_rows : callable
            As of :func:`capture.model.hooks.tap`.
        n_words : int
            Of the vocabulary.
        """
        self._tell, self._before = tell, before
        self._hidden_rows, self._n_words = hidden_rows, n_words
        return self

    @contextmanager
    def open(self) -> Iterator[None]:
        """Follow calls while the block runs; the model is as before afterwards."""
        with ExitStack() as stack:
            # code that was compiled before has no hooks, code that is compiled now keeps them
            torch._dynamo.reset()
            stack.callback(torch._dynamo.reset)
            not_compiled()
            self._begin_apart = torch._dynamo.disable(self._begin)  # type: ignore[no-untyped-call]
            self._finish_apart = torch._dynamo.disable(self._finish)  # type: ignore[no-untyped-call]
            self._taps = stack.enter_context(
                tap(self._sites, hidden_rows=self._hidden_rows, training=True)
            )
            stack.callback(heard(self._sites[0].router, self._alone))
            for module in modules_called(self._model):
                self._signatures[module] = inspect.signature(type(module).forward)
                stack.enter_context(calls_of(module, self._call))
            if self._tell is not None:
                stack.enter_context(method_of(self._model, "generate", self._generate))
                stack.enter_context(watched_caches(self._changed))
            yield

    @property
    def _listens(self) -> bool:
        return self._failure.error is None

    def _call(
        self, module: nn.Module, inner: Inner, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Run one call of the model, or of its decoder."""
        if not self._listens or self._running == threading.get_ident():
            return inner(*args, **kwargs)
        begun = None
        try:
            with self._failure.kept():
                begun = self._begin_apart(module, args, kwargs)
            output = inner(*args, **kwargs)
        except BaseException:
            self._discard()
            raise
        finally:
            self._running = None
        if begun is not None and self._listens:
            with self._failure.kept():
                self._finish_apart(begun, output)
        return output

    def _alone(self) -> None:
        """Notice routers that run without a call, but for those that checkpointing runs again."""
        is_again = torch._C._current_graph_task_id() != -1  # in a backward pass
        if self._running is None and self._listens and not is_again:
            with self._failure.kept():
                raise CannotFollow(
                    "A call of the model or its decoder was expected, but a router ran without "
                    "one. Call model(...), not single layers or the decoder's forward."
                )

    def _discard(self) -> None:
        if self._taps is not None:
            self._taps.discard()

    def _begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> _Begun:
        if self._running is not None:
            raise CannotFollow(
                "One call of the model at a time was expected, but two threads call it at once, "
                "which mixes their tokens. Record one thread, or give each a model of its own."
            )
        self._running = threading.get_ident()
        self._tell_gone()
        # what checkpointing ran again since the last call
        self._discard()
        bound = self._signatures[module].bind_partial(module, *args, **kwargs).arguments
        for name, parameter in self._signatures[module].parameters.items():
            if parameter.kind is parameter.VAR_KEYWORD:
                bound |= bound.pop(name, {})
        known = self._known(bound)
        columns = 0 if known is None else known.columns
        call = read_call(bound, columns)
        self._before(call, not columns)
        return _Begun(call, known, not isinstance(bound.get("logits_to_keep"), torch.Tensor))

    def _known(self, arguments: dict[str, Any]) -> Known | None:
        """Return what is known of the cache that a call goes on from."""
        cache = next((c for n in CACHE_ARGUMENTS if (c := arguments.get(n)) is not None), None)
        if cache is None or self._tell is None:
            return None
        length = _length_of(cache)
        known = self._caches.find(cache)
        if known is None:
            if int(length):
                raise CannotFollow(
                    f"A cache that holds {int(length)} tokens was given to the model, which was "
                    "not seen reading them: it read them before the recording began, or the cache "
                    "is a copy. Start with an empty cache inside the recording."
                )
            return self._caches.add(cache, 0)
        # a static cache has it on the device, where nobody waits for it
        if isinstance(length, int) and length != known.columns:
            raise CannotFollow(
                f"A cache of {known.columns} tokens was expected, got one of {length}: it was "
                "changed by other means than its own methods. Use crop() or reset()."
            )
        return known

    @torch.no_grad()
    def _finish(self, begun: _Begun, output: Any) -> None:
        assert self._taps is not None
        known, call = begun.known, begun.call
        seen = self._taps.take()
        for site, one in zip(self._sites, seen, strict=True):
            if len(one.expert_ids) != call.rows * call.width:
                raise CannotFollow(
                    f"{site.info.module}: {call.rows * call.width} rows were expected for "
                    f"{call.rows} texts of {call.width} tokens, got {len(one.expert_ids)}. Such a "
                    "call cannot be recorded token by token."
                )
        if known is None and self._tell is not None:
            made = _cache_in(output)
            if made is not None and int(_length_of(made)):
                known = self._caches.find(made) or self._caches.add(made, 0)
        losses: dict[str, torch.Tensor] = {}
        if self._tell is not None:
            logits = getattr(output, "logits", None) if begun.keeps_last else None
            last = None if known is None else known.last
            losses, last = read_losses(logits, call, last, self._n_words)
            if known is not None:
                known.last = last
        if known is not None:
            known.columns += call.width
        key = None if known is None else known.key
        self._on_call(ObservedCall(call, seen, key, self._scope, losses))

    def _tell_gone(self) -> None:
        if self._tell is not None and self._caches.gone:
            count = len(self._caches.gone)
            keys = self._caches.gone[:count]
            del self._caches.gone[:count]
            self._tell(EndStep(keys))

    def _changed(self, cache: object, what: str, values: tuple[Any, ...]) -> None:
        """Follow a change of a cache, which has happened."""
        known = self._caches.find(cache)
        if known is None or not self._listens or self._tell is None:
            return
        with self._failure.kept():
            value: Any = values[0] if values else None
            key, last, known.last = known.key, known.last, None
            if last is not None and what == "batch_repeat_interleave":
                known.last = LastLogits(*(one.repeat_interleave(value, 0) for one in last))
            elif last is not None and what in ("reorder_cache", "batch_select_indices"):
                chosen = torch.as_tensor(value, device=last.known.device)
                known.last = LastLogits(*(one[chosen] for one in last))
            if what == "crop":
                value = abs(int(value))
                known.columns -= value
            elif what == "reset":
                key = self._caches.new_key(known)
            elif isinstance(value, torch.Tensor):
                value = self._staging.send(value.detach().clone(), stop=self._stop)
            elif not isinstance(value, int):
                value = self._staging.send(torch.as_tensor(value), stop=self._stop)
            self._tell(ChangeStep(key, what, value))

    def _generate(
        self, module: nn.Module, inner: Inner, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Run ``generate``, whose result says which of its tokens count."""
        if not self._listens or self._scope is not None or self._tell is None:
            return inner(*args, **kwargs)
        scope = None
        with self._failure.kept():
            scope = self._enter(args, kwargs)
        try:
            output = inner(*args, **kwargs)
        except BaseException:
            self._scope = None
            if scope is not None and self._listens:
                with self._failure.kept():
                    self._tell(GeneratedStep(scope, None))
            raise
        self._scope = None
        if scope is not None and self._listens:
            with self._failure.kept():
                self._tell(self._result(scope, module, output, args, kwargs))
                self._tell_gone()
        return output

    def _enter(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
        assert self._tell is not None
        given = args[0] if args else kwargs.get("inputs", kwargs.get("input_ids"))
        ids = given if isinstance(given, torch.Tensor) and given.ndim > 1 else None
        embeds = kwargs.get("inputs_embeds")
        read = embeds if isinstance(embeds, torch.Tensor) else ids
        returned = 0 if ids is None and read is not None else 1 if ids is None else ids.shape[1]
        tokens = None
        if ids is not None and read is ids:
            tokens = self._staging.send(ids.detach().clone(), stop=self._stop)
        scope, self._scopes = self._scopes, self._scopes + 1
        self._tell(
            GenerateStep(
                scope=scope,
                columns=1 if read is None else int(read.shape[1]),
                returned=int(returned),
                prompts=None if read is None else int(read.shape[0]),
                tokens=tokens,
            )
        )
        self._scope = scope
        return scope

    def _result(
        self,
        scope: int,
        module: nn.Module,
        output: Any,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> GeneratedStep:
        sequences = (
            output if isinstance(output, torch.Tensor) else getattr(output, "sequences", None)
        )
        if not isinstance(sequences, torch.Tensor) or sequences.ndim != 2:
            raise CannotFollow(
                f"Token ids [texts, length] were expected from generate(), got "
                f"{type(output).__name__}, so it is not known which tokens count. Call the model "
                "yourself, or use transformers' generate()."
            )
        given = kwargs.get("generation_config", args[1] if len(args) > 1 else None)
        owners = (given, getattr(module, "generation_config", None))

        def setting(name: str) -> Any:
            found = [kwargs.get(name), *(getattr(owner, name, None) for owner in owners)]
            return next((value for value in found if value is not None), None)

        ends = setting("eos_token_id")
        end_ids = _whole_numbers(ends)
        pads = _whole_numbers(setting("pad_token_id")) or end_ids
        return GeneratedStep(
            scope=scope,
            sequences=self._staging.send(sequences.detach().clone(), stop=self._stop),
            end_ids=end_ids,
            pad_id=pads[0] if pads else None,
            may_stop=any(setting(name) is not None for name in STOPS)
            or len(args) > 3
            or (setting("num_beams") or 1) > 1,
        )


def innermost(model: Any) -> Any:
    """Return the model inside what compilers, parallel wrappers and adapters put around it."""
    while True:
        inside = vars(model).get("_orig_mod") or model._modules.get("_orig_mod")
        if inside is None and type(model).__name__.endswith(("DataParallel", "DistributedModel")):
            inside = getattr(model, "module", None)
        if inside is None and callable(getattr(model, "get_base_model", None)):
            inside = model.get_base_model()
        if not isinstance(inside, nn.Module) or inside is model:
            return model
        model = inside


def _length_of(cache: object) -> int | torch.Tensor:
    length = getattr(cache, "get_seq_length", None)
    if not callable(length):
        raise CannotFollow(
            f"A cache of transformers was expected, got {type(cache).__name__}. Use DynamicCache "
            "or StaticCache."
        )
    found: int | torch.Tensor = length()
    return found


def _cache_in(output: Any) -> object | None:
    """Return the cache among what a model put out."""
    # of the first name alone: transformers warns of older ones
    name = next((name for name in CACHE_ARGUMENTS if hasattr(output, name)), None)
    if name is not None:
        found = getattr(output, name)
        return found if callable(getattr(found, "get_seq_length", None)) else None
    for value in output if isinstance(output, tuple) else ():
        if callable(getattr(value, "get_seq_length", None)):
            return value  # type: ignore[no-any-return]
    return None


def _whole_numbers(value: Any) -> tuple[int, ...]:
    if value is None:
        return ()
    if isinstance(value, torch.Tensor):
        value = value.tolist()
    return tuple(value) if isinstance(value, list | tuple) else (int(value),)
