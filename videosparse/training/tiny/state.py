"""What the phases of a run share: options, device, models, numbers, and the state that outlives a call."""

from __future__ import annotations

import argparse
import contextlib
import logging
import threading
import time
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from videosparse.files import write_state
from videosparse.training.tiny.checkpoint import read_backup, read_pipeline, write_backup
from videosparse.training.tiny.models import TinySizes
from videosparse.training.tiny.optimizing import Progress
from videosparse.training.tiny.plan import Plan
from videosparse.training.tiny.ranks import Ranks
from videosparse.training.tiny.rounds import begin_round

# The wish to end this call.
STOP = threading.Event()
logger = logging.getLogger(__name__)


class Latents(NamedTuple):
    """A pool of clips: latents bf16 [N, C, T, h, w], caption ids [N, 4, 48], how much of each cell is object, and the
    `motion_marks` [N, 4, 2, 2] of the captions.

    `objects` bf16 [N, 1, T, h, w] is the mean saturation of the pixels of a cell, 0 to 1: objects are the only
    saturated things in this world.
    """

    latents: Tensor
    ids: Tensor
    objects: Tensor
    marks: Tensor


@dataclass
class Run:
    """What all phases share: options, device, models, and the numbers that the model card will quote.

    `tensors` are weights on the host, named `vae.*`, `raw.transformer.*`, `raw.text.*` and the same with `ema.`;
    `meta` is the rest of the state, which JSON can hold. `began` is the clock when this call began.
    """

    args: argparse.Namespace
    plan: Plan
    device: torch.device
    workers: ProcessPoolExecutor
    ranks: Ranks = field(default_factory=Ranks)
    meta: dict[str, Any] = field(default_factory=dict)
    tensors: dict[str, Tensor] = field(default_factory=dict)
    tokenizer: Any = None
    vae: Any = None
    parallel: Any = None
    pools: dict[str, Latents] = field(default_factory=dict)
    savers: list[threading.Thread] = field(default_factory=list)
    futures: dict[str, list[Future[Any]]] = field(default_factory=dict)
    began: float = field(default_factory=time.monotonic)

    @property
    def work(self) -> Path:
        """Local folder of the checkpoint and the pools."""
        return Path(self.args.work)

    @property
    def backup(self) -> Path:
        """Small folder that another machine can go on from."""
        return Path(self.args.backup)

    @property
    def pools_path(self) -> Path:
        """Where the pools of this process are stored."""
        return self.work / ("pools.pt" if self.ranks.first else f"pools-{self.ranks.rank}.pt")

    def drop_stored_pools(self) -> None:
        """Forget the pools that were stored, those of all processes."""
        for path in self.work.glob("pools*.pt") if self.ranks.first else ():
            path.unlink(missing_ok=True)

    @property
    def numbers(self) -> dict[str, Any]:
        """What the model card will quote."""
        numbers: dict[str, Any] = self.meta.setdefault("numbers", {})
        return numbers

    def spent(self) -> float:
        """Minutes of all calls of this round so far."""
        return float(self.meta.get("spent_before", 0.0)) + self.minutes()

    def minutes(self) -> float:
        """Minutes of this call so far."""
        return (time.monotonic() - self.began) / 60

    def must_stop(self) -> bool:
        """Whether this call has to checkpoint now: its own limit, or a signal to any process. All must ask."""
        return self.ranks.any(STOP.is_set() or self.minutes() >= float(self.args.stop_after_minutes))

    def goes_on(self, progress: Progress) -> bool:
        """Whether a phase makes another step: by the clock of the first process, so the same in all. All must ask."""
        progress.told = self.ranks.of_first(progress.measured)
        return progress.fraction < 1.0 and not self.must_stop()

    def autocast(self, cache: bool = True) -> contextlib.AbstractContextManager[Any]:
        """Mixed precision in bf16 on a GPU, nothing on a CPU."""
        if self.device.type == "cuda":
            return torch.autocast("cuda", torch.bfloat16, cache_enabled=cache)
        return contextlib.nullcontext()

    def set_tensors(self, prefix: str, module: torch.nn.Module, dtype: torch.dtype = torch.float32) -> None:
        """Keep a module's weights, on the host, under `prefix`, for the next save."""
        for name in [key for key in self.tensors if key.startswith(prefix)]:
            del self.tensors[name]
        for name, tensor in module.state_dict().items():
            # A copy of its own: safetensors refuses tied weights.
            self.tensors[prefix + name] = tensor.detach().to("cpu", dtype, copy=True).contiguous()

    def load_into(self, module: torch.nn.Module, prefix: str) -> None:
        """Load the kept weights under `prefix` into a module."""
        state = {k.removeprefix(prefix): v.float() for k, v in self.tensors.items() if k.startswith(prefix)}
        module.load_state_dict(state, strict=True)

    def save(self) -> None:
        """Local checkpoint (fp32) and backup (moving average rounded to bf16), both written by the first process."""
        if not self.ranks.first:
            return
        name = torch.cuda.get_device_name() if self.device.type == "cuda" else "CPU"
        self.meta["device"] = name if self.ranks.size == 1 else f"{self.ranks.size} x {name}"
        meta = self.meta | {"sizes": asdict(self.plan.sizes), "spent": round(self.spent(), 3)}
        write_state({"meta": meta, "tensors": self.tensors}, self.work / "checkpoint.pt")
        small = {k: v.bfloat16() if k.startswith("ema.") else v for k, v in self.tensors.items()}
        write_backup(self.backup, small, meta)
        logger.info(f"saved ({self.spent():.2f} min in all)")

    def load(self, resume: bool) -> None:
        """Go on with the round in the local folder or the backup if `resume`, else begin one from other weights.

        Other weights are those of `--restore` or `--from-pipeline`, or none. `--again` begins a round too, unless the
        local folder or the backup is in the middle of one: then the same command, given again, goes on with it.
        """
        args, own = self.args, resume and self._load_own()
        if not own:
            if self.ranks.first:
                (self.work / "checkpoint.pt").unlink(missing_ok=True)
            self.drop_stored_pools()
            if not self._load_other():
                logger.info("nothing to start from: starting from the beginning")
                return
        if "decoder" in self.meta and args.command != "decoder":
            raise ValueError(f"{args.command} cannot start from a backup of `decoder`: it holds no more than a VAE.")
        if own and args.command == "decoder" and "decoder" not in self.meta:
            raise ValueError(f"{self.work} or {self.backup} holds a round; give folders of its own to `decoder`.")
        self.meta["spent_before"] = self.meta.pop("spent", 0.0)
        self.plan = replace(self.plan, sizes=TinySizes(**self.meta["sizes"]))
        if args.again and args.command != "export" and not (own and self._unfinished()):
            if args.keep_vae and not self.meta.get("vae", {}).get("finished"):
                raise ValueError("--keep-vae needs a finished VAE; leave it out.")
            begin_round(self.meta, args.keep_vae)
            # Scenes are drawn anew in every round.
            self.drop_stored_pools()
        number, spent = len(self.meta.get("rounds", [])) + 1, self.meta["spent_before"]
        logger.info(f"resumed: round {number}, {self.meta.get('phase')}, {spent:.2f} min spent before")

    def _load_own(self) -> bool:
        """State of the local checkpoint, else of the backup; false if there is none."""
        local = self.work / "checkpoint.pt"
        if local.exists():
            state = torch.load(local, map_location="cpu", weights_only=True)
            self.tensors, self.meta = state["tensors"], state["meta"]
        elif (self.backup / "state.json").exists():
            self.tensors, self.meta = read_backup(self.backup)
        return bool(self.meta)

    def _load_other(self) -> bool:
        """State of another run's backup, or of an exported pipeline; false if none is named."""
        if self.args.restore:
            self.tensors, self.meta = read_backup(Path(self.args.restore))
        elif self.args.from_pipeline:
            self.tensors, self.meta = read_pipeline(Path(self.args.from_pipeline))
        return bool(self.meta)

    def _unfinished(self) -> bool:
        return not all(self.meta[name]["finished"] for name in ("vae", "dit") if name in self.meta)
