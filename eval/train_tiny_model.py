"""Train the embedded model `assets/tiny-wan`: VAE, latents, DiT with its text encoder, and the exported pipeline.

Everything in one process on one GPU, in 19.5 minutes of wall clock, cut into calls of at most 9.2 minutes; give the
same command again until it says `finished`. It goes on from the local folder, or from the backup if that is gone:

    PYTHONPATH=. python eval/train_tiny_model.py all --budget-minutes 19.5 --stop-after-minutes 9.2 \\
        --work /tmp/tiny --backup out/backup --resume

Then, on any machine, from the backup alone:

    PYTHONPATH=. python eval/train_tiny_model.py export --backup out/backup --out assets/tiny-wan --check

Next round: the published weights are enough to go on with the DiT. The VAE stays as it is, so all the time is the
DiT's, in one round of its own that is added to those in `training.json`:

    PYTHONPATH=. python eval/train_tiny_model.py all --from-pipeline assets/tiny-wan --stages mixed --pairs 0.6 \\
        --binding 0.1 --budget-minutes 24 --stop-after-minutes 9.4 --work /tmp/tiny --backup out/backup --resume

The first six rounds left motions unbound: which of two objects moves how was drawn at random, since the text encoder
did not tell. `--binding` adds a loss for that (`videosparse/training/tiny/binding.py`), which the seventh had.

Export as above. Score the result with `eval/score_world.py`, write the accuracy into the card (its text speaks of the
first rows, its table has a line for each file), and correct the card's last section, which is written by hand:

    PYTHONPATH=. python eval/train_tiny_model.py card --out assets/tiny-wan \\
        --rows assets/results/tiny_wan_dense_33.csv assets/results/tiny_wan_heldout_*.csv

On N GPUs of one host, with N times the batch. Each process draws clips of its own, the first one logs and writes, and
all stop together at a signal to one of them. Here the VAE is trained on, too, and the DiT learns its new latents:

    PYTHONPATH=. torchrun --nproc-per-node 2 eval/train_tiny_model.py all --from-pipeline assets/tiny-wan --again \\
        --stages mixed --pairs 0.5 --vae-lr 5e-4 --vae-minutes 7.5 --scale-lr --budget-minutes 20 --work /tmp/tiny \\
        --backup out/backup --resume

Where a shell lives for minutes only, but the machine stays, let one process outlive it, and call again to look:

    PYTHONPATH=. setsid nohup python -u eval/train_tiny_model.py all --from-pipeline assets/tiny-wan --stages large \\
        --budget-minutes 24 --work /tmp/tiny --backup /tmp/tiny-backup --resume > /tmp/tiny.log 2>&1 &
    tail -n 5 /tmp/tiny.log; cp /tmp/tiny-backup/* out/backup/

Once the VAE of a round is finished, the DiT learns its latents, and they change no more; but the VAE's decoder can be
trained on, on a GPU of its own beside the DiT. Copy the round's backup as soon as its state.json says that the VAE is
finished, start from the copy, and put both together. Stages and pairs must be those of the round:

    PYTHONPATH=. python eval/train_tiny_model.py decoder --restore out/backup-copy --stages mixed --pairs 0.5 \\
        --vae-lr 5e-4 --vae-steps 60000 --minutes 13 --work /tmp/decoder --backup out/decoder
    PYTHONPATH=. python eval/train_tiny_model.py export --backup out/backup --decoder out/decoder \\
        --out assets/tiny-wan --check

It saves every `--save-seconds`, at the end of a stage and on SIGTERM, each file at once by a
rename; copy the backup when the log is not just saving. One process wastes nothing: a new call compiles again, which
takes about 45 s. Do not start a second one on the same folders.

`--again` starts a round from a finished state, or from the backup `--restore` names: all weights stay, the schedules of
VAE and DiT and the statistics of the latents start anew; with `--keep-vae` only the DiT's. `--from-pipeline` keeps the
VAE unless `--again` says otherwise. Budgets are of a round.

One phase at a time: `vae`, `encode`, `dit`, `decoder`, with `--minutes`. All paths of a round in seconds, on CPU, or on
a GPU with the real shapes and the time of a step of each:
`all --smoke --work /tmp/tiny-smoke --backup /tmp/tiny-smoke/backup`.

A phase ends at `--steps` or at `--minutes`, whichever is first, and its learning rate reaches zero just then. SIGTERM
writes a checkpoint. The backup is at most 60 MiB: fp32 weights, the moving average in bf16, one state.json, one PNG.
"""

from __future__ import annotations

from videosparse.program import run_program

import argparse
import logging
import math
import multiprocessing
import os
import signal
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path

import torch

