"""What kernels share that leave the statistics of rows (`row_statistics.py`)."""
# mypy: ignore-errors

import triton
import triton.language as tl

from kernels.row_statistics import CHUNK

_CHUNK = tl.constexpr(CHUNK)


@triton.jit
def store_chunk_statistics(chunks_ptr, row, first, x, D: tl.constexpr, BLOCK: tl.constexpr):
    """Of x fp32[BLOCK], features first ... first + BLOCK of a row as they are stored. D and BLOCK are multiples of 64."""
    parts = tl.reshape(x, (BLOCK // _CHUNK, _CHUNK))
    mean = tl.sum(parts, 1) / _CHUNK
    away = parts - mean[:, None]
    chunk = first // _CHUNK + tl.arange(0, BLOCK // _CHUNK)
    at = chunks_ptr + row * (2 * (D // _CHUNK)) + chunk
    tl.store(at, mean, mask=chunk < D // _CHUNK)
    tl.store(at + D // _CHUNK, tl.sum(away * away, 1), mask=chunk < D // _CHUNK)
