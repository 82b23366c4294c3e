"""A length-extension run: everything between a configuration and a LoRA. The loop is in the program under `lora/`."""

from __future__ import annotations

import importlib.util
import json
import logging
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from videosparse.attach import sparsify, tracker_of
from videosparse.files import naming, write_text
from videosparse.generation.environment import peak_memory, reset_peak_memory, versions
from videosparse.generation.errors import GenerationError, one_line
from videosparse.generation.families import Rotary
from videosparse.generation.lora import FORMAT
from videosparse.generation.methods import make_processor, refusals
from videosparse.generation.sources import ModelSource, check_text_to_video, find_model, scheduler_shift
from videosparse.layout import TokenLayout
from videosparse.stretching import extend_rope
from videosparse.training import checkpoint
from videosparse.training.adapters import add_adapters, copy_into, load_adapters, save_lora, trained, whole
from videosparse.training.batches import Batch, Sampler, Step
from videosparse.training.clips import check_size
from videosparse.training.config import Config, ConfigError, describe
from videosparse.training.dataset import Dataset
from videosparse.training.families import TRAINING_FAMILIES, TrainingFamily
from videosparse.training.noise import NoiseLevels, RunSchedule
from videosparse.training.optimizing import Average, make_optimizer, rate
from videosparse.training.shards import choose_blocks, drop_gathered, shard_plugin
from videosparse.training.sharing import share_clips

logger = logging.getLogger(__name__)

LOG = "log.jsonl"


class Diverged(GenerationError):
    """The loss or the gradient is no number any more."""


@dataclass(frozen=True)
class StepResult:
    """What one optimizer step did.

    Args:
        step: what it trained.
        loss: mean over its samples.
        gradient: norm before clipping.
        lr: learning rate.
        seconds: wall time.
        tokens: video tokens, over all processes.
        flops: of the model, over all processes, without what checkpointing computes twice.
        peak: most memory so far on this process's device, bytes; see `environment.peak_memory`.
    """

    step: Step
    loss: float
    gradient: float
    lr: float
    seconds: float
    tokens: int
    flops: float
    peak: int | None


def make_accelerator(config: Config, device: str = "auto") -> Any:
    """The engine: one process, or as many as `accelerate launch` started.

    Raises:
        ConfigError: processes that cannot be shared out as asked, or weights that cannot be sharded.
    """
    from datetime import timedelta

    from accelerate import Accelerator
    from accelerate.utils import InitProcessGroupKwargs

    on_gpu = torch.cuda.is_available() and device != "cpu"
    precision = {"auto": "bf16" if on_gpu else "no", "bf16": "bf16", "fp32": "no"}[config.train.precision]
    present = [name for name in config.output.trackers if importlib.util.find_spec(name) is not None]
    shards = shard_plugin(config)
    # processes wait for the one that makes a validation video
    accelerator = Accelerator(
        mixed_precision=precision,
        cpu=not on_gpu,
        log_with=present or None,
        project_dir=config.output.folder,
        fsdp_plugin=shards,
        kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(hours=2))],
    )
    for name in sorted(set(config.output.trackers) - set(present)):
        accelerator.print(f"Note: {name} is not installed, and nothing is logged to it (pip install {name}).")
    if shards is not None and accelerator.num_processes > 1 and not accelerator.is_fsdp2:
        raise ConfigError(f"accelerate shards weights on GPUs only (got {accelerator.device.type}); drop --use_fsdp.")
    if accelerator.num_processes % config.train.sequence_parallel:
        raise ConfigError(
            f"train.sequence_parallel must divide the number of processes (got {config.train.sequence_parallel} and "
            f"{accelerator.num_processes}); start as many with accelerate launch --num_processes."
        )
    return accelerator