from videosparse.generation.output import check_writable
from videosparse.training.tiny.card import update_card
from videosparse.training.tiny.decoder_phase import take_decoder, train_decoder
from videosparse.training.tiny.dit_phase import train_dit
from videosparse.training.tiny.export import check, export
from videosparse.training.tiny.objectives import FLOW_SHIFT
from videosparse.training.tiny.plan import STAGES, Plan, smoke_plan, with_long_share
from videosparse.training.tiny.pools import encode, prepare_tokenizer, sample_captions, worker_init
from videosparse.training.tiny.ranks import Ranks
from videosparse.training.tiny.state import STOP, Run
from videosparse.training.tiny.vae_phase import VAE_VARIANTS, train_vae

logger = logging.getLogger("videosparse.training.tiny")


class Elapsed(logging.Formatter):
    """Log lines that begin with the seconds since the start, and say which process is speaking if not the first."""

    def __init__(self, rank: int) -> None:
        super().__init__()
        self.who = f" process {rank}" if rank else ""
        self.began = time.monotonic()

    def format(self, record: logging.LogRecord) -> str:
        """One line."""
        return f"[{time.monotonic() - self.began:7.1f}s{self.who}] {super().format(record)}"


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("all", "vae", "encode", "dit", "decoder", "export", "card"))
    parser.add_argument("--work", default="/tmp/tiny", help="local folder: checkpoint, pools of latents")
    parser.add_argument("--backup", default="/tmp/tiny/backup", help="small folder that a later machine can start from")
    parser.add_argument(
        "--resume", action="store_true", help="go on from what --work, else --backup holds, if anything"
    )
    start = parser.add_mutually_exclusive_group()
    start.add_argument("--restore", default="", metavar="FOLDER", help="else start from this backup of another run")
    start.add_argument("--from-pipeline", default="", metavar="FOLDER", help="else start from this exported pipeline")
    parser.add_argument("--smoke", action="store_true", help="seconds-long run of every path")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=0, help="processes that draw scenes; 0: by the CPU count")
    budget = parser.add_argument_group("time")
    budget.add_argument("--minutes", type=float, default=4.0, help="of the one phase that the command names")
    budget.add_argument("--budget-minutes", type=float, default=19.5, help="all: of all calls of a round together")
    budget.add_argument("--stop-after-minutes", type=float, default=1e9, help="of this call, then checkpoint")
    budget.add_argument("--vae-minutes", type=float, default=4.5)
    budget.add_argument("--reserve-minutes", type=float, default=0.15, help="kept back for the last save")
    budget.add_argument("--vae-steps", type=int, default=20000)
    budget.add_argument("--steps", type=int, default=40000)
    budget.add_argument("--check-seconds", type=float, default=60.0, help="between two looks at held-out clips")
    budget.add_argument("--save-seconds", type=float, default=150.0)
    knobs = parser.add_argument_group("training")
    knobs.add_argument("--lr", type=float, default=6e-4)
    knobs.add_argument("--vae-lr", type=float, default=2e-4)
    knobs.add_argument("--kl", type=float, default=1e-5, help="weight of the KL term, mean over latent elements")
    knobs.add_argument(
        "--scale-lr", action="store_true", help="multiply the DiT's rates by the square root of the number of processes"
    )
    knobs.add_argument("--vae-object-weight", type=float, default=8.0, help="how much more pixels of objects count")
    knobs.add_argument("--ema", type=float, default=0.999)
    knobs.add_argument("--attention", choices=("auto", "default"), default="auto")
    knobs.add_argument("--vae-variant", choices=("auto", *VAE_VARIANTS), default="auto")
    knobs.add_argument("--no-graph", action="store_true", help="no CUDA graph of the VAE step")
    knobs.add_argument("--again", action="store_true", help="another round: keep the weights, restart all schedules")
    knobs.add_argument("--keep-vae", action="store_true", help="with --again: another round of the DiT alone")
    knobs.add_argument(
        "--stages",
        choices=tuple(STAGES),
        default="full",
        help="large: no 64 pixels and no 17-frame batches; short: nor 81 frames; long: 81 and 33 frames in every "
        "stage; mixed: the same from one larger pool of 81 frames",
    )
    knobs.add_argument("--optimizer", choices=("muon", "adamw"), default="muon", help="of the matrices of the blocks")
    knobs.add_argument("--matrix-lr", type=float, default=2e-3, help="of Muon")
    knobs.add_argument("--shift", type=float, default=4.0, help="of the noise levels that the DiT is trained on")
    knobs.add_argument("--object-weight", type=float, default=8.0, help="how much more cells with objects count")
    knobs.add_argument(
        "--decay-share", type=float, default=1.0, help="last share of the phase in which the rate falls to zero"
    )
    knobs.add_argument(
        "--binding",
        type=float,
        default=0.0,
        help="weight of a loss by which the text encoder tells which object moves how; 0: none (0.1 is a beginning)",
    )
    knobs.add_argument("--pairs", type=float, default=0.25, help="share of scenes with two objects")
    knobs.add_argument(
        "--long-share", type=float, default=None, help="share of batches of the longest clips in the last stage"
    )
    knobs.add_argument("--pool-scale", type=float, default=1.0, help="more or fewer clips in every pool of latents")
    knobs.add_argument("--no-compile", action="store_true", help="no torch.compile of the DiT blocks")
    out = parser.add_argument_group("export")
    out.add_argument("--out", default="assets/tiny-wan")
    out.add_argument(
        "--decoder", default="", metavar="FOLDER", help="use the decoder of the VAE in this backup of `decoder`"
    )
    out.add_argument("--scheduler", choices=("unipc", "euler"), default="unipc")
    out.add_argument("--flow-shift", type=float, default=FLOW_SHIFT, help="of the noise levels of the scheduler")
    out.add_argument("--check", action="store_true", help="load the exported pipeline and generate a clip")
    out.add_argument("--check-steps", type=int, default=8)
    out.add_argument(
        "--rows", type=Path, nargs="+", default=[], help="card: rows of eval/score_world.py to take the accuracy from"
    )
    args = parser.parse_args(argv)
    if args.keep_vae and not args.again:
        parser.error("--keep-vae says what --again keeps; give both, or neither: --from-pipeline keeps the VAE anyway.")
    check_decoder(parser, args)
    check_numbers(parser, args)
    if args.smoke:
        limit_smoke(args)
    return args


