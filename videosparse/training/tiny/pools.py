"""Scenes and captions, drawn in other processes, and the pools of latents that the DiT is trained on."""

from __future__ import annotations

import logging
import multiprocessing
import os
import random
import signal
import threading
import time
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from videosparse.files import write_state
from videosparse.synthetic.captions import caption
from videosparse.synthetic.render import render
from videosparse.synthetic.scene import Scene, sample_scene
from videosparse.training.tiny.binding import motion_marks
from videosparse.training.tiny.plan import Clip
from videosparse.training.tiny.state import Latents, Run
from videosparse.training.tiny.text import tokenize, train_tokenizer, wrap_tokenizer

# Captions of one clip: a new one for each use.
VARIANTS = 4
logger = logging.getLogger(__name__)


def worker_init() -> None:
    """Set up a process that draws scenes."""
    # Each worker works alone; a pool of threads inherited through the fork would never answer.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    torch.set_num_threads(1)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """A training that is killed cannot tell its workers, which would wait for work for ever."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def sample_captions(seed: int, count: int) -> list[str]:
    """Captions of scenes of the training split."""
    rng = random.Random(seed)
    return [caption(sample_scene(rng, split="train"), rng) for _ in range(count)]


def draw_scenes(seed: int, count: int, tokenizer_state: str | None, pairs: float) -> tuple[list[Scene], Any]:
    """Scenes, and of several captions of each, a new one for each use of a clip, the ids [count, 4, 48] and the
    `motion_marks` [count, 4, 2, 2].

    A share `pairs` of the scenes has two objects.
    """
    rng = random.Random(seed)
    scenes = [sample_scene(rng, split="train", objects=1 + (rng.random() < pairs)) for _ in range(count)]
    if tokenizer_state is None:
        return scenes, None
    texts = [caption(scene, rng) for scene in scenes for _ in range(VARIANTS)]
    tokenizer = wrap_tokenizer(tokenizer_state)
    found = tokenize(tokenizer, texts), motion_marks(tokenizer, texts)
    # Plain arrays travel between processes; tensors would need a shared-memory handle.
    return scenes, tuple(x.view(count, VARIANTS, *x.shape[1:]).numpy() for x in found)


def submit(run: Run, seed: int, count: int, tokenizer_state: str | None = None) -> list[Future[Any]]:
    """Begin to draw `count` scenes in the workers, in shares."""
    share = 512
    sizes = [min(share, count - at) for at in range(0, count, share)]
    first = 1_000_003 * seed
    return [run.workers.submit(draw_scenes, first + i, n, tokenizer_state, run.args.pairs) for i, n in enumerate(sizes)]


def gather(futures: list[Future[Any]]) -> tuple[list[Scene], list[Tensor]]:
    """Wait for what `submit` began: scenes, and ids and marks of their captions; none without a tokenizer."""
    results = [future.result() for future in futures]
    scenes = [scene for part, _ in results for scene in part]
    told = [arrays for _, arrays in results if arrays is not None]
    return scenes, [torch.cat([torch.from_numpy(x) for x in parts]) for parts in zip(*told, strict=True)]


