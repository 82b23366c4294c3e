"""Train the embedded model `assets/tiny-wan`: VAE, latents, DiT with its text encoder, and the exported pipeline.

Everything in one process on one GPU, in 19.5 minutes of wall clock, cut into calls of at most 9.2 minutes; a later
call with `--resume` goes on from the local folder, or from the backup if that folder is gone:

    PYTHONPATH=. python eval/train_tiny_model.py all --budget-minutes 19.5 --stop-after-minutes 9.2 \\
        --work /tmp/tiny --backup out/backup --resume

Then, on any machine, from the backup alone:

    PYTHONPATH=. python eval/train_tiny_model.py export --backup out/backup --out assets/tiny-wan --check

One phase at a time: `vae`, `encode`, `dit`, with `--minutes`. All paths in seconds, on CPU, or on a GPU with the real
shapes and the time of a step of each: `all --smoke --work /tmp/tiny-smoke --backup /tmp/tiny-smoke/backup`.

A phase ends at `--steps` or at `--minutes`, whichever is first, and its learning rate reaches zero just then. SIGTERM
writes a checkpoint. The backup is at most 60 MiB: fp32 weights, the moving average in bf16, one state.json, one PNG.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import json
import multiprocessing
import os
import random
import re
import signal
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from videosparse.synthetic.captions import caption
from videosparse.synthetic.render import render
from videosparse.synthetic.scene import Scene, sample_scene
from videosparse.training import tiny

START = time.monotonic()
STOP = threading.Event()
VARIANTS = 4
VAE_VARIANTS = ("first-fused", "last-fused", "first-eager", "last-eager")
HELD_OUT = 64


# ---------------------------------------------------------------- settings


@dataclass(frozen=True)
class Clip:
    """A pool of latents: clips of `frames` pixel frames at `size` pixels; `chunk` are rendered and encoded at once."""

    name: str
    size: int
    frames: int
    count: int
    chunk: int


@dataclass(frozen=True)
class Shape:
    """One kind of training batch: the first `latent_frames` of clips of a pool, drawn with a relative weight."""

    pool: str
    latent_frames: int
    batch: int
    # how often it is drawn is no part of what it is: two stages share the compiled step of a shape
    weight: float = field(compare=False)


@dataclass(frozen=True)
class Plan:
    """All sizes and amounts of a run."""

    sizes: tiny.TinySizes = field(default_factory=tiny.TinySizes)
    vae_clips: int = 6144
    vae_frames: int = 17
    vae_batches: tuple[tuple[int, int], ...] = ((64, 16), (128, 8))
    vae_check: int = 32
    pools: tuple[Clip, ...] = (
        Clip("64x33", 64, 33, 30720, 256),
        Clip("128x33", 128, 33, 20480, 64),
        Clip("128x81", 128, 81, 4096, 16),
    )
    stages: tuple[tuple[float, tuple[Shape, ...]], ...] = (
        (0.30, (Shape("64x33", 9, 128, 0.8), Shape("64x33", 1, 512, 0.2))),
        (0.85, (Shape("128x33", 9, 48, 0.75), Shape("128x33", 5, 80, 0.13), Shape("128x33", 1, 256, 0.12))),
        (1.00, (Shape("128x81", 21, 20, 0.6), Shape("128x33", 9, 48, 0.4))),
    )
    captions: int = 20000
    sample_pool: str = "128x33"
    sample_steps: int = 20
    eval_batch: int = 32


def smoke_plan(cuda: bool) -> Plan:
    """Seconds instead of minutes: on a GPU the real shapes with few clips, on a CPU small shapes."""
    full = Plan()
    if cuda:
        pools = tuple(replace(pool, count=max(2 * HELD_OUT, 2 * pool.chunk)) for pool in full.pools)
        return replace(full, vae_clips=256, pools=pools, captions=2000)
    pools = (Clip("64x33", 16, 9, 12, 4), Clip("128x33", 32, 9, 12, 4), Clip("128x81", 32, 13, 12, 4))
    stages = (
        (0.30, (Shape("64x33", 3, 4, 0.8), Shape("64x33", 1, 4, 0.2))),
        (0.85, (Shape("128x33", 3, 2, 0.75), Shape("128x33", 2, 2, 0.13), Shape("128x33", 1, 2, 0.12))),
        (1.00, (Shape("128x81", 4, 2, 0.6), Shape("128x33", 3, 2, 0.4))),
    )
    return Plan(
        tiny.SMOKE_SIZES, 8, 9, ((16, 2), (32, 2)), 4, pools, stages, captions=300, sample_steps=2, eval_batch=4
    )


# ---------------------------------------------------------------- run state


@dataclass
class Run:
    """What all phases share: options, device, models, and the numbers that the model card will quote."""

    args: argparse.Namespace
    plan: Plan
    device: torch.device
    workers: ProcessPoolExecutor
    meta: dict[str, Any] = field(default_factory=dict)
    tensors: dict[str, Tensor] = field(default_factory=dict)
    tokenizer: Any = None
    vae: Any = None
    parallel: Any = None
    pools: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    savers: list[threading.Thread] = field(default_factory=list)
    futures: dict[str, list[Future]] = field(default_factory=dict)

    @property
    def work(self) -> Path:
        """Local folder of the checkpoint and the pools."""
        return Path(self.args.work)

    @property
    def backup(self) -> Path:
        """Small folder that another machine can go on from."""
        return Path(self.args.backup)

    @property
    def numbers(self) -> dict[str, Any]:
        """What the model card will quote."""
        return self.meta.setdefault("numbers", {})

    def spent(self) -> float:
        """Minutes of all calls so far."""
        return self.meta.get("spent_before", 0.0) + (time.monotonic() - START) / 60

    def must_stop(self) -> bool:
        """Whether this call has to checkpoint now: its own limit, or a signal."""
        return STOP.is_set() or (time.monotonic() - START) / 60 >= self.args.stop_after_minutes

    def autocast(self, cache: bool = True):
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
        """Local checkpoint (fp32) and backup (moving average rounded to bf16)."""
        meta = self.meta | {"sizes": tiny.sizes_dict(self.plan.sizes), "spent": round(self.spent(), 3)}
        self.work.mkdir(parents=True, exist_ok=True)
        torch.save({"meta": meta, "tensors": self.tensors}, self.work / "checkpoint.tmp")
        (self.work / "checkpoint.tmp").replace(self.work / "checkpoint.pt")
        small = {k: v.bfloat16() if k.startswith("ema.") else v for k, v in self.tensors.items()}
        tiny.write_backup(self.backup, small, meta)
        log(f"saved ({self.spent():.2f} min in all)")

    def load(self) -> None:
        """State of the local checkpoint, else of the backup, else nothing."""
        local = self.work / "checkpoint.pt"
        if local.exists():
            state = torch.load(local, map_location="cpu", weights_only=True)
            self.tensors, self.meta = state["tensors"], state["meta"]
        elif (self.backup / "state.json").exists():
            self.tensors, self.meta = tiny.read_backup(self.backup)
        elif self.args.restore and (Path(self.args.restore) / "state.json").exists():
            self.tensors, self.meta = tiny.read_backup(Path(self.args.restore))
        else:
            log("nothing to resume: starting from the beginning")
            return
        self.meta["spent_before"] = self.meta.pop("spent", 0.0)
        if self.args.again:
            self.again()
        self.plan = replace(self.plan, sizes=tiny.sizes_of(self.meta))
        log(f"resumed: {self.meta.get('phase')}, {self.meta['spent_before']:.2f} min spent before")


    def again(self) -> None:
        """Keep all weights, and start every schedule and the statistics of the latents anew."""
        for phase in ("vae", "dit"):
            if phase in self.meta:
                self.meta[phase] = {"step": 0, "elapsed": 0.0, "finished": False}
        for key in ("latents_mean", "latents_std"):
            self.meta.pop(key, None)


def log(text: str) -> None:
    print(f"[{time.monotonic() - START:7.1f}s] {text}", flush=True)


class Ticker:
    """One log line about every ten seconds; only then is the loss read from the device."""

    def __init__(self, name: str, progress: tiny.Progress, seconds: float = 10.0) -> None:
        self.name, self.progress, self.seconds = name, progress, seconds
        self.last, self.last_step = time.monotonic(), progress.step

    def __call__(self, loss: Tensor, lr: float, extra: str = "") -> None:
        """Log, if it is time to."""
        now = time.monotonic()
        if now - self.last < self.seconds:
            return
        p = self.progress
        rate = (p.step - self.last_step) / (now - self.last)
        left = min((p.steps - p.step) / max(rate, 1e-6), 60 * p.minutes - p.elapsed)
        log(
            f"{self.name} step {p.step} loss {loss.item():.4f} lr {lr:.2e} {rate:.1f} it/s "
            f"{100 * p.fraction:.0f}% ETA {left:.0f}s {extra}"
        )
        self.last, self.last_step = now, p.step


# ---------------------------------------------------------------- scenes, in other processes


def worker_init() -> None:
    # Each worker works alone; a pool of threads inherited through the fork would never answer.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    torch.set_num_threads(1)


def sample_captions(seed: int, count: int) -> list[str]:
    rng = random.Random(seed)
    return [caption(sample_scene(rng, split="train"), rng) for _ in range(count)]


def draw_scenes(seed: int, count: int, tokenizer_state: str | None) -> tuple[list[Scene], Tensor | None]:
    """Scenes, and the ids [count, 4, 48] of several captions of each, a new one for each use of a clip."""
    rng = random.Random(seed)
    scenes = [sample_scene(rng, split="train") for _ in range(count)]
    if tokenizer_state is None:
        return scenes, None
    texts = [caption(scene, rng) for scene in scenes for _ in range(VARIANTS)]
    ids = tiny.tokenize(tiny.wrap_tokenizer(tokenizer_state), texts)
    # A plain array travels between processes; a tensor would need a shared-memory handle.
    return scenes, ids.view(count, VARIANTS, -1).numpy()


def submit(run: Run, seed: int, count: int, tokenizer_state: str | None = None) -> list[Future]:
    share = 512
    sizes = [min(share, count - at) for at in range(0, count, share)]
    return [run.workers.submit(draw_scenes, 1_000_003 * seed + i, n, tokenizer_state) for i, n in enumerate(sizes)]


def gather(futures: list[Future]) -> tuple[list[Scene], Tensor | None]:
    results = [future.result() for future in futures]
    scenes = [scene for part, _ in results for scene in part]
    ids = None if results[0][1] is None else torch.cat([torch.from_numpy(part) for _, part in results])
    return scenes, ids


def prepare_tokenizer(run: Run) -> None:
    if "tokenizer" not in run.meta:
        share = max(1, run.plan.captions // 10)
        futures = [run.workers.submit(sample_captions, 7_000_000 + i, share) for i in range(10)]
        texts = [text for future in futures for text in future.result()]
        tokenizer = tiny.train_tokenizer(texts, run.plan.sizes.vocab)
        run.meta["tokenizer"] = tokenizer.backend_tokenizer.to_str()
        longest = int(tiny.tokenize(tokenizer, texts).ne(0).sum(1).max())
        log(f"tokenizer: {len(tokenizer)} tokens, longest caption {longest}; e.g. {texts[0]!r}")
    run.tokenizer = tiny.wrap_tokenizer(run.meta["tokenizer"])


@torch.no_grad()
def render_uint8(run: Run, scenes: list[Scene], frames: int, size: int, chunk: int = 128) -> Tensor:
    """uint8 [N, 3, F, S, S] on the device."""
    out = torch.empty(len(scenes), 3, frames, size, size, dtype=torch.uint8, device=run.device)
    for at in range(0, len(scenes), chunk):
        part = render(scenes[at : at + chunk], frames, size, size, device=run.device)
        out[at : at + chunk] = part.mul_(255).round_().clamp_(0, 255)
    return out


def to_video(clips: Tensor) -> Tensor:
    """uint8 -> fp32 in [-1, 1]."""
    return clips.float().div_(127.5).sub_(1.0)


# ---------------------------------------------------------------- VAE


class VaeStep:
    """One optimiser step on one batch shape: eager at first, replayed as a CUDA graph after `capture`.

    The batch and the posterior noise are static inputs, so no random numbers are drawn inside the graph.
    """

    def __init__(self, run: Run, model: tiny.ParallelVae, optimizer, size: int, batch: int) -> None:
        plan, device = run.plan, run.device
        self.run, self.model, self.optimizer = run, model, optimizer
        self.parameters = list(model.vae.parameters())
        self.clips = torch.zeros(batch, 3, plan.vae_frames, size, size, dtype=torch.uint8, device=device)
        frames = 1 + (plan.vae_frames - 1) // 4
        self.noise = torch.zeros(batch, plan.sizes.z_dim, frames, size // 4, size // 4, device=device)
        self.loss = torch.zeros((), device=device)
        self.graph = None

    def _compute(self) -> None:
        with self.run.autocast(cache=False):
            loss = tiny.vae_loss(self.model, to_video(self.clips), self.noise, self.run.args.kl)
        if self.parameters[0].grad is not None:
            torch._foreach_zero_([parameter.grad for parameter in self.parameters])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0, foreach=True)
        self.optimizer.step()
        self.loss.copy_(loss.detach())

    def __call__(self, pool: Tensor) -> Tensor:
        """One step on random clips of the pool; returns the loss on the device."""
        index = torch.randint(len(pool), (len(self.clips),), device=pool.device)
        self.clips.copy_(pool[index])
        self.noise.normal_()
        if self.graph is None:
            self._compute()
        else:
            self.graph.replay()
        return self.loss

    def capture(self, stream: torch.cuda.Stream) -> None:
        """Record the step as a graph, on the stream on which it was warmed up."""
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            self._compute()
        self.graph = graph


def vae_variant(run: Run, vae, name: str) -> tiny.ParallelVae:
    """The model set up as a variant says: memory format, and whether norm and activation are one kernel."""
    cuda = run.device.type == "cuda"
    layout = torch.channels_last_3d if name.startswith("last") else torch.contiguous_format
    for module in vae.modules():
        if isinstance(module, torch.nn.Conv3d):
            module.weight.data = module.weight.data.contiguous(memory_format=layout)
    return tiny.ParallelVae(vae, fused=cuda and name.endswith("fused"))


def choose_vae_variant(run: Run, vae, pools: dict[int, Tensor]) -> str:
    """The fastest variant that runs, timed over five steps of the largest shape on a copy of the weights."""
    if run.args.vae_variant != "auto" or run.device.type != "cuda":
        return run.args.vae_variant if run.args.vae_variant != "auto" else "first-eager"
    size, batch = run.plan.vae_batches[-1]
    times = {}
    for name in ("first-fused", "last-fused", "first-eager"):
        if name == "first-eager" and times:
            break
        try:
            trial = copy.deepcopy(vae)
            step = VaeStep(run, vae_variant(run, trial, name), make_vae_optimizer(run, trial), size, batch)
            begin = time.perf_counter()
            for i in range(8):
                if i == 3:
                    torch.cuda.synchronize()
                    start = time.perf_counter()
                step(pools[size])
            torch.cuda.synchronize()
            times[name] = (time.perf_counter() - start) / 5
            log(f"vae variant {name}: {1e3 * times[name]:.1f} ms a step, set up in {start - begin:.1f} s")
        except Exception as error:
            log(f"vae variant {name} failed: {type(error).__name__}: {str(error)[:300]}")
        trial = step = None
        torch.cuda.empty_cache()
    return min(times, key=times.__getitem__)


def make_vae_optimizer(run: Run, vae):
    cuda = run.device.type == "cuda"
    lr = torch.tensor(run.args.vae_lr, device=run.device) if cuda else run.args.vae_lr
    return tiny.adamw([vae], lr, capturable=cuda)


def set_lr(optimizer, lr: float) -> None:
    """Write the rate; into the tensor if there is one, since a captured graph reads that tensor."""
    for group in optimizer.param_groups:
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(lr)
        else:
            group["lr"] = lr


def vae_psnr(run: Run, model: tiny.ParallelVae, held: dict[int, Tensor]) -> dict[str, float]:
    """PSNR in dB on held-out clips, by size, without sampling the posterior."""
    result = {}
    with torch.no_grad(), run.autocast():
        for size, clips in held.items():
            values = []
            for part in clips.split(8):
                video = to_video(part)
                values.append(tiny.psnr(model.decode(model.encode(video)[0]), video))
            result[str(size)] = round(torch.stack(values).mean().item(), 2)
    return result


def vae_warm_up(run: Run, steps: dict[int, VaeStep], pools: dict[int, Tensor], optimizer) -> None:
    """A few real steps, then graphs; without graphs if capture fails."""
    set_lr(optimizer, run.args.vae_lr / 20)
    if run.device.type != "cuda" or run.args.no_graph:
        return
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(4):
            for size, step in steps.items():
                step(pools[size])
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    try:
        for step in steps.values():
            step.capture(stream)
        for size, step in steps.items():
            step(pools[size])
        torch.cuda.synchronize()
        log("vae: CUDA graphs captured")
    except Exception as error:
        log(f"vae: graph capture failed, going on eagerly: {type(error).__name__}: {str(error)[:300]}")
        for step in steps.values():
            step.graph = None
        torch.cuda.synchronize()
        optimizer.zero_grad(set_to_none=True)


def train_vae(run: Run, minutes: float) -> bool:
    """Train the VAE; true when it is finished. Leaves `run.vae` and `run.parallel`."""
    plan, args = run.plan, run.args
    done = run.meta.get("vae", {})
    run.vae = tiny.build_vae(plan.sizes).to(run.device)
    if done:
        run.load_into(run.vae, "vae.")
    if done.get("finished"):
        finish_vae(run)
        return True
    sizes = [size for size, _ in plan.vae_batches]
    (run.work / "pools.pt").unlink(missing_ok=True)
    futures = {size: submit(run, 11 + i, plan.vae_clips + plan.vae_check) for i, size in enumerate(sizes)}
    submit_pools(run)
    pools, held = {}, {}
    for size in sizes:
        clips = render_uint8(run, gather(futures[size])[0], plan.vae_frames, size)
        held[size], pools[size] = clips[: plan.vae_check], clips[plan.vae_check :]
    log(f"vae: {plan.vae_clips} clips of each of {sizes} pixels rendered")
    variant = choose_vae_variant(run, run.vae, pools)
    model = vae_variant(run, run.vae, variant)
    optimizer = make_vae_optimizer(run, run.vae)
    progress = tiny.Progress(args.vae_steps, minutes, done.get("step", 0), done.get("elapsed", 0.0), warmup=100)
    steps = {size: VaeStep(run, model, optimizer, size, batch) for size, batch in plan.vae_batches}
    vae_warm_up(run, steps, pools, optimizer)
    if args.smoke:
        time_vae(run, steps, pools)
    vae_loop(run, model, optimizer, progress, steps, pools, held)
    finished = progress.fraction >= 1.0
    run.meta["vae"] = {"step": progress.step, "elapsed": progress.elapsed, "finished": finished, "variant": variant}
    run.meta["phase"] = "vae"
    run.set_tensors("vae.", run.vae)
    if finished:
        run.numbers["vae_psnr"] = vae_psnr(run, model, held)
        run.numbers.update(vae_steps=progress.step, vae_minutes=round(progress.elapsed / 60, 2))
        log(f"vae: finished by {progress.ended_by} at step {progress.step}, PSNR {run.numbers['vae_psnr']} dB")
        finish_vae(run)
    run.save()
    return finished


def time_vae(run: Run, steps: dict[int, VaeStep], pools: dict[int, Tensor]) -> None:
    for size, step in steps.items():
        seconds = timed(run, lambda step=step, size=size: step(pools[size]), 10)
        mode = "graph" if step.graph is not None else "eager"
        log(f"TIMING vae {size}x{size} batch {len(step.clips)} {mode}: {1e3 * seconds:.1f} ms a step")


def timed(run: Run, call, count: int) -> float:
    """Seconds a call, after one to warm up."""
    call()
    if run.device.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(count):
        call()
    if run.device.type == "cuda":
        torch.cuda.synchronize()
    return (time.perf_counter() - start) / count


def vae_loop(run: Run, model, optimizer, progress: tiny.Progress, steps, pools, held) -> None:
    tick = Ticker("vae", progress)
    rng = random.Random(progress.step)
    checked = time.monotonic()
    sizes = list(steps)
    while progress.fraction < 1.0 and not run.must_stop():
        lr = run.args.vae_lr * progress.lr_factor()
        set_lr(optimizer, lr)
        # Small frames are cheaper, large ones are what the model is used at.
        size = rng.choices(sizes, sizes)[0]
        loss = steps[size](pools[size])
        progress.advance()
        tick(loss, lr, f"({size}px)")
        # The host runs ahead of the device; without this the clock would be read far too early.
        if progress.step % 20 == 0 and run.device.type == "cuda":
            torch.cuda.current_stream().synchronize()
        if time.monotonic() - checked > run.args.check_seconds:
            log(f"vae step {progress.step} PSNR {vae_psnr(run, model, held)} dB")
            checked = time.monotonic()
            if not torch.isfinite(loss):
                raise FloatingPointError("the VAE's loss is not finite; lower --vae-lr.")


def finish_vae(run: Run) -> None:
    """Freeze the VAE and set it up for encoding."""
    run.vae.requires_grad_(False).eval()
    for parameter in run.vae.parameters():
        parameter.grad = None
    name = run.meta["vae"].get("variant", "first-eager") if run.meta.get("vae") else "first-eager"
    run.parallel = vae_variant(run, run.vae, name)
    if run.device.type == "cuda":
        torch.cuda.empty_cache()


# ---------------------------------------------------------------- latents


def submit_pools(run: Run) -> None:
    """Start drawing the scenes and captions of all pools, in the background, unless that has been done."""
    for i, pool in enumerate(run.plan.pools):
        if pool.name not in run.futures:
            run.futures[pool.name] = submit(run, 101 + i, pool.count, run.meta["tokenizer"])


@torch.no_grad()
def encode_pool(run: Run, pool: Clip, scenes: list[Scene]) -> Tensor:
    """bf16 [N, C, T, h, w] posterior means. The chunk is halved if the device runs out of memory."""
    chunk, parts, at = pool.chunk, [], 0
    render_seconds = last_chunk = 0.0
    while at < len(scenes):
        try:
            began = time.perf_counter()
            begin = time.perf_counter()
            video = render(scenes[at : at + chunk], pool.frames, pool.size, pool.size, device=run.device)
            render_seconds += time.perf_counter() - begin
            # Rounded as in VAE training, and as in a video file.
            video = video.mul_(255).round_().clamp_(0, 255).div_(127.5).sub_(1.0)
            with run.autocast():
                parts.append(run.parallel.encode(video)[0].bfloat16())
            at += chunk
            if run.args.smoke and run.device.type == "cuda":
                torch.cuda.synchronize()
                last_chunk = (time.perf_counter() - began) / chunk
        except torch.cuda.OutOfMemoryError:
            if chunk == 1:
                raise
            chunk //= 2
            video = None
            torch.cuda.empty_cache()
            log(f"encode {pool.name}: out of memory, chunk {chunk}")
    latents = torch.cat(parts).contiguous()
    log(f"encode {pool.name}: {tuple(latents.shape)}; host time of rendering {render_seconds:.1f} s")
    if last_chunk:
        log(f"TIMING encode {pool.name}, warm: {1e3 * last_chunk:.2f} ms a clip")
    return latents


def encode(run: Run) -> None:
    """Fill `run.pools` with (latents, caption ids), from the local folder or anew, and set the statistics."""
    path = run.work / "pools.pt"
    start = time.monotonic()
    if path.exists():
        stored = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        run.pools = {name: (z.to(run.device), ids.to(run.device)) for name, (z, ids) in stored.items()}
        log(f"encode: pools read from {path} in {time.monotonic() - start:.1f} s")
    else:
        submit_pools(run)
        for pool in run.plan.pools:
            scenes, ids = gather(run.futures.pop(pool.name))
            begin = time.monotonic()
            latents = encode_pool(run, pool, scenes)
            if run.device.type == "cuda":
                torch.cuda.synchronize()
                torch.cuda.empty_cache()
            run.pools[pool.name] = (latents, ids.to(run.device))
            log(f"TIMING encode {pool.name}: {1e3 * (time.monotonic() - begin) / pool.count:.2f} ms a clip")
        run.numbers["encode_minutes"] = round((time.monotonic() - start) / 60, 2)
        store_pools(run, path)
    if "latents_mean" not in run.meta:
        sample = run.pools[run.plan.sample_pool][0][:2048].float()
        run.meta["latents_mean"] = [round(x, 5) for x in sample.mean((0, 2, 3, 4)).tolist()]
        run.meta["latents_std"] = [round(x, 5) for x in sample.std((0, 2, 3, 4)).tolist()]
        log(f"latents mean {run.meta['latents_mean']} std {run.meta['latents_std']}")
    run.meta["phase"] = "encode"


def store_pools(run: Run, path: Path) -> None:
    """Write the pools for a later call, in the background: training does not wait for the disk."""
    host = {name: (z.cpu(), ids.cpu()) for name, (z, ids) in run.pools.items()}

    def write() -> None:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.save(host, path.with_suffix(".tmp"))
            path.with_suffix(".tmp").replace(path)
            log("pools stored")
        except (OSError, RuntimeError) as error:
            log(f"pools not stored: {error}")

    thread = threading.Thread(target=write)
    thread.start()
    run.savers.append(thread)


# ---------------------------------------------------------------- DiT


class Dit:
    """The transformer, the text encoder, their averages, and one training step."""

    def __init__(self, run: Run) -> None:
        plan, device = run.plan, run.device
        self.run = run
        self.transformer = tiny.build_transformer(plan.sizes)
        self.text = tiny.build_text_encoder(plan.sizes, len(run.tokenizer))
        done = run.meta.get("dit")
        if done:
            run.load_into(self.transformer, "raw.transformer.")
            run.load_into(self.text, "raw.text.")
        self.ema_transformer, self.ema_text = copy.deepcopy(self.transformer), copy.deepcopy(self.text)
        if done:
            run.load_into(self.ema_transformer, "ema.transformer.")
            run.load_into(self.ema_text, "ema.text.")
        for module in (self.transformer, self.text, self.ema_transformer, self.ema_text):
            module.to(device)
        updates = (done or {}).get("step", 0)
        self.emas = [
            tiny.Ema(self.transformer, self.ema_transformer, run.args.ema, updates),
            tiny.Ema(self.text, self.ema_text, run.args.ema, updates),
        ]
        self.modules = [self.transformer.train(), self.text.train()]
        self.parameters = [p for module in self.modules for p in module.parameters() if p.requires_grad]
        self.graphs: dict[Shape, torch.cuda.CUDAGraph] = {}
        cuda = device.type == "cuda"
        self.optimizer = tiny.adamw(
            self.modules, torch.tensor(run.args.lr, device=device) if cuda else run.args.lr, capturable=cuda
        )
        self.loss = torch.zeros((), device=device)
        self.mean = torch.tensor(run.meta["latents_mean"], device=device).view(1, -1, 1, 1, 1)
        self.std = torch.tensor(run.meta["latents_std"], device=device).view(1, -1, 1, 1, 1)
        self.empty = tiny.tokenize(run.tokenizer, [""]).to(device)
        # The last clips of each pool are never trained on, unless a pool is too small (in tests).
        self.held = min(HELD_OUT, len(run.pools[plan.sample_pool][0]) // 3)
        self.compiled = False

    def compile(self) -> None:
        """Compile the blocks: one small graph for all of them, per shape."""
        self.transformer.compile_repeated_blocks(dynamic=False)
        self.compiled = True

    def uncompile(self) -> None:
        """Back to eager blocks, and to the most tested attention."""
        torch.backends.cuda.enable_cudnn_sdp(False)
        for block in self.transformer.blocks:
            block._compiled_call_impl = None
        torch._dynamo.reset()
        self.compiled = False

    def latents(self, pool: str, index: Tensor, frames: int) -> Tensor:
        """Normalised fp32 latents [B, C, T, h, w]; a prefix of a causal latent is the latent of the prefix."""
        return (self.run.pools[pool][0][index][:, :, :frames].float() - self.mean) / self.std

    def step(self, shape: Shape, learn: bool = True) -> Tensor:
        """One optimiser step, or only its gradients; returns the loss on the device, without waiting for it."""
        if learn and shape in self.graphs:
            self.graphs[shape].replay()
        else:
            self._compute(shape, learn)
        if learn:
            for ema in self.emas:
                ema.update()
        return self.loss

    def capture(self, shapes: Sequence[Shape]) -> None:
        """Record the step of every shape as a CUDA graph: the host issues kernels slower than the device runs them.

        Random numbers come from the device's default generator, which graphs advance at each replay. The steps that
        warm up run at a rate of 0, so they change no weight.
        """
        set_lr(self.optimizer, 0.0)
        stream, pool = torch.cuda.Stream(), None
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for shape in shapes:
                for _ in range(2):
                    self._compute(shape, True)
        torch.cuda.current_stream().wait_stream(stream)
        torch.cuda.synchronize()
        for shape in shapes:
            graph = torch.cuda.CUDAGraph()
            self.optimizer.zero_grad(set_to_none=True)
            with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
                self._compute(shape, True)
            pool = graph.pool()
            self.graphs[shape] = graph
        torch.cuda.synchronize()

    def _compute(self, shape: Shape, learn: bool) -> None:
        latents, ids = self.run.pools[shape.pool]
        device, batch = latents.device, shape.batch
        index = torch.randint(len(latents) - self.held, (batch,), device=device)
        x0 = self.latents(shape.pool, index, shape.latent_frames)
        words = ids[index, torch.randint(VARIANTS, (batch,), device=device)]
        drop = torch.rand(batch, 1, device=device) < 0.1
        words = torch.where(drop, self.empty, words)
        sigma = tiny.sample_sigmas(batch, device)
        # no cache of cast weights: it would hold tensors of one graph that another one reads
        with self.run.autocast(cache=False):
            text = tiny.embed_text(self.text, words)
            loss = tiny.flow_loss(self.transformer, text, x0, torch.randn_like(x0), sigma).mean()
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, 1.0, foreach=True)
        self.loss.copy_(loss.detach())
        if not learn:
            return
        # A step whose gradient is not finite is skipped on the device itself.
        self.optimizer.found_inf = (~torch.isfinite(norm)).float()
        self.optimizer.step()

    @torch.no_grad()
    def evaluate(self) -> dict[str, list[float]]:
        """Loss of the averaged weights on held-out clips at fixed noise levels, the same noise every time."""
        result = {}
        generator = torch.Generator(self.run.device).manual_seed(0)
        for pool, (latents, ids) in self.run.pools.items():
            count = min(self.run.plan.eval_batch, self.held)
            index = torch.arange(len(latents) - count, len(latents), device=latents.device)
            x0 = self.latents(pool, index, latents.shape[2])
            noise = torch.randn(x0.shape, generator=generator, device=x0.device)
            losses = []
            with self.run.autocast():
                text = tiny.embed_text(self.ema_text, ids[index, 0])
                for level in (0.3, 0.6, 0.8, 0.95):
                    sigma = torch.full((count,), level, device=x0.device)
                    losses.append(tiny.flow_loss(self.ema_transformer, text, x0, noise, sigma).mean())
            result[pool] = [round(x, 4) for x in torch.stack(losses).tolist()]
        return result

    @torch.no_grad()
    def sample(self) -> tuple[Tensor, list[str]]:
        """Four generated clips [4, 3, F, H, W] in [0, 1] of the averaged weights, and their prompts."""
        prompts = [
            "a red circle bounces on a plain dark background",
            "a large blue star orbits on a plain grey background",
            "a yellow square moves in a straight line on a light checker background",
            "a green triangle zigzags on a plain light background",
        ]
        latents = self.run.pools[self.run.plan.sample_pool][0]
        generator = torch.Generator(self.run.device).manual_seed(1)
        noise = torch.randn(4, *latents.shape[1:], generator=generator, device=self.run.device)
        with self.run.autocast():
            words = tiny.tokenize(self.run.tokenizer, prompts).to(self.run.device)
            text = tiny.embed_text(self.ema_text, words)
            empty = tiny.embed_text(self.ema_text, self.empty)
            z = tiny.euler_sample(self.ema_transformer, text, empty, noise, self.run.plan.sample_steps)
            video = self.run.parallel.decode(z * self.std + self.mean)
        return video.float().add(1).div(2).clamp(0, 1), prompts


def save_strip(run: Run, dit: Dit, stage: int) -> None:
    """Frames of four samples, one row a clip; the stages are stacked in one PNG, which is kept small."""
    import numpy as np
    from PIL import Image

    try:
        start = time.monotonic()
        video, _ = dit.sample()
        frames = torch.linspace(0, video.shape[2] - 1, 5).round().long().tolist()
        rows = [torch.cat([clip[:, f] for f in frames], 2) for clip in video]
        image = torch.cat(rows, 1).mul(255).round().byte().permute(1, 2, 0).cpu().numpy()
        keep = run.work / "strips"
        keep.mkdir(parents=True, exist_ok=True)
        np.save(keep / f"{stage}.npy", image)
        stack = np.concatenate([np.load(path) for path in sorted(keep.glob("*.npy"))])
        run.backup.mkdir(parents=True, exist_ok=True)
        for colours in (128, 48, 16, 6):
            Image.fromarray(stack).quantize(colours).save(run.backup / "samples.png", optimize=True)
            if (run.backup / "samples.png").stat().st_size <= 200_000:
                break
        log(f"dit: samples of stage {stage} in {run.backup / 'samples.png'}, {time.monotonic() - start:.1f} s")
    except Exception as error:
        log(f"dit: no samples: {type(error).__name__}: {error}")


def stage_of(plan: Plan, fraction: float) -> int:
    return next((i for i, (end, _) in enumerate(plan.stages) if fraction < end), len(plan.stages) - 1)


def keep_dit(run: Run, dit: Dit, progress: tiny.Progress) -> None:
    """Copy the weights to the host and save everything."""
    run.meta["dit"] = {
        "step": progress.step,
        "elapsed": progress.elapsed,
        "finished": progress.fraction >= 1.0,
        "steps_by_stage": run.meta.get("dit", {}).get("steps_by_stage", {}),
    }
    run.meta["phase"] = "dit"
    run.set_tensors("raw.transformer.", dit.transformer)
    run.set_tensors("raw.text.", dit.text)
    run.set_tensors("ema.transformer.", dit.ema_transformer)
    run.set_tensors("ema.text.", dit.ema_text)
    run.save()


def first_steps(run: Run, dit: Dit) -> None:
    """Compute the gradients of every batch shape once, so that compilation and any failure come first."""
    shapes = list(dict.fromkeys(shape for _, shapes in run.plan.stages for shape in shapes))
    for shape in shapes:
        begin = time.monotonic()
        try:
            loss = dit.step(shape, learn=False).item()
        except Exception as error:
            if not dit.compiled:
                raise
            log(f"dit: {shape} failed when compiled, going on eagerly: {type(error).__name__}: {str(error)[:400]}")
            dit.uncompile()
            loss = dit.step(shape, learn=False).item()
        log(f"dit: {shape} first step {time.monotonic() - begin:.1f} s, loss {loss:.4f}")
    capture_steps(run, dit, shapes)
    set_lr(dit.optimizer, 0.0)
    for shape in shapes if run.device.type == "cuda" or run.args.smoke else ():
        seconds = timed(run, lambda shape=shape: dit.step(shape), 8 if run.device.type == "cuda" else 1)
        log(f"TIMING dit {shape.pool} T={shape.latent_frames} batch {shape.batch}: {1e3 * seconds:.1f} ms a step")
    if run.device.type == "cuda":
        log(f"dit: peak memory {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB")


def capture_steps(run: Run, dit: Dit, shapes: list[Shape]) -> None:
    """CUDA graphs of all steps; without graphs if that fails."""
    if run.device.type != "cuda" or run.args.no_graph:
        return
    begin = time.monotonic()
    try:
        dit.capture(shapes)
        log(f"dit: CUDA graphs of {len(shapes)} shapes captured in {time.monotonic() - begin:.1f} s")
    except Exception as error:
        log(f"dit: graph capture failed, going on without: {type(error).__name__}: {str(error)[:400]}")
        dit.graphs.clear()
        dit.optimizer.zero_grad(set_to_none=True)
        torch.cuda.synchronize()


def train_dit(run: Run, minutes: float) -> bool:
    """Train the DiT and the text encoder; true when finished."""
    plan, args = run.plan, run.args
    done = run.meta.get("dit", {})
    if done.get("finished"):
        return True
    progress = tiny.Progress(args.steps, minutes, done.get("step", 0), done.get("elapsed", 0.0))
    dit = Dit(run)
    cuda = run.device.type == "cuda"
    with contextlib.ExitStack() as stack:
        if cuda:
            from torch.nn.attention import sdpa_kernel

            order = tiny.pick_attention() if args.attention == "auto" else None
            if order:
                stack.enter_context(sdpa_kernel(order, set_priority=True))
            torch.cuda.empty_cache()
        if cuda and not args.no_compile:
            dit.compile()
        first_steps(run, dit)
        dit_loop(run, dit, progress)
    finished = progress.fraction >= 1.0
    if finished:
        run.numbers.update(
            dit_steps=progress.step,
            dit_minutes=round(progress.elapsed / 60, 2),
            dit_ended_by=progress.ended_by,
            dit_steps_by_stage=run.meta.get("dit", {}).get("steps_by_stage", {}),
            held_out_loss=dit.evaluate(),
            device=torch.cuda.get_device_name() if cuda else "CPU",
        )
        log(f"dit: finished by {progress.ended_by} at step {progress.step}: {run.numbers['held_out_loss']}")
    keep_dit(run, dit, progress)
    save_strip(run, dit, stage_of(plan, progress.fraction))
    return finished


def dit_loop(run: Run, dit: Dit, progress: tiny.Progress) -> None:
    plan, args = run.plan, run.args
    rng = random.Random(progress.step + 17)
    tick = Ticker("dit", progress)
    stage = stage_of(plan, progress.fraction)
    run.meta.setdefault("dit", {}).setdefault("steps_by_stage", {})
    counts = run.meta["dit"]["steps_by_stage"]
    average = None
    checked = saved = time.monotonic()
    while progress.fraction < 1.0 and not run.must_stop():
        now = stage_of(plan, progress.fraction)
        if now != stage:
            log(f"dit: stage {stage} ended at step {progress.step}, held-out loss {dit.evaluate()}")
            keep_dit(run, dit, progress)
            counts = run.meta["dit"]["steps_by_stage"]
            save_strip(run, dit, stage)
            stage, average = now, None
        lr = args.lr * progress.lr_factor()
        set_lr(dit.optimizer, lr)
        shapes = plan.stages[stage][1]
        shape = rng.choices(shapes, [s.weight for s in shapes])[0]
        loss = dit.step(shape)
        average = loss.clone() if average is None else average.lerp(loss, 0.02)
        counts[str(stage)] = counts.get(str(stage), 0) + 1
        progress.advance()
        tick(average, lr, f"stage {stage}")
        # As in the VAE's loop: the host must not run far ahead of the device, or the clock means nothing.
        if progress.step % 10 == 0 and run.device.type == "cuda":
            torch.cuda.current_stream().synchronize()
        if time.monotonic() - checked > args.check_seconds:
            log(f"dit step {progress.step} held-out loss (sigma .3 .6 .8 .95) {dit.evaluate()}")
            checked = time.monotonic()
        if time.monotonic() - saved > args.save_seconds:
            keep_dit(run, dit, progress)
            counts = run.meta["dit"]["steps_by_stage"]
            saved = time.monotonic()


# ---------------------------------------------------------------- export


def fill_card(text: str, numbers: dict[str, Any]) -> str:
    """Replace what stands between `<!-- n:key -->` and `<!-- /n -->` by the measured number, if there is one."""

    def value(match: re.Match[str]) -> str:
        found: Any = numbers
        for key in match[1].split("."):
            found = found.get(key) if isinstance(found, dict) else None
        return f"<!-- n:{match[1]} -->{'not measured' if found is None else found}<!-- /n -->"

    return re.sub(r"<!-- n:([\w.]+) -->.*?<!-- /n -->", value, text, flags=re.S)


def make_scheduler(name: str):
    """UniPC as Wan itself uses it (second order, best at few steps), or Euler; both with the trained shift."""
    from diffusers import FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler

    if name == "euler":
        return FlowMatchEulerDiscreteScheduler(shift=tiny.FLOW_SHIFT)
    return UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=tiny.FLOW_SHIFT)


def export(run: Run) -> Path:
    """Write the averaged weights as a WanPipeline in bf16, its card and its numbers."""
    from diffusers import WanPipeline

    out, sizes = Path(run.args.out), run.plan.sizes
    tokenizer = tiny.wrap_tokenizer(run.meta["tokenizer"])
    vae = tiny.build_vae(sizes, run.meta["latents_mean"], run.meta["latents_std"])
    transformer = tiny.build_transformer(sizes)
    text = tiny.build_text_encoder(sizes, len(tokenizer))
    run.load_into(vae, "vae.")
    run.load_into(transformer, "ema.transformer.")
    run.load_into(text, "ema.text.")
    for module in (vae, transformer, text):
        module.to(torch.bfloat16).eval()
    pipe = WanPipeline(
        tokenizer=tokenizer,
        text_encoder=text,
        vae=vae,
        scheduler=make_scheduler(run.args.scheduler),
        transformer=transformer,
    )
    card = next((p for p in (out / "README.md", Path("assets/tiny-wan/README.md")) if p.exists()), None)
    card_text = card.read_text() if card else ""
    pipe.save_pretrained(out, safe_serialization=True, max_shard_size="11MB")
    plain_class_names(out)
    total = sum(path.stat().st_size for path in out.rglob("*.safetensors"))
    minutes = run.meta.get("spent_before", run.spent())
    numbers = run.numbers | {"weights_mb": round(total / 1e6, 2), "training_minutes": round(minutes, 2)}
    numbers["parameters"] = {
        name: sum(p.numel() for p in module.parameters())
        for name, module in (("vae", vae), ("transformer", transformer), ("text_encoder", text))
    }
    (out / "training.json").write_text(json.dumps(numbers, indent=2) + "\n")
    if card_text:
        (out / "README.md").write_text(fill_card(card_text, numbers))
    log(f"exported to {out}: {total / 1e6:.2f} MB of weights")
    if total > 20e6:
        raise ValueError(f"the weights must stay under 20 MB (got {total / 1e6:.2f} MB); use fewer or thinner layers.")
    return out


def plain_class_names(out: Path) -> None:
    """Name the tokenizer's class as every version of transformers knows it."""
    for path in (out / "model_index.json", out / "tokenizer" / "tokenizer_config.json"):
        path.write_text(path.read_text().replace("TokenizersBackend", "PreTrainedTokenizerFast"))


