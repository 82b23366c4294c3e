"""Which part of a transformer a kernel or operation belongs to, by what it is called: the table `RULES`."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

SELF_ATTENTION, CROSS_ATTENTION = "self-attention", "cross-attention"
QUERIES = "norm and rotation of queries and keys"
NORMS = "norms, modulation, residuals"
UNKNOWN = "unknown"
PARTS = (
    SELF_ATTENTION, "rounding for integer attention", "search and lists", "token order", QUERIES, CROSS_ATTENTION,
    "linear layers", "rounding for FP8 linears", "activations", NORMS, "embeddings", "copies", UNKNOWN,
)  # fmt: skip
"""In the order of tables. What is in no rule is `UNKNOWN`, and tables name it."""

GAPS = "between kernels"
"""Time in which the device does nothing; no part of any kernel."""

_ATTENTION = "attention"

RULES: tuple[tuple[str, str], ...] = (
    # what an operation contains counts as that operation, so rounding comes before attention
    ("rounding for integer attention", r"^(statistics|totals|queries|keys|values)_kernel"),
    (SELF_ATTENTION, r"videosparse::(attend_\w+|dense_by_library)|^(forward|int8|tail)_kernel"),
    ("search and lists", r"videosparse::(block_sums|block_stats|select_blocks|search_orders|expand_blocks)"),
    ("search and lists", r"^(hopper_sums|sums|sampled|stats|keep_largest|expand)_kernel|sort|cumsum|RadixSort"),
    ("token order", r"videosparse::reorder|^reorder_kernel"),
    (QUERIES, r"videosparse::norm_rotate|^norm_rotate_kernel"),
    (_ATTENTION, r"scaled_dot_product|_attention_(forward|fusible)|_(flash|cudnn|efficient)_attention"),
    (_ATTENTION, r"fmha|flash_(fwd|attn)|FlashAttn|cudnn_generated.*sdpa|sdpa"),
    ("rounding for FP8 linears", r"float8|(^triton_|aten::).*(amax|_scaled_dequant)|quantize_affine"),
    ("linear layers", r"aten::(addmm|mm|bmm|linear|matmul|_scaled_mm|_addmm_activation)$|extern_kernels"),
    ("linear layers", r"nvjet|gemm|cutlass.*(mma|Gemm)|cublas|splitKreduce|mkldnn_linear"),
    ("embeddings", r"convolution|conv3d|conv2d|cudnn.*conv|implicit_conv"),
    (QUERIES, r"rms_norm|^aten::_fused_rms_norm"),
    (NORMS, r"layer_norm|LayerNorm|native_batch_norm|var_mean|group_norm"),
    ("activations", r"gelu|silu|GeluCUDA|\btanh\b"),
    (NORMS, r"^(triton|cpp)_\w*fused|^graph_\d+_cpp_fused"),
    ("embeddings", r"aten::(sin|cos|arange|exp|outer|embedding)\b"),
    ("copies", r"^Mem(cpy|set)|aten::(copy_|_to_copy|to|clone|contiguous|cat|fill_|zero_|empty\w*|view|reshape)$"),
    ("copies", r"aten::(zeros|ones|full|new_\w+|_reshape_alias|flatten|expand|stack|zeros_like|resize_)$|CatArray"),
    ("copies", r"aten::(permute|unflatten|as_strided|type_as|unsqueeze|squeeze|_unsafe_view|lift_fresh|detach)$"),
    (NORMS, r"aten::(mul|add|sub|div|pow|mean|sum|rsqrt|sqrt|neg|chunk|split|unbind|select|slice|transpose|t|sub_)$"),
    (NORMS, r"elementwise_kernel|reduce_kernel"),
)  # fmt: skip
"""(part, pattern), the first that is found in the kernel's name or in one of the operations around it counts."""

_WIDE = re.compile(r"aten::(mul|add|sub|copy_|cat|neg|stack|empty_like)")


@dataclass(frozen=True)
class Work:
    """A kernel, or on a CPU an operation without what it calls.

    Args:
        name: of the kernel.
        seconds: that it took.
        operations: around it, the innermost first.
        shapes: of the inputs of the innermost operation that has any.
    """

    name: str
    seconds: float
    operations: tuple[str, ...] = ()
    shapes: tuple[tuple[int, ...], ...] = ()


def part_of(work: Work, head_dims: Sequence[int] = (128, 64)) -> str:
    """The part that a kernel belongs to, one of `PARTS`.

    Args:
        work: the kernel.
        head_dims: last sizes of tensors [B, L, H, D] of queries and keys, or of halves of them as they are rotated.
    """
    part = next((part for part, pattern in _COMPILED if any(pattern.search(n) for n in _names(work))), UNKNOWN)
    if part == _ATTENTION:
        return CROSS_ATTENTION if _crosses(work.shapes) else SELF_ATTENTION
    if part in (NORMS, "copies") and _of_heads(work, head_dims):
        return QUERIES
    return part


def _names(work: Work) -> tuple[str, ...]:
    return (work.name, *work.operations)


def _crosses(shapes: Sequence[tuple[int, ...]]) -> bool:
    """Whether queries and keys, the first two inputs of four dimensions, differ in length."""
    four = [shape for shape in shapes if len(shape) == 4]
    return len(four) >= 2 and four[0][1:3] != four[1][1:3]


def _of_heads(work: Work, head_dims: Sequence[int]) -> bool:
    """Whether an elementwise operation works on queries or keys of many tokens."""
    if not any(_WIDE.match(name) for name in work.operations[:1]) or not work.shapes:
        return False
    first = work.shapes[0]
    return len(first) in (4, 5) and (first[-1] in head_dims or (first[-1] == 2 and first[-2] * 2 in head_dims))


_COMPILED = tuple((part, re.compile(pattern)) for part, pattern in RULES)
