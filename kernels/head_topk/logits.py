"""The logits that `head_topk` leaves behind. R rows, V vocabulary."""

from __future__ import annotations

import torch

from kernels.head_topk.tiles import HeadTiles
from kernels.launch import check


def row_logits(scratch: torch.Tensor, out: torch.Tensor, tiles: HeadTiles) -> torch.Tensor:
    """What a launch with these tiles wrote to its logits_scratch, in the order of tokens -> out fp32[R, V].

    Logits lie chunk by chunk, the rows of a chunk side by side; `laned` tiles write 16 tokens of a whole chunk in the
    order of the lanes that hold them. Raises ValueError for gated tiles, which leave most of the scratch unwritten.
    """
    check(not tiles.gated, "gated tiles write a part of the logits only: use replace(tiles, gated=False)")
    (num_rows, vocab_size), width = out.shape, tiles.chunk
    whole = vocab_size // width * width
    flat = scratch.flatten()
    chunks = flat[: num_rows * whole].view(-1, num_rows, width)
    if tiles.laned:  # stored by (16 tokens, lane, half, neighbour), wanted by (16 tokens, half, lane, neighbour)
        chunks = chunks.view(-1, num_rows, width // 16, 4, 2, 2).transpose(3, 4).reshape(-1, num_rows, width)
    out[:, :whole].view(num_rows, -1, width).copy_(chunks.transpose(0, 1))
    out[:, whole:] = flat[num_rows * whole : num_rows * vocab_size].view(num_rows, vocab_size - whole)
    return out