class LoraRun:
    """A run: model with adapters, data, optimizer, and the step that it is at.

    Args:
        config: checked.
        accelerator: of `make_accelerator`.

    Raises:
        ConfigError: the model, the data set and the configuration do not go together.
        GenerationError: no such model, one that needs more than a prompt, or options that its attention refuses.
    """

    def __init__(self, config: Config, accelerator: Any) -> None:
        self.config, self.accelerator = config, accelerator
        self.folder = Path(config.output.folder)
        try:
            self.source: ModelSource = find_model(config.model.path)
        except GenerationError as error:
            raise ConfigError(str(error).replace("--model", "model.path")) from None
        check_text_to_video(self.source)
        self.family: TrainingFamily = TRAINING_FAMILIES[self.source.spec.family]
        self.data = Dataset(config.data.path, config.data.holdout)
        self.fps = config.data.fps or float(self.source.defaults.fps)
        self._check_data()
        train = config.train
        draw = self.family.draw if train.draw == "auto" else train.draw
        self.levels = NoiseLevels(draw, train.shift or self.family.shift, train.noise_from, train.noise_to)
        groups = accelerator.num_processes // train.sequence_parallel
        self.schedule = RunSchedule(config.attention.shift or scheduler_shift(self.source), self.family.halves)
        self.sampler = Sampler(
            config, self.data, self.levels, self.schedule, groups * train.batch_size * train.accumulate
        )
        self.group = accelerator.process_index // train.sequence_parallel
        # shards leave the CPU block by block, so that no GPU ever holds the whole
        home = torch.device("cpu") if accelerator.is_fsdp2 else accelerator.device
        self.transformer = load_transformer(self.source, config, accelerator.device).to(home)
        add_adapters(self.transformer, self.family, config.lora, train.seed)
        if train.checkpointing:
            self.transformer.enable_gradient_checkpointing()
        self.trained_frames = self._trained_frames()
        with refusals("model.rope: "):
            extend_rope(self.transformer, config.model.rope, trained_frames=self.trained_frames)
        self.bind()
        if train.sequence_parallel > 1:
            share_clips(self.transformer, train.sequence_parallel, accelerator.device)
        if accelerator.is_fsdp2:
            choose_blocks(accelerator.state.fsdp_plugin, self.transformer)
        optimizer = make_optimizer(trained(self.transformer).values(), train)
        self.model, self.optimizer = accelerator.prepare(self.transformer, optimizer)
        self.transformer = accelerator.unwrap_model(self.model)  # sharding replaces it in place
        self.parameters = trained(self.transformer)
        self.average = Average(self.parameters, train.ema) if train.ema else None
        self.done, self.pending = 0, False
        self._densities: dict[int, float] = {}
        reset_peak_memory(accelerator.device)

    # what a step is

    def bind(self) -> None:
        """Put the attention of training on the transformer: that of generation, without a schedule over steps."""
        attention = self.config.attention
        options: dict[str, object] = {}
        if attention.method != "dense":
            given = sorted({"first_steps", "last_steps", "first_layers", "num_steps"} & set(attention.options))
            if given:
                raise ConfigError(
                    f"attention.options must not have {given[0]}: first_steps and first_layers are keys of [attention] "
                    "themselves, and the others have no meaning in training."
                )
            schedule = {"first_steps": 0, "last_steps": 0, "first_layers": attention.first_layers}
            options = {**attention.options, **schedule}
        self.processor = make_processor(attention.method, options)
        experts = self.source.experts
        with refusals():
            self.processor.resolve(self.source.described, experts=experts)
            # one transformer does not tell that it is one of two experts, whose defaults generation takes
            place = int(self.config.model.component == "transformer_2"), experts
            sparsify(self.transformer, self.processor, place=place)

    def loss(self, batch: Batch, dense: bool) -> Tensor:
        """Mean squared error of the flow in fp32, as one number."""
        batch = batch.to(self.accelerator.device)
        tracker = tracker_of(self.transformer)
        tracker.outside_run, tracker.all_dense = True, dense
        kind = frozen_dtype(self.config, self.accelerator.device)
        text = {name: value.to(kind) if value.is_floating_point() else value for name, value in batch.text.items()}
        inputs = self.family.inputs(self.transformer.config, batch.noisy.to(kind), batch.levels, text)
        with self.accelerator.autocast():  # that of `prepare` is left out where weights are sharded
            predicted = self.model(**inputs, return_dict=False)[0]
        target = self.family.target_of(batch.latents, batch.noise)
        return F.mse_loss(predicted.float(), target.float())

    def train_step(self) -> StepResult:
        """One optimizer step.

        Raises:
            Diverged: the loss or the gradient is not finite; nothing has been changed.
        """
        start = time.perf_counter()
        train, engine = self.config.train, self.accelerator
        self.model.train()
        step = self.sampler.step(self.done)
        for group in self.optimizer.param_groups:
            group["lr"] = rate(train, self.done)
        total = torch.zeros((), device=engine.device)
        for turn in range(train.accumulate):
            first = (turn * (engine.num_processes // train.sequence_parallel) + self.group) * train.batch_size
            batch = self.sampler.batch(step, range(first, first + train.batch_size))
            last = turn == train.accumulate - 1
            with nullcontext() if last else engine.no_sync(self.model):
                loss = self.loss(batch, step.dense)
                # processes that share a clip have a part of its gradient each, of which the mean is taken
                engine.backward(loss * train.sequence_parallel / train.accumulate)
            total += loss.detach() / train.accumulate
        mean = float(engine.reduce(total, "mean"))
        gradient = float(whole(engine.clip_grad_norm_(list(self.parameters.values()), train.clip)))
        if not (math.isfinite(mean) and math.isfinite(gradient)):
            self.optimizer.zero_grad()
            raise Diverged(
                f"The {'gradient' if math.isfinite(mean) else 'loss'} is not finite at step {self.done} ({step.frames} "
                f"frames, {'dense' if step.dense else 'sparse'}); lower train.lr or train.clip, or use "
                'train.precision = "fp32".'
            )
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.average is not None:
            self.average.update(self.done)
        self.done += 1
        tokens, flops = self._work(step)
        seconds, peak = time.perf_counter() - start, peak_memory(engine.device)
        return StepResult(step, mean, gradient, rate(train, self.done - 1), seconds, tokens, flops, peak)

    def remaining(self) -> Iterator[int]:
        """Number of every step that is left to do."""
        while self.done < self.config.train.steps:
            yield self.done

    # what is measured

    @torch.no_grad()
    def held_out(self, frames: int) -> dict[float, float]:
        """Loss on the held-out clips of a length, by quantile of the noise levels; the same noise every time."""
        self.model.eval()
        threshold = self.sampler.threshold
        found = {}
        entries = [e for bucket in self.data.of_length(self.data.held, frames) for e in bucket.entries]
        for quantile in self.config.validate.quantiles:
            level = self.levels.level(quantile)
            batches = (self.sampler.held_out(entry, frames, level) for entry in entries)
            dense = self.sampler.dense_share > 0 and level > threshold
            losses = [float(self.loss(batch, dense)) for batch in batches]
            found[quantile] = sum(losses) / len(losses) if losses else math.nan
        return found

    def log(self, values: Mapping[str, Any]) -> None:
        """Add a line to the run's log, and tell the trackers; all processes must call.

        Raises:
            OSError: it cannot be written.
        """
        self.accelerator.log({k: v for k, v in values.items() if isinstance(v, int | float)}, step=self.done)
        told = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}

        def write() -> None:
            path = self.folder / LOG
            path.parent.mkdir(parents=True, exist_ok=True)
            with naming(path), path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"step": self.done, **told}) + "\n")

        self.on_main(write)

    def cut_log(self) -> None:
        """Drop what the log says of what is still to be done, and a line that a full disk cut short."""
        path = self.folder / LOG
        if not self.accelerator.is_main_process or not path.is_file():
            return
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
        if self.pending or self.done == self.config.train.steps:  # held-out losses of this step are measured again
            lines = [line for line in lines if _step_of(line) < self.done or '"held_out/' not in line]
        # losses before the first step are measured again where a run begins
        write_text(path, "".join(f"{line}\n" for line in lines if self.done and _step_of(line) <= self.done))

    def _work(self, step: Step) -> tuple[int, float]:
        """(video tokens, floating-point operations of the model) of a step over all processes."""
        size, spec = step.bucket.size, self.source.spec
        grid = spec.grid(step.frames, size.height, size.width)
        samples = self.sampler.in_step
        layout = TokenLayout(grid, spec.text)
        density = 1.0
        if not step.dense and self.config.attention.method != "dense":
            density = self._density(layout)
        weights = sum(p.numel() for p in self.transformer.parameters() if p.dim() > 1)
        # forward, and the gradient of activations; weights of a LoRA hardly count. Attention's backward is 2.5 forwards
        linear = 2 * 2.0 * weights * grid.tokens
        attention = 3.5 * 4.0 * layout.length**2 * spec.heads * spec.head_dim * spec.layers * density
        return grid.tokens * samples, (linear + attention) * samples

    def _density(self, layout: TokenLayout) -> float:
        if layout.length not in self._densities:
            resolved = self.processor.resolve(self.source.described, experts=self.source.experts, grid=layout.grid)
            found = None if resolved.policy is None else resolved.policy.static_map(layout)
            density = 1.0 if found is None else float(found.density)
            dense = min(self.source.spec.layers, self.config.attention.first_layers)
            self._densities[layout.length] = density + (1 - density) * dense / self.source.spec.layers
        return self._densities[layout.length]

    # what is kept

    def on_main(self, write: Callable[[], object]) -> None:
        """Let the main process write something, for which the others wait; all processes must call.

        Raises:
            OSError: it could not, such as on a full disk. It comes on all of them, as none can go on alone.
        """
        from accelerate.utils import broadcast_object_list

        failed: OSError | None = None
        if self.accelerator.is_main_process:
            try:
                write()
            except OSError as error:
                failed = error
        (failed,) = broadcast_object_list([failed])
        if failed is not None:
            raise failed

    def save(self, pending: bool = False) -> Path:
        """Write a checkpoint, whose folder also is a LoRA; all processes must call.

        Args:
            pending: whether what is due after this step (validation) is left to the run that goes on from here.

        Raises:
            OSError: it cannot be written; nothing is left of it.
        """
        tensors = {
            checkpoint.WEIGHTS: {name: whole(p) for name, p in self.parameters.items()},
            checkpoint.OPTIMIZER: checkpoint.optimizer_tensors(self.optimizer, self.parameters),
        }
        if self.average is not None:
            tensors[checkpoint.EMA] = {name: whole(value) for name, value in self.average.values.items()}
        path = self.folder / checkpoint.FOLDER / f"step-{self.done:06d}"
        weights = tensors.get(checkpoint.EMA, tensors[checkpoint.WEIGHTS])
        state = {
            "config": self.config.as_dict(), "samples": self.sampler.in_step, "pending": pending,
            "clips": self.data.fingerprint(self.data.train, self.data.held),
            "held_out": self.data.fingerprint(self.data.held),
        }  # fmt: skip
        keep = self.config.output.keep
        self.on_main(
            lambda: checkpoint.write_checkpoint(
                self.folder, self.done, tensors, state, keep, lambda part: self._write(part, weights)
            )
        )
        return path

    def resume(self) -> int:
        """Go on from the newest checkpoint, if there is one; returns the step. `cut_log` is to follow.

        Raises:
            ConfigError: the checkpoint is damaged, is beyond the last step, or is of another run.
        """
        found = checkpoint.checkpoints(self.folder)
        if not found:
            return 0
        tensors, state = checkpoint.read_checkpoint(found[-1])
        self._check_same(state, found[-1])
        drop_gathered(self.transformer)
        load_adapters(self.transformer, tensors[checkpoint.WEIGHTS])
        checkpoint.load_optimizer(self.optimizer, self.parameters, tensors.get(checkpoint.OPTIMIZER, {}))
        if self.average is not None:
            for name, value in tensors[checkpoint.EMA].items():
                copy_into(self.average.values[name], value, name)
        self.done, self.pending = state["step"], bool(state.get("pending"))
        return self.done

    def export(self, folder: Path | None = None) -> Path:
        """Write the LoRA: the moving average where there is one; all processes must call.

        Raises:
            OSError: it cannot be written.
        """
        values: Mapping[str, Tensor] = self.parameters if self.average is None else self.average.values
        weights = {name: whole(value) for name, value in values.items()}
        folder = folder or self.folder
        self.on_main(lambda: self._write(folder, weights))
        return folder

    def about(self) -> dict[str, Any]:
        """What the LoRA is for, as its file says it."""
        config, spec = self.config, self.source.spec
        options = dict(config.attention.options)
        if "plan" in options:  # the LoRA may be used from another folder
            options["plan"] = str(Path(options["plan"]).resolve())
        return {
            "format": FORMAT, "base_model": self.source.name, "location": self.source.location, "family": spec.family,
            "layers": spec.layers, "heads": spec.heads, "component": config.model.component,
            "method": config.attention.method, "options": options, "first_steps": config.attention.first_steps,
            "first_layers": config.attention.first_layers, "shift": self.schedule.shift,
            "dense_above": self.sampler.threshold, "rope": config.model.rope,
            "trained_frames": self.trained_frames, "norms": config.lora.norms,
            "frames": list(config.train.frames), "fps": self.fps,
            "sizes": sorted({str(b.size) for b in self.data.train}), "steps": self.done, "recipe": config.as_dict(),
            "versions": versions(),
        }  # fmt: skip

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """The moving average in place of the weights, for validation; nothing where there is none."""
        if self.average is None:
            yield
            return
        kept = {name: p.detach().clone() for name, p in self.parameters.items()}
        self._put(self.average.values)
        try:
            yield
        finally:
            self._put(kept)

    @torch.no_grad()
    def _put(self, values: Mapping[str, Tensor]) -> None:
        for name, parameter in self.parameters.items():
            parameter.copy_(values[name])
        drop_gathered(self.transformer)

    def _trained_frames(self) -> int | None:
        """The length beyond which the rotary embedding is stretched; None where it is as it is."""
        model, defaults = self.config.model, self.source.defaults
        if model.rope == "none":
            return None
        if self.source.pipelines.rotary == Rotary.LEARNED:
            title = self.source.pipelines.title
            raise ConfigError(f'{title} learned the frequencies of its rotary embedding; model.rope must be "none".')
        return model.trained_frames or defaults.trained_frames or defaults.num_frames

    def _write(self, folder: Path, weights: Mapping[str, Tensor]) -> None:
        save_lora(folder, self.source.pipeline_class, self.transformer, weights, self.about())

    def _check_same(self, state: Mapping[str, Any], path: Path) -> None:
        """Raise ConfigError where what was changed since a checkpoint would make it another run."""
        self._check_same_config(state["config"], path)
        samples = state.get("samples", self.sampler.in_step)
        if samples != self.sampler.in_step:
            raise ConfigError(
                f"A step had {samples} samples in {path} and has {self.sampler.in_step} now; start as many "
                "processes as before, or choose another output.folder."
            )
        clips, held = self.data.fingerprint(self.data.train, self.data.held), self.data.fingerprint(self.data.held)
        if state.get("clips", clips) != clips:
            others = "trained" if state.get("held_out", held) == held else "held out"
            raise ConfigError(
                f"{self.config.data.path} has other clips than it had in {path}, so that others would be {others}; "
                "give it back its clips, or choose another output.folder."
            )
        if state["step"] > self.config.train.steps:
            raise ConfigError(
                f"{path} has {state['step']} steps behind it, and train.steps is {self.config.train.steps}; raise it, "
                "or take the LoRA that is in that folder."
            )

    def _check_same_config(self, before: Mapping[str, Any], path: Path) -> None:
        now = json.loads(json.dumps(self.config.as_dict()))
        defaults = {name: json.loads(json.dumps(default)) for name, default, _ in describe()}
        free = {"train": ("steps",), "output": None, "validate": None}
        for section, values in now.items():
            allowed = free.get(section, ())
            if allowed is None:
                continue
            for name, value in values.items():
                was = before.get(section, {}).get(name, defaults[f"{section}.{name}"])  # a key may be a new one
                if name not in allowed and was != value:
                    raise ConfigError(
                        f"{section}.{name} was {was!r} in {path} and is {value!r} now; give it back its value, or "
                        "choose another output.folder."
                    )

    def _check_data(self) -> None:
        """Raise ConfigError where data set, model and configuration do not go together."""
        about, config = self.data.about, self.config
        if about["family"] != self.family.name or about["time_stride"] != self.source.spec.stride[0]:
            raise ConfigError(
                f"{config.data.path} was encoded for {about['model']}, and {self.source.name} has another VAE; prepare "
                "it with --model " + config.model.path + "."
            )
        if config.model.component == "transformer_2" and self.source.experts < 2:
            raise ConfigError(f"{self.source.name} has one transformer; model.component must be transformer.")
        if config.validate.prompts and self.source.experts > 1:
            raise ConfigError(
                f"validate.prompts makes videos with the transformer that is trained, and {self.source.name} needs "
                "both of its experts; drop it, and look at the LoRA with videosparse generate --lora."
            )
        if config.model.fp8 and not config.train.checkpointing:
            raise ConfigError("model.fp8 needs train.checkpointing = true: weights are 8 bits wide between the passes.")
        if about["fps"] != self.fps:
            raise ConfigError(
                f"{config.data.path} was prepared at {about['fps']:g} frames a second, and data.fps is {self.fps:g}"
                f"{'' if config.data.fps else ', that of the model'}; prepare it again in another folder with --fps "
                f"{self.fps:g}, or set data.fps."
            )
        for frames in config.train.frames:
            for bucket in self.data.of_length(self.data.train, frames):
                check_size(self.source, frames, bucket.size.height, bucket.size.width, ("train.frames", "", ""))


