"""Plain torch truth of `embed`. R tokens, V vocabulary, D d_model, P rows of the position table."""

from __future__ import annotations

import torch


def embed_reference(
    token_ids: torch.Tensor,
    positions: torch.Tensor | None,
    table: torch.Tensor,
    position_table: torch.Tensor,
    *,
    scale: float,
    pad_token_id: int,
    position_rows: torch.Tensor | None = None,
) -> torch.Tensor:
    """Same contract as `embed`."""
    if positions is not None:
        position_rows = torch.where(token_ids == pad_token_id, pad_token_id, positions + 1 + pad_token_id)
    assert position_rows is not None
    return _rows(table, token_ids) * scale + _rows(position_table, position_rows)


def _rows(table: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """table[index], zeros for an index outside the table."""
    inside = (index >= 0) & (index < table.shape[0])
    return torch.where(inside[:, None], table[torch.where(inside, index, 0).long()], 0)
