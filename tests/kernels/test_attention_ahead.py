"""What decode attention may read before the kernel before it is done."""

import dataclasses
import math

import pytest
import torch

from kernels.cross_attention_checks import CrossCase, cross_inputs
from kernels.decode_attention import decode_cross_attention, decode_self_attention, lists_from
from kernels.history_lists import history_lists_reference
from kernels.self_attention_checks import GroupCase, SelfCase, group_inputs, self_inputs
from kernels.small_linear import qkv_linear, small_linear


def test_reading_ahead_changes_no_bit(cpu: torch.device) -> None:
    for inputs in (
        self_inputs(SelfCase(2, 64, (40, 3, 1, 0), beam=2), cpu, torch.float32),
        group_inputs(GroupCase(2, 64, (3, 1, -2), (40, 3, 7), (20, 0, 7)), cpu, torch.float32),
        cross_inputs(CrossCase(2, 64, (3, 8, 1), (40, 75, 0)), cpu, torch.float32),
    ):
        again = dataclasses.replace(inputs, ready=True).run()
        torch.testing.assert_close(inputs.run(), again, rtol=0, atol=0, equal_nan=True)


@pytest.mark.gpu
@pytest.mark.parametrize("sentences", [1, 40])  # few entries, and so many that they are worked off through lists
def test_cells_read_ahead_in_a_captured_step_are_the_right_ones(sentences: int, cuda: torch.device) -> None:
    entries, heads, d, seen = 4 * sentences, 16, 1024, 20
    generator = torch.Generator(cuda).manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, device=cuda, generator=generator).bfloat16()

    weights = [draw(n, d) / 32 for n in (d, 3 * d, d, d)]
    source, cells = draw(sentences, 64, 2, heads, 64), draw(entries, 64, 2, heads, 64)
    index = torch.arange(entries, device=cuda, dtype=torch.int32)
    ancestry = torch.randint(0, 4, (entries, 65), device=cuda, generator=generator, dtype=torch.int32)
    ancestry += index[:, None] // 4 * 4
    positions, lengths, counts = (
        torch.full((n,), v, device=cuda, dtype=torch.int32) for n, v in ((entries, seen), (sentences, 40), (sentences, 4))
    )
    groups = index[:sentences], index[:sentences] * 4, counts
    x = draw(entries, d)
    lists = None
    if entries >= (lists_from(heads, 64, x.dtype, cuda) or entries + 1):
        lists = history_lists_reference(*groups, index, positions, ancestry, max_positions=64)

    def step(ready: bool) -> torch.Tensor:
        y = small_linear(x, weights[0])
        q = qkv_linear(y, weights[1], None, cells, index, positions)
        y = decode_self_attention(q, cells, ancestry, index, positions, num_heads=heads, history_ready=ready, lists=lists)
        q = small_linear(y, weights[2])
        y = decode_cross_attention(q, source, lengths, *groups, num_heads=heads, source_ready=ready)
        return small_linear(y, weights[3])

    step(True)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step(True)
    for position in range(seen, seen + 40):
        x.copy_(draw(entries, d))
        positions.fill_(position)
        if lists is not None:
            now = history_lists_reference(*groups, index, positions, ancestry, max_positions=64)
            lists.groups.copy_(now.groups)
            lists.words.copy_(now.words)
        graph.replay()
        got, written = captured.clone(), cells.clone()
        assert torch.equal(got, step(False))
        assert torch.equal(written, cells)


@pytest.mark.gpu
@pytest.mark.parametrize("poison", [math.nan, 50.0])
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize(("sentences", "beams"), [(1, 4), (12, 4), (40, 4), (64, 1)])  # the last two: through lists
def test_a_start_token_fed_in_the_same_step_is_not_read_ahead(
    sentences: int, beams: int, head_dim: int, poison: float, cuda: torch.device
) -> None:
    """The first step of a sentence: its beams stand at position 1 and attend to the cell that its start token, an entry of
    its own behind the beams, writes in this step."""
    heads, d = 16, 16 * head_dim
    rows_of_beams, generator = beams * sentences, torch.Generator(cuda).manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, device=cuda, generator=generator).bfloat16()

    weights, cells = [draw(n, d) / 32 for n in (d, 3 * d)], draw(rows_of_beams, 64, 2, heads, head_dim)
    index = torch.arange(rows_of_beams, device=cuda, dtype=torch.int32)
    first_rows = index[:sentences] * beams
    rows = torch.cat((index, first_rows))
    positions = torch.cat((torch.ones_like(index), torch.zeros_like(first_rows)))
    ancestry = (index // beams * beams)[:, None].repeat(1, 65)
    slots = torch.cat((index[:sentences], index[:sentences]))
    starts = torch.cat((first_rows, rows_of_beams + index[:sentences]))
    counts = torch.cat((torch.full_like(first_rows, beams), torch.ones_like(first_rows)))
    x = draw(len(rows), d)
    lists = None
    if len(rows) >= (lists_from(heads, head_dim, x.dtype, cuda) or len(rows) + 1):
        lists = history_lists_reference(slots, starts, counts, rows, positions, ancestry, max_positions=64)

    def step(ready: bool) -> torch.Tensor:
        y = small_linear(x, weights[0])
        q = qkv_linear(y, weights[1], None, cells, rows, positions)
        operands = q, cells, ancestry, rows, positions
        return decode_self_attention(*operands, num_heads=heads, history_ready=ready, lists=lists)

    step(True)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step(True)
    for _ in range(20):
        x.copy_(draw(len(rows), d))
        cells.fill_(poison)
        graph.replay()
        got = captured.clone()
        assert torch.equal(got, step(False))
