"""Launcher of `stamp`. N spans that are kept."""

from __future__ import annotations

import time

import torch

from kernels.launch import check


def stamp(spans: torch.Tensor, count: torch.Tensor, *, is_end: bool) -> None:
    """Write the device's clock, in ns, as start or end of span `count` into spans int64[N, 2]; the last N are kept.

    count int32[1] counts finished spans. On a CPU it is the clock of the host. One launch, ordered like any other: a start
    comes after all work before it in the stream, an end after all work of the span. Raises ValueError for other operands.
    """
    check(
        spans.dtype == torch.int64 and spans.dim() == 2 and spans.shape[1] == 2 and spans.is_contiguous(),
        f"spans are {spans.dtype}{list(spans.shape)}; want contiguous int64[N, 2]",
    )
    check(
        count.dtype == torch.int32 and tuple(count.shape) == (1,),
        f"count is {count.dtype}{list(count.shape)}; want int32[1]",
    )
    if not spans.is_cuda:
        number = int(count)
        spans[number % len(spans), int(is_end)] = time.perf_counter_ns()
        count += is_end
        return
    from kernels.step_clock.kernel import stamp_kernel

    stamp_kernel[(1,)](spans, count, spans.shape[0], IS_END=is_end, num_warps=1)
