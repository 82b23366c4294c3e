"""Several GPUs: one video on all of them (Ulysses), or a video on each.

    torchrun --nproc-per-node 2 pipelines/multi_gpu.py "a cat surfing"
    torchrun --nproc-per-node 2 pipelines/multi_gpu.py "a cat surfing" --frames 161 --lora wan-161.safetensors
    torchrun --nproc-per-node 8 pipelines/multi_gpu.py --prompts outputs/prompts.txt --output outputs/videos

One video: every GPU holds a part of its tokens; for attention they exchange tokens for heads, whose number must divide
by that of the GPUs. Every method works, and memory for activations falls with the number of GPUs.
A prompt file: every GPU has the whole model and makes its own videos; what is there already is not made again.
"""

from videosparse.program import leave_out, run_program

import argparse
import sys
import warnings

import torch
from accelerate import PartialState
from diffusers import DiffusionPipeline

import videosparse
from videosparse import AdaSpaProcessor, DenseProcessor, PAROProcessor, RadialProcessor
from videosparse.generation import (
    find_loras,
    find_model,
    first_given,
    load_loras,
    lora_notices,
    stream_to,
    trained_for,
    video_place,
)
from videosparse.generation.batch import plan_batch, run_batch
from videosparse.generation.runfile import merge, read_prompts, request_from
from videosparse.generation.shifts import shifted

PROCESSORS = {"radial": RadialProcessor, "adaspa": AdaSpaProcessor, "paro": PAROProcessor, "dense": DenseProcessor}


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("prompt", nargs="?")
    parser.add_argument("--prompts", help="instead: a file, a prompt a line, which may end in --w --h --f --s --seed")
    parser.add_argument("--model", default="Wan-AI/Wan2.1-T2V-14B-Diffusers", help="folder or hub id")
    parser.add_argument("--method", choices=PROCESSORS, default="radial")
    parser.add_argument("--frames", type=int, help="those of the LoRA, else the model's usual: 81 for Wan 2.1")
    parser.add_argument("--height", type=int, default=720)
    parser.add_argument("--width", type=int, default=1280)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--guidance", type=float, help="the model's usual: 5 for Wan 2.1")
    parser.add_argument(
        "--shift", type=float, help="of the noise schedule: that of the LoRA, else for Wan 2.1 5 at 720p and 3 below"
    )
    parser.add_argument("--rope", choices=("none", "riflex", "ntk", "pi"), default="none", help="beyond 81 frames")
    parser.add_argument("--lora", help="folder, file or hub id; with two experts of that for high noise")
    parser.add_argument("--lora-2", help="of the expert for low noise")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--fps", type=float, default=16)
    parser.add_argument("--output", help="an .mp4 file or a folder, with --prompts a folder; outputs/ unless said")
    parser.add_argument("--overwrite", action="store_true", help="replace existing files")
    args = parser.parse_args()
    if (args.prompt is None) == (args.prompts is None):
        parser.error("give a prompt, or --prompts FILE")
    return args


def usual_shift(variant: str, height: int, width: int) -> float | None:
    """That of the other programs for a kind of model; None leaves the model's own."""
    if variant == "wan2.1":
        return 5.0 if min(height, width) >= 720 else 3.0
    return {"wan2.2-a14b": 12.0, "wan2.2-5b": 5.0, "hunyuan-video": 7.0}.get(variant)


def one_video(args: argparse.Namespace, state: PartialState) -> None:
    # names and sizes are checked before anything is loaded
    place = video_place(args.output, args.prompt, args.seed, args.method, overwrite=args.overwrite)
    model = find_model(args.model)
    loras = find_loras(model, args.lora, args.lora_2)
    trained = trained_for(loras, args.method, args.shift)  # what is given here wins
    frames = first_given(args.frames, trained.frames, model.defaults.num_frames)
    model.grid(frames, args.height, args.width)
    shift = trained.shift
    if shift is None:
        shift = usual_shift(model.spec.variant, args.height, args.width)
    if state.is_main_process:
        for notice in lora_notices(loras, args.method, trained.options, frames):
            print(f"Note: {notice}", file=sys.stderr)
    dtype = torch.bfloat16 if state.device.type == "cuda" else torch.float32
    pipe = DiffusionPipeline.from_pretrained(args.model, dtype={"default": dtype, "vae": torch.float32})
    if not type(pipe).__name__.startswith("Wan"):
        pipe.vae.enable_tiling()
    load_loras(pipe, loras)
    pipe.to(state.device)
    pipe.set_progress_bar_config(disable=not state.is_main_process)
    processor = PROCESSORS[args.method](**trained.options)
    pipe.set_attn_processor(processor)
    if args.rope != "none":
        videosparse.extend_rope(pipe, args.rope, trained_frames=model.defaults.longest)
    else:
        videosparse.extend_rope(pipe, trained.rope, trained_frames=trained.rope_frames)
    videosparse.parallelize(pipe)
    call = {"prompt": args.prompt, "num_frames": frames, "height": args.height, "width": args.width}
    call |= {"num_inference_steps": args.steps, "guidance_scale": first_given(args.guidance, model.defaults.guidance)}
    if args.guidance is None and model.defaults.guidance_2 is not None:
        call["guidance_scale_2"] = model.defaults.guidance_2
    # the same seed everywhere: ranks begin with the same noise, and each takes its part of it
    call["generator"] = torch.Generator().manual_seed(args.seed)
    with shifted(pipe, shift):
        if state.is_main_process:
            with stream_to(pipe, place, fps=args.fps) as video:
                pipe(**call)
            print(processor.report())
            print(video.path)
        else:
            pipe(**call, output_type="latent")  # all ranks denoise, the first one decodes


def many_videos(args: argparse.Namespace, state: PartialState) -> None:
    names = ("model", "method", "frames", "height", "width", "steps", "guidance", "shift", "rope", "seed", "fps")
    values = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    values |= {"device": str(state.device), "lora": [lora for lora in (args.lora, args.lora_2) if lora is not None]}
    model = find_model(args.model)
    trained = trained_for(find_loras(model, args.lora, args.lora_2), args.method, args.shift)
    lines = read_prompts(args.prompts)
    requests = []
    for line in lines:
        merged = merge([values, line.values, {"prompt": line.prompt}])
        shift = usual_shift(model.spec.variant, merged["height"], merged["width"])
        if trained.shift is None and shift is not None:
            merged["shift"] = shift  # of this line's size
        requests.append(request_from(merged))
    labels = [f"{args.prompts}, line {line.number}" for line in lines]
    batch = plan_batch(requests, args.output, overwrite=args.overwrite, labels=labels)
    with state.split_between_processes(list(range(len(requests)))) as own:
        run_batch(batch, lambda number, made, paths: print(paths[".mp4"], flush=True), numbers=own)


def keep_quiet() -> None:
    """Two remarks about Ulysses, one a rank, that are about no fault of a run: of Diffusers, and of torch about it.

    Wan's time step is one number for all tokens, so that there is nothing to split.
    """
    leave_out("split will not be applied", "diffusers.hooks.context_parallel")
    warnings.filterwarnings("ignore", ".*all_gather_tensor. is deprecated", FutureWarning)


def main() -> None:
    args = parse()
    keep_quiet()
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