def prepare_tokenizer(run: Run) -> None:
    """Set the tokenizer of the run, trained on captions the first time."""
    if "tokenizer" not in run.meta:
        share = max(1, run.plan.captions // 10)
        futures = [run.workers.submit(sample_captions, 7_000_000 + i, share) for i in range(10)]
        texts = [text for future in futures for text in future.result()]
        tokenizer = train_tokenizer(texts, run.plan.sizes.vocab)
        run.meta["tokenizer"] = tokenizer.backend_tokenizer.to_str()
        longest = int(tokenize(tokenizer, texts).ne(0).sum(1).max())
        logger.info(f"tokenizer: {len(tokenizer)} tokens, longest caption {longest}; e.g. {texts[0]!r}")
    run.tokenizer = wrap_tokenizer(run.meta["tokenizer"])


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


def submit_pools(run: Run) -> None:
    """Start drawing the scenes and captions of all pools, in the background, unless that has been done."""
    for i, pool in enumerate(run.plan.pools):
        if pool.name not in run.futures:
            # other scenes in every round, and in every process
            seed = 101 + i + 10 * run.ranks.rank + 1000 * len(run.meta.get("rounds", []))
            run.futures[pool.name] = submit(run, seed, pool.count, run.meta["tokenizer"])


def object_share(video: Tensor, cells: torch.Size) -> Tensor:
    """Mean saturation [B, 1, T, h, w] in 0..1 of the pixels of each latent cell of a video [B, 3, F, S, S] in [-1, 1].

    The first latent frame is one pixel frame, each other one is four.
    """
    saturation = (video.amax(1) - video.amin(1)).div_(2)
    frames, height, width = cells[-3:]
    saturation = F.adaptive_avg_pool2d(saturation, (height, width))
    first, rest = saturation[:, :1], saturation[:, 1:]
    groups = rest.reshape(len(rest), frames - 1, -1 if frames > 1 else 1, height, width)
    return torch.cat([first, groups.mean(2)], 1)[:, None]


@torch.no_grad()
def encode_pool(run: Run, pool: Clip, scenes: list[Scene]) -> tuple[Tensor, Tensor]:
    """Posterior means [N, C, T, h, w] and `object_share`, bf16. The chunk is halved if memory runs out."""
    chunk, parts, shares, at = pool.chunk, [], [], 0
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
            shares.append(object_share(video, parts[-1].shape).bfloat16())
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
            logger.info(f"encode {pool.name}: out of memory, chunk {chunk}")
    latents = torch.cat(parts).contiguous()
    logger.info(f"encode {pool.name}: {tuple(latents.shape)}; host time of rendering {render_seconds:.1f} s")
    if last_chunk:
        logger.info(f"TIMING encode {pool.name}, warm: {1e3 * last_chunk:.2f} ms a clip")
    return latents, torch.cat(shares)


def encode(run: Run) -> None:
    """Fill `run.pools` with (latents, caption ids), from the local folder or anew, and set the statistics."""
    path = run.pools_path
    start = time.monotonic()
    if path.exists():
        stored = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        run.pools = {name: Latents(*(x.to(run.device) for x in parts)) for name, parts in stored.items()}
        logger.info(f"encode: pools read from {path} in {time.monotonic() - start:.1f} s")
    else:
        submit_pools(run)
        for pool in run.plan.pools:
            scenes, (ids, marks) = gather(run.futures.pop(pool.name))
            begin = time.monotonic()
            latents, objects = encode_pool(run, pool, scenes)
            if run.device.type == "cuda":
                torch.cuda.synchronize()
                torch.cuda.empty_cache()
            run.pools[pool.name] = Latents(latents, ids.to(run.device), objects, marks.to(run.device))
            logger.info(f"TIMING encode {pool.name}: {1e3 * (time.monotonic() - begin) / pool.count:.2f} ms a clip")
        store_pools(run, path)
    if "latents_mean" not in run.meta:
        sample = run.pools[run.plan.sample_pool].latents[:2048].float()
        statistics = torch.stack([sample.mean((0, 2, 3, 4)), sample.std((0, 2, 3, 4))]).cpu()
        run.ranks.reunite([statistics])
        run.meta["latents_mean"], run.meta["latents_std"] = ([round(x, 5) for x in row.tolist()] for row in statistics)
        logger.info(f"latents mean {run.meta['latents_mean']} std {run.meta['latents_std']}")
    run.meta["phase"] = "encode"


def store_pools(run: Run, path: Path) -> None:
    """Write the pools for a later call, in the background: training does not wait for the disk."""
    host = {name: tuple(x.cpu() for x in pool) for name, pool in run.pools.items()}

    def write() -> None:
        try:
            write_state(host, path)
            logger.info("pools stored")
        except OSError as error:
            logger.info(f"pools not stored: {error}")

    thread = threading.Thread(target=write)
    thread.start()
    run.savers.append(thread)
