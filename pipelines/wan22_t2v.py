"""Text to video with Wan 2.2 A14B: two experts, one for high noise and one for low, which share one processor.

    python pipelines/wan22_t2v.py "a cat surfing" --offload
    python pipelines/wan22_t2v.py "a cat surfing" --frames 161 --lora high.safetensors --lora-2 low.safetensors
    videosparse calibrate --model wan2.2-a14b --shift 12 --prompts outputs/prompts.txt -o outputs/plan.safetensors
    python pipelines/wan22_t2v.py "a cat surfing" --method paro --plan outputs/plan.safetensors

Both experts hold 28 GB of weights each in bfloat16; --offload keeps the one in use on the GPU.
"""

from videosparse.program import run_program

import argparse
import sys

import torch
from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanPipeline

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
    parser.add_argument("--negative-prompt", default="")
    parser.add_argument("--model", default="Wan-AI/Wan2.2-T2V-A14B-Diffusers", help="folder or hub id")
    parser.add_argument("--method", choices=PROCESSORS, default="radial")
    parser.add_argument("--plan", help="of --method paro, for both experts; without one, maps are found in the run")
    parser.add_argument("--frames", type=int, help="4k+1: those of the LoRA, else 81")
    parser.add_argument("--height", type=int, default=720)
    parser.add_argument("--width", type=int, default=1280)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--guidance", type=float, default=4.0, help="of the expert for high noise")
    parser.add_argument("--guidance-2", type=float, default=3.0, help="of the expert for low noise")
    parser.add_argument("--shift", type=float, help="of the noise schedule: that of the LoRA, else 12")
    parser.add_argument("--rope", choices=("none", "riflex", "ntk", "pi"), default="none", help="beyond 81 frames")
    parser.add_argument("--lora", help="of the expert for high noise: folder, file or hub id")
    parser.add_argument("--lora-2", help="of the expert for low noise")
    parser.add_argument("--offload", action="store_true", help="keep only the part in use on the GPU")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--fps", type=float, default=16)
    parser.add_argument("--output", help="an .mp4 file or a folder; outputs/PROMPT-SEED-METHOD.mp4 unless said")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing file")
    args = parser.parse_args()
    if args.plan is not None and args.method != "paro":
        parser.error("--plan is for --method paro")
    return args


def main() -> None:
    args = parse()
    # names and sizes are checked before anything is loaded
    place = video_place(args.output, args.prompt, args.seed, args.method, overwrite=args.overwrite)
    model = find_model(args.model)
    loras = find_loras(model, args.lora, args.lora_2)
    trained = trained_for(loras, args.method, args.shift)  # what is given here wins
    frames = first_given(args.frames, trained.frames, 81)
    shift = first_given(args.shift, trained.shift, 12.0)
    model.grid(frames, args.height, args.width)
    for notice in lora_notices(loras, args.method, trained.options, frames):
        print(f"Note: {notice}", file=sys.stderr)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    # the VAE is small, and loses detail below float32
    vae = AutoencoderKLWan.from_pretrained(args.model, subfolder="vae", dtype=torch.float32)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    pipe = WanPipeline.from_pretrained(args.model, vae=vae, dtype=dtype)
    pipe.scheduler = UniPCMultistepScheduler.from_config(pipe.scheduler.config, flow_shift=shift)
    load_loras(pipe, loras)
    if args.offload:
        pipe.enable_model_cpu_offload()
    else:
        pipe.to(device)

    options = {} if args.plan is None else {"plan": args.plan}
    processor = PROCESSORS[args.method](**{**trained.options, **options})
    pipe.set_attn_processor(processor)  # both experts; the step is that of the run, whichever is at work
    if args.rope != "none":
        videosparse.extend_rope(pipe, args.rope, trained_frames=81)
    else:
        videosparse.extend_rope(pipe, trained.rope, trained_frames=trained.rope_frames)

    with stream_to(pipe, place, fps=args.fps) as video:
        pipe(
            prompt=args.prompt,
            negative_prompt=args.negative_prompt,
            num_frames=frames,
            height=args.height,
            width=args.width,
            num_inference_steps=args.steps,
            guidance_scale=args.guidance,
            guidance_scale_2=args.guidance_2,
            generator=torch.Generator().manual_seed(args.seed),
        )
    print(processor.report())
    print(video.path)


if __name__ == "__main__":
    # sizes, names, files and memory, as Diffusers, torch and videosparse tell them
    run_program(main, (ValueError, OSError, RuntimeError), "Interrupted; no file is left half-written.")
