"""What `online` makes of the products of one tile: largest logits, sums of exponentials, and the logits that may be chosen.

A group of four warps holds ROWS rows x CH tokens: each lane 32 logits of a row r, and of row r + 8; four lanes share a row.
Twenty warps work off their results at a time, so that loads, stores and shuffles are what is short: both rows of a lane go
through one address, and a warp that keeps no row's logits jumps over the stores.
"""
# mypy: ignore-errors

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.language.core import _aggregate as aggregate

from kernels.head_topk.constants import PACK
from kernels.head_topk.results import ordered

ROWS = gl.constexpr(64)
CH = gl.constexpr(128)
LOG2E = gl.constexpr(1.4426950408889634)
PAUSE_NS = gl.constexpr(500)
WIDE = gl.constexpr(gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 128, 16]))  # acc[ROWS, CH]
INT_WIDE = gl.constexpr(gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 128, 32]))  # the same places, of int8 products
RL = gl.constexpr(gl.SliceLayout(1, gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 128, 16])))  # [ROWS]
# [ROWS, 4 lanes of a row, logits of a lane], and [ROWS, 4 lanes]
OWN = gl.constexpr(
    gl.DistributedLinearLayout(
        [[0, 0, 1], [8, 0, 0], [0, 0, 2], [0, 0, 4], [0, 0, 8], [0, 0, 16]],
        [[0, 1, 0], [0, 2, 0], [1, 0, 0], [2, 0, 0], [4, 0, 0]],
        [[16, 0, 0], [32, 0, 0]],
        [],
        [64, 4, 32],
    )
)
LANES = gl.constexpr(gl.SliceLayout(2, OWN.value))
QUADS = gl.constexpr(
    gl.DistributedLinearLayout([[8, 0]], [[0, 1], [0, 2], [1, 0], [2, 0], [4, 0]], [[16, 0], [32, 0]], [], [64, 4])
)

# All of these work on rows r and r + 8 of a lane; the first address is that of r.
_SPEAKER = ".reg .pred l; .reg .b32 t; mov.u32 t, %tid.x; and.b32 t, t, 3; setp.eq.b32 l, t, 0;"  # one lane of the four
_DONE = "mov.b32 $0, 0; mov.b32 $1, 0;"
PAUSE_PTX = gl.constexpr("nanosleep.u32 $1; mov.b32 $0, 0;")


def _tell_ptx(pack: int) -> str:
    """$4, $5: largest logits of the two rows."""
    return f"{{ {_SPEAKER} @l st.global.f32 [$2], $4; @l st.global.f32 [$2+{8 * 4 * pack}], $5; {_DONE} }}"


def _raise_ptx(thresholds: int) -> str:
    """$4, $5: what to raise thresholds to; $6, $7: whether to."""
    raise_to = "red.relaxed.gpu.global.max.s32"
    return (
        f"{{ {_SPEAKER} .reg .pred p, q; setp.ne.and.b32 p, $6, 0, l; setp.ne.and.b32 q, $7, 0, l;"
        f" @p {raise_to} [$2], $4; @q {raise_to} [$2+{8 * 4 * thresholds}], $5; {_DONE} }}"
    )


def _ask_ptx(thresholds: int) -> str:
    """$0, $1: the least of a quarter of the thresholds of a row: of each 8, a lane reads two neighbours."""
    count = thresholds // 4
    lines = []
    for out, row in (("$0", 0), ("$1", 8 * 4 * thresholds)):
        lines += [f"ld.global.cg.v2.s32 {{t{n}, t{n + 1}}}, [$2+{row + 16 * n}];" for n in range(0, count, 2)]
        lines.append(f"min.s32 {out}, t0, t1;")
        lines += [f"min.s32 {out}, {out}, t{n};" for n in range(2, count)]
    return f"{{ .reg .s32 t<{count}>; {' '.join(lines)} }}"


def _save_ptx() -> str:
    """64 logits of a lane, in the order of WIDE: 4 j + 2 b + i is number i of pair j of row r + 8 b; pairs of a row lie 32
    bytes apart. $64 is the address, and $192 and $194 say whether the rows are kept."""

    def row(keep: str, b: int) -> str:
        stores = [
            f"@{keep} st.global.v2.f32 [$64+{8 * 512 * b + 32 * j}], {{${128 + 4 * j + 2 * b}, ${129 + 4 * j + 2 * b}}};"
            for j in range(16)
        ]
        return f"vote.sync.any.pred any, {keep}, 0xffffffff; @!any bra after{b}; {' '.join(stores)} after{b}:"

    return (
        "{ .reg .pred p, q, any; setp.ne.s32 p, $192, 0; setp.ne.s32 q, $194, 0;"
        f" {row('p', 0)} {row('q', 1)} mov.b32 $0, 0; }}"
    )


