"""What a calibration run has found out about one model (`PAROPlan`), and the file it is kept in.

A plan holds a token order for every layer and head, and block maps in that order for parts of the denoising run, a bit
a block. For a model whose run is shared by two experts (Wan2.2-A14B) it holds those of both. The file is one
safetensors: `codes`, `counts` and `bits` as in `PAROPlan`, and `PlanFacts` as JSON in its metadata. Nothing in it
depends on when it was made: the same calibration gives the same bytes.
"""

from __future__ import annotations

import hashlib
import json
import weakref
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from videosparse.blocks import PackedIndex, pack_rows
from videosparse.kernels.selection import write_places
from videosparse.layout import TokenLayout, VideoGrid, ceil_div
from videosparse.ordering import AXIS_ORDERS, TokenOrder
from videosparse.policies.plan_metadata import check_seal, check_values, checksum, parsed, sealed
from videosparse.uploading import upload
from videosparse.writing import write_whole

FORMAT = "videosparse-paro-2"
ONE_TRANSFORMER = "videosparse-paro-1"
"""The format before, without `others` and `weights`; still read."""

_METADATA = "videosparse_plan"
_SMALL_PARAMETER, _SAMPLED_PARAMETERS = 2**16, 64
_SAMPLED_VALUES = 1024
_AGAIN = "calibrate for it: videosparse calibrate"


@dataclass(frozen=True)
class PlanFacts:
    """What a plan is for and how it was made; plain values, as in the file.

    Args:
        model_class: of the transformer.
        config: its configuration, without names that begin with an underscore; of experts, the first one's.
        grid: (frames, rows, columns) of tokens.
        text: text tokens of the calibration runs; maps hold none, and serve any number of them.
        layers, heads: self-attentions of a transformer, and their heads.
        block: (query rows, key rows).
        buckets: parts of the first half of a run with maps of their own; the second half shares one more. Of a run that
            experts share, each has its own steps, which are counted alone.
        density: asked share of video blocks, None where `mass` decided.
        mass: asked share of the attention among video tokens, None where `density` decided.
        video: (frames, height, width) in pixels.
        method: further parameters of the calibration, such as alpha, eps, sigma, steps, seed, and the shift of its
            noise schedule.
        prompts: SHA-256 of the calibration prompts.
        versions: of what made the plan.
        others: configurations of the further experts, in the order in which they take over; none for one transformer.
        weights: `fingerprint` of each expert, "" where unknown; none for one transformer.
    """

    model_class: str
    config: dict[str, Any]
    grid: tuple[int, int, int]
    text: int
    layers: int
    heads: int
    block: tuple[int, int]
    buckets: int
    density: float | None
    mass: float | None
    video: tuple[int, int, int]
    method: dict[str, Any] = field(default_factory=dict)
    prompts: str = ""
    versions: dict[str, str] = field(default_factory=dict)
    others: tuple[dict[str, Any], ...] = ()
    weights: tuple[str, ...] = ()

    @property
    def configs(self) -> tuple[dict[str, Any], ...]:
        """The configuration of every expert."""
        return self.config, *self.others

    @property
    def experts(self) -> int:
        """Transformers that share a run; 1 for most models."""
        return len(self.configs)

    @property
    def attentions(self) -> int:
        """Self-attentions of all experts: those of the second come after those of the first."""
        return self.experts * self.layers

    def to_json(self, **more: Any) -> str:
        """One line, keys sorted, with a checksum of its own."""
        return sealed({"format": FORMAT, "config_hash": config_hash(self.config), **asdict(self), **more})

    @classmethod
    def from_json(cls, text: str) -> PlanFacts:
        """The inverse.

        Raises:
            KeyError, ValueError: something is missing, or not what a plan has.
        """
        about = parsed(text)
        later = {"others", "weights"} if about["format"] == ONE_TRANSFORMER else set()
        values = {f.name: about[f.name] for f in fields(cls) if f.name not in later}
        check_values(values)
        for name in {"grid", "block", "video", "others", "weights"} & values.keys():
            values[name] = tuple(values[name])
        facts = cls(**values)
        if about.get("config_hash", config_hash(facts.config)) != config_hash(facts.config):
            raise ValueError("its config does not match config_hash")
        if len(facts.weights) not in ((0, facts.experts) if facts.others else (0,)):
            raise ValueError(f"weights must name each of several experts (got {len(facts.weights)})")
        return facts


