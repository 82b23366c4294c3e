# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
"""What the softmaxes of the Hopper kernels share: maxima that are kept for a while, so that seldom a number shrinks.

A maximum is kept until scores pass it by SLACK, base 2, so that weights are at most 2^8 (FlashAttention-4 keeps maxima
so, too). Then most warps have nothing to shrink, and jump over it.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

SLACK = gl.constexpr(8.0)  # by how much scores may pass a maximum that is kept: weights are at most 2^8


@gluon.constexpr_function
def _jump_asm(count, operation, neutral):
    """(code, constraints): `operation` of numbers and those of their rows; a warp with `neutral` ones only jumps over it.

    A thread holds two rows, whose numbers are among the first four.
    """
    moves = " ".join(f"mov.b32 ${i}, ${count + i};" for i in range(count))
    work = " ".join(f"{operation}.f32 ${i}, ${count + i}, ${2 * count + i};" for i in range(count))
    tests = f"setp.neu.f32 p, ${2 * count}, {neutral}; "
    tests += " ".join(f"setp.neu.or.f32 p, ${2 * count + i}, {neutral}, p;" for i in range(1, 4))
    code = "{ .reg .pred p; " + f"{tests} vote.sync.any.pred p, p, -1; {moves} @!p bra.uni END; {work} END: }}"
    return code, ",".join(["=&f"] * count + ["f"] * (2 * count))


@gluon.jit
def _shrink(acc, factor):
    """acc [64, D] times factors of its rows, which are 1 as a rule."""
    count: gl.constexpr = acc.shape[1] // 2  # registers of a thread
    asm: gl.constexpr = _jump_asm(count, "mul", "0f3F800000")
    return gl.inline_asm_elementwise(
        asm[0],
        asm[1],
        [acc, factor],
        dtype=gl.float32,
        is_pure=True,
        pack=count,
    )


@gluon.jit
def _lower(scores, shift):
    """scores [64, 128] less shifts of their rows, which are 0 as a rule."""
    count: gl.constexpr = scores.shape[1] // 2  # registers of a thread
    asm: gl.constexpr = _jump_asm(count, "sub", "0f00000000")
    return gl.inline_asm_elementwise(
        asm[0],
        asm[1],
        [scores, shift],
        dtype=gl.float32,
        is_pure=True,
        pack=count,
    )


@gluon.constexpr_function
def _hold_asm(count):
    """(code, constraints): numbers as they are, once they are there."""
    moves = " ".join(f"mov.b32 ${i}, ${count + i};" for i in range(count))
    tests = f"setp.lt.f32 p, ${count}, 0fBF800000; "
    tests += " ".join(f"setp.lt.or.f32 p, ${count + i}, 0fBF800000, p;" for i in range(1, count))
    return "{ .reg .pred p; " + f"{tests} .reg .b32 a; mov.b32 a, 0; @p st.shared.f32 [a], ${count}; {moves} }}", ",".join(["=&f"] * count + ["f"] * count)


@gluon.jit
def _hold(total):
    """Numbers that are never negative, once they have been computed: no instruction behind this comes before."""
    count: gl.constexpr = 2
    asm: gl.constexpr = _hold_asm(count)
    return gl.inline_asm_elementwise(asm[0], asm[1], [total], dtype=gl.float32, is_pure=False, pack=count)


@gluon.jit
def _halve(x):
    """The two halves of the second dimension."""
    return gl.split(gl.permute(gl.reshape(x, [64, 2, x.shape[1] // 2, 4, 2]), (0, 2, 3, 4, 1)))


@gluon.jit
def _highest_of_three(top, cut):
    """The highest of `top` [64, 4] and one pair of each [64, 1, 4, 2]: one instruction on Hopper."""
    a, b = gl.split(gl.reshape(cut, [64, 4, 2]))
    return gl.inline_asm_elementwise(
        "{ .reg .s32 t; max.s32 t, $1, $2; max.s32 $0, t, $3; }", "=r,r,r,r", [a, b, top],
        dtype=gl.int32, is_pure=True, pack=1,
    )  # fmt: skip


@gluon.jit
def _highest(scores):
    """The highest of each row [64] of scores [64, 128] where that is positive, else any of them that is not.

    Maxima are taken of the bits as integers, three by one instruction: these order positive numbers.
    """
    a, b = _halve(gl.reshape(scores.to(gl.int32, bitcast=True), [64, 16, 4, 2]))
    a, c = _halve(a)
    b, d = _halve(b)
    for part in gl.static_range(4):
        quarters = _halve(a if part == 0 else b if part == 1 else c if part == 2 else d)
        for half in gl.static_range(2):
            first, second = _halve(quarters[half])
            if part + half == 0:
                x, y = gl.split(gl.reshape(first, [64, 4, 2]))
                top = _highest_of_three(gl.maximum(x, y), second)
            else:
                top = _highest_of_three(_highest_of_three(top, first), second)
    return gl.max(top, 1).to(gl.float32, bitcast=True)
