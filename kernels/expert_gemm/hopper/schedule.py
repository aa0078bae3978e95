"""Which items a program of the persistent launch does: a static schedule, balanced over both GEMMs.

Dealt round robin, the second GEMM may leave a few programs with one item more than the others, who wait for them: as long
as several items of the first GEMM take. So programs that will do one more of the second do fewer of the first, and get the
tiles that are ready first.
"""
# mypy: ignore-errors

import triton
import triton.language as tl


@triton.jit
def items_of(
    program,
    programs,
    first_items,
    second_items,
    FIRST_COST: tl.constexpr,
    SECOND_COST: tl.constexpr,
    BALANCED: tl.constexpr,
):
    """Items of one program: (number, end) of each GEMM and hop, meaning number, number + hop, ... below end.

    first_items, second_items: of the launch; FIRST_COST, SECOND_COST: of one item, in the same unit. Each item is done once.
    A program does its items of the first GEMM before those of the second; only the latter wait, and only for items of the
    first, so that none waits for ever.
    All programs do `rounds` items of the second GEMM, the first `extra` programs one more: the earliest items. Those do
    items of the first GEMM for `first_rounds` rounds, as many as lead up to the mean cost; the others share the rest. Where
    there is no full round, or most programs have one more, or it is not BALANCED, both GEMMs are dealt round robin (extra =
    0). In the second GEMM, programs with fewer items of the first come first.
    Programs with most to do stand together: two of one multiprocessor seldom have neighbouring numbers, so their company has
    less to do.
    """
    rounds = second_items // programs
    extra = second_items % programs
    extra = tl.where((not BALANCED) | (rounds == 0) | (extra > programs // 2), 0, extra)
    excess = first_items * FIRST_COST + (second_items - (rounds + 1) * programs) * SECOND_COST
    first_rounds = tl.minimum(tl.cdiv(tl.maximum(excess, 0), programs * FIRST_COST), first_items // programs)
    others = programs - extra
    other = program - extra  # its number among the others
    one_more = (first_items - extra * first_rounds) % others  # so many of the others have one more of the first
    first = other + extra * first_rounds
    second = other - one_more + tl.where(other < one_more, others, 0) + extra * (rounds + 1)
    is_extra = program < extra
    hop = tl.where(is_extra, extra, others)
    of_first = tl.where(is_extra, program, first), tl.where(is_extra, extra * first_rounds, first_items)
    of_second = tl.where(is_extra, program, second), tl.where(is_extra, extra * (rounds + 1), second_items)
    return of_first, of_second, hop