@dataclass(frozen=True, eq=False, repr=False)
class PAROPlan:
    """Token orders and block maps of one model at one size.

    Layers are counted through all experts (see `PlanFacts.attentions`).

    Args:
        codes: uint8 [attentions, heads], indices into `AXIS_ORDERS`.
        counts: int32 [attentions, buckets + 1, heads], video columns that each row keeps; the last map is that of the
            second half.
        bits: uint8 [attentions, buckets + 1, heads, rows, ceil(columns / 8)], video blocks only, as `pack_rows` makes
            them.
        facts: what the plan is for.
        source: how messages call it.

    Raises:
        ValueError: tensors that do not fit the facts.
    """

    codes: torch.Tensor
    counts: torch.Tensor
    bits: torch.Tensor
    facts: PlanFacts
    source: str = "the plan"
    _orders: dict[tuple[int, VideoGrid], TokenOrder] = field(default_factory=dict, init=False)
    _uploads: weakref.WeakValueDictionary[tuple[Any, ...], PackedIndex] = field(
        default_factory=weakref.WeakValueDictionary, init=False
    )

    def __post_init__(self) -> None:
        facts, maps = self.facts, self.facts.buckets + 1
        rows, columns = self.blocks
        expected = {
            "codes": (torch.uint8, (facts.attentions, facts.heads)),
            "counts": (torch.int32, (facts.attentions, maps, facts.heads)),
            "bits": (torch.uint8, (facts.attentions, maps, facts.heads, rows, ceil_div(columns, 8))),
        }
        for name, (dtype, shape) in expected.items():
            x = getattr(self, name)
            if x.dtype != dtype or tuple(x.shape) != shape:
                raise ValueError(f"{name} must be {dtype} {list(shape)} (got {x.dtype} {list(x.shape)})")
        if int(self.codes.max()) >= len(AXIS_ORDERS):
            raise ValueError(f"codes must be below {len(AXIS_ORDERS)} (got {int(self.codes.max())})")
        if int(self.counts.min()) < 1 or int(self.counts.max()) > columns:
            raise ValueError(f"counts must be 1..{columns} (got {int(self.counts.min())}..{int(self.counts.max())})")
        for layer, (bits, own) in enumerate(zip(self.bits, self.counts, strict=True)):
            # lists are allotted by counts and filled from bits: others would end in what memory held
            if not bool((blocks_kept(bits, columns) == own[..., None]).all()):
                raise ValueError(f"the bits of attention {layer} keep other numbers of blocks than its counts")

    @property
    def grid(self) -> VideoGrid:
        """The grid that the maps are for."""
        return VideoGrid(*self.facts.grid)

    @property
    def blocks(self) -> tuple[int, int]:
        """(rows, columns) of video blocks."""
        rows, columns = (ceil_div(self.grid.tokens, b) for b in self.facts.block)
        return rows, columns

    @property
    def density(self) -> float:
        """Kept / all video blocks, mean over layers, maps and heads."""
        return float(self.counts.float().mean()) / self.blocks[1]

    def __deepcopy__(self, memo: dict[int, object]) -> PAROPlan:
        # nothing of it changes, and it is large: the copy of a transformer reads the same plan
        return self

    def __repr__(self) -> str:
        model = (
            self.facts.model_class if self.facts.experts == 1 else f"{self.facts.experts} x {self.facts.model_class}"
        )
        return f"PAROPlan({self.source}: {model}, grid {self.grid}, density {self.density:.3f})"

    def bucket(self, index: int, total: int) -> int:
        """Number of the map that step `index` (from 0) of the `total` of a transformer reads."""
        return bucket_of(index, total, self.facts.buckets)

    def order(self, layer: int, grid: VideoGrid) -> TokenOrder:
        """The order of a layer's heads, on any grid."""
        key = layer, grid
        if key not in self._orders:
            self._orders[key] = TokenOrder(grid, tuple(self.codes[layer].tolist()))
        return self._orders[key]

    def densities(self, layout: TokenLayout, layer: int, bucket: int) -> tuple[float, float]:
        """(kept / all blocks, the same among video blocks) of one map on an aligned layout."""
        count = float(self.counts[layer, bucket].float().mean())
        rows, columns = (ceil_div(layout.length, b) for b in self.facts.block)
        video_rows, video_columns = self.blocks
        kept = video_rows * (count + columns - video_columns) + (rows - video_rows) * columns
        return kept / (rows * columns), count / video_columns

    def index(self, layout: TokenLayout, layer: int, bucket: int, device: torch.device) -> PackedIndex:
        """One map on a device, text kept throughout; shared by all samples, and by all who hold on to it.

        The copy leaves from page-locked memory, and nothing waits for the device.

        Args:
            layout: the aligned sequence.
            layer, bucket: which map.
            device: where to.
        """
        key = layer, bucket, device, layout.text
        found = self._uploads.get(key)
        if found is None:
            found = self._upload(layout, layer, bucket, device)
            self._uploads[key] = found
        return found

    def _upload(self, layout: TokenLayout, layer: int, bucket: int, device: torch.device) -> PackedIndex:
        block, heads = self.facts.block, self.facts.heads
        rows, columns = (ceil_div(layout.length, b) for b in block)
        video_rows, video_columns = self.blocks
        counts = self.counts[layer, bucket]
        capacity = int(counts.sum()) * video_rows
        capacity += heads * (video_rows * (columns - video_columns) + (rows - video_rows) * columns)
        # plain tensors also when the caller is in inference mode: the next caller may be training
        with torch.inference_mode(False):
            index = PackedIndex.allocate(layout, block, 1, heads, capacity, device)
            video = upload(self.bits[layer, bucket], device)
            index.bits[0, :, :video_rows, : video.shape[2]] = video
            if layout.text:
                text = torch.arange(columns, device=device) >= video_columns
                index.bits[0, :, :video_rows] |= pack_rows(text)
                index.bits[0, :, video_rows:] = pack_rows(torch.ones_like(text))
            kept = upload(counts, device)[None]
            write_places(kept, index.row_ptr, index.order, (rows, columns), (video_rows, video_columns))
        return index

    def check_model(self, config: Mapping[str, Any], expert: int | None = None) -> None:
        """Raise ValueError, saying what differs, unless the plan is for a transformer of this configuration.

        Weights are not compared: a plan also serves a fine-tune of the model it was made for.

        Args:
            config: with its `_class_name`.
            expert: which expert it is; None where that is unknown, and any will do.
        """
        name, own = str(config.get("_class_name")), plain_config(config)
        if name != self.facts.model_class:
            raise ValueError(
                f"{self.source} is for a {self.facts.model_class}, this model is a {name}; {_AGAIN} --model ..."
            )
        configs = self.facts.configs if expert is None else self.facts.configs[expert : expert + 1]
        if any(own.keys().isdisjoint(theirs) for theirs in configs):
            raise ValueError(
                f"{self.source} knows nothing of this model's configuration, so that it cannot be compared; {_AGAIN} "
                "--model ..."
            )
        differing = [_first_difference(own, theirs) for theirs in configs]
        if key := None if None in differing else differing[0]:
            raise ValueError(
                f"{self.source} is for a {name} with {key}={configs[0][key]}, this model has {key}={own[key]}; "
                f"{_AGAIN} --model ..."
            )

    def check_experts(self, experts: int) -> None:
        """Raise ValueError unless the plan is for so many transformers that share a run."""
        own = self.facts.experts
        if own == experts:
            return
        if experts > own:
            raise ValueError(
                f"{self.source} is for one transformer, and this pipeline has {experts} experts; {_AGAIN} --model ... "
                "with the whole pipeline, or use PAROProcessor() without a plan."
            )
        raise ValueError(
            f"{self.source} is for {own} experts that share a run, and this is one transformer, which does not say "
            "which of them it is; pass the pipeline that has both, or calibrate for the one."
        )

    def check_weights(self, transformer: torch.nn.Module, expert: int) -> None:
        """Raise ValueError where a transformer is known to be another expert than the one whose place it takes."""
        known = self.facts.weights
        found = fingerprint(transformer) if known else ""
        if found and found in known and known[expert] != found:
            raise ValueError(
                f"{self.source} knows this transformer as expert {known.index(found) + 1} of {len(known)}, and it sits "
                f"in the place of expert {expert + 1}; put transformer and transformer_2 where they belong."
            )

    def check_sizes(self, layers: int, heads: int) -> None:
        """Raise ValueError unless the plan is for so many self-attentions and heads."""
        for what, own, got in (("layers", self.facts.layers, layers), ("heads", self.facts.heads, heads)):
            if own != got:
                raise ValueError(
                    f"{self.source} is for a model with {own} {what}, this one has {got}; {_AGAIN} --model ..."
                )

    def check_grid(self, grid: VideoGrid) -> None:
        """Raise ValueError unless the maps are for this grid."""
        if grid != self.grid:
            frames, height, width = self.facts.video
            raise ValueError(
                f"The maps of {self.source} are for grid {self.grid} ({frames} frames of {height}x{width}), this video "
                f"has grid {grid}; {_AGAIN} --frames ... --height ... --width ..., or keep its token orders and find "
                "the maps in the run: PAROProcessor(plan, online_maps=True), --set paro.online_maps=yes."
            )

    def other_shift(self, shift: float | None) -> str | None:
        """That maps are for other noise levels than those of a run, in a sentence; None where they are not, or unknown.

        The parts of a run that have maps are counted in steps, and the shift says at which noise these are made. Such
        maps still serve, worse.

        Args:
            shift: of the noise schedule of the run, None where unknown.
        """
        own = self.facts.method.get("shift")  # plans of before only have what was asked for
        if own is None or shift is None or abs(own - shift) <= 1e-6 * abs(own):
            return None
        return (
            f"{self.source} was calibrated with shift {own:g} of the noise schedule, and this run has {shift:g}: its "
            f"maps are for other noise levels; use --shift {own:g}, or calibrate with --shift {shift:g}."
        )

    def save(self, path: str | Path, overwrite: bool = False) -> None:
        """Write the file: whole, or not at all.

        Raises:
            FileExistsError: it is there, and not to be overwritten.
            OSError: it cannot be written; nothing is left behind.
        """
        from safetensors.torch import save

        tensors = {name: getattr(self, name).contiguous() for name in ("bits", "codes", "counts")}
        data = save(tensors, {_METADATA: self.facts.to_json(checksum=checksum(tensors))})
        write_whole(path, data, overwrite)

    @classmethod
    def load(cls, path: str | Path) -> PAROPlan:
        """Read a file and check all of it.

        Raises:
            ValueError: there is no such file, it is no plan, damaged, or of another format.
        """
        if not str(path).strip():
            raise ValueError("The name of the plan is empty; give the .safetensors file, or leave plan out.")
        if Path(path).is_dir():
            raise ValueError(f"{path} is a folder; name the .safetensors file of the plan.")
        if not Path(path).is_file():
            raise ValueError(f"There is no plan at {path}; make one with videosparse calibrate --output {path}.")
        status = Path(path).stat()
        return _read(str(path), status.st_mtime_ns, status.st_size)


