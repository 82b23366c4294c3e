"""What a calibration has found out so far (`Partial`), and the file beside the plan from which a rerun goes on."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from videosparse.generation.errors import GenerationError, one_line
from videosparse.generation.looking import Call
from videosparse.policies.paro_plan import write_whole

FORMAT = "videosparse-calibration-3"
_METADATA = "videosparse_calibration"


@dataclass(eq=False)
class Partial:
    """Statistics of a calibration in progress.

    Args:
        asked: what is being calibrated, as plain values: statistics of anything else are refused.
        figures: fp64 [layers, heads, 6] for each name, the totals of `looking.Figures`; none before the first prompt.
        calls_seen: how many calls they are of, for each expert.
        calls: of each prompt that is done.
        counts, bits: of each map that is done, int32 [layers, heads] and uint8 [layers, heads, rows, bytes]; all maps
            of the first expert, then those of the second.
        recall: of each map that is done, mean kept share of the attention among video tokens.
        text: text tokens of a sequence.
    """

    asked: dict[str, Any]
    figures: dict[str, torch.Tensor] = field(default_factory=dict)
    calls_seen: list[int] = field(default_factory=list)
    calls: list[list[Call]] = field(default_factory=list)
    counts: list[torch.Tensor] = field(default_factory=list)
    bits: list[torch.Tensor] = field(default_factory=list)
    recall: list[float] = field(default_factory=list)
    text: int = 0

    @staticmethod
    def path(output: Path) -> Path:
        """Where the file is, for a plan's."""
        return output.with_name(f"{output.name}.partial")

    def save(self, path: Path) -> None:
        """Write the file, whole or not at all.

        Raises:
            GenerationError: it cannot be written.
        """
        from safetensors.torch import save

        tensors: dict[str, torch.Tensor] = {}
        calls = [[self._described(call, tensors) for call in prompt] for prompt in self.calls]
        tensors |= {f"figure {name}": x for name, x in self.figures.items()}
        tensors |= {f"counts {i}": x for i, x in enumerate(self.counts)}
        tensors |= {f"bits {i}": x for i, x in enumerate(self.bits)}
        about = {
            "format": FORMAT, "asked": self.asked, "calls_seen": self.calls_seen, "calls": calls,
            "figures": list(self.figures), "maps": len(self.bits), "recall": self.recall, "text": self.text,
        }  # fmt: skip
        try:
            write_whole(path, save(tensors, {_METADATA: json.dumps(about)}), overwrite=True)
        except OSError as error:
            raise GenerationError(f"Cannot write {path}: {error.strerror or one_line(error)}.") from error

    @staticmethod
    def _described(call: Call, tensors: dict[str, torch.Tensor]) -> dict[str, Any]:
        """A call as JSON; its tensors are entered by number."""
        inputs: dict[str, Any] = {}
        for name, value in call.inputs.items():
            if isinstance(value, torch.Tensor):
                key = f"input {len(tensors)}"
                tensors[key] = value.contiguous()
                inputs[name] = {"tensor": key}
            else:
                inputs[name] = value
        return {"bucket": call.bucket, "inputs": inputs, "expert": call.expert}

    @classmethod
    def load(cls, path: Path, asked: Mapping[str, Any]) -> Partial:
        """Read a file.

        Raises:
            GenerationError: it is damaged, or holds the statistics of something else; says what differs.
        """
        from safetensors import SafetensorError, safe_open

        advice = "delete it, or pass --overwrite to begin anew"
        try:
            with safe_open(str(path), framework="pt") as file:
                about = json.loads((file.metadata() or {})[_METADATA])
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  no mapping
            found = cls._from(about, tensors)
        except (SafetensorError, OSError, ValueError, KeyError) as error:
            raise GenerationError(f"{path} is damaged ({one_line(error, 100)}); {advice}.") from error
        for key, value in asked.items():
            if found.asked.get(key) != value:
                raise GenerationError(
                    f"{path} is of an interrupted calibration with another {key} ({found.asked.get(key)} there, "
                    f"{value} now); {advice}."
                )
        return found

    @classmethod
    def _from(cls, about: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> Partial:
        if about["format"] != FORMAT:
            raise ValueError(f"format {about['format']}")

        def value(stored: Any) -> Any:
            return tensors[stored["tensor"]] if isinstance(stored, dict) else stored

        calls = [
            [Call(c["bucket"], {name: value(x) for name, x in c["inputs"].items()}, c["expert"]) for c in prompt]
            for prompt in about["calls"]
        ]
        maps = range(about["maps"])
        return cls(
            asked=about["asked"],
            figures={name: tensors[f"figure {name}"] for name in about["figures"]},
            calls_seen=about["calls_seen"],
            calls=calls,
            counts=[tensors[f"counts {i}"] for i in maps],
            bits=[tensors[f"bits {i}"] for i in maps],
            recall=about["recall"],
            text=about["text"],
        )