TELL = gl.constexpr(_tell_ptx(PACK))
RAISE8 = gl.constexpr(_raise_ptx(8))
RAISE16 = gl.constexpr(_raise_ptx(16))
RAISE32 = gl.constexpr(_raise_ptx(32))
ASK8 = gl.constexpr("ld.global.cg.v2.s32 {$0, $2}, [$4]; ld.global.cg.v2.s32 {$1, $3}, [$4+256];")
ASK16 = gl.constexpr(_ask_ptx(16))
ASK32 = gl.constexpr(_ask_ptx(32))
# The least of both first, as the compiler would have it, would wait for them long before there is something to compare.
REACHES = gl.constexpr("{ .reg .pred p; setp.ge.s32 p, $1, $2; setp.ge.or.s32 p, $1, $3, p; selp.b32 $0, 1, 0, p; }")
SAVE = gl.constexpr(_save_ptx())
SAVE_OPERANDS = gl.constexpr(",".join(["=r"] * 64 + ["l"] * 64 + ["f"] * 64 + ["r"] * 64))


@aggregate
class Memory:
    """Scales of rows (int8 only), what rows may not choose, and where results go."""

    banned: gl.tensor
    thresholds: gl.tensor
    tops: gl.tensor
    logits: gl.tensor
    row_scales: gl.tensor
    R: gl.tensor
    V: gl.tensor

    @gluon.constexpr_function
    def __init__(self, banned, thresholds, tops, logits, row_scales, R, V):
        self.banned = banned
        self.thresholds = thresholds
        self.tops = tops
        self.logits = logits
        self.row_scales = row_scales
        self.R = R
        self.V = V


@aggregate
class Mode:
    """GROUPS: thresholds a row (8, 16 or 32); PACK: see `online`; WHOLE: V is a multiple of CH; LATE: the merge multiplies
    by the rows' scales."""

    GROUPS: gl.constexpr
    PACK: gl.constexpr
    HAS_BANNED: gl.constexpr
    GATED: gl.constexpr
    INT8: gl.constexpr
    WHOLE: gl.constexpr
    LATE: gl.constexpr

    @gluon.constexpr_function
    def __init__(self, GROUPS, PACK, HAS_BANNED, GATED, INT8, WHOLE):
        self.GROUPS = gl.constexpr(GROUPS)
        self.PACK = gl.constexpr(PACK)
        self.HAS_BANNED = gl.constexpr(HAS_BANNED)
        self.GATED = gl.constexpr(GATED)
        self.INT8 = gl.constexpr(INT8)
        self.WHOLE = gl.constexpr(WHOLE)
        self.LATE = gl.constexpr(INT8 and GATED)


@gluon.jit
def ask_thresholds(first, memory, mode):
    """Thresholds of rows first ..., twice [ROWS, 4]: the four lanes of a row share them out; a lane tells the least of its
    first and of its second ones (of 8 thresholds: two, as they are)."""
    GROUPS: gl.constexpr = mode.GROUPS
    PTX: gl.constexpr = ASK16 if GROUPS == 16 else ASK32
    row = gl.arange(0, ROWS, layout=gl.SliceLayout(1, QUADS))[:, None]
    lane = gl.arange(0, 4, layout=gl.SliceLayout(0, QUADS))[None, :]
    at = memory.thresholds + first * GROUPS + row * GROUPS + lane * 2
    if GROUPS == 8:
        return gl.inline_asm_elementwise(ASK8, "=r,=r,=r,=r,l,l", [at.to(gl.int64)], (gl.int32, gl.int32), False, 2)
    found = gl.inline_asm_elementwise(PTX, "=r,=r,l,l", [at.to(gl.int64)], gl.int32, False, 2)
    return found, found


@gluon.jit
def reaches(order, bounds, bounds2):
    """Whether rows reach the least of GROUPS >= k group maxima, that is, any of them. k chunks reach it, so a chunk below
    it holds none of the k best. A stale value is lower, hence safe: what is stored depends on timing, not what is found."""
    own = gl.expand_dims(gl.convert_layout(order, gl.SliceLayout(1, QUADS)), 1).broadcast_to((ROWS, 4))
    reached = gl.inline_asm_elementwise(REACHES, "=r,r,r,r", [own, bounds, bounds2], gl.int32, True, 1)
    return gl.convert_layout(gl.max(reached, 1), RL) > 0


