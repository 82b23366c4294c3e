"""An auxiliary loss by which the text encoder learns which of two objects moves how.

The loss of flow matching hardly asks for it: where noise still hides the paths, either of two objects may take either
path, and the error is nearly the same. So the encoder's output at the word for an object's colour, which is where the
DiT finds the object, told nothing of the object's motion, and pairs were drawn with motions given at random. Here a
linear layer has to read the motion from that output; it is trained along and thrown away.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast

from videosparse.synthetic.captions import named_motions
from videosparse.synthetic.scene import MOTIONS
from videosparse.training.tiny.text import TEXT_LENGTH

# More are never in a scene.
OBJECTS = 2


def motion_marks(tokenizer: PreTrainedTokenizerFast, captions: Sequence[str]) -> Tensor:
    """int16 [N, 2, 2]: the place of the token that ends an object's colour, and the number of its motion in `MOTIONS`.

    Both are -1 where there is no such object, or its colour was cut off.
    """
    marks = torch.full((len(captions), OBJECTS, 2), -1, dtype=torch.int16)
    for row, text in zip(marks, captions, strict=True):
        spans = tokenizer(text, return_offsets_mapping=True, max_length=TEXT_LENGTH, truncation=True).offset_mapping
        for mark, (end, motion) in zip(row, named_motions(text), strict=False):
            place = next((i for i, (first, last) in enumerate(spans) if first < end <= last), None)
            if place is not None:
                mark[0], mark[1] = place, MOTIONS.index(motion)
    return marks


def build_reader(width: int) -> nn.Linear:
    """What reads a motion from an embedding of `width` numbers."""
    return nn.Linear(width, len(MOTIONS))


def read_motions(reader: nn.Module, text: Tensor, marks: Tensor) -> Tensor:
    """Logits fp32 [B, 2, motions] of embeddings [B, 48, E] at `motion_marks` [B, 2, 2]; where there is none, of any."""
    place = marks[..., 0].long().clamp(min=0)[..., None].expand(-1, -1, text.shape[2])
    logits: Tensor = reader(text.gather(1, place))
    return logits.float()


def binding_loss(reader: nn.Module, text: Tensor, marks: Tensor) -> Tensor:
    """Mean cross-entropy of the motions that captions give, over all objects of a batch; 0 without any."""
    logits, motion = read_motions(reader, text, marks), marks[..., 1].long()
    entropy = F.cross_entropy(logits.flatten(0, 1), motion.flatten(), ignore_index=-1, reduction="sum")
    return entropy / motion.ge(0).sum().clamp(min=1)


def motions_right(reader: nn.Module, text: Tensor, marks: Tensor) -> Tensor:
    """Share of the objects of a batch whose motion is read right."""
    motion = marks[..., 1].long()
    right = read_motions(reader, text, marks).argmax(-1) == motion
    return right.sum() / motion.ge(0).sum().clamp(min=1)