def load_transformer(source: ModelSource, config: Config, device: torch.device) -> Any:
    """The transformer to train, on the CPU, its frozen weights in the `frozen_dtype` of a device.

    Raises:
        ConfigError: weights are missing or damaged.
    """
    import diffusers

    cls = getattr(diffusers, (source.config or {}).get("_class_name", "WanTransformer3DModel"))
    dtype = frozen_dtype(config, device)
    try:
        transformer = cls.from_pretrained(source.location, subfolder=config.model.component, dtype=dtype)
    except Exception as error:  # of four libraries
        raise ConfigError(f"Cannot load {config.model.component} of {source.location}: {one_line(error)}.") from error
    if config.model.fp8:
        transformer.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=dtype)
    return transformer


def frozen_dtype(config: Config, device: torch.device) -> torch.dtype:
    """Of the frozen weights and the inputs: that of the forward."""
    auto = torch.bfloat16 if device.type == "cuda" else torch.float32
    return {"auto": auto, "bf16": torch.bfloat16, "fp32": torch.float32}[config.train.precision]


def change(config: Config, **sections: Mapping[str, Any]) -> Config:
    """A configuration with some keys changed: `change(config, train={"steps": 10})`."""
    return replace(config, **{name: replace(getattr(config, name), **values) for name, values in sections.items()})


def _step_of(line: str) -> float:
    """The step of a line of the log; infinite where the line is none."""
    try:
        return int(json.loads(line)["step"])
    except (ValueError, TypeError, KeyError):
        return math.inf


def quantile_text(losses: Mapping[float, float]) -> str:
    """Losses by quantile in one line."""
    return ", ".join(f"{loss:.4f} at {quantile:g}" for quantile, loss in losses.items())


def mean_of(losses: Iterable[float]) -> float:
    """Mean, NaN of nothing."""
    listed = list(losses)
    return sum(listed) / len(listed) if listed else math.nan
