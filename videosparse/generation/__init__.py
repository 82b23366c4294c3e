"""From a prompt to a video file: the parts that `videosparse generate` is made of.

```python
from videosparse.generation import GenerationRequest, generate

generate(GenerationRequest("a red circle bounces", method="radial")).save("circle.mp4")
```
"""

from videosparse.generation.compiling import compile_blocks
from videosparse.generation.errors import GenerationError, told
from videosparse.generation.generating import Comparison, Generation, compare, generate, generate_to, output_place
from videosparse.generation.linears import quantize_linears
from videosparse.generation.lora import find_loras, first_given, load_loras, lora_notices, trained_for
from videosparse.generation.output import video_place
from videosparse.generation.request import GenerationRequest, Settings
from videosparse.generation.sources import embedded_model_path, find_model
from videosparse.generation.streaming import stream_to

__all__ = [
    "Comparison",
    "Generation",
    "GenerationError",
    "GenerationRequest",
    "Settings",
    "compare",
    "compile_blocks",
    "embedded_model_path",
    "find_loras",
    "find_model",
    "first_given",
    "generate",
    "generate_to",
    "load_loras",
    "lora_notices",
    "output_place",
    "quantize_linears",
    "stream_to",
    "told",
    "trained_for",
    "video_place",
]
