"""Encode videos and captions once, for training a length-extension LoRA.

    python lora/prepare_dataset.py --videos VIDEOS --model wan2.1-14b --frames 161 --size 720x1280 --output data/wan-2x

VIDEOS is a folder with `metadata.jsonl` or `metadata.csv` (columns video and caption), or with videos beside `.txt`
captions of the same name. Several lengths and sizes may be given; a video goes to the size of its own shape, at every
length, scaled and cut around its centre, from its first frame on. A longer clip also serves shorter lengths in
training, so one length is usually enough.

Clips are brought to the model's frame rate (Wan 16 frames a second, Wan2.2-5B and HunyuanVideo 24, Mochi 30; --fps N
for another): frame i is the one whose time stamp is nearest to i / N seconds, also where the rate varies, so faster
videos lose frames and slower ones repeat some. The rate is written into `dataset.json`, and training refuses another.

    python lora/prepare_dataset.py --synthetic 96 --frames 65 --size 64x64 --output outputs/data/tiny-2x

makes clips of the synthetic world of the embedded model instead. Either way the result is a folder of safetensors
shards with latents and text embeddings, named by the hash of what they were made from: call it again to add what is
missing. Videos that cannot be read are listed in `skipped.jsonl` there, and never stop the program; if none can be
used, the exit code is 1.
"""

from __future__ import annotations

from videosparse.program import quiet_loading, run_program

import argparse
import itertools
import re
import sys
from pathlib import Path

from videosparse.generation.errors import GenerationError, told
from videosparse.training.clips import Size, find_clips, synthetic_clips
from videosparse.training.config import ConfigError
from videosparse.training.encoding import prepare


def main() -> int:
    args = arguments()
    quiet_loading()
    try:
        sizes = sizes_of(args.frames, args.size)
        clips = find_clips(args.videos) if args.videos else synthetic_clips(args.synthetic, args.seed)
        done = prepare(clips, args.output, args.model, sizes, fps=args.fps, device=args.device, report=show)
    except GenerationError as error:
        print(f"Error: {error}", file=sys.stderr)
        return 2
    except OSError as error:  # such as a full disk
        print(f"Error: {told(error)}; once that is mended, call it again: it adds what is missing.", file=sys.stderr)
        return 2
    print(f"{args.output}: {done.encoded} clips encoded, {done.present} were there, {len(done.skipped)} skipped")
    for name, reason in done.skipped:
        print(f"  {name} {reason}")
    if not done.encoded + done.present:
        print(f"Error: none of {len(clips)} clips could be used, and {args.output} has none to train on; see the "
              "reasons above.", file=sys.stderr)  # fmt: skip
        return 1
    return 0


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--videos", type=Path, help="folder of videos with captions")
    source.add_argument("--synthetic", type=int, metavar="N", help="N clips of the synthetic world")
    parser.add_argument("--model", default="assets/tiny-wan", help="Diffusers folder, hub id or name")
    parser.add_argument("--frames", type=int, nargs="+", required=True, help="pixel frames of the clips")
    parser.add_argument("--size", nargs="+", required=True, help="HEIGHTxWIDTH in pixels")
    parser.add_argument("--fps", type=float, help="frames a second of the clips; the model's unless given")
    parser.add_argument("--output", type=Path, required=True, help="folder of the data set")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    parser.add_argument("--seed", type=int, default=0, help="of synthetic clips")
    return parser.parse_args()


def sizes_of(frames: list[int], texts: list[str]) -> list[Size]:
    found = []
    for text, count in itertools.product(texts, frames):
        match = re.fullmatch(r"(\d+)x(\d+)", text)
        if not match:
            raise ConfigError(f"--size must be HEIGHTxWIDTH, such as 480x832 (got {text!r}).")
        found.append(Size(count, int(match[1]), int(match[2])))
    return found


def show(done: int, skipped: int, total: int) -> None:
    print(f"encoded {done} of {total}" + (f", skipped {skipped}" if skipped else ""), flush=True)


if __name__ == "__main__":
    run_program(main)