# a command reads its plan several times, and checking it takes a second for a large model
@lru_cache(maxsize=1)
def _read(name: str, changed: int, size: int) -> PAROPlan:
    """The plan in a file that was `changed` then; see `PAROPlan.load`."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(name, framework="pt") as file:
            about = (file.metadata() or {}).get(_METADATA)
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  no mapping
    except (SafetensorError, OSError, ValueError) as error:
        raise ValueError(
            f"{name} is no whole safetensors file ({' '.join(str(error).split())}); copy it again, or calibrate anew "
            "with --overwrite."
        ) from error
    return _checked(name, about, tensors)


def _checked(name: str, about: str | None, tensors: dict[str, torch.Tensor]) -> PAROPlan:
    """The plan, from what its file holds.

    Raises:
        ValueError: it is no plan, of another format, or damaged.
    """
    if about is None:
        raise ValueError(f"{name} is a safetensors file, but no plan; make one with videosparse calibrate.")
    try:
        found = parsed(about)
        if found["format"] not in (FORMAT, ONE_TRANSFORMER):
            raise ValueError(f"its format is {found['format']}, this version reads {FORMAT}")
        check_seal(found)
        facts = PlanFacts.from_json(about)
        if set(tensors) != {"bits", "codes", "counts"} or checksum(tensors) != found["checksum"]:
            raise ValueError("its contents do not match their checksum")
        return PAROPlan(**tensors, facts=facts, source=Path(name).name)
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        reason = f"it lacks {error}" if isinstance(error, KeyError) else str(error)
        raise ValueError(f"{name} is no plan that can be used: {reason}; calibrate anew with --overwrite.") from error


def blocks_kept(bits: torch.Tensor, columns: int) -> torch.Tensor:
    """int32 [...], how many of its columns each row of `pack_rows` keeps; uint8 [..., ceil(columns / 8)] on the CPU."""
    last = bits[..., -1].numpy() & (0xFF >> -columns % 8)
    whole = np.bitwise_count(bits[..., :-1].numpy()).sum(-1, dtype=np.int32)
    return torch.from_numpy(whole + np.bitwise_count(last))


def bucket_of(index: int, total: int, buckets: int) -> int:
    """Which map step `index` (from 0) of `total` reads: equal parts of the first half, then one for the second half."""
    return buckets if 2 * index >= total else 2 * index * buckets // total


def plain_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """A transformer's configuration as JSON has it, without names that begin with an underscore."""
    own = {k: v for k, v in dict(config).items() if not k.startswith("_") and k != "quantization_config"}
    plain: dict[str, Any] = json.loads(json.dumps(own, sort_keys=True, default=str))
    return plain


