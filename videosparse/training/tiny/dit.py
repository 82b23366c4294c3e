"""The DiT with its text encoder as they are trained: weights, averages, one step, samples."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from videosparse.training.tiny.binding import binding_loss, build_reader, motions_right
from videosparse.training.tiny.models import build_text_encoder, build_transformer
from videosparse.training.tiny.objectives import euler_sample, flow_error, object_weight, sample_sigmas
from videosparse.training.tiny.optimizing import Ema, Muon, adamw, block_matrices, set_lr
from videosparse.training.tiny.plan import HELD_OUT, Shape
from videosparse.training.tiny.pools import VARIANTS
from videosparse.training.tiny.state import Run
from videosparse.training.tiny.text import embed_text, tokenize
from videosparse.training.tiny.update import Update, record


class Batch(NamedTuple):
    """Normalised latents fp32 [B, C, T, h, w], caption ids [B, 48], noise like the latents, its level [B] in 0..1, the
    weights of the error [B, 1, T, h, w], and the captions' `motion_marks` [B, 2, 2]."""

    x0: Tensor
    words: Tensor
    noise: Tensor
    sigma: Tensor
    weight: Tensor
    marks: Tensor


class Dit:
    """The transformer, the text encoder, their averages, and one training step.

    `reader` is what the auxiliary loss of `binding` reads motions with, None without that loss.
    """

    def __init__(self, run: Run) -> None:
        plan, device = run.plan, run.device
        self.run = run
        self.transformer = build_transformer(plan.sizes)
        self.text = build_text_encoder(plan.sizes, len(run.tokenizer))
        self.reader = build_reader(plan.sizes.text_dim) if run.args.binding else None
        done = run.meta.get("dit")
        if done:
            run.load_into(self.transformer, "raw.transformer.")
            run.load_into(self.text, "raw.text.")
            if self.reader is not None and any(name.startswith("raw.reader.") for name in run.tensors):
                run.load_into(self.reader, "raw.reader.")
        trained = [self.transformer, self.text, *([] if self.reader is None else [self.reader])]
        run.ranks.reunite([p for module in trained for p in module.parameters()])
        self.ema_transformer, self.ema_text = copy.deepcopy(self.transformer), copy.deepcopy(self.text)
        if done:
            run.load_into(self.ema_transformer, "ema.transformer.")
            run.load_into(self.ema_text, "ema.text.")
        for module in (*trained, self.ema_transformer, self.ema_text):
            module.to(device)
        updates = (done or {}).get("step", 0)
        self.emas = [
            Ema(self.transformer, self.ema_transformer, run.args.ema, updates),
            Ema(self.text, self.ema_text, run.args.ema, updates),
        ]
        self.modules = [module.train() for module in trained]
        self.parameters = [p for module in self.modules for p in module.parameters() if p.requires_grad]
        self.graphs: dict[Shape, torch.cuda.CUDAGraph] = {}
        cuda = device.type == "cuda"
        # a captured graph reads its rates from tensors
        lr, matrix_lr = (torch.tensor(x, device=device) if cuda else x for x in (run.args.lr, run.args.matrix_lr))
        matrices = block_matrices(self.transformer) if run.args.optimizer == "muon" else []
        rest = adamw(self.modules, lr, capturable=cuda, without=matrices)
        self.optimizers: list[tuple[torch.optim.Optimizer, float]] = [(rest, run.args.lr)]
        if matrices:
            self.optimizers.append((Muon(matrices, matrix_lr), run.args.matrix_lr))
        self.update = Update(self.parameters, [optimizer for optimizer, _ in self.optimizers], run.ranks)
        self.mean = torch.tensor(run.meta["latents_mean"], device=device).view(1, -1, 1, 1, 1)
        self.std = torch.tensor(run.meta["latents_std"], device=device).view(1, -1, 1, 1, 1)
        self.empty = tokenize(run.tokenizer, [""]).to(device)
        # The last clips of each pool are never trained on, unless a pool is too small (in tests).
        self.held = min(HELD_OUT, len(run.pools[plan.sample_pool].latents) // 3)
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

    def set_lr(self, factor: float) -> None:
        """Set the rates of everything that is trained to this share of their highest."""
        for optimizer, highest in self.optimizers:
            set_lr(optimizer, factor * highest)

    def latents(self, pool: str, index: Tensor, frames: int) -> Tensor:
        """Normalised fp32 latents [B, C, T, h, w]; a prefix of a causal latent is the latent of the prefix."""
        return (self.run.pools[pool].latents[index][:, :, :frames].float() - self.mean) / self.std

    def step(self, shape: Shape, learn: bool = True) -> Tensor:
        """One optimiser step of all processes, or only this one's gradients.

        Returns the mean loss of the processes on the device, without waiting for it.
        """
        if learn and shape in self.graphs:
            self.graphs[shape].replay()
        else:
            self._backward(shape)
        if learn:
            self.update()
            for ema in self.emas:
                ema.update()
        return self.update.loss

    def capture(self, shapes: Sequence[Shape]) -> None:
        """Record the gradients of every shape, and the update, as CUDA graphs: a host is slower than its device.

        Between the two the gradients of all processes are added up. Random numbers come from the device's default
        generator, which graphs advance at each replay. The steps that warm up run at a rate of 0, so they change no
        weight; they are steps of all processes, since they do change the averages of the optimisers.
        """
        self.set_lr(0.0)
        stream, pool = torch.cuda.Stream(), None  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for shape in shapes:
                for _ in range(2):
                    self._backward(shape)
                    self.update()
        torch.cuda.current_stream().wait_stream(stream)
        torch.cuda.synchronize()
        for shape in shapes:
            self.graphs[shape] = record(partial(self._backward, shape), stream, pool)
            pool = self.graphs[shape].pool()
        self.update.capture(stream, pool)
        torch.cuda.synchronize()

    def forget_graphs(self) -> None:
        """Go on without graphs."""
        self.graphs.clear()
        self.update.graph = None

    def draw(self, shape: Shape) -> Batch:
        """A batch of this process: clips of its pools, one of their captions or none, noise and its level."""
        pool = self.run.pools[shape.pool]
        device, count = pool.latents.device, shape.batch
        index = torch.randint(len(pool.latents) - self.held, (count,), device=device)
        x0 = self.latents(shape.pool, index, shape.latent_frames)
        variant = torch.randint(VARIANTS, (count,), device=device)
        words, marks = pool.ids[index, variant], pool.marks[index, variant]
        drop = torch.rand(count, 1, device=device) < 0.1
        words, marks = torch.where(drop, self.empty, words), marks.masked_fill(drop[..., None], -1)
        sigma = sample_sigmas(count, device, shift=self.run.args.shift)
        weight = object_weight(pool.objects[index][:, :, : shape.latent_frames], sigma, self.run.args.object_weight)
        return Batch(x0, words, torch.randn_like(x0), sigma, weight, marks)

    def _backward(self, shape: Shape) -> None:
        """Loss and gradients of a batch of this process."""
        batch = self.draw(shape)
        # no cache of cast weights: it would hold tensors of one graph that another one reads
        with self.run.autocast(cache=False):
            text = embed_text(self.text, batch.words)
            loss = (flow_error(self.transformer, text, batch.x0, batch.noise, batch.sigma) * batch.weight).mean()
            if self.reader is not None:
                loss = loss + self.run.args.binding * binding_loss(self.reader, text, batch.marks)
        self.update.backward(loss)

    @torch.no_grad()
    def evaluate(self) -> dict[str, list[float]]:
        """Loss of the averaged weights on held-out clips at fixed noise levels, the same noise every time.

        Per pool over all cells, and, as `<pool> objects`, over cells in the share that objects cover. With the loss of
        `binding`, as `<pool> motions`, also the share of motions that are read right.
        """
        result = {}
        generator = torch.Generator(self.run.device).manual_seed(0)
        for name, pool in self.run.pools.items():
            count = min(self.run.plan.eval_batch, self.held)
            index = torch.arange(len(pool.latents) - count, len(pool.latents), device=pool.latents.device)
            x0 = self.latents(name, index, pool.latents.shape[2])
            share = pool.objects[index].float()
            noise = torch.randn(x0.shape, generator=generator, device=x0.device)
            losses = []
            with self.run.autocast():
                text = embed_text(self.ema_text, pool.ids[index, 0])
                for level in (0.3, 0.6, 0.8, 0.95):
                    sigma = torch.full((count,), level, device=x0.device)
                    error = flow_error(self.ema_transformer, text, x0, noise, sigma)
                    losses.append(torch.stack([error.mean(), (error * share).mean() / share.mean()]))
            plain, objects = torch.stack(losses, 1).tolist()
            result[name] = [round(x, 4) for x in plain]
            result[f"{name} objects"] = [round(x, 4) for x in objects]
            if self.reader is not None:
                with self.run.autocast():
                    right = motions_right(self.reader, text, pool.marks[index, 0])
                result[f"{name} motions"] = [round(right.item(), 4)]
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
        latents = self.run.pools[self.run.plan.sample_pool].latents
        generator = torch.Generator(self.run.device).manual_seed(1)
        noise = torch.randn(4, *latents.shape[1:], generator=generator, device=self.run.device)
        with self.run.autocast():
            words = tokenize(self.run.tokenizer, prompts).to(self.run.device)
            text = embed_text(self.ema_text, words)
            empty = embed_text(self.ema_text, self.empty)
            z = euler_sample(self.ema_transformer, text, empty, noise, self.run.plan.sample_steps)
            video = self.run.parallel.decode(z * self.std + self.mean)
        return video.float().add(1).div(2).clamp(0, 1), prompts
