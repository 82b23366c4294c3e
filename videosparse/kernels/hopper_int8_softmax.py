# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
"""The softmax of `hopper_int8_kernel`: from int32 scores [64, 128] of a consumer to weights, and weights as factors."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from videosparse.kernels.hopper_kernel import accumulator, reinterpret, told

OFFSET = gl.constexpr(12582912.0)  # 1.5 * 2^23: floats beside it are 1 apart
OFFSET_BITS = gl.constexpr(0x4B400000)
HIDDEN = gl.constexpr(-(1 << 23) - 0x4B400000)  # the integer that `as_float` makes -inf
PEAK = gl.constexpr(8.0)  # fp8 weights are at most 2^8: as far above e4m3's smallest as it goes in powers of two
SLACK = gl.constexpr(8.0)  # by how much scores may pass a maximum that is kept: weights are at most 2^8
FLAT = gl.constexpr(gl.SwizzledSharedLayout(1, 1, 1, [0]))


@gluon.jit
def as_float(scores):
    """Integer scores as floats, OFFSET too high; what `hide` hid is -inf."""
    return (scores + OFFSET_BITS).to(gl.float32, bitcast=True)


@gluon.jit
def hide(scores, spots, slot, masked, end, layout, KEYS: gl.constexpr, TEXT: gl.constexpr):
    """The integer scores of a tile without those that belong to no token."""
    column = gl.arange(0, 128, gl.SliceLayout(0, accumulator(128, 8)))
    if TEXT:
        _, video, text_start = layout
        position = told(spots, slot * 2) + column
        if KEYS == 64:
            position = gl.where(column < 64, position, told(spots, slot * 2 + 1) + column - 64)
        token = (position < video) | ((position >= text_start) & (position < end))
    else:
        token = column < masked
    return gl.where(token[None, :], scores, HIDDEN)


@gluon.jit
def key_scales(scales, slot):
    """The scales of the two halves of a tile; 1 outside the tensor, where copies read 0."""
    left = told(reinterpret(scales.index(slot * 2), gl.float32, [32, 1], FLAT), 0)
    right = told(reinterpret(scales.index(slot * 2 + 1), gl.float32, [32, 1], FLAT), 0)
    return gl.where(left == 0.0, 1.0, left), gl.where(right == 0.0, 1.0, right)


@gluon.jit
def _of_halves(left, right, layout: gl.constexpr):
    """[2]: one number for each half of a tile."""
    return gl.where(gl.arange(0, 2, layout) == 0, left, right)


@gluon.jit
def _halve(x):
    """The two halves of the third dimension."""
    return gl.split(gl.permute(gl.reshape(x, [64, 2, 2, x.shape[2] // 2, 4, 2]), (0, 1, 3, 4, 5, 2)))


@gluon.jit
def _highest_of_pairs(top, cut):
    """The highest of `top` [64, 2, 4] and one pair of each [64, 2, 1, 4, 2]: one instruction on Hopper."""
    a, b = gl.split(gl.reshape(cut, [64, 2, 4, 2]))
    return gl.maximum(gl.maximum(a, b), top)


@gluon.jit
def _highest_of_integers(cut):
    """The maxima [64, 2, 4] of [64, 2, 8, 4, 2]."""
    a, b = _halve(cut)
    a, c = _halve(a)
    b, d = _halve(b)
    first, second = _halve(a)
    x, y = gl.split(gl.reshape(first, [64, 2, 4, 2]))
    top = _highest_of_pairs(gl.maximum(x, y), second)
    for pairs in gl.static_range(3):
        first, second = _halve(b if pairs == 0 else c if pairs == 1 else d)
        top = _highest_of_pairs(_highest_of_pairs(top, first), second)
    return top


@gluon.jit
def highest_of_rows(scores, own, halves):
    """The highest score of each row [64], scaled. `own` are the scales of rows, positive as all are.

    Maxima are taken of integers, three by one instruction, and only they are made floats first.
    """
    tops = as_float(_highest_of_integers(gl.reshape(scores, [64, 2, 8, 4, 2])))
    scale = _of_halves(halves[0], halves[1], gl.SliceLayout(0, gl.SliceLayout(2, tops.type.layout)))
    tops = gl.max(gl.max((tops - OFFSET) * scale[None, :, None], 1), 1)
    return gl.convert_layout(tops, own.type.layout) * own


@gluon.jit
def weigh(scores, top, own, halves):
    """(weights [64, 128], their sums by lane): 2 ** (scaled score - top).

    OFFSET times a scale is rounded to 24 bits: that shifts the scores of a row in a block by less than one step of
    theirs, which rounding queries and keys to integers did a hundred times over.
    """
    cut = gl.reshape(scores, [64, 2, 64])
    pairs: gl.constexpr = gl.SliceLayout(2, cut.type.layout)
    lines: gl.constexpr = gl.SliceLayout(1, pairs)
    scale = gl.convert_layout(own, lines)[:, None] * _of_halves(halves[0], halves[1], gl.SliceLayout(0, pairs))[None, :]
    level = scale * OFFSET + gl.convert_layout(top, lines)[:, None]
    p = gl.exp2(cut * scale[:, :, None] - level[:, :, None])
    return p, gl.sum(gl.sum(gl.reshape(p, [64, 16, 4, 2]), 3), 1)


@gluon.constexpr_function
def _shrink_asm(count):
    """(code, constraints): numbers times factors; a warp whose factors are all 1 jumps over the products.

    A thread holds two rows, whose factors are among the first four.
    """
    moves = " ".join(f"mov.b32 ${i}, ${count + i};" for i in range(count))
    products = " ".join(f"mul.f32 ${i}, ${count + i}, ${2 * count + i};" for i in range(count))
    tests = f"setp.neu.f32 p, ${2 * count}, 0f3F800000; "
    tests += " ".join(f"setp.neu.or.f32 p, ${2 * count + i}, 0f3F800000, p;" for i in range(1, 4))
    code = "{ .reg .pred p; " + f"{tests} vote.sync.any.pred p, p, -1; {moves} @!p bra.uni END; {products} END: }}"
    return code, ",".join(["=&f"] * count + ["f"] * (2 * count))


@gluon.jit
def shrink_rows(acc, factor):
    """acc [64, D] times factors of its rows, which are 1 as a rule."""
    count: gl.constexpr = acc.shape[1] // 2  # registers of a thread
    asm: gl.constexpr = _shrink_asm(count)
    return gl.inline_asm_elementwise(
        asm[0],
        asm[1],
        [acc, factor],
        dtype=gl.float32,
        is_pure=True,
        pack=count,
    )


@gluon.constexpr_function
def _pack_asm():
    """Sixteen floats, four of each of four tensors, to four words of four fp8 each."""
    halves = "cvt.rn.satfinite.e4m3x2.f32 l, ${}, ${}; cvt.rn.satfinite.e4m3x2.f32 h, ${}, ${}; mov.b32 ${}, {{l, h}};"
    parts = [halves.format(4 * j + 5, 4 * j + 4, 4 * j + 7, 4 * j + 6, j) for j in range(4)]
    return "{ .reg .b16 l, h; " + " ".join(parts) + " }"


@gluon.jit
def _pack(p, HEAD_DIM: gl.constexpr):
    """Weights [64, 128] as words of four fp8 each, int32 [64, 32].

    A thread holds columns 0, 1, 8 and 9 of 16 where the product reads 0..3: values come in that order instead. A word
    holds four columns, not the one of its place: `unpack_weights` undoes that, and no byte moves. As bytes, a loop
    would carry each in a register of its own.
    """
    p = gl.permute(gl.reshape(p, [64, 8, 2, 4, 2]), (0, 1, 3, 2, 4))
    p = gl.convert_layout(gl.reshape(p, [64, 128]), gl.DotOperandLayout(0, accumulator(HEAD_DIM, 8), 4))
    left, right = gl.split(gl.permute(gl.reshape(p, [64, 2, 2, 32]), (0, 3, 2, 1)))
    p0, p1 = gl.split(left)
    p2, p3 = gl.split(right)
    return gl.inline_asm_elementwise(
        _pack_asm(), "=r,=r,=r,=r" + ",r" * 16, [p0, p1, p2, p3], dtype=gl.int32, is_pure=True, pack=4
    )


@gluon.jit
def unpack_weights(words, HEAD_DIM: gl.constexpr):
    """What `_pack` made, as the left factor of the product with values."""
    p0, p1, p2, p3 = gl.inline_asm_elementwise(
        "mov.b32 $0, $4; mov.b32 $1, $5; mov.b32 $2, $6; mov.b32 $3, $7;",
        "=r,=r,=r,=r,r,r,r,r",
        [words],
        dtype=(gl.float8e4nv, gl.float8e4nv, gl.float8e4nv, gl.float8e4nv),
        is_pure=True,
        pack=4,
    )
    p = gl.permute(gl.join(gl.join(p0, p1), gl.join(p2, p3)), (0, 3, 2, 1))
    return gl.convert_layout(gl.reshape(p, [64, 128]), gl.DotOperandLayout(0, accumulator(HEAD_DIM, 8), 4))


@gluon.jit
def as_operand(p, dtype: gl.constexpr, HEAD_DIM: gl.constexpr, FP8: gl.constexpr):
    """Weights as they wait for the product with values."""
    if FP8:
        return _pack(p, HEAD_DIM)
    else:
        p = gl.reshape(p, [64, 128]).to(dtype)
        return gl.convert_layout(p, gl.DotOperandLayout(0, accumulator(HEAD_DIM, 16), 2))
