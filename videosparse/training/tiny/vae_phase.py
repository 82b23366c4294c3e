"""First phase: train the VAE, with a CUDA graph of the whole step where there is a GPU."""

from __future__ import annotations

import copy
import logging
import random
import time
from collections.abc import Callable, Mapping, Sequence

import torch
from diffusers import AutoencoderKLWan
from torch import Tensor

from videosparse.training.tiny.models import build_vae
from videosparse.training.tiny.objectives import object_mask, psnr, vae_loss
from videosparse.training.tiny.optimizing import Progress, Ticker, adamw, set_lr, timed
from videosparse.training.tiny.parallel_vae import ParallelVae
from videosparse.training.tiny.pools import gather, render_uint8, submit, submit_pools, to_video
from videosparse.training.tiny.ranks import REUNITE_STEPS, Ranks
from videosparse.training.tiny.state import Run
from videosparse.training.tiny.update import Update, record

VAE_VARIANTS = ("first-fused", "last-fused", "first-eager", "last-eager")
logger = logging.getLogger(__name__)


def train_vae(run: Run, minutes: float) -> bool:
    """Train the VAE; true when it is finished. Leaves `run.vae` and `run.parallel`."""
    plan, args = run.plan, run.args
    done = run.meta.get("vae", {})
    run.vae = build_vae(plan.sizes).to(run.device)
    if done:
        run.load_into(run.vae, "vae.")
    if done.get("finished"):
        finish_vae(run)
        return True
    run.ranks.reunite(list(run.vae.parameters()))
    sizes = [size for size, _ in plan.vae_batches]
    run.drop_stored_pools()
    seed = vae_seed(run)
    futures = {size: submit(run, seed + i, plan.vae_clips + plan.vae_check) for i, size in enumerate(sizes)}
    submit_pools(run)
    pools, held = {}, {}
    for size in sizes:
        clips = render_uint8(run, gather(futures[size])[0], plan.vae_frames, size)
        held[size], pools[size] = clips[: plan.vae_check], clips[plan.vae_check :]
    logger.info(f"vae: {plan.vae_clips} clips of each of {sizes} pixels rendered")
    variant = choose_vae_variant(run, run.vae, pools)
    model = vae_variant(run, run.vae, variant)
    optimizer = make_vae_optimizer(run, [run.vae])
    update = Update(list(run.vae.parameters()), [optimizer], run.ranks)
    progress = Progress(args.vae_steps, minutes, done.get("step", 0), done.get("elapsed", 0.0), warmup=100)
    steps = {size: VaeStep(run, model, update, pools[size], batch) for size, batch in plan.vae_batches}
    vae_warm_up(run, steps, optimizer)
    if args.smoke:
        time_vae(run, steps)
    run.meta["vae"] = describe_vae(run, variant)
    vae_loop(run, optimizer, progress, steps, lambda: vae_psnr(run, model, held), keep_vae)
    apart = run.ranks.reunite(update.parameters)
    logger.info(f"vae: weights of {run.ranks.size} processes were {apart:.1e} apart")
    finished = progress.fraction >= 1.0
    keep_vae(run, progress, finished)
    if finished:
        if run.ranks.first:
            run.numbers["vae_psnr"] = told = vae_psnr(run, model, held)
            logger.info(f"vae: finished by {progress.ended_by} at step {progress.step}, PSNR {told} dB")
        finish_vae(run)
    run.save()
    return finished


def vae_seed(run: Run) -> int:
    """Where the seeds of the VAE's scenes begin: others in every round, and in every process."""
    return 11 + 10 * run.ranks.rank + 1000 * len(run.meta.get("rounds", []))


def describe_vae(run: Run, variant: str) -> dict[str, object]:
    """What the state and the model card tell of this phase, whatever its step."""
    how = f"{run.plan.vae_frames} frames, objects weighing {1 + run.args.vae_object_weight:g} times as much"
    return {"variant": variant, "lr": run.args.vae_lr, "how": how}


def keep_vae(run: Run, progress: Progress, finished: bool) -> None:
    """Copy weights and step to what the next save writes."""
    run.meta["vae"] |= {"step": progress.step, "elapsed": progress.elapsed, "finished": finished}
    run.meta["phase"] = "vae"
    run.set_tensors("vae.", run.vae)


