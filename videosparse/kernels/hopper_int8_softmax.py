# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
"""The softmax of `hopper_int8_kernel`: from int32 scores [64, 128] of a consumer to weights, and weights as factors.

FP8 weights are made without exponentials. The bits of a positive floating-point number, read as an integer, grow by
the same for each doubling, and linearly between: they are a piecewise linear logarithm (N. N. Schraudolph, "A fast,
compact approximation of the exponential function", Neural Computation 11, 1999). e4m3 has 8 steps an octave, so the
bits of 2 ** x are about 8 (x + 7) - CENTRE, rounded. That is off by up to 4 %, 2 % in the root mean square, besides the
2.5 % of rounding; CENTRE makes the mean right. Below 2 ** -6 e4m3 is linear, and a second line, less steep, is the
higher one: it keeps weights down to 2 ** -9, at 0.84 to 1.14 of what they are on average. Row sums are of the weights
as rounded.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from videosparse.kernels.hopper_kernel import accumulator, reinterpret, told

OFFSET = gl.constexpr(12582912.0)  # 1.5 * 2^23: floats beside it are 1 apart
OFFSET_BITS = gl.constexpr(0x4B400000)
HIDDEN = gl.constexpr(-(1 << 23) - 0x4B400000)  # the integer that `_as_float` makes -inf
PEAK = gl.constexpr(8.0)  # fp8 weights are at most 2^8: as far above e4m3's smallest as it goes in powers of two
SLACK = gl.constexpr(8.0)  # by how much scores may pass a maximum that is kept: weights are at most 2^8
STEPS = gl.constexpr(141.0)  # of FP8 bits between the lowest number that is told from others and a weight of 2^PEAK
CENTRE = gl.constexpr(0.45)  # steps: what the line lies above the curve, on average over an octave
LINES = gl.constexpr("0x63D663D6 0x58685868 0x64006400 0x4EB34EB3")
"""Pairs of fp16: 1,003 + 141 y is the line for weights of 2^-6 and more, 1,024 + 26.8 y that for less."""
FLAT = gl.constexpr(gl.SwizzledSharedLayout(1, 1, 1, [0]))


@gluon.jit
def _as_float(scores):
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
    tops = _as_float(_highest_of_integers(gl.reshape(scores, [64, 2, 8, 4, 2])))
    scale = _of_halves(halves[0], halves[1], gl.SliceLayout(0, gl.SliceLayout(2, tops.type.layout)))
    tops = gl.max(gl.max((tops - OFFSET) * scale[None, :, None], 1), 1)
    return gl.convert_layout(tops, own.type.layout) * own


@gluon.jit
def _scales(own, top, halves, scores):
    """(scale, level) [64, 2, 1] for scores as `_as_float` makes them: scale x score - level is own x score - top.

    OFFSET times a scale is rounded to 24 bits: that shifts the scores of a row in a block by less than one step of
    theirs, which rounding queries and keys to integers did a hundred times over.
    """
    pairs: gl.constexpr = gl.SliceLayout(2, gl.reshape(scores, [64, 2, 64]).type.layout)
    lines: gl.constexpr = gl.SliceLayout(1, pairs)
    scale = gl.convert_layout(own, lines)[:, None] * _of_halves(halves[0], halves[1], gl.SliceLayout(0, pairs))[None, :]
    level = scale * OFFSET + gl.convert_layout(top, lines)[:, None]
    return scale[:, :, None], level[:, :, None]


@gluon.jit
def weigh(scores, top, own, halves):
    """(weights [64, 128], their sums by lane): 2 ** (scaled score - top)."""
    scale, level = _scales(own, top, halves, scores)
    p = gl.exp2(gl.reshape(_as_float(scores), [64, 2, 64]) * scale - level)
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
def _fp8_asm(lines):
    """(code, constraints): 16 numbers, four of each of four tensors, to four words of four weights, and sums by word.

    Numbers are 0..1, from a weight of 0 to the highest. Both lines are computed 1,024 too high, where fp16 numbers are
    1 apart and the last byte is the integer. Bits of e4m3 are bits 7 to 14 of fp16 numbers 2^-8 as large, subnormal
    ones as well: what `mad` leaves, once 0x6400, the bits of 1,024, has gone. Sums are pairs of fp16.
    """
    code = "".join(f"mov.b32 {name}, {x}; " for name, x in zip(("a0", "a1", "b0", "b1"), lines.split(), strict=True))
    for j in range(4):
        for x, first in (("l", 8 + 4 * j), ("h", 10 + 4 * j)):
            code += f"cvt.rn.f16x2.f32 {x}, ${first + 1}, ${first}; fma.rn.f16x2 m, {x}, b1, b0; "
            code += f"fma.rn.f16x2 {x}, {x}, a1, a0; max.f16x2 {x}, {x}, m; "
        code += f"prmt.b32 ${j}, l, h, 0x6420; mad.lo.s32 l, l, 128, -0x320000; mad.lo.s32 h, h, 128, -0x320000; "
        code += f"add.rn.f16x2 ${4 + j}, l, h; "
    return "{ .reg .b32 l, h, m, a0, a1, b0, b1; " + code + "}", ",".join(["=&r"] * 8 + ["f"] * 16)


@gluon.jit
def _add_pairs(a, b):
    """Sums of words of two fp16 numbers each."""
    return gl.inline_asm_elementwise("add.rn.f16x2 $0, $1, $2;", "=r,r,r", [a, b], dtype=gl.int32, is_pure=True, pack=1)


@gluon.jit
def _sum_words(sums):
    """Sums for words [64, 32], pairs of fp16, by lane in fp32 [64, 4]; a lane has 16 weights for each fp16 number."""
    a, b = gl.split(gl.reshape(sums, [64, 2, 4, 2, 2]))
    a, b = gl.split(_add_pairs(a, b))
    a, b = gl.split(gl.permute(_add_pairs(a, b), (0, 2, 1)))
    pairs = _add_pairs(a, b)
    low = (pairs & 0xFFFF).to(gl.int16).to(gl.float16, bitcast=True)
    high = (pairs >> 16).to(gl.int16).to(gl.float16, bitcast=True)
    return (low.to(gl.float32) + high.to(gl.float32)) * 256.0


@gluon.jit
def weigh_in_fp8(scores, top, own, halves, HEAD_DIM: gl.constexpr):
    """(weights as words of four fp8 each, int32 [64, 32]; their sums by lane): 2 ** (scaled score - top + PEAK).

    Scores that are hidden get 0, and so do NaN: `poison` makes those show.

    A thread holds columns 0, 1, 8 and 9 of 16 where the product reads 0..3: values come in that order instead. A word
    holds four columns, not the one of its place: `unpack_weights` undoes that, and no byte moves. As bytes, a loop
    would carry each in a register of its own.
    """
    scale, level = _scales(own * (8.0 / STEPS), top * (8.0 / STEPS) - (1.0 - CENTRE / STEPS), halves, scores)
    y = gl.inline_asm_elementwise(
        "fma.rn.sat.f32 $0, $1, $2, $3;",
        "=f,f,f,f",
        [gl.reshape(_as_float(scores), [64, 2, 64]), scale, -level],
        dtype=gl.float32,
        is_pure=True,
        pack=1,
    )
    y = gl.permute(gl.reshape(y, [64, 8, 2, 4, 2]), (0, 1, 3, 2, 4))
    y = gl.convert_layout(gl.reshape(y, [64, 128]), gl.DotOperandLayout(0, accumulator(HEAD_DIM, 8), 4))
    left, right = gl.split(gl.permute(gl.reshape(y, [64, 2, 2, 32]), (0, 3, 2, 1)))
    y0, y1 = gl.split(left)
    y2, y3 = gl.split(right)
    asm: gl.constexpr = _fp8_asm(LINES)
    words, sums = gl.inline_asm_elementwise(
        asm[0], asm[1], [y0, y1, y2, y3], dtype=(gl.int32, gl.int32), is_pure=True, pack=4
    )
    return words, _sum_words(sums)


@gluon.jit
def poison(own, halves):
    """0 for each row, NaN where a scale is infinite as that of a NaN is: `weigh_in_fp8` would hide it."""
    return own * ((halves[0] + halves[1]) * 0.0)


@gluon.jit
def unpack_weights(words, HEAD_DIM: gl.constexpr):
    """What `weigh_in_fp8` made, as the left factor of the product with values."""
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
def as_operand(p, dtype: gl.constexpr, HEAD_DIM: gl.constexpr):
    """16-bit weights as they wait for the product with values."""
    p = gl.reshape(p, [64, 128]).to(dtype)
    return gl.convert_layout(p, gl.DotOperandLayout(0, accumulator(HEAD_DIM, 16), 2))
