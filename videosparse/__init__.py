"""Sparse attention for video diffusion transformers in Diffusers.

```python
from diffusers import WanPipeline
from videosparse import RadialProcessor

pipe = WanPipeline.from_pretrained("Wan-AI/Wan2.1-T2V-14B-Diffusers", torch_dtype=torch.bfloat16).to("cuda")
pipe.set_attn_processor(RadialProcessor())
```

Importing this package adds one method, `set_attn_processor`, to `diffusers.DiffusionPipeline`, and changes nothing
else. `sparsify` and `restore` do the same for a pipeline or a transformer, and undo it.
"""

from __future__ import annotations

import re
import sys
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from types import TracebackType

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

_PROGRAMS = ("eval", "lora", "pipelines")


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


def _runs_ours() -> bool:
    """Whether this process runs our command, by its script or as `python -m videosparse`, or a program beside it."""
    if sys.argv[:1] == ["-m"]:  # until Python has found the module
        return any(re.fullmatch(r"(-[A-Za-z]*m)?videosparse", given) for given in sys.orig_argv[1:])
    if not sys.argv or not sys.argv[0]:
        return False
    script, clone = Path(sys.argv[0]).resolve(), Path(__file__).resolve().parents[1]
    return script.stem == "videosparse" or (script.parent.parent == clone and script.parent.name in _PROGRAMS)


def _end(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """`sys.excepthook` of our command and programs: libraries take seconds to import, in which Ctrl-C is one line."""
    if not issubclass(kind, KeyboardInterrupt):
        sys.__excepthook__(kind, error, trace)
        return
    sys.stderr.write("Interrupted; nothing was written.\n")
    raise SystemExit(130)  # `program.INTERRUPTED`, which would be one more import to be interrupted


if _runs_ours():
    sys.excepthook = _end
_extend_pipelines()