def choose_vae_variant(run: Run, vae: AutoencoderKLWan, pools: dict[int, Tensor]) -> str:
    """The fastest variant that runs, timed over five steps of the largest shape on a copy of the weights.

    All processes take what is fastest in the first.
    """
    if run.args.vae_variant != "auto" or run.device.type != "cuda":
        return "first-eager" if run.args.vae_variant == "auto" else str(run.args.vae_variant)
    size, batch = run.plan.vae_batches[-1]
    times: dict[str, float] = {}
    trial: AutoencoderKLWan | None
    model: ParallelVae | None
    step: VaeStep | None
    update: Update | None
    for name in ("first-fused", "last-fused", "first-eager"):
        if name == "first-eager" and times:
            break
        try:
            trial = copy.deepcopy(vae)
            # before the update, whose gradients are laid out as the weights are
            model = vae_variant(run, trial, name)
            # by itself: a variant may fail in one process alone
            update = Update(list(trial.parameters()), [make_vae_optimizer(run, [trial])], Ranks())
            step = VaeStep(run, model, update, pools[size], batch)
            begin = time.perf_counter()
            for i in range(8):
                if i == 3:
                    torch.cuda.synchronize()
                    start = time.perf_counter()
                step()
            torch.cuda.synchronize()
            times[name] = (time.perf_counter() - start) / 5
            logger.info(f"vae variant {name}: {1e3 * times[name]:.1f} ms a step, set up in {start - begin:.1f} s")
        except Exception as error:
            logger.info(f"vae variant {name} failed: {type(error).__name__}: {str(error)[:300]}")
        trial = model = step = update = None
        torch.cuda.empty_cache()
    best = min(times, key=times.__getitem__)
    return VAE_VARIANTS[round(run.ranks.of_first(VAE_VARIANTS.index(best)))]


def vae_variant(run: Run, vae: AutoencoderKLWan, name: str) -> ParallelVae:
    """The model set up as a variant says: memory format, and whether norm and activation are one kernel."""
    cuda = run.device.type == "cuda"
    layout = torch.channels_last_3d if name.startswith("last") else torch.contiguous_format
    for module in vae.modules():
        if isinstance(module, torch.nn.Conv3d):
            module.weight.data = module.weight.data.contiguous(memory_format=layout)
    return ParallelVae(vae, fused=cuda and name.endswith("fused"))


def make_vae_optimizer(run: Run, modules: Sequence[torch.nn.Module]) -> torch.optim.AdamW:
    """AdamW whose rate is a tensor on a GPU, so that a captured graph reads it."""
    cuda = run.device.type == "cuda"
    lr = torch.tensor(run.args.vae_lr, device=run.device) if cuda else run.args.vae_lr
    return adamw(modules, lr, capturable=cuda)


class ClipStep:
    """One optimiser step on random clips of a pool: eager at first, its gradients from a CUDA graph after `capture`.

    What a step reads are static inputs, so nothing is drawn inside the graph.
    """

    def __init__(self, run: Run, model: ParallelVae, update: Update, pool: Tensor, batch: int) -> None:
        """`pool` is uint8 [N, 3, F, S, S] on the device."""
        self.run, self.model, self.update, self.pool = run, model, update, pool
        self.clips = torch.zeros_like(pool[:batch])
        self.graph: torch.cuda.CUDAGraph | None = None

    def _draw(self, index: Tensor) -> None:
        """Set the static inputs to the clips of this index, and what belongs to them."""
        self.clips.copy_(self.pool[index])

    def _loss(self) -> Tensor:
        raise NotImplementedError

    def _backward(self) -> None:
        with self.run.autocast(cache=False):
            loss = self._loss()
        self.update.backward(loss)

    def __call__(self) -> Tensor:
        """One step on random clips of the pool; returns the loss, the mean of all processes, on the device."""
        self._draw(torch.randint(len(self.pool), (len(self.clips),), device=self.pool.device))
        if self.graph is None:
            self._backward()
        else:
            self.graph.replay()
        self.update()
        return self.update.loss

    def capture(self, stream: torch.cuda.Stream) -> None:
        """Record the gradients as a graph, on the stream on which they were warmed up."""
        self.graph = record(self._backward, stream, None)


