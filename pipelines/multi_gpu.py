"""Several GPUs: one video on all of them (Ulysses), or a video on each.

    torchrun --nproc-per-node 2 pipelines/multi_gpu.py "a cat surfing" --frames 161
    torchrun --nproc-per-node 8 pipelines/multi_gpu.py --prompts prompts.txt --output videos

One video: every GPU holds a part of its tokens; for attention they exchange tokens for heads, whose number must divide
by that of the GPUs. Every method works, and memory for activations falls with the number of GPUs.
A prompt file: every GPU has the whole model and makes its own videos; what is there already is not made again.
"""

from videosparse.program import run_program

import argparse

import torch
from accelerate import PartialState
from diffusers import DiffusionPipeline

import videosparse
from videosparse import AdaSpaProcessor, DenseProcessor, PAROProcessor, RadialProcessor
from videosparse.generation import find_model, stream_to, video_place
from videosparse.generation.batch import plan_batch, run_batch
from videosparse.generation.runfile import merge, read_prompts, request_from

PROCESSORS = {"radial": RadialProcessor, "adaspa": AdaSpaProcessor, "paro": PAROProcessor, "dense": DenseProcessor}


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("prompt", nargs="?")
    parser.add_argument("--prompts", help="instead: a file, a prompt a line, which may end in --w --h --f --s --seed")
    parser.add_argument("--model", default="Wan-AI/Wan2.1-T2V-14B-Diffusers", help="folder or hub id")
    parser.add_argument("--method", choices=PROCESSORS, default="radial")
    parser.add_argument("--frames", type=int, default=81)
    parser.add_argument("--height", type=int, default=720)
    parser.add_argument("--width", type=int, default=1280)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--fps", type=float, default=16)
    parser.add_argument("--output", help="an .mp4 file or a folder, with --prompts a folder; outputs/ unless said")
    parser.add_argument("--overwrite", action="store_true", help="replace existing files")
    args = parser.parse_args()
    if (args.prompt is None) == (args.prompts is None):
        parser.error("give a prompt, or --prompts FILE")
    return args


def one_video(args: argparse.Namespace, state: PartialState) -> None:
    # names and sizes are checked before anything is loaded
    place = video_place(args.output, args.prompt, args.seed, args.method, overwrite=args.overwrite)
    find_model(args.model).grid(args.frames, args.height, args.width)
    dtype = torch.bfloat16 if state.device.type == "cuda" else torch.float32
    pipe = DiffusionPipeline.from_pretrained(args.model, dtype={"default": dtype, "vae": torch.float32})
    if not type(pipe).__name__.startswith("Wan"):
        pipe.vae.enable_tiling()
    pipe.to(state.device)
    pipe.set_progress_bar_config(disable=not state.is_main_process)
    processor = PROCESSORS[args.method]()
    pipe.set_attn_processor(processor)
    videosparse.parallelize(pipe)
    # the same seed everywhere: ranks begin with the same noise, and each takes its part of it
    generator = torch.Generator().manual_seed(args.seed)
    sizes = {"num_frames": args.frames, "height": args.height, "width": args.width}
    call = {"prompt": args.prompt, **sizes, "num_inference_steps": args.steps, "generator": generator}
    if state.is_main_process:
        with stream_to(pipe, place, fps=args.fps) as video:
            pipe(**call)
        print(processor.report())
        print(video.path)
    else:
        pipe(**call, output_type="latent")  # all ranks denoise, the first one decodes


def many_videos(args: argparse.Namespace, state: PartialState) -> None:
    values = {name: getattr(args, name) for name in ("model", "method", "frames", "height", "width", "steps", "seed")}
    values |= {"device": str(state.device), "fps": args.fps}
    lines = read_prompts(args.prompts)
    requests = [request_from(merge([values, line.values, {"prompt": line.prompt}])) for line in lines]
    labels = [f"{args.prompts}, line {line.number}" for line in lines]
    batch = plan_batch(requests, args.output, overwrite=args.overwrite, labels=labels)
    with state.split_between_processes(list(range(len(requests)))) as own:
        run_batch(batch, lambda number, made, paths: print(paths[".mp4"], flush=True), numbers=own)


def main() -> None:
    args = parse()
    state = PartialState(cpu=not torch.cuda.is_available())
    if args.prompts is None:
        one_video(args, state)
    else:
        many_videos(args, state)
    state.destroy_process_group()


if __name__ == "__main__":
    # sizes, names, files and memory, as Diffusers, torch and videosparse tell them; on every rank: the first to end
    # takes the others along
    run_program(main, (ValueError, OSError, RuntimeError), "Interrupted; no file is left half-written.")
