"""Attention over packed sentences (encoder) and over the KV cache (decoder).

Legend: S_total packed source tokens, B sentences, R rows, T positions, P active source slots, S source length,
H heads, Dh head_dim, D = H * Dh. Scores are q k^T / sqrt(Dh); every projection has a bias.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from engine.kv_cache import LENGTH_STEP, KVCache
from engine.model.layers import Linear

_WIDTH_STEP = {torch.float32: 8, torch.bfloat16: 2, torch.float16: 2}


@dataclass(frozen=True, slots=True)
class SelfAttention:
    """qkv [3D, D] (queries, keys, values stacked in this order), out [D, D]."""

    qkv: Linear
    out: Linear
    num_heads: int

    def pack(self) -> None:
        """See Linear.pack."""
        self.qkv.pack()
        self.out.pack()

    def encode(self, x: Tensor, lengths: list[int]) -> Tensor:
        """Bidirectional, within each sentence. x [S_total, D], lengths of the packed sentences -> [S_total, D].

        One call per run of equally long sentences, so that no result depends on the length of a batch mate.
        """
        heads = self.qkv(x).view(x.shape[0], 3, self.num_heads, -1)
        contexts = []
        start = 0
        for length, count in _runs(lengths):
            packed = heads[start : start + length * count].view(count, length, *heads.shape[1:])
            query, key, value = packed.permute(2, 0, 3, 1, 4).unbind(0)
            context = functional.scaled_dot_product_attention(query, key, value)
            contexts.append(context.transpose(1, 2).reshape(length * count, -1))
            start += length * count
        return self.out(torch.cat(contexts) if len(contexts) > 1 else contexts[0])

    def decode(self, x: Tensor, plan: DecodePlan, cells: Tensor) -> Tensor:
        """Write one key/value per row, then attend over the row's ancestry. x [R, D], cells [N * T_max, 2D] -> [R, D]."""
        rows, d_model = x.shape
        qkv = self.qkv(x)
        cells.index_copy_(0, plan.write_cells, qkv[:, d_model:])
        history = cells.index_select(0, plan.read_cells).view(rows, -1, 2, self.num_heads, d_model // self.num_heads)
        key, value = history.permute(2, 0, 3, 1, 4).unbind(0)
        query = qkv[:, :d_model].view(rows, self.num_heads, 1, -1)
        context = functional.scaled_dot_product_attention(query, key, value, attn_mask=plan.self_mask)
        return self.out(context.reshape(rows, d_model))


@dataclass(frozen=True, slots=True)
class CrossAttention:
    """query [D, D], key_value [2D, D] (keys, then values), out [D, D]."""

    query: Linear
    key_value: Linear
    out: Linear
    num_heads: int

    def pack(self) -> None:
        """See Linear.pack."""
        self.query.pack()
        self.key_value.pack()
        self.out.pack()

    def decode(self, x: Tensor, plan: DecodePlan, slots: Tensor) -> Tensor:
        """Attend over the row's source; rows of one slot share its keys.

        x [R, D], slots [cache slots, S_max, 2, H, Dh] -> [R, D].
        """
        d_model = x.shape[1]
        query = self.query(x).index_select(0, plan.grouped_rows)
        query = query.view(plan.active_slots.shape[0], -1, self.num_heads, d_model // self.num_heads).transpose(1, 2)
        source = slots[:, : plan.cross_mask.shape[-1]].index_select(0, plan.active_slots)
        key, value = source.permute(2, 0, 3, 1, 4).unbind(0)
        context = functional.scaled_dot_product_attention(query, key, value, attn_mask=plan.cross_mask)
        context = context.transpose(1, 2).reshape(-1, d_model).index_select(0, plan.ungrouped_rows)
        return self.out(context)


@dataclass(frozen=True, slots=True)
class DecodePlan:
    """Index tensors of one decode step, shared by all layers. C rows per active slot (padded with repeats).

    On the CPU T and S are trimmed to what is used and rounded up to 16, and C to 8 (2 in half precision): the attention
    kernel then adds up each row in the same order whatever its batch mates' lengths and beams are (found by trying).

    write_cells int64[R], read_cells int64[R * T]: flat (row, position) cells. self_mask [R, 1, 1, T] additive.
    active_slots int64[P], grouped_rows int64[P * C] into rows, ungrouped_rows int64[R] into P * C.
    cross_mask [P, 1, 1, S] additive.
    """

    write_cells: Tensor
    read_cells: Tensor
    self_mask: Tensor
    active_slots: Tensor
    grouped_rows: Tensor
    ungrouped_rows: Tensor
    cross_mask: Tensor

    @classmethod
    def build(cls, positions: Tensor, rows: Tensor, source_slots: Tensor, ancestry: Tensor, cache: KVCache) -> DecodePlan:
        """Turn Transformer.decode's arguments into flat indices and masks.

        Cells beyond a row's position are replaced by its own cell before they are masked: what stale cells hold, NaN
        included, cannot reach a result. Away from the CPU nothing is trimmed or checked, which would force a
        synchronisation. Raises ValueError for positions that ancestry or cache do not hold, and for empty slots.
        """
        dtype = cache.self_kv.dtype
        on_cpu = _is_on_cpu(positions)
        used = int(positions.max()) + 1 if on_cpu else ancestry.shape[1]
        if used > min(ancestry.shape[1], cache.max_target_tokens):
            raise ValueError(
                f"position {used - 1} is beyond ancestry's {ancestry.shape[1]} columns or the cache's "
                f"{cache.max_target_tokens} positions"
            )
        num_positions = _round_up(used, LENGTH_STEP) if on_cpu else used
        write_cells = rows * cache.max_target_tokens + positions
        beyond = torch.arange(num_positions, device=positions.device) > positions.unsqueeze(1)
        read_cells = write_cells.unsqueeze(1).repeat(1, num_positions)
        earlier = ancestry[:, :used] * cache.max_target_tokens + torch.arange(used, device=positions.device)
        torch.where(beyond[:, :used], write_cells.unsqueeze(1), earlier, out=read_cells[:, :used])
        if on_cpu:
            slots, grouped_rows, ungrouped_rows = _group_by_slot(source_slots, _WIDTH_STEP[dtype])
        else:
            slots, grouped_rows, ungrouped_rows = _one_group_per_row(source_slots)
        lengths = cache.source_lengths.index_select(0, slots)
        if on_cpu and int(lengths.min()) < 1:
            raise ValueError(f"source slots {slots[lengths < 1].tolist()} were never written")
        source_length = _round_up(int(lengths.max()), LENGTH_STEP) if on_cpu else cache.max_source_tokens
        past_end = torch.arange(source_length, device=slots.device) >= lengths.unsqueeze(1)
        return cls(
            write_cells=write_cells,
            read_cells=read_cells.view(-1),
            self_mask=_additive(beyond, dtype),
            active_slots=slots,
            grouped_rows=grouped_rows,
            ungrouped_rows=ungrouped_rows,
            cross_mask=_additive(past_end, dtype),
        )


def _is_on_cpu(tensor: Tensor) -> bool:
    return tensor.device.type == "cpu"


def _additive(hidden: Tensor, dtype: torch.dtype) -> Tensor:
    """bool [A, T] -> [A, 1, 1, T]: 0 where visible, -inf where hidden."""
    mask = torch.zeros(hidden.shape, dtype=dtype, device=hidden.device)
    return mask.masked_fill_(hidden, float("-inf"))[:, None, None, :]


def _round_up(value: int, step: int) -> int:
    return -(-value // step) * step


def _group_by_slot(source_slots: Tensor, width_step: int) -> tuple[Tensor, Tensor, Tensor]:
    """Rows of one slot side by side, short groups filled with repeats of their first row. C is a multiple of width_step.

    Returns active slots int64[P], grouped_rows int64[P * C], ungrouped_rows int64[R].
    """
    slots, group_of_row, counts = torch.unique(source_slots, return_inverse=True, return_counts=True)
    order = torch.argsort(group_of_row, stable=True)
    starts = counts.cumsum(0) - counts
    width = _round_up(int(counts.max()), width_step)
    rank = torch.empty_like(order)
    rank[order] = torch.arange(order.shape[0]) - starts[group_of_row[order]]
    grouped_rows = order[starts].unsqueeze(1).repeat(1, width).view(-1)
    ungrouped_rows = group_of_row * width + rank
    grouped_rows[ungrouped_rows] = torch.arange(order.shape[0])
    return slots, grouped_rows, ungrouped_rows


def _one_group_per_row(source_slots: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    identity = torch.arange(source_slots.shape[0], device=source_slots.device)
    return source_slots, identity, identity


def _runs(lengths: list[int]) -> list[tuple[int, int]]:
    """Run-length encoding: [5, 5, 3] -> [(5, 2), (3, 1)]."""
    runs: list[tuple[int, int]] = []
    for length in lengths:
        if runs and runs[-1][0] == length:
            runs[-1] = (length, runs[-1][1] + 1)
        else:
            runs.append((length, 1))
    return runs
