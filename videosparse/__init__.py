"""Sparse attention for video diffusion transformers in Diffusers.

```python
import torch
from diffusers import WanPipeline
from videosparse import RadialProcessor

pipe = WanPipeline.from_pretrained("Wan-AI/Wan2.1-T2V-14B-Diffusers", dtype=torch.bfloat16).to("cuda")
pipe.set_attn_processor(RadialProcessor())
```

Importing this package adds one method, `set_attn_processor`, to `diffusers.DiffusionPipeline`, and changes nothing
else. `sparsify` and `restore` do the same for a pipeline or a transformer, and undo it.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from videosparse.interrupts import end_at_once

if TYPE_CHECKING:
    from videosparse.attach import restore, sparsify
    from videosparse.blocks import BlockMap
    from videosparse.kernels import attend
    from videosparse.layout import TokenLayout, VideoGrid
    from videosparse.logits import FarLogits
    from videosparse.parallel import parallelize
    from videosparse.processors import AdaSpaProcessor, DenseProcessor, PAROProcessor, RadialProcessor
    from videosparse.stretching import context_windows, extend_rope

__all__ = [
    "AdaSpaProcessor",
    "BlockMap",
    "DenseProcessor",
    "FarLogits",
    "PAROProcessor",
    "RadialProcessor",
    "TokenLayout",
    "VideoGrid",
    "attend",
    "context_windows",
    "extend_rope",
    "parallelize",
    "restore",
    "sparsify",
]

_HOME = {
    "AdaSpaProcessor": "processors",
    "BlockMap": "blocks",
    "DenseProcessor": "processors",
    "FarLogits": "logits",
    "PAROProcessor": "processors",
    "RadialProcessor": "processors",
    "TokenLayout": "layout",
    "VideoGrid": "layout",
    "attend": "kernels",
    "context_windows": "stretching",
    "extend_rope": "stretching",
    "parallelize": "parallel",
    "restore": "attach",
    "sparsify": "attach",
}


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used."""
    if name == "__version__":
        from importlib.metadata import version

        return version("videosparse")
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"videosparse.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__, "__version__"])


def _set_attn_processor(self: object, processor: object) -> None:
    """Choose how the self-attentions of this pipeline attend (added by videosparse).

    Args:
        processor: a processor of videosparse, e.g. `RadialProcessor()`, which is bound to all self-attentions; or a
            stock processor or a dict of them, which is passed on to the transformers.
    """
    from videosparse.attach import set_attn_processor

    set_attn_processor(self, processor)


def _extend_pipelines() -> None:
    try:
        from diffusers import DiffusionPipeline
    except ImportError:
        return  # layouts, maps, policies and kernels serve other hosts, too
    if not hasattr(DiffusionPipeline, "set_attn_processor"):
        _set_attn_processor.__name__ = "set_attn_processor"
        DiffusionPipeline.set_attn_processor = _set_attn_processor


end_at_once()
_extend_pipelines()