def check(run: Run, out: Path) -> None:
    """Load the exported folder as a user would and generate one clip."""
    from diffusers import DiffusionPipeline

    pool = next(pool for pool in run.plan.pools if pool.name == run.plan.sample_pool)
    pipe = DiffusionPipeline.from_pretrained(out, local_files_only=True)
    pipe.set_progress_bar_config(disable=True)
    start = time.monotonic()
    video = pipe(
        "a red circle bounces on a plain dark background",
        height=pool.size,
        width=pool.size,
        num_frames=pool.frames,
        num_inference_steps=run.args.check_steps,
        guidance_scale=4.0,
        max_sequence_length=tiny.TEXT_LENGTH,
        generator=torch.Generator().manual_seed(0),
        output_type="pt",
    ).frames
    log(f"check: {tuple(video.shape)}, mean {video.float().mean():.3f}, {time.monotonic() - start:.1f} s")
    if not torch.isfinite(video).all():
        raise FloatingPointError("the exported pipeline generated values that are not finite.")


# ---------------------------------------------------------------- program


def run_all(run: Run) -> bool:
    """Every phase under one wall-clock budget; true when all are finished."""
    args = run.args
    prepare_tokenizer(run)
    if not train_vae(run, args.vae_minutes) or run.must_stop():
        run.save()
        return False
    encode(run)
    run.save()
    left = args.budget_minutes - run.spent() - args.reserve_minutes
    minutes = max(0.02, run.meta.get("dit", {}).get("elapsed", 0.0) / 60 + left)
    log(f"dit: {minutes:.2f} min in all, {left:.2f} left")
    return train_dit(run, minutes)


