"""What a dimension of VBench is here: how it is computed, how close that is to VBench, and how its score is scaled.

Ranges and weights are those of VBench's `scripts/constant.py` (Huang et al., arXiv 2311.17982).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from videosparse.metrics.vbench.models import Models
from videosparse.metrics.video import Video

Kind = Literal["exact", "near", "proxy"]
Group = Literal["quality", "semantic", "extra"]


@dataclass(frozen=True)
class Scale:
    """How a dimension enters VBench's total.

    Args:
        group: "quality" or "semantic"; "extra" enters no total.
        minimum, maximum: raw scores that count as 0 and 1.
        weight: within the group.
    """

    group: Group
    minimum: float = 0.0
    maximum: float = 1.0
    weight: float = 1.0

    def normalised(self, score: float) -> float:
        """The score between 0 and 1; outside the range it is clipped, which VBench's own script does not do."""
        return min(max((score - self.minimum) / (self.maximum - self.minimum), 0.0), 1.0)


SCALES: dict[str, Scale] = {
    "subject_consistency": Scale("quality", 0.1462),
    "background_consistency": Scale("quality", 0.2615),
    "temporal_flickering": Scale("quality", 0.6293),
    "motion_smoothness": Scale("quality", 0.706, 0.9975),
    "dynamic_degree": Scale("quality", weight=0.5),
    "aesthetic_quality": Scale("quality"),
    "imaging_quality": Scale("quality"),
    "object_class": Scale("semantic"),
    "multiple_objects": Scale("semantic"),
    "human_action": Scale("semantic"),
    "color": Scale("semantic"),
    "spatial_relationship": Scale("semantic"),
    "scene": Scale("semantic", 0.0, 0.8222),
    "appearance_style": Scale("semantic", 0.0009, 0.2855),
    "temporal_style": Scale("semantic", 0.0, 0.364),
    "overall_consistency": Scale("semantic", 0.0, 0.364),
}
"""All sixteen dimensions of VBench, also those that are not computed here."""


@dataclass(frozen=True)
class VideoScore:
    """One dimension of one video.

    Args:
        value: raw score, in the unit of the dimension's range.
        parts: of how many frames, pairs or clips it is the mean.
    """

    value: float
    parts: int = 1


@dataclass(eq=False)
class Context:
    """What a dimension may ask for besides the frames; one for each video or clip, since it keeps their features.

    Args:
        models: the learned models.
        prompt: that the video was made from.
        auxiliary: what a prompt suite adds for a dimension, such as the style it asks for.
    """

    models: Models = field(default_factory=Models)
    prompt: str = ""
    auxiliary: Mapping[str, Any] = field(default_factory=dict)
    _features: dict[str, tuple[Video, torch.Tensor]] = field(default_factory=dict, repr=False)

    def features(self, key: str, video: Video) -> torch.Tensor:
        """`Models.features`, kept, so that dimensions which share a model pay for it once."""
        if key not in self._features or self._features[key][0] is not video:
            self._features[key] = video, self.models.features(key, video)
        return self._features[key][1]

    def of_part(self, video: Video, part: Video, start: int, stop: int) -> Context:
        """A context of frames `start` to `stop`, which takes over what is known of the whole video's features."""
        known = {k: (part, x[start:stop]) for k, (of, x) in self._features.items() if of is video}
        return Context(self.models, self.prompt, self.auxiliary, known)


@dataclass(frozen=True)
class Dimension:
    """One dimension, and what its score means.

    Args:
        name: as VBench has it.
        models: keys of `videosparse.metrics.vbench.weights.NEEDED`; empty for what needs no weights.
        kind: "exact" (VBench's formula on VBench's inputs), "near" (the same formula and weights, where precision or
            resizing may differ in the third digit), "proxy" (another formula for the same question).
        formula: in words.
        score: raw score of a video.
        scale: how the score enters the total.
        pooled: whether a folder's score is the mean over videos, or over all their parts.
        told_times: what VBench's results file multiplies the score of each video by, though not that of the folder.
        packages: what must be installed besides the models' own packages.
        stands_for: name under which a suite asks for it, where that is another.
    """

    name: str
    models: tuple[str, ...]
    kind: Kind
    formula: str
    score: Callable[[Video, Context], VideoScore]
    scale: Scale
    pooled: Literal["videos", "parts"] = "videos"
    told_times: float = 1.0
    packages: tuple[str, ...] = ()
    stands_for: str = ""

    @property
    def group(self) -> Group:
        """ "quality", "semantic" or "extra"."""
        return self.scale.group

    @property
    def minimum(self) -> float:
        """Raw score that counts as 0."""
        return self.scale.minimum

    @property
    def maximum(self) -> float:
        """Raw score that counts as 1."""
        return self.scale.maximum

    @property
    def weight(self) -> float:
        """Within the group."""
        return self.scale.weight

    def pool(self, scores: list[VideoScore]) -> float:
        """The score of a folder from those of its videos, at least one."""
        weights = [score.parts if self.pooled == "parts" else 1 for score in scores]
        return sum(w * score.value for w, score in zip(weights, scores, strict=True)) / sum(weights)
