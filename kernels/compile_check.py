"""Compile every kernel for other GPUs, without one: python -m kernels.compile_check [--capabilities 75 80 89 90 100].

sm_75 has no bf16 arithmetic, so it is checked in fp16; Hopper-only launch modes (L2 prefetch, fused tiles) are checked on
sm_90 and later only. Exit 1 when a kernel does not compile or needs more shared memory than a block may have.
"""

from __future__ import annotations

import argparse

import torch

from kernels.add_layernorm.jobs import add_layernorm_jobs
from kernels.beam_search.jobs import search_jobs
from kernels.cases import NLLB_54B, PAPER, PRECISIONS
from kernels.compile_ahead import Job, compile_ahead
from kernels.decode_attention.jobs import decode_attention_jobs, group_jobs
from kernels.embed.jobs import embed_jobs
from kernels.encoder_attention.jobs import encoder_attention_jobs
from kernels.expert_gemm.jobs import ffn_jobs
from kernels.expert_gemm.tiles import FfnTiles, default_tiles
from kernels.head_topk.jobs import default_head_jobs, hopper_head_jobs
from kernels.route.jobs import route_jobs
from kernels.route.tiles import default_tiles as default_gate_tiles
from kernels.small_linear.jobs import default_jobs

_BLOCK_SHARED = {75: 65536, 80: 166912, 89: 101376, 90: 232448, 100: 232448}


def jobs_for(capability: int) -> list[Job]:
    """Everything that a device of this capability may be asked to run with its default tiles."""
    dtype = torch.float16 if capability < 80 else torch.bfloat16
    found: list[Job] = []
    for shape in (PAPER, NLLB_54B):
        for precision in PRECISIONS.values():
            for pairs in (1, shape.num_experts * 40, shape.num_experts * 512):
                tiles = [default_tiles(pairs, shape.num_experts, precision.group_size)]
                if pairs == 1:
                    tiles += [FfnTiles(8, join=2), FfnTiles(32, join=2, narrow=16)]
                if capability >= 90:
                    tiles.append(FfnTiles(16, join=2, fused=True, prefetch=True))
                if capability == 90 and precision.bits < 16 and precision.group_size == 0:
                    tiles.append(
                        FfnTiles(64, 128, 64, stages=3 if precision.bits == 8 else 2, programs_per_sm=2, pipelined=True)
                    )
                for t in tiles:
                    found += ffn_jobs(shape.d_model, shape.d_ff, shape.top_k, precision.bits, precision.group_size, t, dtype)
        found += route_jobs(shape.d_model, shape.num_experts, 2, dtype, default_gate_tiles(shape.d_model, shape.num_experts))
        found += add_layernorm_jobs(shape.d_model, 2, dtype)
        found += default_head_jobs(shape.d_model, 128000 if shape is PAPER else 256206, dtype)
        if capability >= 80:  # Triton has no product of int8 codes before
            found += default_head_jobs(shape.d_model, 128000 if shape is PAPER else 256206, torch.int8)
        if capability == 90:
            for rows_type in (dtype, torch.int8):
                found += hopper_head_jobs(shape.d_model, 128000 if shape is PAPER else 256206, rows_type)
        found += default_jobs(shape.d_model, capability) + embed_jobs(shape.d_model, dtype)
    for d_model in (256, 512, 1024, 2048):  # head_dim 16, 32, 64, 128
        found += decode_attention_jobs(d_model, 16, dtype) + encoder_attention_jobs(d_model, 16, dtype)
        if capability == 90:
            found += group_jobs(d_model, 16, dtype)
    return found + search_jobs()


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--capabilities", nargs="+", type=int, default=list(_BLOCK_SHARED), choices=list(_BLOCK_SHARED))
    failed = 0
    for capability in parser.parse_args().capabilities:
        jobs = jobs_for(capability)
        results = compile_ahead(jobs, capability)
        for job, result in zip(jobs, results, strict=True):
            if result.error or result.shared_bytes > _BLOCK_SHARED[capability]:
                failed += 1
                print(
                    f"sm_{capability} {job[1]} {job[3]}: {result.error or f'{result.shared_bytes} bytes of shared memory'}"
                )
        spilling = sum(result.spill_bytes > 0 for result in results)
        print(f"sm_{capability}: {len(jobs)} kernels, {failed} failed so far, {spilling} with spills", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
