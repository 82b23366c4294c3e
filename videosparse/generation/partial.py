"""What a calibration has found out so far (`Partial`), and the file beside the plan from which a rerun goes on."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from videosparse.generation.errors import GenerationError, one_line, unwritable
from videosparse.generation.looking import Call
from videosparse.kernels.order_search import ORDERS
from videosparse.layout import ceil_div
from videosparse.policies.paro_plan import blocks_kept
from videosparse.policies.plan_metadata import check_seal, checksum, is_count, is_list, is_number, parsed, sealed
from videosparse.writing import write_whole

FORMAT = "videosparse-calibration-4"
_METADATA = "videosparse_calibration"
_ADVICE = "delete it, or pass --overwrite to begin anew"


@dataclass(frozen=True)
class Extent:
    """What the statistics of a whole calibration are of.

    Args:
        names: of the figures.
        layers, heads: self-attentions of one transformer, and their heads.
        experts: transformers.
        parts: maps of each of them.
        prompts: how many.
        blocks: (rows, columns) of a map.
    """

    names: tuple[str, ...]
    layers: int
    heads: int
    experts: int
    parts: int
    prompts: int
    blocks: tuple[int, int]


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
            "checksum": checksum(tensors),
        }  # fmt: skip
        try:
            write_whole(path, save(tensors, {_METADATA: sealed(about)}), overwrite=True)
        except OSError as error:
            raise unwritable(path, error) from error

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
    def load(cls, path: Path, asked: Mapping[str, Any], extent: Extent) -> Partial:
        """Read a file and check all of it.

        Raises:
            GenerationError: it is damaged, or holds the statistics of something else; says what differs.
        """
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(str(path), framework="pt") as file:
                about = parsed((file.metadata() or {})[_METADATA])
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  no mapping
            found = cls._from(about, tensors)
            if not isinstance(found.asked, dict):
                raise ValueError("it does not say of what it is")
            for key, value in asked.items():
                if found.asked.get(key) != value:
                    there, now = (_shown(x) for x in (found.asked.get(key), value))
                    raise GenerationError(
                        f"{path} is of an interrupted calibration with another {key} ({there} there, {now} now); "
                        f"{_ADVICE}."
                    )
            found.check(extent)
        except GenerationError:
            raise
        except (SafetensorError, OSError, LookupError, TypeError, ValueError, AttributeError, RecursionError) as error:
            raise GenerationError(f"{path} is damaged ({one_line(error, 100)}); {_ADVICE}.") from error
        return found

    def check(self, extent: Extent) -> None:
        """Raise ValueError unless all of it is of this extent, and numbers."""
        if not 1 <= len(self.calls) <= extent.prompts or not is_count(self.text, 0):
            raise ValueError("its prompts are others")
        calls = [call for prompt in self.calls for call in prompt]
        if not all(_is_place(call.bucket, extent.parts) and _is_place(call.expert, extent.experts) for call in calls):
            raise ValueError("its calls are others")
        counted = [sum(call.expert == expert for call in calls) for expert in range(extent.experts)]
        if self.calls_seen != counted or not all(counted):
            raise ValueError("calls_seen does not count its calls")
        self._check_figures(extent)
        self._check_maps(extent)

    def _check_figures(self, extent: Extent) -> None:
        if set(self.figures) != set(extent.names):
            raise ValueError(f"its figures must be {', '.join(extent.names)}")
        shape = extent.experts * extent.layers, extent.heads, len(ORDERS)
        for name, x in self.figures.items():
            _check_tensor(f"figure {name}", x, torch.float64, shape)
            if not bool(x.isfinite().all()):
                raise ValueError(f"figure {name} is not finite")

    def _check_maps(self, extent: Extent) -> None:
        maps, (rows, columns) = len(self.bits), extent.blocks
        if maps > extent.experts * extent.parts or (maps and len(self.calls) < extent.prompts):
            raise ValueError("its maps are too many")
        if not is_list(self.recall, lambda x: is_number(x) and 0 <= x < 1.001, maps):
            raise ValueError("its recall is not a share for each map")
        of = (extent.layers, extent.heads)
        for i, (counts, bits) in enumerate(zip(self.counts, self.bits, strict=True)):
            _check_tensor(f"counts {i}", counts, torch.int32, of)
            _check_tensor(f"bits {i}", bits, torch.uint8, (*of, rows, ceil_div(columns, 8)))
            if int(counts.min()) < 1 or not bool((blocks_kept(bits, columns) == counts[..., None]).all()):
                raise ValueError(f"map {i} keeps other numbers of blocks than its counts")

    @classmethod
    def _from(cls, about: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> Partial:
        if about["format"] != FORMAT:
            raise ValueError(f"its format is {about['format']}, this version reads {FORMAT}")
        check_seal(about)
        if about["checksum"] != checksum(tensors):
            raise ValueError("its contents do not match their checksum")

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


def _is_place(value: Any, number: int) -> bool:
    return is_count(value, 0) and value < number


def _check_tensor(name: str, x: torch.Tensor, dtype: torch.dtype, shape: Sequence[int]) -> None:
    if x.dtype != dtype or tuple(x.shape) != tuple(shape):
        raise ValueError(f"{name} must be {dtype} {list(shape)}, got {x.dtype} {list(x.shape)}")


def _shown(value: Any) -> str:
    """A value in a message; of a hash the beginning."""
    return re.sub(r"\b([0-9a-f]{12})[0-9a-f]{52}\b", r"\1…", str(value))
