"""Model families: one file each, none knows a method."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from videosparse.cases import ModelSpec
from videosparse.models.base import ModelFamily, Rotary, SelfAttention
from videosparse.models.hunyuan_video import HunyuanVideoFamily
from videosparse.models.mochi import MochiFamily
from videosparse.models.wan import WanFamily

__all__ = ["FAMILIES", "ModelFamily", "Rotary", "SelfAttention", "family_of", "find_family", "model_variant"]

FAMILIES: dict[str, ModelFamily] = {
    "wan": WanFamily(),
    "hunyuan_video": HunyuanVideoFamily(),
    "mochi": MochiFamily(),
}


def find_family(class_name: str) -> ModelFamily | None:
    """The family of a transformer class, None when it is not supported."""
    return next((family for family in FAMILIES.values() if class_name in family.transformers), None)


def family_of(transformer: object) -> ModelFamily:
    """The family of a transformer, subclasses included (sharding wrappers make them).

    Raises:
        TypeError: no family has it.
    """
    families = (find_family(cls.__name__) for cls in type(transformer).__mro__)
    found = next((family for family in families if family is not None), None)
    if found is None:
        known = ", ".join(name for family in FAMILIES.values() for name in family.transformers)
        raise TypeError(
            f"{type(transformer).__name__} is not supported; supported transformers: {known}. Load one of them."
        )
    return found


def model_variant(model: ModelSpec | Mapping[str, Any], *, experts: int = 1) -> str:
    """Which published model's settings suit `model`: one of the `variants` of its family.

    Args:
        model: a `ModelSpec`, or a transformer's configuration with its `_class_name`, as in its `config.json`.
        experts: transformers that share a run: 2 for Wan2.2-A14B.

    Raises:
        ValueError: no family has it.
    """
    if isinstance(model, ModelSpec):
        return model.variant
    name = str(model.get("_class_name"))
    found = find_family(name)
    if found is None:
        known = ", ".join(n for family in FAMILIES.values() for n in family.transformers)
        raise ValueError(
            f"The configuration is of {name}, which is not supported; supported transformers: {known}. Load one of "
            "them."
        )
    return found.variant(model, experts)
