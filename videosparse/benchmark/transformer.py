"""Transformers of published sizes with random weights: building one, its inputs, its blocks, compiling them."""

from __future__ import annotations

from typing import Any

import torch

from videosparse.cases import Case, ModelSpec
from videosparse.generation import compiling

LAST = " last"
"""What the name of a kind of block ends with where the last one of a model does less than the others."""


def build(spec: ModelSpec, layers: int, device: torch.device) -> Any:
    """A transformer as `from_pretrained(dtype=torch.bfloat16)` would give it, made where it runs.

    Args:
        spec: the published model.
        layers: how many blocks; of HunyuanVideo a third are dual-stream ones, as in the whole model.
        device: of its weights, which are random and the same every time.

    Raises:
        ValueError: fewer layers than the kinds of blocks that the model has.
    """
    kinds = len(set(kinds_of(spec)))
    if layers < kinds:
        raise ValueError(f"layers must be at least {kinds} for {spec.name}, a block of each kind (got {layers}).")
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with device:
            model = _construct(spec, layers)
    finally:
        torch.set_default_dtype(before)
    if spec.family == "wan":
        model.rope = type(model.rope)(spec.head_dim, (1, 2, 2), 1024).to(device)  # tables in full precision
    wide = set(getattr(model, "_keep_in_fp32_modules", None) or ())
    for name, parameter in model.named_parameters():
        if wide & set(name.split(".")):
            parameter.data = parameter.data.float()
    return model.eval().requires_grad_(False)


def _construct(spec: ModelSpec, layers: int) -> Any:
    from diffusers import HunyuanVideoTransformer3DModel, MochiTransformer3DModel, WanTransformer3DModel

    sizes = {"num_attention_heads": spec.heads, "attention_head_dim": spec.head_dim}
    if spec.family == "wan":
        channels = _channels(spec)
        return WanTransformer3DModel(
            **sizes, num_layers=layers, in_channels=channels, out_channels=channels, ffn_dim=spec.ffn,
            cross_attn_norm=True, qk_norm="rms_norm_across_heads",
        )  # fmt: skip
    if spec.family == "hunyuan_video":
        dual = _dual(layers)
        return HunyuanVideoTransformer3DModel(
            **sizes, num_layers=dual, num_single_layers=layers - dual, guidance_embeds=True
        )
    return MochiTransformer3DModel(**sizes, num_layers=layers)


def _dual(layers: int) -> int:
    """Dual-stream blocks among the layers of a HunyuanVideo: 20 of 60."""
    return max(1, layers // 3)


def _channels(spec: ModelSpec) -> int:
    """Of its latents."""
    return {"mochi": 12}.get(spec.family, 48 if spec.variant == "wan2.2-5b" else 16)


def make_inputs(case: Case, device: torch.device) -> dict[str, torch.Tensor]:
    """Random arguments of one branch of guidance, all text tokens valid; Mochi's pipeline gives both in one batch."""
    torch.manual_seed(1)
    spec = case.model
    time, space = spec.stride
    half = {"device": device, "dtype": torch.bfloat16}
    size = ((case.num_frames - 1) // time + 1, case.height // space, case.width // space)
    inputs = {
        "hidden_states": torch.randn(1, _channels(spec), *size, **half),  # type: ignore[call-overload]
        "timestep": torch.full((1,), 500.0, device=device),
        "encoder_hidden_states": torch.randn(1, spec.text or 512, 4096, **half),  # type: ignore[call-overload]
    }
    if spec.text:
        inputs["encoder_attention_mask"] = torch.ones(1, spec.text, device=device)
    if spec.family == "hunyuan_video":
        inputs["pooled_projections"] = torch.randn(1, 768, **half)  # type: ignore[call-overload]
        inputs["guidance"] = torch.full((1,), 6000.0, **half)  # type: ignore[call-overload]
    return inputs


def branches_of(spec: ModelSpec) -> int:
    """Forwards of a step: HunyuanVideo was distilled to need no second branch."""
    return 1 if spec.family == "hunyuan_video" else 2


def blocks_of(model: Any) -> list[torch.nn.Module]:
    """The blocks of a transformer, in depth order."""
    if hasattr(model, "blocks"):
        return list(model.blocks)
    return [*model.transformer_blocks, *getattr(model, "single_transformer_blocks", ())]


def kind_of(block: torch.nn.Module) -> str:
    """Blocks of one kind do the same work: the class, and whether it is Mochi's last, which leaves text alone."""
    return type(block).__name__ + (LAST if getattr(block, "context_pre_only", False) else "")


def kinds_of(spec: ModelSpec) -> list[str]:
    """The kind of every block of a whole published model, in depth order."""
    if spec.family == "wan":
        return ["WanTransformerBlock"] * spec.layers
    if spec.family == "hunyuan_video":
        dual = _dual(spec.layers)
        single = spec.layers - dual
        return ["HunyuanVideoTransformerBlock"] * dual + ["HunyuanVideoSingleTransformerBlock"] * single
    return ["MochiTransformerBlock"] * (spec.layers - 1) + ["MochiTransformerBlock" + LAST]


def compile_blocks(model: Any, backend: str = "inductor") -> None:
    """Compile the blocks as `videosparse generate --compile` does, from nothing."""
    torch._dynamo.reset()
    compiling.compile_blocks(model, backend=backend)


def run_eagerly(model: Any) -> None:
    """Undo `compile_blocks`."""
    for block in blocks_of(model):
        vars(block).pop("forward", None)
