"""Text to video with Mochi: both branches of guidance in one batch, text part of the attention.

    python pipelines/mochi_t2v.py "a cat surfing"
    python pipelines/mochi_t2v.py "a cat surfing" --method adaspa --offload

Mochi learned the frequencies of its rotary embedding, so that no formula stretches them: longer videos than 163 frames
need a LoRA for their length.
"""

from videosparse.program import run_program

import argparse
import sys

import torch
from diffusers import MochiPipeline

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
    parser.add_argument("--negative-prompt", default="")
    parser.add_argument("--model", default="genmo/mochi-1-preview", help="folder or hub id")
    parser.add_argument("--method", choices=PROCESSORS, default="radial")
    parser.add_argument("--frames", type=int, help="6k+1: those of the LoRA, else 163")
    parser.add_argument("--height", type=int, default=480)
    parser.add_argument("--width", type=int, default=848)
    parser.add_argument("--steps", type=int, default=64, help="2 or more")
    parser.add_argument("--guidance", type=float, default=4.5)
    parser.add_argument("--lora", help="folder, file or hub id")
    parser.add_argument("--compile", action="store_true", help="compile the blocks: minutes once, then faster")
    parser.add_argument("--offload", action="store_true", help="keep only the part in use on the GPU")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--fps", type=float, default=30)
    parser.add_argument("--output", help="an .mp4 file or a folder; outputs/PROMPT-SEED-METHOD.mp4 unless said")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing file")
    return parser.parse_args()


def main() -> None:
    args = parse()
    # names and sizes are checked before anything is loaded
    place = video_place(args.output, args.prompt, args.seed, args.method, overwrite=args.overwrite)
    model = find_model(args.model)
    loras = find_loras(model, args.lora)
    trained = trained_for(loras, args.method)  # what is given here wins
    frames = first_given(args.frames, trained.frames, 163)
    model.grid(frames, args.height, args.width)
    for notice in lora_notices(loras, args.method, trained.options, frames):
        print(f"Note: {notice}", file=sys.stderr)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    pipe = MochiPipeline.from_pretrained(args.model, dtype=dtype)
    pipe.vae.enable_tiling()
    load_loras(pipe, loras)
    if args.offload:
        pipe.enable_model_cpu_offload()
    else:
        pipe.to(device)

    processor = PROCESSORS[args.method](**trained.options)
    pipe.set_attn_processor(processor)
    if args.compile:
        for block in pipe.transformer.transformer_blocks:
            block.compile(fullgraph=True)

    with stream_to(pipe, place, fps=args.fps) as video:
        pipe(
            prompt=args.prompt,
            negative_prompt=args.negative_prompt,
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
