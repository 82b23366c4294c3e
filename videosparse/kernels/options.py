"""How attention kernels run: the fields that every caller may set."""

from __future__ import annotations

from dataclasses import dataclass

from videosparse.checking import shown
from videosparse.logits import FarLogits

LIBRARIES = ("fa4", "flex")
BACKENDS = ("auto", "triton", "torch", *LIBRARIES)
# queries and keys, then values where they are rounded, too
QUANTS = (None, "int8", "int8-fp8", "int8-int8")
FUSED_NORMS = ("auto", "on", "off")


def own_backend(backend: str) -> str:
    """The backend for what libraries of attention do not do: "auto" where one of them is asked for."""
    return "auto" if backend in LIBRARIES else backend


def check_backend(backend: str) -> None:
    """Raise ValueError unless a backend is one of `BACKENDS`."""
    if not isinstance(backend, str) or backend not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)} (got {shown(backend)}).")


@dataclass(frozen=True)
class KernelOptions:
    """Options of `attend`, `block_sums` and `norm_rotate`.

    Args:
        backend: "auto" takes ours that is fastest here and logs once which and why; "triton" and "torch" raise when
            they cannot run, as do two libraries: "fa4" (FlashAttention-4 on Hopper, `pip install -e ".[fa4]"`)
            and "flex" (PyTorch's FlexAttention), whose forward replaces ours. Gradients are computed as for "auto".
        quant: integer attention, for inference with float16 or bfloat16 and head_dim 64 or 128. "int8" rounds queries
            and keys to INT8; "int8-fp8" also values and softmax weights to FP8 e4m3, which needs compute capability 8.9
            or newer; "int8-int8" these to INT8 too, for GPUs without FP8 (A100, RTX 30). No kind stands in for another.
            `block_sums` ignores it, as does `norm_rotate`.
        logit: what is done to the scores before the softmax, `FarLogits`, for inference. Only the portable Triton
            kernels and plain torch do it. `norm_rotate` ignores it.
        fused_norm: whether a model family norms and rotates queries and keys with one kernel, `norm_rotate`, instead
            of step by step: "auto" does so in inference on a GPU, unless backend is "torch"; "on" always does, and
            raises where it cannot; "off" never does.

    Raises:
        ValueError: an unknown backend, quant or fused_norm; a logit with quant; quant or a logit with a library as
            backend.
        TypeError: logit is neither None nor FarLogits.
    """

    backend: str = "auto"
    quant: str | None = None
    logit: FarLogits | None = None
    fused_norm: str = "auto"

    def __post_init__(self) -> None:
        check_backend(self.backend)
        if self.quant not in QUANTS:
            raise ValueError(f'quant must be None, "int8", "int8-fp8" or "int8-int8" (got {self.quant!r}).')
        if self.quant is not None and self.backend in LIBRARIES:
            raise ValueError(
                f'backend="{self.backend}" has no integer attention, which quant="{self.quant}" asks for; use '
                'backend="auto", "triton" or "torch", or quant=None.'
            )
        if self.fused_norm not in FUSED_NORMS:
            raise ValueError(f"fused_norm must be one of {', '.join(FUSED_NORMS)} (got {self.fused_norm!r}).")
        if self.logit is not None:
            self._check_logit()

    def _check_logit(self) -> None:
        if not isinstance(self.logit, FarLogits):
            raise TypeError(f"logit must be None or FarLogits(trained=...) (got {self.logit!r}).")
        if self.quant is not None:
            raise ValueError(
                f'logit looks at the sign of scores, which quant="{self.quant}" shifts and rounds; drop one of both.'
            )
        if self.backend in LIBRARIES:
            raise ValueError(
                f'backend="{self.backend}" cannot change scores as logit asks; use "auto", "triton" or "torch".'
            )