def run_phase(run: Run) -> bool:
    """The phase that the command names; true when it is finished."""
    args = run.args
    if args.command == "all":
        return run_all(run)
    if args.command == "export":
        out = export(run)
        if args.check:
            check(run, out)
        return True
    prepare_tokenizer(run)
    if args.command != "vae" and not run.meta.get("vae", {}).get("finished"):
        raise ValueError(f"{args.command} needs a finished VAE in {run.work} or {run.backup}; run `vae` first.")
    if not train_vae(run, args.minutes):
        return False
    if args.command == "vae":
        return True
    encode(run)
    run.save()
    return args.command == "encode" or train_dit(run, args.minutes)


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("all", "vae", "encode", "dit", "export"))
    parser.add_argument("--work", default="/tmp/tiny", help="local folder: checkpoint, pools of latents")
    parser.add_argument("--backup", default="/tmp/tiny/backup", help="small folder that a later machine can start from")
    parser.add_argument("--restore", default="", help="a backup to start from when --work and --backup hold nothing")
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoint instead of starting anew")
    parser.add_argument("--smoke", action="store_true", help="seconds-long run of every path")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=0, help="processes that draw scenes; 0: by the CPU count")
    budget = parser.add_argument_group("time")
    budget.add_argument("--minutes", type=float, default=4.0, help="of the one phase that the command names")
    budget.add_argument("--budget-minutes", type=float, default=19.5, help="all: of all calls together")
    budget.add_argument("--stop-after-minutes", type=float, default=1e9, help="of this call, then checkpoint")
    budget.add_argument("--vae-minutes", type=float, default=4.5)
    budget.add_argument("--reserve-minutes", type=float, default=0.15, help="kept back for the last save")
    budget.add_argument("--vae-steps", type=int, default=20000)
    budget.add_argument("--steps", type=int, default=40000)
    budget.add_argument("--check-seconds", type=float, default=60.0, help="between two looks at held-out clips")
    budget.add_argument("--save-seconds", type=float, default=150.0)
    knobs = parser.add_argument_group("training")
    knobs.add_argument("--lr", type=float, default=6e-4)
    knobs.add_argument("--vae-lr", type=float, default=2e-4)
    knobs.add_argument("--kl", type=float, default=1e-5, help="weight of the KL term, mean over latent elements")
    knobs.add_argument("--ema", type=float, default=0.999)
    knobs.add_argument("--attention", choices=("auto", "default"), default="auto")
    knobs.add_argument("--vae-variant", choices=("auto", *VAE_VARIANTS), default="auto")
    knobs.add_argument("--no-graph", action="store_true", help="no CUDA graph of the VAE step")
    knobs.add_argument("--again", action="store_true", help="a second round: keep the weights, restart all schedules")
    knobs.add_argument("--large", action="store_true", help="no stage of 64 pixels and no 17-frame batches")
    knobs.add_argument("--pool-scale", type=float, default=1.0, help="more or fewer clips in every pool of latents")
    knobs.add_argument("--no-compile", action="store_true", help="no torch.compile of the DiT blocks")
    out = parser.add_argument_group("export")
    out.add_argument("--out", default="assets/tiny-wan")
    out.add_argument("--scheduler", choices=("unipc", "euler"), default="unipc")
    out.add_argument("--check", action="store_true", help="load the exported pipeline and generate a clip")
    out.add_argument("--check-steps", type=int, default=8)
    args = parser.parse_args(argv)
    if args.smoke:
        limit_smoke(args)
    return args


