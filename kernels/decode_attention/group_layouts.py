"""Which thread of the kernels for groups holds what: a warp a head, as the products of `grouped.py` want their operands.

HP heads of a program, DH features of a head.
"""
# mypy: ignore-errors

from triton.experimental import gluon
from triton.experimental.gluon import language as gl


@gluon.constexpr_function
def _layout(shape, registers, lanes):
    """A warp a head: bases of registers and lanes over the other two axes."""
    heads = [[1 << bit, 0, 0] for bit in range(shape[0].bit_length() - 1)]
    inside = [[0, *base] for base in registers if base[0] < shape[1] and base[1] < shape[2]]
    return gl.DistributedLinearLayout(inside, [[0, *base] for base in lanes], heads, [], shape)


@gluon.constexpr_function
def values_layout(heads, positions, features):
    """[HP, positions, DH]: a thread has pairs of positions and eight neighbouring features of each."""
    registers = [[0, 1], [0, 2], [0, 4], [0, 64], [1, 0], [8, 0], [16, 0]]
    return _layout([heads, positions, features], registers, [[2, 0], [4, 0], [0, 8], [0, 16], [0, 32]])


@gluon.constexpr_function
def scores_layout(heads, positions):
    """[HP, 8 entries, positions]: the first eight rows of a product."""
    registers, lanes = [[0, 1], [0, 8], [0, 16]], [[0, 2], [0, 4], [1, 0], [2, 0], [4, 0]]
    return _layout([heads, 8, positions], registers, lanes)


@gluon.constexpr_function
def out_layout(heads, features):
    """[HP, 8 entries, DH]: the transposed result, eight neighbouring features a thread."""
    registers = [[0, 1], [0, 2], [0, 4], [0, 64], [1, 0]]
    return _layout([heads, 8, features], registers, [[2, 0], [4, 0], [0, 8], [0, 16], [0, 32]])


@gluon.constexpr_function
def lanes_layout(heads):
    """[HP, 1, 32]: a value a lane, the same for every warp."""
    return _layout([heads, 1, 32], [], [[0, 1], [0, 2], [0, 4], [0, 8], [0, 16]])
