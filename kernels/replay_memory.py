"""The memory of kernels.replay_check's step: every tensor a replay reads and may change, or writes, at fixed addresses.

R entries, G groups, P slots, N cache rows, T target positions, S source positions, S_total packed source tokens, D d_model,
F d_ff, E experts, k active experts, V vocabulary.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from kernels.beam_search import MAX_BEAMS, BeamTables, StepInputs
from kernels.beam_search.tables import FIRST_TOKEN, SENTENCE_FIELDS
from kernels.expert_gemm import FfnTiles
from kernels.replay_search import MAX_BEAM
from kernels.routing import TILE_FIELDS, Routing, max_tiles

Views = dict[str, torch.Tensor]
_ALIGNMENT = 256
_POISON = 2**30  # an index far out of range
CANDIDATES = 2 * MAX_BEAM
EXPERT_TILES = (
    FfnTiles(16, join=2),
    FfnTiles(16, bn1=128, join=2, fused=True, split=2, programs_per_sm=1, prefetch=True),
    FfnTiles(16, join=4, fused=True, dynamic=True),
)


@dataclass(frozen=True, slots=True)
class StepSizes:
    """Sizes of the step (legend above); the defaults are for a GPU."""

    entries: int = 61
    groups: int = 64
    slots: int = 64
    rows: int = 80
    target_positions: int = 48
    source_positions: int = 70
    source_tokens: int = 301
    heads: int = 16
    d_model: int = 1024
    d_ff: int = 4096
    experts: int = 32
    top_k: int = 2
    vocab: int = 32001


TINY = StepSizes(11, 8, 8, 20, 6, 9, 21, 2, 32, 512, 3, 2, 97)


class Arena:
    """Named tensors in one piece of memory, so that one copy sets them all and one comparison sees every byte of them."""

    def __init__(self, layout: dict[str, tuple[tuple[int, ...], torch.dtype]], device: torch.device) -> None:
        self.layout, self.spans, at = layout, {}, 0
        for name, (shape, dtype) in layout.items():
            size = math.prod(shape) * dtype.itemsize
            self.spans[name] = slice(at, at + size)
            at += -(-size // _ALIGNMENT) * _ALIGNMENT
        self.memory = torch.zeros(at, dtype=torch.uint8, device=device)
        self.views = self.views_of(self.memory)

    def views_of(self, memory: torch.Tensor) -> Views:
        """The named tensors in another copy of the memory."""
        return {name: memory[self.spans[name]].view(dtype).view(shape) for name, (shape, dtype) in self.layout.items()}

    def poison(self) -> None:
        """NaN in all floats, an index out of every range in all integers."""
        for view in self.views.values():
            view.fill_(float("nan") if view.is_floating_point() else 1 if view.dtype == torch.bool else _POISON)


ROUTING = tuple(n for n in Routing.__slots__ if n not in ("sync", "block_tokens"))
ROUTING_WHOLE = ("expert_ids", "tokens_per_expert", "expert_offsets", "scatter_index", "num_tiles")
_TABLES = {
    name: "next_ids" if name == "token_ids" else name if name != "rows" else "beam_rows" for name in BeamTables.__slots__
}
ADVANCED = tuple(_TABLES[n] for n in BeamTables.__slots__ if n not in ("rows", "normalizers"))
INPUTS = {"entry_slots", "entry_beams", "group_slots", "group_starts", "group_counts", "cross_cells", "source_lengths"}
INPUTS |= {"source_ids", "source_positions", "token_starts", "token_ends", *_TABLES.values()}


def tables_of(views: Views) -> BeamTables:
    """The beam tables among the named tensors."""
    return BeamTables(**{field: views[name] for field, name in _TABLES.items()})


def inputs_of(views: Views) -> StepInputs:
    """What `step_inputs` fills, among the named tensors."""
    return StepInputs(**{name: views[name] for name in StepInputs.__slots__})


def layout_of(z: StepSizes, dtype: torch.dtype) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Everything a replay reads and may change, or writes; not the weights."""
    r, d, p, t, pairs = z.entries, z.d_model, z.slots, z.target_positions, z.entries * z.top_k
    i32, f32, cell = torch.int32, torch.float32, (2, z.heads, d // z.heads)
    layout: dict[str, tuple[tuple[int, ...], torch.dtype]] = {}
    layout |= dict.fromkeys(("entry_slots", "entry_beams", "token_ids", "positions", "rows", "banned"), ((r,), i32))
    layout |= dict.fromkeys(("group_slots", "group_starts", "group_counts"), ((z.groups,), i32))
    layout |= dict.fromkeys(("x", "q", "attended", "q_cross", "attended_cross"), ((r, d), dtype))
    layout |= {"active": ((r,), torch.bool), "dense_hidden": ((r, z.d_ff), dtype)}
    layout |= {"cells": ((z.rows, t + 1, *cell), dtype), "cross_cells": ((p, z.source_positions, *cell), dtype)}
    layout |= {"source_lengths": ((p,), i32), "sentences": ((p, SENTENCE_FIELDS), i32), "status": ((p,), i32)}
    layout |= {"beam_rows": ((p, MAX_BEAMS), i32), "next_ids": ((p, MAX_BEAMS), i32), "cum_logprob": ((p, MAX_BEAMS), f32)}
    layout |= {"normalizers": ((p, t + 2), f32), "hypothesis_score": ((p, MAX_BEAMS), f32)}
    layout |= {
        "hypotheses": ((p, MAX_BEAMS, 4), i32),
        "ancestry": ((z.rows, t + 1), i32),
        "history": ((z.rows, t + 1, 2), i32),
        "results": ((MAX_BEAMS, p, FIRST_TOKEN + t), i32),
        "reported": ((p,), i32),
    }
    for i, tiles in enumerate(EXPERT_TILES):
        num_tiles = max_tiles(pairs, z.experts, tiles.block_tokens)
        layout |= {f"expert_ids{i}": ((r, z.top_k), i32), f"gate_weights{i}": ((r, z.top_k), f32)}
        layout |= {f"tokens_per_expert{i}": ((z.experts,), i32), f"expert_offsets{i}": ((z.experts + 1,), i32)}
        layout |= {f"gather_index{i}": ((pairs,), i32), f"scatter_index{i}": ((pairs,), i32)}
        layout |= {f"tiles{i}": ((num_tiles, TILE_FIELDS), i32), f"num_tiles{i}": ((1,), i32)}
        layout |= {f"expert_hidden{i}": ((pairs, z.d_ff), dtype), f"expert_out{i}": ((r, z.top_k, d), dtype)}
    layout |= {f"normed{i}": ((r, d), dtype) for i in range(len(EXPERT_TILES) + 1)}
    layout |= {"values": ((r, CANDIDATES), f32), "top_ids": ((r, CANDIDATES), i32), "log_sum_exp": ((r,), f32)}
    tokens = z.source_tokens
    layout |= dict.fromkeys(("source_ids", "source_positions", "token_starts", "token_ends"), ((tokens,), i32))
    layout |= {
        "source_x": ((tokens, d), dtype),
        "source_qkv": ((tokens, 3 * d), dtype),
        "source_attended": ((tokens, d), dtype),
    }
    return layout