def limit_smoke(args: argparse.Namespace) -> None:
    """Few steps; the shapes are timed by themselves."""
    args.vae_steps, args.steps = 4, 12
    args.check_steps = 2
    args.check_seconds = args.save_seconds = 2.0
    args.vae_minutes = args.minutes = 1.0


def make_run(args: argparse.Namespace) -> Run:
    """Workers first: they are forked, so before the first use of the GPU or of any thread pool."""
    count = args.workers or max(1, min(12, (os.cpu_count() or 2) - 2))
    workers = ProcessPoolExecutor(count, multiprocessing.get_context("fork"), initializer=worker_init)
    workers.submit(sample_captions, 0, 1).result()
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    cuda = args.device.startswith("cuda") or (args.device == "auto" and torch.cuda.is_available())
    device = torch.device("cuda" if cuda else "cpu")
    torch.manual_seed(args.seed)
    if cuda:
        set_up_cuda()
    plan = smoke_plan(cuda) if args.smoke else Plan()
    if args.pool_scale != 1.0:
        pools = (replace(p, count=max(2, round(args.pool_scale * p.count / p.chunk)) * p.chunk) for p in plan.pools)
        plan = replace(plan, pools=tuple(pools))
    run = Run(args, large(plan) if args.large else plan, device, workers)
    if args.resume or args.command in ("encode", "dit", "export"):
        run.load()
    else:
        for name in ("checkpoint.pt", "pools.pt"):
            (run.work / name).unlink(missing_ok=True)
    return run


def large(plan: Plan) -> Plan:
    """The plan for weights that have seen 64 pixels: 128 pixels only, in two stages of fewer shapes."""
    _, (_, shapes), (_, last) = plan.stages
    stages = ((0.82, (replace(shapes[0], weight=0.75), replace(shapes[-1], weight=0.25))), (1.0, last))
    return replace(plan, pools=plan.pools[1:], stages=stages)


def set_up_cuda() -> None:
    import torch._dynamo as dynamo

    torch.set_float32_matmul_precision("high")
    torch.backends.cudnn.benchmark = True
    # One block is compiled for each batch shape, and the VAE's norm for each width: more than the default allows.
    dynamo.config.recompile_limit = 64
    dynamo.config.accumulated_recompile_limit = 1024
    log(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, {os.cpu_count()} CPUs")


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    signal.signal(signal.SIGTERM, lambda *_: STOP.set())
    run = make_run(args)
    try:
        finished = run_phase(run)
        for saver in run.savers:
            saver.join()
    finally:
        run.workers.shutdown(wait=True, cancel_futures=True)
    log("finished" if finished else "stopped before the end; go on with --resume")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
