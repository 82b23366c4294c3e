"""Image to video with Wan 2.1 or 2.2: the first frame is given, its shape decides that of the video.

python pipelines/wan_i2v.py "the cat begins to surf" --image cat.png
python pipelines/wan_i2v.py "the cat begins to surf" --image cat.png --area 720x1280 --shift 5
python pipelines/wan_i2v.py "the cat begins to surf" --image cat.png --frames 161 --lora wan-161.safetensors
"""

from videosparse.program import leave_out, run_program

import argparse
import re
import sys
from math import sqrt

import torch
from diffusers import AutoencoderKLWan, UniPCMultistepScheduler
from diffusers.utils import load_image

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
    parser.add_argument("--image", required=True, help="file or URL")
    parser.add_argument("--negative-prompt", default="")
    parser.add_argument("--model", default="Wan-AI/Wan2.1-I2V-14B-480P-Diffusers", help="folder or hub id")
    parser.add_argument("--method", choices=PROCESSORS, default="radial")
    parser.add_argument("--frames", type=int, help="4k+1: those of the LoRA, else 81")
    parser.add_argument("--area", default="480x832", help="HEIGHTxWIDTH: how many pixels a frame has, not its shape")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--guidance", type=float, default=5.0)
    parser.add_argument(
        "--shift", type=float, help="of the noise schedule: that of the LoRA, else 3, for 480p; 5 suits 720p"
    )
    parser.add_argument("--rope", choices=("none", "riflex", "ntk", "pi"), default="none", help="beyond 81 frames")
    parser.add_argument("--lora", help="folder, file or hub id; with two experts of that for high noise")
    parser.add_argument("--lora-2", help="of the expert for low noise")
    parser.add_argument("--offload", action="store_true", help="keep only the part in use on the GPU")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--fps", type=float, default=16)
    parser.add_argument("--output", help="an .mp4 file or a folder; outputs/PROMPT-SEED-METHOD.mp4 unless said")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing file")
    return parser.parse_args()


def size_of(area: str, shape: float, step: int) -> tuple[int, int]:
    """Height and width of as many pixels as `area` has, of which one is `shape` times the other, in whole steps."""
    found = re.fullmatch(r"(\d+)x(\d+)", area)
    if found is None:
        raise ValueError(f"--area must be HEIGHTxWIDTH, such as 480x832 (got {area!r}).")
    pixels = int(found[1]) * int(found[2])
    height, width = (max(1, round(sqrt(pixels * ratio)) // step) * step for ratio in (shape, 1 / shape))
    return height, width


def main() -> None:
    args = parse()
    # without torchvision transformers has another image processor, which does the same, and says so on import
    leave_out("CLIPImageProcessor", "transformers.utils.import_utils")
    from diffusers import WanImageToVideoPipeline

    # names and sizes are checked before anything is loaded
    place = video_place(args.output, args.prompt, args.seed, args.method, overwrite=args.overwrite)
    model = find_model(args.model)
    loras = find_loras(model, args.lora, args.lora_2)
    trained = trained_for(loras, args.method, args.shift)  # what is given here wins
    frames = first_given(args.frames, trained.frames, 81)
    shift = first_given(args.shift, trained.shift, 3.0)
    image = load_image(args.image)
    height, width = size_of(args.area, image.height / image.width, step=model.spec.stride[1] * model.spec.patch)
    model.grid(frames, height, width)
    for notice in lora_notices(loras, args.method, trained.options, frames):
        print(f"Note: {notice}", file=sys.stderr)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    # the VAE is small, and loses detail below float32
    vae = AutoencoderKLWan.from_pretrained(args.model, subfolder="vae", dtype=torch.float32)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    pipe = WanImageToVideoPipeline.from_pretrained(args.model, vae=vae, dtype=dtype)
    pipe.scheduler = UniPCMultistepScheduler.from_config(pipe.scheduler.config, flow_shift=shift)
    load_loras(pipe, loras)
    if args.offload:
        pipe.enable_model_cpu_offload()
    else:
        pipe.to(device)

    processor = PROCESSORS[args.method](**trained.options)
    pipe.set_attn_processor(processor)
    if args.rope != "none":
        videosparse.extend_rope(pipe, args.rope, trained_frames=81)
    else:
        videosparse.extend_rope(pipe, trained.rope, trained_frames=trained.rope_frames)

    with stream_to(pipe, place, fps=args.fps) as video:
        pipe(
            image=image.resize((width, height)),
            prompt=args.prompt,
            negative_prompt=args.negative_prompt,
            num_frames=frames,
            height=height,
            width=width,
            num_inference_steps=args.steps,
            guidance_scale=args.guidance,
            generator=torch.Generator().manual_seed(args.seed),
        )
    print(processor.report())
    print(video.path)


if __name__ == "__main__":
    # sizes, names, files and memory, as Diffusers, torch and videosparse tell them
    run_program(main, (ValueError, OSError, RuntimeError), "Interrupted; no file is left half-written.")
