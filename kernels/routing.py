"""What the router hands to the expert GEMM: the one type that flows between the two ops, and its sizes.

T tokens, k experts a token, P = T * k pairs (pair id = token * k + slot), E experts, D d_model.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

TILE_FIELDS = 4  # expert, first position in expert order, pairs in the tile, unused (keeps a record 16 bytes)
SYNC_HEADER = 4  # ticket counter and three unused words, so that the tile counters start on 16 bytes


@dataclass(frozen=True, slots=True)
class Routing:
    """Device-side routing of one layer; nothing here is ever read by the host.

    expert_ids int32[T, k]: -1 where the token is inactive. gate_weights fp32[T, k]: 0 where inactive.
    tokens_per_expert int32[E]; expert_offsets int32[E + 1].
    gather_index int32[P]: pair id at each position of expert order (stable; undefined past expert_offsets[E]).
    scatter_index int32[P]: position in expert order of each pair, -1 where inactive.
    tiles int32[max_tiles, 4]: (expert, first position, pairs, 0) of every tile of at most `block_tokens` pairs,
    experts ascending;
    undefined past num_tiles int32[1]. sync int32: zeroed counters for one expert FFN call.
    """

    expert_ids: torch.Tensor
    gate_weights: torch.Tensor
    tokens_per_expert: torch.Tensor
    expert_offsets: torch.Tensor
    gather_index: torch.Tensor
    scatter_index: torch.Tensor
    tiles: torch.Tensor
    num_tiles: torch.Tensor
    sync: torch.Tensor
    block_tokens: int

    @property
    def num_tokens(self) -> int:
        """T."""
        return self.expert_ids.shape[0]

    @property
    def top_k(self) -> int:
        """k."""
        return self.expert_ids.shape[1]

    @property
    def num_experts(self) -> int:
        """E."""
        return self.tokens_per_expert.shape[0]


def max_tiles(num_pairs: int, num_experts: int, block_tokens: int) -> int:
    """Most tiles that P pairs over E experts can need: sum of ceil(c_e / block) with at most min(P, E) experts hit."""
    hit = min(num_pairs, num_experts)
    return max(1, (num_pairs + hit * (block_tokens - 1)) // block_tokens)


def sync_size(num_tiles: int, d_model: int) -> int:
    """int32 words of `Routing.sync`: header, one counter a tile, one a (tile, 64 output features)."""
    return SYNC_HEADER + num_tiles * (1 + (d_model + 63) // 64)


def empty_routing(
    num_tokens: int, top_k: int, num_experts: int, d_model: int, block_tokens: int, device: torch.device
) -> Routing:
    """Unfilled buffers of the right sizes; allocate once and reuse them in a captured step."""
    pairs = num_tokens * top_k
    tiles = max_tiles(pairs, num_experts, block_tokens)

    def ints(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=torch.int32, device=device)

    return Routing(
        expert_ids=ints(num_tokens, top_k),
        gate_weights=torch.empty((num_tokens, top_k), dtype=torch.float32, device=device),
        tokens_per_expert=ints(num_experts),
        expert_offsets=ints(num_experts + 1),
        gather_index=ints(pairs),
        scatter_index=ints(pairs),
        tiles=ints(tiles, TILE_FIELDS),
        num_tiles=ints(1),
        sync=ints(sync_size(tiles, d_model)),
        block_tokens=block_tokens,
    )
