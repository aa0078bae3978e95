"""Plain torch truth of decode attention, entry by entry in fp64. R entries, N cache rows, P source slots, G groups."""

from __future__ import annotations

import torch


def _attend(query: torch.Tensor, cells: torch.Tensor) -> torch.Tensor:
    """One entry: query [H, Dh], cells [T, 2, H, Dh] -> [H, Dh] in fp64; zeros for T = 0."""
    keys, values = cells.double().unbind(1)
    scores = torch.einsum("hd,thd->ht", query.double(), keys) / query.shape[-1] ** 0.5
    return torch.einsum("ht,thd->hd", torch.softmax(scores, dim=-1), values)


def decode_self_attention_reference(
    q: torch.Tensor,
    cells: torch.Tensor,
    ancestry: torch.Tensor,
    rows: torch.Tensor,
    positions: torch.Tensor,
    *,
    num_heads: int,
) -> torch.Tensor:
    """Same contract as `decode_self_attention`; copies its indices to the host."""
    out = torch.zeros(q.shape, dtype=q.dtype, device=q.device)
    for entry, (row, position) in enumerate(zip(rows.tolist(), positions.tolist(), strict=True)):
        if row < 0:
            continue
        holders = [*ancestry[row, :position].tolist(), row]
        history = torch.stack([cells[holder, t] for t, holder in enumerate(holders)])
        out[entry] = _attend(q[entry].view(num_heads, -1), history).flatten().to(q.dtype)
    return out


def decode_cross_attention_reference(
    q: torch.Tensor,
    cross_cells: torch.Tensor,
    source_lengths: torch.Tensor,
    group_slots: torch.Tensor,
    group_starts: torch.Tensor,
    group_counts: torch.Tensor,
    *,
    num_heads: int,
) -> torch.Tensor:
    """Same contract as `decode_cross_attention`; entries of no group are NaN here. Copies its indices to the host."""
    out = torch.full(q.shape, float("nan"), dtype=q.dtype, device=q.device)
    for slot, start, count in zip(group_slots.tolist(), group_starts.tolist(), group_counts.tolist(), strict=True):
        if slot < 0:
            continue
        source = cross_cells[slot, : int(source_lengths[slot])]
        for entry in range(start, start + count):
            out[entry] = _attend(q[entry].view(num_heads, -1), source).flatten().to(q.dtype)
    return out
