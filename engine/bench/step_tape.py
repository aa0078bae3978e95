"""One decode step taken down call by call, so that it can be run again without the launches of one part.

A part is left out by putting functions that launch nothing in the place of those that the step calls; they return what the
complete step returned there, so whatever comes behind reads sound data. What the launches would have told the host (which
statistics are valid, which products are there) is told all the same: no other launch changes its form.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from engine.bench.floor import StepPart
from engine.model import kernel_decoder, kernel_layers
from engine.search import device_search
from kernels.head_topk import TopTokens
from kernels.routing import Routing

# Where the step calls what launches, and to which part that belongs; None: by its place in the layer.
_CALLS: tuple[tuple[ModuleType, str, StepPart | None], ...] = (
    (device_search, "step_inputs", StepPart.SEARCH),
    (kernel_decoder, "embed", StepPart.SEARCH),
    (kernel_decoder, "qkv_linear", StepPart.QKV),
    (kernel_decoder, "decode_self_attention", StepPart.SELF_ATTENTION),
    (kernel_decoder, "decode_cross_attention", StepPart.CROSS_ATTENTION),
    (kernel_layers, "small_linear", None),
    (kernel_layers, "route", StepPart.ROUTER),
    (kernel_layers, "route_products", StepPart.ROUTER),
    (kernel_layers, "expert_ffn", StepPart.EXPERTS),
    (kernel_layers, "add_slots", StepPart.SUMS),
    (kernel_layers, "add_layernorm", StepPart.SUMS),
    (kernel_layers, "add_layernorm_int8", StepPart.SUMS),
    (kernel_decoder, "head_topk", StepPart.HEAD),
    (device_search, "advance_sentences", StepPart.SEARCH),
)
# `small_linear` in the order in which a decoder layer calls it, `qkv_linear` being the layer's first call.
_MAPS = (StepPart.SELF_OUT, StepPart.QUERY, StepPart.CROSS_OUT, StepPart.FIRST_DENSE, StepPart.SECOND_DENSE)

_Act = Callable[[int, StepPart, Callable[..., Any], tuple[Any, ...], dict[str, Any]], Any]


@dataclass(frozen=True, slots=True)
class StepCall:
    """result: as it was returned, the very tensors. valid: of the statistics it was given; parts: of the products."""

    part: StepPart
    result: Any
    valid: bool
    parts: Tensor | None


@dataclass(slots=True)
class StepTape:
    """The calls of one step. saved: every tensor that one of them returned, or left statistics in, and its contents at the
    first such moment: later launches add to some in place or use them up."""

    calls: list[StepCall] = field(default_factory=list)
    saved: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Take down the one step that runs meanwhile."""
        with _patched(self._record):
            yield

    @contextmanager
    def without(self, part: StepPart | None) -> Iterator[None]:
        """Steps that run (or are captured) meanwhile launch nothing of this part; None: everything."""

        def act(index: int, here: StepPart, function: Callable[..., Any], args: Any, kwargs: dict[str, Any]) -> Any:
            return function(*args, **kwargs) if here is not part else self._replay(index, here, kwargs)

        with _patched(act):
            yield

    def restore(self) -> None:
        """Put back what was saved; launches copies only."""
        for tensor, contents in self.saved.values():
            tensor.copy_(contents)

    @property
    def parts(self) -> list[StepPart]:
        """Those that the step has, in the order of tables."""
        return [part for part in StepPart if any(call.part is part for call in self.calls)]

    @property
    def top_tokens(self) -> TopTokens:
        """What the output projection returned."""
        found = next(call.result for call in self.calls if call.part is StepPart.HEAD)
        assert isinstance(found, TopTokens)
        return found

    def experts_touched(self) -> float:
        """Distinct experts of a sparse layer, on average; 0 without such layers. Waits for the device."""
        routings = [one for call in self.calls for one in _parts_of(call.result) if isinstance(one, Routing)]
        counts = [int((self._contents(one.tokens_per_expert) > 0).sum()) for one in routings]
        return sum(counts) / max(len(counts), 1)

    def _contents(self, tensor: Tensor) -> Tensor:
        return self.saved[tensor.data_ptr()][1]

    def _record(self, _: int, part: StepPart, function: Callable[..., Any], args: Any, kwargs: dict[str, Any]) -> Any:
        result = function(*args, **kwargs)
        statistics, products = kwargs.get("statistics"), kwargs.get("products")
        valid = statistics is not None and statistics.valid
        self.calls.append(StepCall(part, result, valid, None if products is None else products.parts))
        written = [] if statistics is None else [statistics.chunks]
        for tensor in (*(one for one in _parts_of(result) if isinstance(one, Tensor)), *written):
            if tensor.numel() and tensor.data_ptr() not in self.saved:
                self.saved[tensor.data_ptr()] = (tensor, tensor.clone())
        return result

    def _replay(self, index: int, part: StepPart, kwargs: dict[str, Any]) -> Any:
        call = self.calls[index]
        if call.part is not part:
            raise RuntimeError(f"call {index} of the step is of the {part}, but was of the {call.part} when taken down")
        if kwargs.get("statistics") is not None:
            kwargs["statistics"].valid = call.valid
        if kwargs.get("products") is not None:
            kwargs["products"].parts = call.parts
        return call.result


@contextmanager
def _patched(act: _Act) -> Iterator[None]:
    """Every call of a step goes to `act`, with its number and its part."""
    index = place = 0

    def through(function: Callable[..., Any], part: StepPart | None) -> Callable[..., Any]:
        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal index, place
            if part is None:
                here, place = _MAPS[place], place + 1
            else:
                here, place = part, 0 if part is StepPart.QKV else place
            result = act(index, here, function, args, kwargs)
            index += 1
            return result

        return call

    with ExitStack() as stack:
        for module, name, part in _CALLS:
            function = getattr(module, name)
            stack.callback(setattr, module, name, function)
            setattr(module, name, through(function, part))
        yield


def _parts_of(value: Any) -> Iterator[Any]:
    """The value and, of tuples and dataclasses, all within."""
    yield value
    inner: tuple[Any, ...] = ()
    if isinstance(value, tuple):
        inner = value
    elif dataclasses.is_dataclass(value):
        inner = tuple(getattr(value, one.name) for one in dataclasses.fields(value))
    for one in inner:
        yield from _parts_of(one)


def table_copies(tables: Any) -> dict[int, tuple[Tensor, Tensor]]:
    """Tensors of a dataclass and their contents now, as `StepTape.saved` holds them; not those for the host, which launches
    only write."""
    tensors = (one for one in _parts_of(tables) if isinstance(one, torch.Tensor))
    return {one.data_ptr(): (one, one.clone()) for one in tensors if not one.is_pinned()}
