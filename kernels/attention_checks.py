"""Every attention op against its slow twin, one case at a time (see `kernels.checks`)."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import torch

from kernels.cross_attention_checks import CrossCase, CrossInputs, cross_cases, cross_inputs
from kernels.decode_attention.tiles import CROSS_GROUP_TILES, CROSS_TILES, SELF_LIST_TILES
from kernels.encoder_attention_checks import EncoderCase, EncoderInputs, encoder_cases, encoder_inputs
from kernels.self_attention_checks import GroupCase, SelfCase, SelfInputs, group_cases, group_inputs, self_cases, self_inputs
from kernels.testing import relative_error

Case = SelfCase | GroupCase | CrossCase | EncoderCase
Inputs = SelfInputs | CrossInputs | EncoderInputs


def check_inputs(inputs: Inputs) -> float:
    """Error of what must be written, the largest of all kernels that may be asked for it; inf when a row that must stay or
    be zero does not, or two runs on a GPU differ."""
    return max(_error(one) for one in every_kernel(inputs))


def every_kernel(inputs: Inputs) -> list[Inputs]:
    """The inputs as they are, and as every other kernel that this device has for them wants them."""
    found = [inputs]
    if isinstance(inputs, EncoderInputs) or not inputs.q.is_cuda:
        return found
    head_dim = inputs.q.shape[1] // inputs.num_heads
    hopper = torch.cuda.get_device_capability(inputs.q.device) == (9, 0) and inputs.q.dtype != torch.float32
    if isinstance(inputs, CrossInputs):
        tiles = CROSS_GROUP_TILES.get(head_dim, ()) if hopper else ()
        return [inputs, *(dataclasses.replace(inputs, tiles=t) for t in (CROSS_TILES[head_dim], *tiles))]
    if hopper and inputs.groups is not None and head_dim in SELF_LIST_TILES:
        found += [inputs.listed()]
    return found


def _error(inputs: Inputs) -> float:
    out, truth = inputs.run(), inputs.truth()
    if out.is_cuda:  # the second run reads cells before it waits
        again = inputs if isinstance(inputs, EncoderInputs) else dataclasses.replace(inputs, ready=True)
        if not torch.equal(out.nan_to_num(7.0), again.run().nan_to_num(7.0)):
            return float("inf")
    unwritten, zero = truth.isnan().all(1), truth.eq(0).all(1)
    if not out[unwritten].isnan().all() or not out[zero].eq(0).all():
        return float("inf")
    return relative_error(out[~unwritten], truth[~unwritten])


def make_inputs(case: Case, device: torch.device, dtype: torch.dtype) -> Inputs:
    """Operands of any case."""
    if isinstance(case, SelfCase):
        return self_inputs(case, device, dtype)
    if isinstance(case, GroupCase):
        return group_inputs(case, device, dtype)
    if isinstance(case, CrossCase):
        return cross_inputs(case, device, dtype)
    return encoder_inputs(case, device, dtype)


def attention_failures(device: torch.device, dtype: torch.dtype, limit: float, *, large: bool) -> Iterator[str]:
    """One line for each case of each op whose error is not within the limit."""
    cases: list[Case] = [*self_cases(large=large), *group_cases(large=large)]
    cases += [*cross_cases(large=large), *encoder_cases(large=large)]
    for case in cases:
        error = check_inputs(make_inputs(case, device, dtype))
        if not error <= limit:
            yield f"{type(case).__name__.removesuffix('Case')} attention {dtype} {case.name}: error {error:.2e}"
