"""Launcher of `embed`. R tokens, V vocabulary, D d_model, P rows of the position table."""

from __future__ import annotations

import torch

from kernels.launch import check, next_power_of_two, overlap
from kernels.row_statistics import RowStatistics


def embed(
    token_ids: torch.Tensor,
    positions: torch.Tensor | None,
    table: torch.Tensor,
    position_table: torch.Tensor,
    *,
    scale: float,
    pad_token_id: int,
    position_rows: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
    statistics: RowStatistics | None = None,
) -> torch.Tensor:
    """table[token] * scale + position_table[row] -> [R, D]; the product is rounded before the sum, as torch does it.

    token_ids int32/int64[R]; table fp32/bf16/fp16[V, D], position_table [P, D] of the same dtype. Decoder: positions
    int32/int64[R] from 0, row = position + 1 + pad_token_id, and pad_token_id itself for a pad token. Encoder: None for
    positions, and position_rows int32/int64[R], the rows themselves. An id or row outside its table counts as zeros (rows
    of a captured step that are not in use may hold anything). statistics: the result's are left there, where D serves them.
    One launch, no host sync. Raises ValueError for operands that do not belong together.
    """
    check(
        (positions is None) != (position_rows is None),
        "give positions (decoder) or position_rows (encoder), one of the two and not both",
    )
    index = position_rows if positions is None else positions
    assert index is not None
    rows = token_ids.shape[0]
    check(token_ids.dim() == 1, f"token_ids are {list(token_ids.shape)}; want [R]")
    for name, ids in (("token_ids", token_ids), ("positions" if positions is not None else "position_rows", index)):
        check(
            ids.dtype in (torch.int32, torch.int64) and tuple(ids.shape) == (rows,) and ids.is_contiguous(),
            f"{name} is {ids.dtype}{list(ids.shape)}; want contiguous int32 or int64[{rows}]",
        )
    check(table.dim() == 2 and table.is_contiguous(), f"table is {list(table.shape)}; want contiguous [V, D]")
    features = table.shape[1]
    check(
        position_table.dim() == 2 and position_table.shape[1] == features and position_table.is_contiguous(),
        f"position_table is {list(position_table.shape)}; want contiguous [P, {features}]",
    )
    check(
        position_table.dtype == table.dtype,
        f"position_table is {position_table.dtype}, table {table.dtype}: convert one of them",
    )
    out = table.new_empty((rows, features)) if out is None else out
    check(
        tuple(out.shape) == (rows, features) and out.dtype == table.dtype and out.is_contiguous(),
        f"out is {out.dtype}{list(out.shape)}; want contiguous {table.dtype}[{rows}, {features}]",
    )
    leave = statistics is not None and statistics.serves(rows, features)
    if statistics is not None:
        statistics.valid = leave
    if rows == 0:
        return out
    from kernels.embed.kernel import embed_kernel

    block = min(1024, next_power_of_two(features))
    embed_kernel[(rows, -(-features // block))](
        token_ids,
        index,
        table,
        position_table,
        out,
        statistics.chunks if statistics is not None and leave else out,
        scale,
        table.shape[0],
        position_table.shape[0],
        pad_token_id,
        D=features,
        BLOCK=block,
        GIVEN_ROWS=positions is None,
        LEAVE=leave,
        num_warps=max(1, block // 256),
        enable_fp_fusion=False,
        **overlap(out),
    )
    return out
