"""Text to video with HunyuanVideo: text is part of the attention, and always read in full.

python pipelines/hunyuan_video_t2v.py "a cat surfing" --offload
python pipelines/hunyuan_video_t2v.py "a cat surfing" --frames 253 --rope riflex
"""

from videosparse.program import run_program

import argparse
import sys

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, HunyuanVideoPipeline, HunyuanVideoTransformer3DModel

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

PROCESSORS = {"radial": RadialProcessor, "adaspa": AdaSpaProcessor, "paro": PAROProcessor, "dense": DenseProcessor}


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("prompt")
    parser.add_argument("--model", default="hunyuanvideo-community/HunyuanVideo", help="folder or hub id")
    parser.add_argument("--method", choices=PROCESSORS, default="radial")
    parser.add_argument("--frames", type=int, help="4k+1: those of the LoRA, else 129")
    parser.add_argument("--height", type=int, default=720)
    parser.add_argument("--width", type=int, default=1280)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--guidance", type=float, default=6.0, help="distilled: without a second branch")
    parser.add_argument("--shift", type=float, help="of the noise schedule: that of the LoRA, else 7")
    parser.add_argument("--rope", choices=("none", "riflex", "ntk", "pi"), default="none", help="beyond 129 frames")
    parser.add_argument("--lora", help="folder, file or hub id")
    parser.add_argument("--compile", action="store_true", help="compile the blocks: minutes once, then faster")
    parser.add_argument("--offload", action="store_true", help="keep only the part in use on the GPU")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--fps", type=float, default=24)
    parser.add_argument("--output", help="an .mp4 file or a folder; outputs/PROMPT-SEED-METHOD.mp4 unless said")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing file")
    return parser.parse_args()


def main() -> None:
    args = parse()
    # names and sizes are checked before anything is loaded
    place = video_place(args.output, args.prompt, args.seed, args.method, overwrite=args.overwrite)
    model = find_model(args.model)
    loras = find_loras(model, args.lora)
    trained = trained_for(loras, args.method, args.shift)  # what is given here wins
    frames = first_given(args.frames, trained.frames, 129)
    shift = first_given(args.shift, trained.shift, 7.0)
    model.grid(frames, args.height, args.width)
    for notice in lora_notices(loras, args.method, trained.options, frames):
        print(f"Note: {notice}", file=sys.stderr)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    bf16, half = (torch.bfloat16, torch.float16) if device == "cuda" else (torch.float32, torch.float32)
    # the transformer is made for bfloat16, the other parts are published in float16
    transformer = HunyuanVideoTransformer3DModel.from_pretrained(args.model, subfolder="transformer", dtype=bf16)
    pipe = HunyuanVideoPipeline.from_pretrained(args.model, transformer=transformer, dtype=half)
    pipe.scheduler = FlowMatchEulerDiscreteScheduler.from_config(pipe.scheduler.config, shift=shift)
    pipe.vae.enable_tiling()
    load_loras(pipe, loras)
    if args.offload:
        pipe.enable_model_cpu_offload()
    else:
        pipe.to(device)

    processor = PROCESSORS[args.method](**trained.options)
    pipe.set_attn_processor(processor)
    if args.rope != "none":
        videosparse.extend_rope(pipe, args.rope, trained_frames=129)
    else:
        videosparse.extend_rope(pipe, trained.rope, trained_frames=trained.rope_frames)
    if args.compile:
        pipe.transformer.compile_repeated_blocks(fullgraph=True)

    with stream_to(pipe, place, fps=args.fps) as video:
        pipe(
            prompt=args.prompt,
            num_frames=frames,
            height=args.height,
            width=args.width,
            num_inference_steps=args.steps,
            guidance_scale=args.guidance,
            generator=torch.Generator().manual_seed(args.seed),
        )
    print(processor.report())
    print(video.path)


if __name__ == "__main__":
    # sizes, names, files and memory, as Diffusers, torch and videosparse tell them
    run_program(main, (ValueError, OSError, RuntimeError), "Interrupted; no file is left half-written.")
