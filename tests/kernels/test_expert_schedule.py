"""Who does which items of the persistent expert launch: every item once, and no more work for anybody than need be."""

import pytest
import torch
import triton
import triton.language as tl

from kernels.expert_gemm.hopper.schedule import items_of

Share = tuple[list[int], list[int]]  # a program's items of both GEMMs


@triton.jit
def schedule_kernel(
    out_ptr,
    programs,
    first_items,
    second_items,
    FIRST_COST: tl.constexpr,
    SECOND_COST: tl.constexpr,
    BALANCED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """out int32[5, BLOCK]: number and end of the first GEMM's items of each program, those of the second's, and the hop."""
    program = tl.arange(0, BLOCK)
    first, second, hop = items_of(program, programs, first_items, second_items, FIRST_COST, SECOND_COST, BALANCED)
    for i in tl.static_range(2):
        tl.store(out_ptr + i * BLOCK + program, first[i])
        tl.store(out_ptr + (2 + i) * BLOCK + program, second[i])
    tl.store(out_ptr + 4 * BLOCK + program, hop)


def schedule(
    device: torch.device,
    programs: int,
    first_items: int,
    second_items: int,
    costs: tuple[int, int],
    *,
    balanced: bool = True,
) -> list[Share]:
    """What `items_of` gives each program."""
    block = triton.next_power_of_2(programs)
    out = torch.full((5, block), -1, dtype=torch.int32, device=device)
    schedule_kernel[(1,)](out, programs, first_items, second_items, *costs, balanced, block)
    columns = out[:, :programs].T.tolist()
    return [(list(range(n1, e1, hop)), list(range(n2, e2, hop))) for n1, e1, n2, e2, hop in columns]


def makespan(shares: list[Share], blocks: tuple[int, int], costs: tuple[int, int]) -> int:
    """When the last program is done: an item of the second GEMM begins once its tile's items of the first are all done, and
    so are those of the program's next item, as in the launch. KeyError where it would wait for ever."""
    clocks = [costs[0] * len(first) for first, _ in shares]
    done: dict[int, list[int]] = {}
    for first, _ in shares:
        for at, item in enumerate(first):
            done.setdefault(item // blocks[0], []).append(costs[0] * (at + 1))
    ready = {tile: max(times) for tile, times in done.items() if len(times) == blocks[0]}
    for program, (_, second) in enumerate(shares):
        for at in range(len(second)):
            for item in second[at : at + 2]:
                clocks[program] = max(clocks[program], ready[item // blocks[1]])
            clocks[program] += costs[1]
    return max(clocks)


SHAPES = [  # programs, items a tile of the first and second GEMM, their costs
    (24, (4, 1), (1, 4)),
    (24, (8, 2), (8, 32)),
    (12, (16, 8), (4, 8)),
    (7, (3, 5), (5, 2)),
    (10, (2, 9), (9, 1)),
    (1, (4, 2), (1, 2)),
    (5, (1, 1), (1, 1)),
]


@pytest.mark.parametrize(("programs", "blocks", "costs"), SHAPES, ids=str)
def test_every_item_is_done_once_and_no_program_waits_for_ever(
    programs: int, blocks: tuple[int, int], costs: tuple[int, int], cpu: torch.device
) -> None:
    for tiles in range(41):
        shares = schedule(cpu, programs, tiles * blocks[0], tiles * blocks[1], costs)
        for gemm in range(2):
            done = sorted(item for share in shares for item in share[gemm])
            assert done == list(range(tiles * blocks[gemm])), (tiles, gemm)
        if tiles:
            makespan(shares, blocks, costs)


def round_robin(programs: int, first_items: int, second_items: int) -> list[Share]:
    """Both GEMMs dealt like cards, one behind the other."""
    deal = [list(range(p, first_items + second_items, programs)) for p in range(programs)]
    return [([i for i in hand if i < first_items], [i - first_items for i in hand if i >= first_items]) for hand in deal]


def test_a_few_items_too_many_do_not_cost_a_round_of_the_second_gemm(cpu: torch.device) -> None:
    """An H100's 264 programs and the paper's layer: 33 tiles are one round of the second GEMM, 34 to 49 a bit more."""
    blocks, costs = (32, 8), (4, 16)
    for tiles in (1, 20, 32, 33, 50, 66):  # full rounds, or nearly: as before
        shares = schedule(cpu, 264, tiles * 32, tiles * 8, costs)
        assert shares == round_robin(264, tiles * 32, tiles * 8), tiles
    for tiles in (34, 35, 37, 40, 42, 49, 67, 75):
        shares = schedule(cpu, 264, tiles * 32, tiles * 8, costs)
        work = [costs[0] * len(first) + costs[1] * len(second) for first, second in shares]
        assert max(work) == -(-sum(work) // (264 * costs[0])) * costs[0], tiles  # nobody does more than the mean, rounded up
        dealt = round_robin(264, tiles * 32, tiles * 8)
        assert makespan(shares, blocks, costs) < makespan(dealt, blocks, costs), tiles
        assert schedule(cpu, 264, tiles * 32, tiles * 8, costs, balanced=False) == dealt, tiles