@gluon.jit
def lane_scale(row_scale, mode):
    """What makes of a row's sums, less the row's scale if that is still to come, exponents of 2 [ROWS, 4]."""
    scale = gl.full((ROWS, 4), LOG2E, gl.float32, layout=LANES)
    if mode.LATE:
        scale *= gl.expand_dims(gl.convert_layout(row_scale, gl.SliceLayout(1, LANES)), 1)
    return scale


@gluon.jit
def work_off(acc, peak, total, row_scale, banned, early, bounds, bounds2, v0, first, padded, memory, mode):
    """Tell the largest logit of each row of acc[ROWS, CH], raise the thresholds, and store the logits of rows that may still
    be among the k best; gives peak and total [ROWS, 4] of the logits so far. LATE: acc, what is stored, peak and total lack
    the factor row_scale. banned: the token that a row may not choose; a chunk with it is told as if there were none, raises
    no threshold and is stored in any case: the merge sees to it. early: nobody had told anything when bounds were read."""
    GROUPS: gl.constexpr = mode.GROUPS
    PACK: gl.constexpr = mode.PACK
    own = gl.reshape(gl.permute(gl.reshape(acc, (ROWS, CH // 8, 4, 2)), (0, 2, 1, 3)), (ROWS, 4, CH // 4))
    own = gl.convert_layout(own, OWN)
    lane_top = gl.max(own, 2)
    top = gl.convert_layout(gl.max(lane_top, 1), RL)
    if mode.LATE:
        top *= row_scale
    row = gl.arange(0, ROWS, layout=RL)
    column = gl.arange(0, CH, layout=gl.SliceLayout(0, WIDE))
    chunk = v0 // CH
    taken = row < 0
    if mode.HAS_BANNED:
        taken = (banned >= v0) & (banned < v0 + CH)
    place = memory.tops + ((chunk // PACK * padded + first) * PACK + chunk % PACK) + row * PACK
    gl.inline_asm_elementwise(TELL, "=r,=r,l,l,f,f", [place.to(gl.int64), top], gl.int32, False, 2)
    keep = first + row < memory.R
    if mode.GATED:
        RAISE: gl.constexpr = RAISE8 if GROUPS == 8 else (RAISE16 if GROUPS == 16 else RAISE32)
        order = ordered(top)
        keep &= reaches(order, bounds, bounds2)
        bound = (memory.thresholds + first * GROUPS + chunk % GROUPS + row * GROUPS).to(gl.int64)
        lifts = (keep & (taken == 0)).to(gl.int32)
        gl.inline_asm_elementwise(RAISE, "=r,=r,l,l,r,r,r,r", [bound, order, lifts], gl.int32, False, 2)
        if early:  # all programs begin together: what they tell within a moment spares most of their stores
            moment = gl.full((1,), PAUSE_NS, gl.int32, layout=RL)
            gl.inline_asm_elementwise(PAUSE_PTX, "=r,r", [moment], gl.int32, False, 1)
            bounds, bounds2 = ask_thresholds(first, memory, mode)
            keep &= reaches(order, bounds, bounds2)
        keep |= taken
    width = gl.minimum(memory.V - v0, CH)
    if mode.WHOLE or width == CH:
        base = memory.logits + (v0.to(gl.int64) * memory.R + first * CH)
        at = (base + row * CH)[:, None] + column[None, :]
        gl.inline_asm_elementwise(
            SAVE, SAVE_OPERANDS, [at.to(gl.int64), acc, keep.to(gl.int32)[:, None]], gl.int32, False, 64
        )
    else:
        line = memory.logits + v0.to(gl.int64) * memory.R + (first + row) * width
        gl.store(line[:, None] + column[None, :], acc, mask=keep[:, None] & (column < width)[None, :])
    new = gl.maximum(peak, lane_top)
    # exp(-inf - -inf) would be NaN where a lane has seen nothing but -inf; NaN or +inf makes the sum NaN, as it should
    scale = lane_scale(row_scale, mode)
    shift = gl.where(new == float("-inf"), 0.0, new) * scale
    terms = gl.exp2(own * gl.expand_dims(scale, 2) - gl.expand_dims(shift, 2))
    return new, total * gl.exp2(peak * scale - shift) + gl.sum(terms, 2)
