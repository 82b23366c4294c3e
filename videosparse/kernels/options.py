"""How attention kernels run: the fields that every caller may set."""

from __future__ import annotations

from dataclasses import dataclass

BACKENDS = ("auto", "triton", "torch", "fa4", "flex")
# queries and keys, then values where they are rounded, too
QUANTS = (None, "int8", "int8-fp8", "int8-int8")
FUSED_NORMS = ("auto", "on", "off")


@dataclass(frozen=True)
class KernelOptions:
    """Options of `attend`, `block_sums` and `norm_rotate`.

    Args:
        backend: "auto" takes ours that is fastest here and logs once which and why; "triton" and "torch" raise when
            they cannot run, as do two libraries: "fa4" (FlashAttention-4 on Hopper, `pip install videosparse[fa4]`)
            and "flex" (PyTorch's FlexAttention), whose forward replaces ours. Gradients are computed as for "auto".
        quant: integer attention, for inference with float16 or bfloat16 and head_dim 64 or 128. "int8" rounds queries
            and keys to INT8; "int8-fp8" also values and softmax weights to FP8 e4m3, which needs compute capability 8.9
            or newer; "int8-int8" these to INT8 too, for GPUs without FP8 (A100, RTX 30). No kind stands in for another.
            `block_sums` ignores it, as does `norm_rotate`.
        logit: a change of the scores before the softmax; not built yet, so anything but None raises.
        fused_norm: whether a model family norms and rotates queries and keys with one kernel, `norm_rotate`, instead
            of step by step: "auto" does so in inference on a GPU, unless backend is "torch"; "on" always does, and
            raises where it cannot; "off" never does.

    Raises:
        ValueError: an unknown backend, quant or fused_norm.
        NotImplementedError: logit is set.
    """

    backend: str = "auto"
    quant: str | None = None
    logit: str | None = None
    fused_norm: str = "auto"

    def __post_init__(self) -> None:
        if self.backend not in BACKENDS:
            raise ValueError(f"backend must be one of {', '.join(BACKENDS)} (got {self.backend!r}).")
        if self.quant not in QUANTS:
            raise ValueError(f'quant must be None, "int8", "int8-fp8" or "int8-int8" (got {self.quant!r}).')
        if self.fused_norm not in FUSED_NORMS:
            raise ValueError(f"fused_norm must be one of {', '.join(FUSED_NORMS)} (got {self.fused_norm!r}).")
        if self.logit is not None:
            raise NotImplementedError(f"KernelOptions.logit is not available yet (got {self.logit!r}).")
