"""What runs the dense calls of a forward."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from videosparse.kernels import KernelOptions, describe_backend
from videosparse.kernels.dense import OWN, fastest_dense, title_of
from videosparse.layout import TokenLayout
from videosparse.policies.base import Mode
from videosparse.processors import DensePlan, LayerProcessor, Resolved, autocast


def dense_plan(
    layers: Sequence[LayerProcessor], layout: TokenLayout, resolved: Resolved, latents: torch.Tensor, head_dim: int
) -> DensePlan:
    """The plan of dense layers.

    A backend chosen by the user is what dense calls are for, and Diffusers passes shards around a ring. Else it is the
    fastest there is. With text lengths, which torch's fast kernels cannot take, that is ours, by several times in half
    precision, in training too. Integers and changed scores are ours alone.

    Args:
        layers: of the transformer.
        latents: its input, for batch, dtype and device.
        head_dim: of its self-attentions.

    Raises:
        NotImplementedError, ValueError: see `_check_own`.
    """
    options = _options(resolved)
    far = options.logit is not None and options.logit.reach(layout.grid) is not None
    if options.quant is not None or far:
        _check_own(layers, f'DenseProcessor(quant="{options.quant}")' if options.quant else "logit=FarLogits(...)")
        return DensePlan(Mode.DENSE, layout, options=options, kernel=OWN)
    device, dtype = latents.device, autocast(latents[:0]).dtype
    kernel = None
    if options.backend == "torch" or any(layer.backend_chosen() or layer.ring_degree() > 1 for layer in layers):
        pass
    elif layout.seq_lens is None:
        # Diffusers' own serves training: what is fastest forward need not be so backward
        kernel = None if torch.is_grad_enabled() else fastest_dense(device, dtype, head_dim, layout.length)
    elif dtype in (torch.float16, torch.bfloat16) and describe_backend(device)[0] == "triton":
        kernel = OWN
    key_mask = None
    if kernel is None and layout.seq_lens is not None:
        key_mask = layout.key_mask(latents.shape[0], device)
    return DensePlan(Mode.DENSE, layout, options=options, key_mask=key_mask, kernel=kernel)


def title(plan: DensePlan, device: torch.device) -> str:
    """What runs dense calls that Diffusers does not, as reports call it."""
    if plan.kernel != OWN:
        return title_of(str(plan.kernel))
    backend = plan.options.backend
    return f"videosparse {describe_backend(device)[0] if backend == 'auto' else backend}"


def _options(resolved: Resolved) -> KernelOptions:
    """Options of dense layers.

    A backend is chosen for sparse calls, but "torch" is for who wants no kernel of ours. So is quant, unless all calls
    are dense: steps and layers that a schedule spares are spared rounding, too.
    """
    options = resolved.options
    backend = "torch" if options.backend == "torch" else "auto"
    quant = options.quant if resolved.policy is None else None
    return KernelOptions(backend=backend, quant=quant, logit=options.logit, fused_norm=options.fused_norm)


def _check_own(layers: Sequence[LayerProcessor], what: str) -> None:
    """Raise where something else decides what runs dense calls.

    Raises:
        ValueError: a backend was chosen for the transformer.
        NotImplementedError: ring attention, whose dense calls are Diffusers' own.
    """
    if any(layer.backend_chosen() for layer in layers):
        raise ValueError(
            f"{what} runs our own kernel, and set_attention_backend chose {layers[0].backend_name()}; drop one of both."
        )
    if layers[0].ring_degree() > 1:
        raise NotImplementedError(f"{what} does not work with ring attention; drop it, or use ulysses_degree.")