def _first_difference(own: Mapping[str, Any], other: Mapping[str, Any]) -> str | None:
    """The first key that both configurations have and that differs; versions of Diffusers add keys."""
    return next((key for key in sorted(own.keys() & other.keys()) if own[key] != other[key]), None)


def fingerprint(transformer: torch.nn.Module) -> str:
    """SHA-256 of what tells one set of weights from another: a sample of the small parameters, in bfloat16.

    Experts have one configuration and differ in weights alone. Empty where some are not loaded.
    """
    small = [p for p in transformer.parameters() if p.numel() <= _SMALL_PARAMETER][:_SAMPLED_PARAMETERS]
    if not small or any(p.is_meta for p in small):
        return ""
    found = hashlib.sha256()
    for parameter in small:
        found.update(parameter.detach().to("cpu", torch.bfloat16).contiguous().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def full_fingerprint(module: torch.nn.Module) -> str:
    """SHA-256 of every parameter of a module: name, shape, dtype, and up to 1024 values as they are, on any device.

    Of one that is not loaded, or is packed by a quantizer, no values count. It takes longer than `fingerprint`, whose
    values stand in plans, and notices any training.
    """
    found = hashlib.sha256()
    for name, parameter in module.named_parameters():
        found.update(f"{name} {list(parameter.shape)} {parameter.dtype}\n".encode())
        if parameter.is_meta or type(parameter) is not torch.nn.Parameter:
            continue
        values = parameter.detach().reshape(-1)
        some = values[:: max(1, ceil_div(values.numel(), _SAMPLED_VALUES))].cpu()
        found.update(some.clone(memory_format=torch.contiguous_format).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def config_hash(config: Mapping[str, Any]) -> str:
    """SHA-256 of a plain configuration."""
    return hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()
