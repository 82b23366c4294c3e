"""Runs the straight-line PTX of a kernel's inline assembly on tensors, one element of each operand at a time."""

import re

import torch


def word(x):
    """A register of 32 bits, as int32."""
    return x.contiguous().view(torch.int32) if x.dtype == torch.float32 else x


def single(x):
    return word(x).view(torch.float32)


def pair(x):
    """The two fp16 numbers of each register, the low one first."""
    return word(x).contiguous().view(torch.float16).unflatten(-1, (x.shape[-1], 2))


def packed(x):
    return x.half().contiguous().view(torch.int32).squeeze(-1)


def chosen(a, b, selector):
    """Bytes of two registers, the low one of the result first."""
    bytes_ = torch.cat([x.contiguous().view(torch.uint8).unflatten(-1, (x.shape[-1], 4)) for x in (a, b)], -1)
    picks = [int(digit) for digit in reversed(f"{selector:04x}")]
    return bytes_[..., picks].contiguous().view(torch.int32).squeeze(-1)


def wrapped(x):
    """Integers modulo 2^32."""
    return (x & 0xFFFFFFFF).where(x & 0x80000000 == 0, (x & 0xFFFFFFFF) - 2**32).int()


# fused multiply-adds are exact in float64 up to the rounding at the end: of factors of 11 bits; of 24 bits as good as
OPERATIONS = {
    "mov.b32": lambda a: a,
    "add.s32": lambda a, b: wrapped(word(a).long() + word(b).long()),
    "mad.lo.s32": lambda a, b, c: wrapped(word(a).long() * word(b).long() + word(c).long()),
    "fma.rn.sat.f32": lambda a, b, c: word(
        (single(a).double() * single(b).double() + single(c).double()).float().nan_to_num(0.0).clamp(0, 1)
    ),
    "fma.rn.f16x2": lambda a, b, c: packed(pair(a).double() * pair(b).double() + pair(c).double()),
    "max.f16x2": lambda a, b: packed(torch.maximum(pair(a), pair(b))),
    "add.rn.f16x2": lambda a, b: packed(pair(a).double() + pair(b).double()),
    "cvt.rn.f16x2.f32": lambda high, low: packed(torch.stack([single(low), single(high)], -1)),
    "prmt.b32": lambda a, b, selector: chosen(word(a), word(b), selector[(0,) * selector.dim()].item()),
}


def run(code, outputs, inputs):
    """The outputs $0, $1, ... of code for operands $outputs, ... [..., N], int32 or float32; outputs are int32."""
    registers = {f"${outputs + i}": x for i, x in enumerate(inputs)}
    like = word(inputs[0])
    for step in re.sub(r"\.reg [^;]*;|[{}]", "", code).split(";"):
        if not step.strip():
            continue
        name, operands = step.split(None, 1)
        target, *sources = [x.strip() for x in operands.split(",")]
        values = [registers[x] if x in registers else wrapped(torch.full_like(like, 0, dtype=torch.long) + int(x, 0))
                  for x in sources]  # fmt: skip
        registers[target] = OPERATIONS[name](*values)
    return [registers[f"${i}"] for i in range(outputs)]
