"""What `specialized` makes of the products of one tile: maximum and sum of every chunk, and the logits that may be chosen.

R rows, V vocabulary, CH logits a chunk, N rows (64 or 128) of a group of four warps. A row's logits lie in four lanes of one
warp, so that its maximum and sum need two shuffles. All of this is kept short, since nothing multiplies meanwhile: words in
pieces, and no branch that would keep the compiler from mixing the work of one chunk with the next one's.
"""
# mypy: ignore-errors

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.language.core import _aggregate as aggregate

LOG2E = gl.constexpr(1.4426950408889634)
STORE_PAIR_PTX = gl.constexpr("{ .reg .pred p; setp.ne.b32 p, $4, 0; @p st.global.v2.f32 [$1], {$2, $3}; mov.b32 $0, 0; }")
RAISE_PTX = gl.constexpr(  # one of a row's four lanes speaks for it
    "{ .reg .pred p; .reg .b32 t; mov.u32 t, %tid.x; and.b32 t, t, 3; setp.eq.b32 p, t, 0;"
    " setp.ne.and.b32 p, $3, 0, p; @p red.relaxed.gpu.global.max.s32 [$1], $2; mov.b32 $0, 0; }"
)


@aggregate
class Memory:
    """Scales of rows and tokens (sums of int8 products want them), what rows may not choose, and where results go."""

    row_scales: gl.tensor
    scales: gl.tensor
    banned: gl.tensor
    thresholds: gl.tensor
    partials: gl.tensor
    banned_logits: gl.tensor
    logits: gl.tensor
    R: gl.tensor
    V: gl.tensor

    @gluon.constexpr_function
    def __init__(self, row_scales, scales, banned, thresholds, partials, banned_logits, logits, R, V):
        self.row_scales = row_scales
        self.scales = scales
        self.banned = banned
        self.thresholds = thresholds
        self.partials = partials
        self.banned_logits = banned_logits
        self.logits = logits
        self.R = R
        self.V = V


@aggregate
class Mode:
    """How results are worked off. L: layout of acc[N, CH]; GROUPS, PACK: see `kernel`."""

    CH: gl.constexpr
    GROUPS: gl.constexpr
    PACK: gl.constexpr
    HAS_BANNED: gl.constexpr
    GATED: gl.constexpr
    INT8: gl.constexpr
    L: gl.constexpr

    @gluon.constexpr_function
    def __init__(self, CH, GROUPS, PACK, HAS_BANNED, GATED, INT8):
        self.CH = gl.constexpr(CH)
        self.GROUPS = gl.constexpr(GROUPS)
        self.PACK = gl.constexpr(PACK)
        self.HAS_BANNED = gl.constexpr(HAS_BANNED)
        self.GATED = gl.constexpr(GATED)
        self.INT8 = gl.constexpr(INT8)
        self.L = gl.constexpr(gl.NVMMADistributedLayout([3, 0], [4, 1], [16, CH, 32 if INT8 else 16]))


@gluon.jit
def ask_thresholds(first, N: gl.constexpr, memory, mode):
    """Thresholds of all groups for rows first ... [N, GROUPS]; the four lanes that hold a row's logits share its loads."""
    LG: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, mode.GROUPS, 16])
    group = gl.arange(0, mode.GROUPS, layout=gl.SliceLayout(0, LG))[None, :]
    rows = first + gl.arange(0, N, layout=gl.SliceLayout(1, LG))[:, None]
    return gl.load(memory.thresholds + group * memory.R + rows, mask=rows < memory.R, other=0, cache_modifier=".cg")


@gluon.jit
def least(bounds, mode):
    """Least of GROUPS >= k group maxima: k chunks reach it, so a chunk below it holds none of the k best. A stale value is
    lower, hence safe: what is stored depends on timing, what is found does not."""
    return gl.convert_layout(gl.min(bounds, 1), gl.SliceLayout(1, mode.L), assert_trivial=True)


@gluon.jit
def ask_scales(v0, memory, mode):
    """Scales of the tokens of a chunk [CH]."""
    v = v0 + gl.arange(0, mode.CH, layout=gl.SliceLayout(0, mode.L))
    return gl.load(memory.scales + v, mask=v < memory.V, other=0.0)


@gluon.jit
def ask_row_scales(first, N: gl.constexpr, memory, mode):
    """Scales of rows first ... [N]."""
    rows = first + gl.arange(0, N, layout=gl.SliceLayout(1, mode.L))
    return gl.load(memory.row_scales + rows, mask=rows < memory.R, other=0.0)


