"""Every op against its slow twin, one case at a time: python -m kernels.checks (GPU), or through pytest on either device.

With --small a few tiny awkward cases of every op, little enough for compute-sanitizer to watch (kernels.small_checks). On a
CPU the kernels run in Triton's interpreter (TRITON_INTERPRET=1 before triton is imported), in fp32 and fp16 and with the
plain decoder; on a GPU in bf16 and fp16 with the assembly decoder.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator

import torch

from kernels.attention_checks import attention_failures
from kernels.compile_ahead import Job, compile_ahead
from kernels.expert_checks import check_expert_case, expert_case_jobs, expert_cases, pipelined_cases
from kernels.head_checks import failed_head_checks, head_check_jobs
from kernels.layernorm_checks import LAYERNORM_SIZES, check_add_layernorm
from kernels.linear_checks import linear_check_jobs, linear_failures
from kernels.linear_int8_checks import int8_rows_check_jobs, int8_rows_failures
from kernels.route_checks import ROUTE_SIZES, check_route

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
LIMITS = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1e-2}


def all_jobs(dtypes: tuple[torch.dtype, ...]) -> list[Job]:
    """Compile jobs of the full run."""
    jobs = [
        job
        for dtype in dtypes
        for c in (*expert_cases(large=True), *pipelined_cases())
        for job in expert_case_jobs(c, dtype)
    ]
    jobs += [job for dtype in dtypes for job in linear_check_jobs(dtype)]
    jobs += [job for dtype in dtypes for job in int8_rows_check_jobs(dtype)]
    return jobs + [job for dtype in dtypes for job in head_check_jobs(dtype)]


def all_failures(device: torch.device, dtype: torch.dtype) -> Iterator[str]:
    """Every check of the full run; one line for each that fails."""
    pipelined = pipelined_cases() if torch.cuda.get_device_capability(device) == (9, 0) else []
    for case in (*expert_cases(large=True), *pipelined):
        error = check_expert_case(case, device, dtype)
        if not error <= LIMITS[dtype]:
            yield f"expert_ffn {dtype} {case.name}: error {error:.2e}"
    for sizes in (
        *ROUTE_SIZES,
        (1, 1024, 32, 2),
        (16, 2048, 128, 2),
        (320, 1024, 32, 1),
        (320, 2048, 128, 2),
        (1000, 2048, 128, 2),
    ):
        trouble = check_route(*sizes, device, dtype)
        if trouble:
            yield f"route {dtype} {sizes}: {trouble}"
    for shape in (*LAYERNORM_SIZES, (320, 2048, 2)):
        error = check_add_layernorm(*shape, device, dtype)
        if not error <= LIMITS[dtype]:
            yield f"add_layernorm {dtype} {shape}: error {error:.2e}"
    yield from attention_failures(device, dtype, LIMITS[dtype], large=True)
    yield from linear_failures(device, dtype, LIMITS[dtype])
    yield from int8_rows_failures(device, dtype, LIMITS[dtype])
    yield from (line.removeprefix("FAILED ") for line in failed_head_checks(device, dtype))


def main(arguments: list[str] | None = None) -> int:
    """Run the checks on the GPU; exit 1 when one fails."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="a few tiny cases of every op")
    parser.add_argument(
        "--no-compile-ahead",
        action="store_true",
        help="compile kernels when they are first launched and not in a pool of processes before: for compute-sanitizer",
    )
    parser.add_argument("--dtype", nargs="+", choices=list(DTYPES), default=list(DTYPES))
    options = parser.parse_args(arguments)
    from kernels.small_checks import small_failures, small_jobs  # builds on the checks of this module

    dtypes = tuple(DTYPES[name] for name in options.dtype)
    if not options.no_compile_ahead:
        jobs = small_jobs(dtypes) if options.small else all_jobs(dtypes)
        broken = [result.error for result in compile_ahead(jobs, capability=90) if result.error]
        print(f"compiled {len(jobs)} kernels; {len(broken)} failed {broken[:2]}", flush=True)
    device, failed = torch.device("cuda"), 0
    for dtype in dtypes:
        for trouble in (small_failures if options.small else all_failures)(device, dtype):
            failed += 1
            print(f"FAILED {trouble}", flush=True)
    torch.cuda.synchronize()
    print(f"checks: {failed} failed", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
