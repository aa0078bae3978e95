"""What decode attention may read before the kernel before it is done."""

import dataclasses

import pytest
import torch

from kernels.attention_checks import CrossCase, SelfCase, cross_inputs, self_inputs
from kernels.decode_attention import decode_cross_attention, decode_self_attention
from kernels.small_linear import qkv_linear, small_linear


def test_reading_ahead_changes_no_bit(cpu: torch.device) -> None:
    for inputs in (
        self_inputs(SelfCase(2, 64, (40, 3, 1, 0), beam=2), cpu, torch.float32),
        cross_inputs(CrossCase(2, 64, (3, 8, 1), (40, 75, 0)), cpu, torch.float32),
    ):
        again = dataclasses.replace(inputs, ready=True).run()
        torch.testing.assert_close(inputs.run(), again, rtol=0, atol=0, equal_nan=True)


@pytest.mark.gpu
def test_cells_read_ahead_in_a_captured_step_are_the_right_ones(cuda: torch.device) -> None:
    entries, heads, d, seen = 4, 16, 1024, 20
    generator = torch.Generator(cuda).manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, device=cuda, generator=generator).bfloat16()

    weights = [draw(n, d) / 32 for n in (d, 3 * d, d, d)]
    source, cells = draw(1, 64, 2, heads, 64), draw(entries, 64, 2, heads, 64)
    index = torch.arange(entries, device=cuda, dtype=torch.int32)
    ancestry = torch.randint(0, entries, (entries, 65), device=cuda, generator=generator, dtype=torch.int32)
    positions, length, one = (
        torch.full((n,), v, device=cuda, dtype=torch.int32) for n, v in ((entries, seen), (1, 40), (1, entries))
    )
    x = draw(entries, d)

    def step(ready: bool) -> torch.Tensor:
        y = small_linear(x, weights[0])
        q = qkv_linear(y, weights[1], None, cells, index, positions)
        y = decode_self_attention(q, cells, ancestry, index, positions, num_heads=heads, history_ready=ready)
        q = small_linear(y, weights[2])
        slot = index[:1]
        y = decode_cross_attention(q, source, length, slot, slot, one, num_heads=heads, source_ready=ready)
        return small_linear(y, weights[3])

    step(True)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step(True)
    for position in range(seen, seen + 40):
        x.copy_(draw(entries, d))
        positions.fill_(position)
        graph.replay()
        got, written = captured.clone(), cells.clone()
        assert torch.equal(got, step(False))
        assert torch.equal(written, cells)
