"""Launchers of the expert GEMM. T tokens, D d_model, F d_ff, E experts, k active, P = T * k pairs."""

from __future__ import annotations

import functools
from typing import Any

import torch

from kernels.expert_gemm.hopper.launcher import check_pipelined, first_strips, launch_pipelined
from kernels.expert_gemm.packing import PackedExperts
from kernels.expert_gemm.tiles import FfnTiles, select_tiles
from kernels.launch import check, overlap
from kernels.routing import Routing
from kernels.weights_ahead import WeightsAhead


def expert_gemm(
    x: torch.Tensor,
    weight: PackedExperts,
    bias: torch.Tensor,
    routing: Routing,
    *,
    first: bool,
    tiles: FfnTiles | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """One grouped GEMM over experts, weights dequantized in registers, fp32 accumulation.

    first: relu(x W^T + b) of x [T, D] -> [P, F] in expert order. Not first: gate * (x W^T + b) of x [P, F] in expert
    order -> [P, D] in pair order. x, bias and out are bf16, fp16 or fp32; weight holds [E, N, K]. Rows of inactive
    pairs are not written. An expert without tokens costs nothing. One launch, no host sync. Raises ValueError for
    shapes or dtypes that do not belong together.
    """
    num_pairs = routing.gather_index.numel()
    rows = routing.num_tokens if first else num_pairs
    tiles = tiles or select_tiles(num_pairs, weight)
    check(not tiles.pipelined, "pipelined tiles are of both GEMMs: call expert_ffn, or choose other tiles")
    _check_gemm(x, weight, bias, routing, rows, tiles)
    check(
        tiles.block_tokens == routing.block_tokens,
        f"tiles of {tiles.block_tokens} tokens; routing was cut to {routing.block_tokens}",
    )
    out = x.new_empty(num_pairs, weight.num_features) if out is None else out
    if num_pairs == 0:
        return out
    from kernels.expert_gemm.kernel import expert_gemm_kernel

    constants = gemm_constants(
        weight.num_features, weight.num_inputs, routing.top_k, weight.bits, weight.group_size, tiles, first, _has_asm(x)
    )
    grid = (-(-weight.num_features // constants["BN"]), routing.tiles.shape[0])
    expert_gemm_kernel[grid](
        x,
        weight.data,
        bias if weight.scales is None else weight.scales,
        bias,
        routing.gate_weights,
        routing.gather_index,
        routing.tiles,
        routing.num_tiles,
        out,
        **constants,
        **launch_options(tiles, x.is_cuda),
        **overlap(x),
    )
    return out


def expert_ffn(
    x: torch.Tensor,
    fc1: PackedExperts,
    bias1: torch.Tensor,
    fc2: PackedExperts,
    bias2: torch.Tensor,
    routing: Routing,
    *,
    tiles: FfnTiles | None = None,
    hidden: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """gate * (relu(x W1^T + b1) W2^T + b2) for every active (token, expert) pair: [T, k, D] in x's dtype.

    x bf16/fp16/fp32[T, D]; fc1 holds [E, F, D], fc2 [E, D, F]; bias1 [E, F], bias2 [E, D]; hidden: scratch [P, F] in
    x's dtype. Inactive pairs are not written: the reader masks them by expert_ids (add_layernorm does). The sum over k
    is its reader's as well, in slot order, so the result does not depend on timing. With tiles.split 1 a row's bits do
    not depend on its batch either. One or two launches, no host sync. routing.sync is used up: route again before the
    next call. Raises ValueError for shapes or dtypes that do not belong together.
    """
    num_pairs = routing.gather_index.numel()
    tiles = tiles or select_tiles(num_pairs, fc1)
    check(
        fc1.num_features == fc2.num_inputs and fc1.num_inputs == fc2.num_features, "fc1 is [E, F, D]; fc2 must be [E, D, F]"
    )
    check(fc1.bits == fc2.bits and fc1.group_size == fc2.group_size, "fc1 and fc2 must be quantized alike")
    hidden = x.new_empty(num_pairs, fc1.num_features) if hidden is None else hidden
    check(hidden.dtype == x.dtype, f"hidden is {hidden.dtype}, x is {x.dtype}: both GEMMs multiply in one dtype")
    out = x.new_empty(routing.num_tokens, routing.top_k, fc2.num_features) if out is None else out
    if not (tiles.fused or tiles.pipelined):
        expert_gemm(x, fc1, bias1, routing, first=True, tiles=tiles, out=hidden)
        expert_gemm(hidden, fc2, bias2, routing, first=False, tiles=tiles, out=out)
        return out
    _check_gemm(x, fc1, bias1, routing, routing.num_tokens, tiles)
    _check_gemm(hidden, fc2, bias2, routing, num_pairs, tiles)
    check(
        tiles.block_tokens == routing.block_tokens,
        f"tiles of {tiles.block_tokens} tokens; routing was cut to {routing.block_tokens}",
    )
    if tiles.pipelined:
        check(_has_pipeline(x), "pipelined tiles need a GPU of compute capability 9.0: choose other tiles")
        check_pipelined(fc1, x.dtype, num_pairs, tiles)
    if num_pairs and tiles.pipelined:
        launch_pipelined(x, fc1, bias1, fc2, bias2, routing, tiles, hidden, out, _programs(tiles, x))
    elif num_pairs:
        _launch_ffn(x, fc1, bias1, fc2, bias2, routing, tiles, hidden, out)
    return out


def first_weights(fc1: PackedExperts, tiles: FfnTiles, limit: int) -> WeightsAhead | None:
    """What the programs of a pipelined launch read first, `limit` bytes at most, for a launch before to ask for in L2; None
    for other launches."""
    if not (tiles.pipelined and _has_pipeline(fc1.data)):
        return None
    return first_strips(fc1, tiles, _programs(tiles, fc1.data), limit)


def _launch_ffn(
    x: torch.Tensor,
    fc1: PackedExperts,
    bias1: torch.Tensor,
    fc2: PackedExperts,
    bias2: torch.Tensor,
    routing: Routing,
    tiles: FfnTiles,
    hidden: torch.Tensor,
    out: torch.Tensor,
) -> None:
    from kernels.expert_gemm.fused import expert_ffn_kernel

    num_pairs, max_tiles = routing.gather_index.numel(), routing.tiles.shape[0]
    d_model, d_ff = fc1.num_inputs, fc1.num_features
    block = 64 * tiles.join if fc1.bits == 16 else 1024 // fc1.bits
    check(
        -(-d_ff // block) % tiles.split == 0,
        f"split {tiles.split} does not divide the {-(-d_ff // block)} steps of d_ff {d_ff}",
    )
    partial = hidden
    if tiles.split > 1:
        partial = torch.empty((tiles.split, num_pairs, d_model), dtype=torch.float32, device=x.device)
    items = max_tiles * (-(-d_ff // tiles.bn1) + -(-d_model // tiles.bn2) * tiles.split)
    constants = ffn_constants(d_model, d_ff, routing.top_k, fc1.bits, fc1.group_size, tiles, _has_asm(x), x.is_cuda)
    expert_ffn_kernel[(min(items, _programs(tiles, x)),)](
        x,
        fc1.data,
        bias1 if fc1.scales is None else fc1.scales,
        bias1,
        fc2.data,
        bias2 if fc2.scales is None else fc2.scales,
        bias2,
        routing.gate_weights,
        routing.gather_index,
        routing.tiles,
        routing.num_tiles,
        hidden,
        out,
        partial,
        routing.sync,
        num_pairs,
        max_tiles,
        **constants,
        **launch_options(tiles, x.is_cuda),
        **overlap(x),
    )


def _check_gemm(
    x: torch.Tensor, weight: PackedExperts, bias: torch.Tensor, routing: Routing, rows: int, tiles: FfnTiles
) -> None:
    wanted = (rows, weight.num_inputs)
    check(tuple(x.shape) == wanted, f"x is {tuple(x.shape)}; routing and weight want {wanted}")
    check(x.is_contiguous() and bias.is_contiguous(), "x and bias must be contiguous: call .contiguous()")
    check(tuple(bias.shape) == (weight.num_experts, weight.num_features), f"bias is {tuple(bias.shape)}; it must be [E, N]")
    check(
        weight.num_experts == routing.num_experts,
        f"{weight.num_experts} experts in the weights, {routing.num_experts} in the routing",
    )
    check(
        weight.bits < 16 or weight.data.dtype == x.dtype,
        f"weights are {weight.data.dtype}, x is {x.dtype}: convert one of them",
    )
    check(
        weight.group_size == 0 or tiles.join in (2, weight.group_size // 32),
        f"join {tiles.join} does not fit groups of {weight.group_size}; choose 2 (or 4 with groups of 128)",
    )
    check(weight.data.device == x.device, f"weights are on {weight.data.device}, x on {x.device}")


def _has_asm(x: torch.Tensor) -> bool:
    """The assembly decoder gives 16-bit floats and runs on a GPU (bf16 arithmetic from compute capability 8.0 on)."""
    if not x.is_cuda or x.dtype == torch.float32:
        return False
    return x.dtype == torch.float16 or torch.cuda.get_device_capability(x.device) >= (8, 0)


def _has_pipeline(x: torch.Tensor) -> bool:
    """Register operands of asynchronous dots exist on Hopper alone."""
    return x.is_cuda and torch.cuda.get_device_capability(x.device) == (9, 0)


def gemm_constants(
    num_features: int, num_inputs: int, top_k: int, bits: int, group_size: int, tiles: FfnTiles, first: bool, asm: bool
) -> dict[str, Any]:
    """Compile-time arguments of `expert_gemm_kernel`; the tuner and the compile check build the same ones."""
    return {
        "N": num_features,
        "K": num_inputs,
        "TOP_K": top_k,
        "BITS": bits,
        "GROUP": group_size,
        "BN": tiles.bn1 if first else tiles.bn2,
        "BT": tiles.block_tokens,
        "JOIN": tiles.join,
        "STAGES": tiles.stages,
        "ASM": asm,
        "FIRST": first,
        "NARROW": tiles.narrow,
    }


def ffn_constants(
    d_model: int, d_ff: int, top_k: int, bits: int, group_size: int, tiles: FfnTiles, asm: bool, on_gpu: bool
) -> dict[str, Any]:
    """Compile-time arguments of `expert_ffn_kernel`. Only whole tiles are prefetched, and only where an L2 can be asked."""
    prefetch = tiles.prefetch and on_gpu and d_ff % tiles.bn1 == 0 and d_model % tiles.bn2 == 0
    return {
        "D": d_model,
        "F": d_ff,
        "TOP_K": top_k,
        "BITS": bits,
        "GROUP": group_size,
        "BN1": tiles.bn1,
        "BN2": tiles.bn2,
        "BT": tiles.block_tokens,
        "SPLIT": tiles.split,
        "JOIN": tiles.join,
        "STAGES": tiles.stages,
        "ASM": asm,
        "PREFETCH": prefetch,
        "DYNAMIC": tiles.dynamic,
    }


def launch_options(tiles: FfnTiles, on_gpu: bool) -> dict[str, Any]:
    """Launch options; a fused launch whose programs wait for each other is cooperative, so that all of them are resident."""
    options: dict[str, Any] = {"num_warps": tiles.warps}
    if on_gpu and tiles.max_registers:
        options["maxnreg"] = tiles.max_registers
    if on_gpu and tiles.fused and not tiles.dynamic:
        options["launch_cooperative_grid"] = True
    return options


@functools.cache
def _multiprocessors(device_index: int) -> int:
    return int(torch.cuda.get_device_properties(device_index).multi_processor_count)


def _programs(tiles: FfnTiles, x: torch.Tensor) -> int:
    """Persistent programs. One in the interpreter, which runs them one after the other: none may wait for a later one."""
    return _multiprocessors(x.device.index or 0) * tiles.programs_per_sm if x.is_cuda else 1