class VaeStep(ClipStep):
    """A step of the whole VAE, on clips and the noise of their posteriors."""

    def __init__(self, run: Run, model: ParallelVae, update: Update, pool: Tensor, batch: int) -> None:
        super().__init__(run, model, update, pool, batch)
        _, _, frames, height, width = pool.shape
        shape = (batch, run.plan.sizes.z_dim, 1 + (frames - 1) // 4, height // 4, width // 4)
        self.noise = torch.zeros(shape, device=pool.device)

    def _draw(self, index: Tensor) -> None:
        super()._draw(index)
        self.noise.normal_()

    def _loss(self) -> Tensor:
        args = self.run.args
        return vae_loss(self.model, to_video(self.clips), self.noise, args.kl, args.vae_object_weight)


def vae_warm_up(run: Run, steps: Mapping[int, ClipStep], optimizer: torch.optim.Optimizer) -> None:
    """A few real steps, then graphs; a single process goes on without graphs if capture fails."""
    set_lr(optimizer, run.args.vae_lr / 20)
    if run.device.type != "cuda" or run.args.no_graph:
        return
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(4):
            for step in steps.values():
                step()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    try:
        for step in steps.values():
            step.capture(stream)
        step.update.capture(stream, None)
        for step in steps.values():
            step()
        torch.cuda.synchronize()
        logger.info("vae: CUDA graphs captured")
    except Exception as error:
        if run.ranks.size > 1:
            # the others may wait for a sum that this process never made
            raise
        logger.info(f"vae: graph capture failed, going on eagerly: {type(error).__name__}: {str(error)[:300]}")
        for step in steps.values():
            step.graph = step.update.graph = None
        torch.cuda.synchronize()


def time_vae(run: Run, steps: Mapping[int, ClipStep], name: str = "vae") -> None:
    """Log the time of a step of every batch shape."""
    for size, step in steps.items():
        seconds = timed(run.device, step, 10)
        mode = "graph" if step.graph is not None else "eager"
        logger.info(f"TIMING {name} {size}x{size} batch {len(step.clips)} {mode}: {1e3 * seconds:.1f} ms a step")


def vae_loop(
    run: Run,
    optimizer: torch.optim.Optimizer,
    progress: Progress,
    steps: Mapping[int, ClipStep],
    look: Callable[[], dict[str, float]],
    keep: Callable[[Run, Progress, bool], None],
    name: str = "vae",
) -> None:
    """Step until the phase or the call ends; the first process looks at held-out clips and saves now and then.

    `look` gives their PSNR, `keep` copies weights and step (and whether that is the end) to what the next save writes.
    """
    tick = Ticker(name, progress)
    rng = random.Random(progress.step)
    checked = saved = time.monotonic()
    sizes = list(steps)
    while run.goes_on(progress):
        lr = run.args.vae_lr * progress.lr_factor()
        set_lr(optimizer, lr)
        # Small frames are cheaper, large ones are what the model is used at.
        size = rng.choices(sizes, sizes)[0]
        loss = steps[size]()
        progress.advance()
        if progress.step % REUNITE_STEPS == 0:
            run.ranks.reunite(list(run.vae.parameters()))
        tick(loss, lr, f"({size}px)")
        # The host runs ahead of the device; without this the clock would be read far too early.
        if progress.step % 20 == 0 and run.device.type == "cuda":
            torch.cuda.current_stream().synchronize()
        if run.ranks.first and time.monotonic() - checked > run.args.check_seconds:
            logger.info(f"{name} step {progress.step} PSNR {look()} dB")
            checked = time.monotonic()
            if not torch.isfinite(loss):
                raise FloatingPointError("the VAE's loss is not finite; lower --vae-lr.")
        if run.ranks.first and time.monotonic() - saved > run.args.save_seconds:
            keep(run, progress, False)
            run.save()
            saved = time.monotonic()


def vae_psnr(run: Run, model: ParallelVae, held: dict[int, Tensor]) -> dict[str, float]:
    """PSNR in dB on held-out clips, by size, without sampling the posterior; and that of objects and their rims."""
    result: dict[str, float] = {}
    with torch.no_grad(), run.autocast():
        for size, clips in held.items():
            values = []
            for part in torch.split(clips, 8):
                video = to_video(part)
                decoded = model.decode(model.encode(video)[0])
                values.append(torch.stack([psnr(decoded, video), psnr(decoded, video, object_mask(video))]))
            whole, objects = torch.stack(values).mean(0).tolist()
            result |= {str(size): round(whole, 2), f"{size}_objects": round(objects, 2)}
    return result


def finish_vae(run: Run) -> None:
    """Freeze the VAE and set it up for encoding."""
    run.vae.requires_grad_(False).eval()
    for parameter in run.vae.parameters():
        parameter.grad = None
    # Weights of an exported pipeline come without the variant that trained them.
    name = run.meta["vae"].get("variant", run.args.vae_variant)
    run.parallel = vae_variant(run, run.vae, "first-eager" if name == "auto" else name)
    if run.device.type == "cuda":
        torch.cuda.empty_cache()