def check_decoder(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Refuse options that mean nothing to the decoder's training, or would harm what it starts from."""
    if args.decoder and args.command != "export":
        parser.error(f"--decoder is for export (got {args.command}); to train one, give `decoder --restore FOLDER`.")
    if args.command != "decoder":
        return
    if args.again or args.keep_vae:
        parser.error("--again and --keep-vae begin a round; leave them out, `decoder` has a schedule of its own.")
    if args.restore and Path(args.restore).resolve() in (Path(args.backup).resolve(), Path(args.work).resolve()):
        parser.error(f"--restore must not be the folder that is written (got {args.restore}); give another --backup.")


def check_numbers(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Refuse what would train to nothing, or fail only later."""
    for name in ("decay_share", "pairs", "long_share"):
        if not 0 <= (getattr(args, name) or 0) <= 1:
            parser.error(f"--{name.replace('_', '-')} must lie in 0..1 (got {getattr(args, name)}).")
    for name in (
        "minutes",
        "budget_minutes",
        "lr",
        "matrix_lr",
        "vae_lr",
        "vae_steps",
        "shift",
        "flow_shift",
        "pool_scale",
        "steps",
        "vae_minutes",
        "check_steps",
    ):
        if not 0 < getattr(args, name) < math.inf:
            parser.error(f"--{name.replace('_', '-')} must be a positive number (got {getattr(args, name)}).")
    for name in ("object_weight", "vae_object_weight", "binding", "kl", "workers"):
        if not 0 <= getattr(args, name) < math.inf:
            parser.error(f"--{name.replace('_', '-')} must not be negative (got {getattr(args, name)}).")
    for name in ("stop_after_minutes", "reserve_minutes", "check_seconds", "save_seconds"):
        if not getattr(args, name) >= 0:
            parser.error(f"--{name.replace('_', '-')} must not be negative (got {getattr(args, name)}).")
    if not 0 <= args.ema < 1:
        parser.error(f"--ema must lie in 0..1, below 1 (got {args.ema}).")
    if args.device not in ("auto", "cpu") and not args.device.startswith("cuda"):
        parser.error(f"--device must be auto, cpu or cuda (got {args.device!r}).")
    if args.device.startswith("cuda") and not torch.cuda.is_available():
        parser.error(f"--device {args.device}: torch sees no CUDA GPU; use --device cpu.")


def limit_smoke(args: argparse.Namespace) -> None:
    """Few steps; the shapes are timed by themselves."""
    args.vae_steps, args.steps = 4, 12
    args.check_steps = 2
    args.check_seconds = args.save_seconds = 2.0
    args.vae_minutes = args.minutes = 8.0  # steps end it; a busy machine may take long


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    try:
        if args.command == "card":
            update_card(Path(args.out), args.rows)
            return 0
        # minutes of training come before the first save
        for folder in (args.work, args.backup):
            check_writable(Path(folder))
        return run(args)
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def run(args: argparse.Namespace) -> int:
    """Train or export, with a log of lines that begin with the seconds since the start."""
    handler = logging.StreamHandler(sys.stdout)
    ranks = Ranks.of_launcher()
    handler.setFormatter(Elapsed(ranks.rank))
    logger.addHandler(handler)
    logger.setLevel(logging.INFO if ranks.first else logging.WARNING)
    try:
        train(args, ranks)
    finally:
        logger.removeHandler(handler)
    return 0


def train(args: argparse.Namespace, ranks: Ranks) -> None:
    """The phases that the command names, and the last words."""
    signal.signal(signal.SIGTERM, lambda *_: STOP.set())
    run = make_run(args, ranks)
    try:
        finished = run_phase(run)
        for saver in run.savers:
            saver.join()
    finally:
        run.workers.shutdown(wait=True, cancel_futures=True)
    # the first may still have been writing
    ranks.any(False)
    ranks.leave()
    logger.info("finished" if finished else "stopped before the end; go on with --resume")


def make_run(args: argparse.Namespace, ranks: Ranks) -> Run:
    """Workers first: they are forked, so before the first use of the GPU, any thread pool and other processes."""
    count = args.workers or max(1, min(12, ((os.cpu_count() or 2) - 2) // ranks.size))
    workers = ProcessPoolExecutor(count, multiprocessing.get_context("fork"), initializer=worker_init)
    workers.submit(sample_captions, 0, 1).result()
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    cuda = args.device.startswith("cuda") or (args.device == "auto" and torch.cuda.is_available())
    device = torch.device(pick_gpu(args.device) if cuda else "cpu")
    # new weights are those of the first process; clips and noise are each one's own
    torch.manual_seed(args.seed + ranks.rank)
    if cuda:
        torch.cuda.set_device(device)
        set_up_cuda()
    ranks.join(cuda)
    plan = smoke_plan(cuda) if args.smoke else Plan()
    if args.pool_scale != 1.0:
        pools = (replace(p, count=max(2, round(args.pool_scale * p.count / p.chunk)) * p.chunk) for p in plan.pools)
        plan = replace(plan, pools=tuple(pools))
    plan = STAGES[args.stages](plan)
    if args.long_share is not None:
        plan = with_long_share(plan, args.long_share)
    run = Run(args, plan, device, workers, ranks)
    run.load(resume=args.resume or args.command in ("encode", "dit", "decoder", "export"))
    # nobody stores pools before the first has removed those of another round
    ranks.any(False)
    return run


def pick_gpu(name: str) -> str:
    """The device that was named, else the GPU that `torchrun` has for this process."""
    return name if ":" in name else f"cuda:{os.environ.get('LOCAL_RANK', 0)}"


def set_up_cuda() -> None:
    import torch._dynamo as dynamo

    torch.set_float32_matmul_precision("high")
    torch.backends.cudnn.benchmark = True
    # One block is compiled for each batch shape, and the VAE's norm for each width: more than the default allows.
    dynamo.config.recompile_limit = 64
    dynamo.config.accumulated_recompile_limit = 1024
    logger.info(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, {os.cpu_count()} CPUs")


def run_phase(run: Run) -> bool:
    """The phase that the command names; true when it is finished."""
    args = run.args
    if args.command == "all":
        return run_all(run)
    if args.command == "export":
        if not run.meta.get("dit") or "latents_mean" not in run.meta:
            raise ValueError(f"export needs a trained DiT in {run.work} or {run.backup}; run `all` first.")
        if args.decoder:
            take_decoder(run, Path(args.decoder))
        out = export(run)
        if args.check:
            check(run, out)
        return True
    if args.command == "decoder":
        return train_decoder(run, args.minutes)
    prepare_tokenizer(run)
    if args.command != "vae" and not run.meta.get("vae", {}).get("finished"):
        raise ValueError(f"{args.command} needs a finished VAE in {run.work} or {run.backup}; run `vae` first.")
    if not train_vae(run, args.minutes):
        return False
    if args.command == "vae":
        return True
    encode(run)
    run.save()
    return args.command == "encode" or train_dit(run, args.minutes)


def run_all(run: Run) -> bool:
    """Every phase under one wall-clock budget; true when all are finished."""
    args = run.args
    prepare_tokenizer(run)
    if not train_vae(run, args.vae_minutes) or run.must_stop():
        run.save()
        return False
    encode(run)
    run.save()
    left = args.budget_minutes - run.spent() - args.reserve_minutes
    # by the clock of the first process, or one would end before another
    minutes = run.ranks.of_first(max(0.02, run.meta.get("dit", {}).get("elapsed", 0.0) / 60 + left))
    logger.info(f"dit: {minutes:.2f} min in all, {left:.2f} left")
    return train_dit(run, minutes)


if __name__ == "__main__":
    run_program(main)