@gluon.jit
def ordered(value):
    """As `kernel.ordered`, for Gluon."""
    bits = gl.where(value == 0.0, 0.0, value).to(gl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@gluon.jit
def take_out(acc, row_scale, v0, first, N: gl.constexpr, memory, mode):
    """acc[N, CH] where what lies past the vocabulary and what a row may not choose is -inf; the latter's logit is kept."""
    v = v0 + gl.arange(0, mode.CH, layout=gl.SliceLayout(0, mode.L))
    rows = first + gl.arange(0, N, layout=gl.SliceLayout(1, mode.L))
    acc = gl.where((v < memory.V)[None, :], acc, float("-inf"))
    if mode.HAS_BANNED:
        banned = gl.load(memory.banned + rows, mask=rows < memory.R, other=-1)
        here = (banned >= v0) & (banned < gl.minimum(v0 + mode.CH, memory.V))
        hit = v[None, :] == banned[:, None]
        own = gl.sum(gl.where(hit, acc, 0.0), 1)
        if mode.INT8:
            own *= row_scale
        gl.store(memory.banned_logits + rows, own, mask=here & (rows < memory.R))
        acc = gl.where(hit & here[:, None], float("-inf"), acc)
    return acc


@gluon.jit
def tell(acc, row_scale, threshold, v0, first, N: gl.constexpr, memory, mode):
    """Store maximum and sum of exp(logit - maximum) of acc[N, CH], and raise the thresholds; gives the rows whose logits are
    to be stored. Two words are stored in one piece, and no lane branches. INT8: acc still lacks row_scale."""
    PACK: gl.constexpr = mode.PACK
    top = gl.max(acc, 1)
    if mode.INT8:
        top *= row_scale  # it is positive, and changes no order
        factor = (row_scale * LOG2E)[:, None]
    else:
        factor = LOG2E
    # exp(-inf - -inf) would be NaN where a chunk holds nothing but -inf; NaN or +inf makes the sum NaN, as it should
    shift = gl.where(top == float("-inf"), 0.0, top) * LOG2E
    total = gl.sum(gl.exp2(acc * factor - shift[:, None]), 1)
    rows = first + gl.arange(0, N, layout=gl.SliceLayout(1, mode.L))
    keep = (rows < memory.R) & (v0 < memory.V)
    chunk = v0 // mode.CH
    pair = (memory.partials + (chunk // PACK * memory.R + rows) * (2 * PACK) + chunk % PACK * 2).to(gl.int64)
    gl.inline_asm_elementwise(STORE_PAIR_PTX, "=r,l,f,f,r", [pair, top, total, keep.to(gl.int32)], gl.int32, False, 1)
    if mode.GATED:
        order = ordered(top)
        keep &= order >= threshold
        bound = (memory.thresholds + chunk % mode.GROUPS * memory.R + rows).to(gl.int64)
        gl.inline_asm_elementwise(RAISE_PTX, "=r,l,r,r", [bound, order, keep.to(gl.int32)], gl.int32, False, 1)
    return keep


@gluon.jit
def save(acc, row_scale, keep, v0, first, N: gl.constexpr, memory, mode):
    """Store the logits of the rows to keep."""
    CH: gl.constexpr = mode.CH
    LANES: gl.constexpr = gl.DistributedLinearLayout(
        [[0, 1], [0, 2], [0, 16], [0, 32]] + ([[0, 64]] if CH == 128 else []) + [[8, 0]] + ([[64, 0]] if N == 128 else []),
        [[0, 4], [0, 8], [1, 0], [2, 0], [4, 0]],
        [[16, 0], [32, 0]],
        [],
        [N, CH],
    )
    if mode.INT8:
        acc *= row_scale[:, None]
    if v0 + CH <= memory.V:
        # four logits of a lane lie side by side: one instruction stores them; the merge (LANED) knows the order
        moved = gl.reshape(gl.permute(gl.reshape(acc, (N, CH // 16, 2, 4, 2)), (0, 1, 3, 2, 4)), (N, CH))
        line = memory.logits + v0.to(gl.int64) * memory.R + (first + gl.arange(0, N, layout=gl.SliceLayout(1, LANES))) * CH
        place = line[:, None] + gl.arange(0, CH, layout=gl.SliceLayout(0, LANES))[None, :]
        kept = gl.convert_layout(keep, gl.SliceLayout(1, LANES))
        gl.store(place, gl.convert_layout(moved, LANES), mask=kept[:, None])
    else:
        column = gl.arange(0, CH, layout=gl.SliceLayout(0, mode.L))[None, :]
        start = first + gl.arange(0, N, layout=gl.SliceLayout(1, mode.L))
        at = memory.logits + v0.to(gl.int64) * memory.R + (start * (memory.V - v0))[:, None]
        gl.store(at + column, acc, mask=keep[:, None] & (v0 + column < memory.V))
