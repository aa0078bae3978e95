"""What every cache row was fed, and from which beam it came: hypotheses are read back from here when a sentence ends.

Beams branch, so a row's own column holds pieces of several hypotheses. Position t of a sentence: beam j read token
`token_ids[rows[j], t]`, and continued the beam `parents[rows[j], t]` of position t - 1.
Legend: R rows of the cache, T positions, B sentences, N beams of a sentence, L live rows.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Int64Array = NDArray[np.int64]


class History:
    """Fixed buffers token_ids int64[R, T + 1] and parents int64[R, T + 1] (a beam number within the sentence)."""

    def __init__(self, *, num_rows: int, max_target_tokens: int, device: torch.device) -> None:
        # One column more than positions: the token after the last position is chosen, never fed.
        self.token_ids = torch.zeros(num_rows, max_target_tokens + 1, dtype=torch.int64, device=device)
        self.parents = torch.zeros_like(self.token_ids)

    def record(self, rows: Tensor, positions: Tensor, token_ids: Tensor, parents: Tensor) -> None:
        """Note what the rows are about to be fed: all int64[B, N]."""
        self.token_ids[rows, positions] = token_ids
        self.parents[rows, positions] = parents

    def prefixes(self, ancestry: Tensor) -> Tensor:
        """Tokens that led to every live row: ancestry int64[L, t] -> token ids int64[L, t], from the start token."""
        return self.token_ids[ancestry, torch.arange(ancestry.shape[1], device=ancestry.device)]

    def of_rows(self, rows: Tensor) -> tuple[Int64Array, Int64Array]:
        """Copy (token_ids, parents) of rows int64[B, N] to the host, each int64[B, N, T + 1]."""
        return self.token_ids[rows].cpu().numpy(), self.parents[rows].cpu().numpy()


def trace(token_ids: Int64Array, parents: Int64Array, *, beam: int, position: int) -> list[int]:
    """Generated tokens up to and including what `beam` was fed at `position`, without the start token at position 0.

    token_ids, parents: int64[N, T + 1] of one sentence.
    """
    backwards: list[int] = []
    for t in range(position, 0, -1):
        backwards.append(int(token_ids[beam, t]))
        beam = int(parents[beam, t])
    return backwards[::-1]
