"""The work items of one GEMM: an item is a block of output features of one tile of pairs."""
# mypy: ignore-errors

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.language.core import _aggregate as aggregate


@aggregate
class Gemm:
    """One of both GEMMs: x [., K] by the packed weights of an expert, to out [., N], with its scales and biases [E, N].
    This program does the items number, number + hop, ... below end. FIRST: x is gathered (ROW_DIVISOR pairs a token) and
    gets a ReLU; else it is in expert order and gets gates. An item has HALVES blocks of ROWS output features, TILE_STRIPS
    strips of STRIDE words; a tile BLOCKS_N items."""

    x: gl.tensor
    w: gl.tensor
    scales: gl.tensor
    biases: gl.tensor
    out: gl.tensor
    number: gl.tensor
    end: gl.tensor
    hop: gl.tensor
    N: gl.constexpr
    K: gl.constexpr
    FIRST: gl.constexpr
    ROW_DIVISOR: gl.constexpr
    HALVES: gl.constexpr
    STEPS: gl.constexpr
    STRIDE: gl.constexpr
    STRIPS: gl.constexpr
    TILE_STRIPS: gl.constexpr
    BLOCKS_N: gl.constexpr

    @gluon.constexpr_function
    def __init__(self, x, w, scales, biases, out, items, hop, N, K, BN, FIRST, TOP_K, ROWS, KB):
        self.x = x
        self.w = w
        self.scales = scales
        self.biases = biases
        self.out = out
        self.number, self.end = items
        self.hop = hop
        self.N = gl.constexpr(N)
        self.K = gl.constexpr(K)
        self.FIRST = gl.constexpr(FIRST)
        self.ROW_DIVISOR = gl.constexpr(TOP_K if FIRST else 1)
        self.HALVES = gl.constexpr(BN // ROWS)
        self.STEPS = gl.constexpr(K // KB)
        self.STRIDE = gl.constexpr(K // KB * 2048)
        self.STRIPS = gl.constexpr(N // 64)
        self.TILE_STRIPS = gl.constexpr(BN // 64)
        self.BLOCKS_N = gl.constexpr(N // BN)


@aggregate
class Pairs:
    """What the router made of the tokens: gates of all pairs, who stands where in expert order, the tile records, and a
    counter for each tile: how many items of the first GEMM are done."""

    gates: gl.tensor
    gather: gl.tensor
    tiles: gl.tensor
    ready: gl.tensor

    @gluon.constexpr_function
    def __init__(self, gates, gather, tiles, ready):
        self.gates = gates
        self.gather = gather
        self.tiles = tiles
        self.ready = ready


@aggregate
class Tile:
    """A tile record: expert, first position in expert order, number of pairs."""

    expert: gl.tensor
    start: gl.tensor
    count: gl.tensor

    @gluon.constexpr_function
    def __init__(self, expert, start, count):
        self.expert = expert
        self.start = start
        self.count = count


@aggregate
class Item:
    """Its number, tile, rows of x (`rows_of`) and where the first of its strips begins."""

    number: gl.tensor
    tile: Tile
    rows: gl.tensor
    weights: gl.tensor

    @gluon.constexpr_function
    def __init__(self, number, tile, rows, weights):
        self.number = number
        self.tile = tile
        self.rows = rows
        self.weights = weights


@gluon.jit
def tile_of(number, gemm, pairs):
    """Record of an item's tile; no pairs where this program has no such item."""
    there = number < gemm.end
    record_ptr = pairs.tiles + number // gemm.BLOCKS_N * 4
    expert = gl.load(record_ptr, mask=there, other=0)
    return Tile(expert, gl.load(record_ptr + 1, mask=there, other=0), gl.load(record_ptr + 2, mask=there, other=0))


@gluon.jit
def rows_of(tile, lane, gemm, pairs):
    """Rows of x that a tile multiplies, times TOP_K in the first GEMM: who divides them waits until they are there."""
    return gl.load(pairs.gather + tile.start + lane, mask=lane < tile.count, other=0) if gemm.FIRST else tile.start + lane


@gluon.jit
def weights_of(number, expert, gemm):
    """Where the strips of an item begin."""
    block = number % gemm.BLOCKS_N
    return gemm.w + (expert * gemm.STRIPS + block * gemm.TILE_STRIPS).to(gl.int64) * gemm.STRIDE


@gluon.jit
def wait_ready(number, gemm, pairs, TARGET: gl.constexpr):
    """Wait until all TARGET items of the first GEMM of the item's tile are written."""
    if number < gemm.end:
        while gl.atomic_add(pairs.ready + number // gemm.BLOCKS_N, 0, sem="acquire") < TARGET:
            pass


@gluon.jit
def release(tile, pairs):
    """Count one more item of the first GEMM of this tile as written; a barrier must have come after its stores."""
    gl.atomic_add(pairs.ready + tile, 1, sem="release")
