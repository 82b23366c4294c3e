"""Is the faster video still a good one, and still the same one? Scores for any folder of videos.

VBench's dimensions that maintained models compute, of videos called `{prompt}-0.mp4`, `{prompt}-1.mp4`, ...:

    python eval/score_videos.py FOLDER                                 all of them; names what it lacks weights for
    python eval/score_videos.py FOLDER --dimensions free               only those that need no download
    python eval/score_videos.py FOLDER --weights DIR --no-download     weights from a folder, never from the network
    python eval/score_videos.py FOLDER --suite VBench_full_info.json   each video only in what its prompt is for
    python eval/score_videos.py FOLDER --long                          clips of 2 seconds, and the drift from the first

How close videos are to others of the same names, by our convention or that of a paper:

    python eval/score_videos.py FOLDER --reference DENSE
    python eval/score_videos.py FOLDER --reference DENSE --convention svg --decoded

Written to FOLDER/scores, or to --output, under the folder's name, with --long FOLDER_long; a killed run goes on where
it was when the same command is given again:

    NAME_eval_results.json   VBench's own shape, which its summariser reads
    NAME_full_info.json      the videos by prompt, as VBench writes it beside the other
    NAME_dimensions.csv      scores with intervals, ranges, exact | near | proxy, formulas, what is missing, totals
    NAME_videos.csv          a row a video
    NAME_drift.csv           with --long: cosine of the first clip and later ones
    NAME_fidelity.csv        with --reference; by another --convention, such as svg: NAME_fidelity_svg.csv

LPIPS is computed where its weights are. `--summarise RESULTS.json` prints the totals of a results file, also of one by
VBench. Exit code 0 if all that was asked for was computed, 1 if something is missing (told a line each), 2 if the
request cannot be carried out.
"""

from __future__ import annotations

from videosparse.program import run_program

import argparse
import math
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from videosparse.benchmark.rows import write_rows
from videosparse.files import write_json
from videosparse.generation.output import check_writable
from videosparse.metrics import pairs
from videosparse.metrics.bootstrap import interval
from videosparse.metrics.fidelity import CONVENTION, CONVENTIONS, Perceptual
from videosparse.metrics.perceptual import load_perceptual
from videosparse.metrics.vbench import DIMENSIONS, SCALES, WITHOUT_WEIGHTS, MissingError, Models, Weights
from videosparse.metrics.vbench.ledger import Ledger
from videosparse.metrics.vbench.prompts import Suite, load_suite
from videosparse.metrics.vbench.results import (
    DimensionResult,
    load_results,
    save_results,
    totals,
)
from videosparse.metrics.vbench.suite import FolderScores, score_folder
from videosparse.metrics.vbench.tables import (
    DIMENSION_COLUMNS,
    DRIFT_COLUMNS,
    dimension_rows,
    drift_rows,
    video_rows,
)
from videosparse.metrics.video import find_videos

FREE = "free"
SHOWN = 60  # letters of a file's name beside the bar


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?", help="of videos")
    parser.add_argument(
        "--dimensions", nargs="+", metavar="NAME", help=f"some of: {', '.join(DIMENSIONS)}; or {FREE}, or none"
    )
    parser.add_argument("--weights", type=Path, metavar="DIR", help="folder of weights, looked into first")
    parser.add_argument("--no-download", action="store_true", help="never ask the network for weights")
    parser.add_argument("--suite", type=Path, metavar="FILE", help="prompts in the form of VBench_full_info.json")
    parser.add_argument("--long", action="store_true", help="score clips of 2 seconds and follow the drift")
    parser.add_argument("--mixed-sizes", action="store_true", help="score videos of several sizes as one set")
    parser.add_argument("--reference", type=Path, metavar="FOLDER", help="videos of the same names to compare with")
    parser.add_argument("--convention", choices=CONVENTIONS, default=CONVENTION)
    parser.add_argument("--decoded", action="store_true", help="compare decoded files even where there are raw frames")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="that models run on")
    parser.add_argument("--output", type=Path, metavar="DIR", help="FOLDER/scores if left out")
    parser.add_argument("--name", help="that files begin with; the folder's, with --long FOLDER_long")
    parser.add_argument("--summarise", type=Path, metavar="JSON", help="print the totals of a results file; no scoring")
    args = parser.parse_args(argv)
    if (args.folder is None) == (args.summarise is None):
        parser.error("give a FOLDER of videos, or --summarise a results file")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    args = arguments(argv)
    try:
        if args.summarise:
            return summarise(load_results(args.summarise))
        return score(args)
    except (ValueError, OSError) as error:
        print(f"Error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("Interrupted; the same command goes on where it was.", file=sys.stderr)
        return 130


def score(args: argparse.Namespace) -> int:
    folder: Path = args.folder
    output: Path = args.output or folder / "scores"
    prefix = args.name or folder.resolve().name + "_long" * args.long  # scores of clips beside those of whole videos
    names = dimensions_asked(args.dimensions)
    check_request(args, names)
    check_places(output, files_of(args, names, prefix))
    ledger = Ledger(output / f"{prefix}_ledger.jsonl", {"long": args.long})
    weights = Weights(args.weights, download=not args.no_download)
    lines: list[str] = []
    written = names != []
    if names != []:
        suite = load_suite(args.suite) if args.suite else None
        scores = score_dimensions(args, names, suite, ledger, weights)
        write_scores(output, prefix, scores, suite)
        if args.long and not scores.drift:
            put_aside(output / f"{prefix}_drift.csv")
        show(scores)
        lines += [f"{name}: {why}" for name, why in scores.missing.items()] + scores.failures
        tell_notes(scores.notes)
    if args.reference:
        found = compare(args, ledger, weights)
        written |= write_fidelity(output / fidelity_name(prefix, args.convention), found, args.convention)
        lines += found.failures
    for line in dict.fromkeys(lines):  # a video that cannot be read fails in both
        print(f"Not computed: {line}", file=sys.stderr)
    print(f"Written to {output}" if written else "Nothing written: no video could be compared.")
    return 1 if lines else 0


def check_request(args: argparse.Namespace, names: list[str] | None) -> None:
    """Tell before hours of scoring what cannot be carried out.

    Raises:
        ValueError: nothing is asked for, a folder holds no videos, or the name is none of files in the output folder.
    """
    if names == [] and not args.reference:
        raise ValueError("--dimensions none leaves nothing to compute; add --reference FOLDER, or name dimensions.")
    if args.name and (args.name.startswith(".") or {"/", "\\"} & set(args.name)):
        raise ValueError(
            f"--name must not start with a dot or hold a slash (got {args.name!r}); for another folder use --output."
        )
    for folder in filter(None, (args.folder, args.reference)):
        find_videos(folder)


def files_of(args: argparse.Namespace, names: list[str] | None, prefix: str) -> list[str]:
    """Names of all files that the run may write."""
    files = [f"{prefix}_ledger.jsonl"]
    if names != []:
        files += [
            f"{prefix}_{kind}" for kind in ("eval_results.json", "full_info.json", "dimensions.csv", "videos.csv")
        ]
        files += [f"{prefix}_drift.csv"] * args.long
    return files + ([fidelity_name(prefix, args.convention)] if args.reference else [])


def check_places(output: Path, names: Sequence[str]) -> None:
    """Whether files of these names can be written.

    Raises:
        ValueError: a folder stands where a file is to be.
        GenerationError: the output folder takes no files, or none of these names.
    """
    check_writable(output, [f"{name}.part" for name in names])
    for name in names:
        for path in (output / name, output / f"{name}.part"):
            if path.is_dir():
                raise ValueError(
                    f"{path} is a folder, where a file of scores is to be; rename it, or choose another --name."
                )


def put_aside(path: Path) -> None:
    """Rename a table of an earlier run, which would pass for one of this run, that has no rows for it."""
    if path.exists():
        old = path.replace(path.with_name(f"{path.name}.old"))
        tell_notes([f"{path.name} is of an earlier run, and this run has no rows for it; it is now {old.name}."])


def tell_notes(notes: Sequence[str]) -> None:
    for note in notes:
        print(f"Note: {note}", file=sys.stderr)


def dimensions_asked(names: list[str] | None) -> list[str] | None:
    """Names for `score_folder`; an empty list for none of them."""
    if names == ["none"]:
        return []
    if names is None:
        return None
    return [n for name in names for n in (WITHOUT_WEIGHTS if name == FREE else (name,))]


def score_dimensions(
    args: argparse.Namespace, names: list[str] | None, suite: Suite | None, ledger: Ledger, weights: Weights
) -> FolderScores:
    transformers.utils.logging.disable_progress_bar()  # its bars for loading would tear ours
    transformers.utils.logging.set_verbosity_error()
    models = Models(weights, args.device)
    with bar("score") as progress:
        return score_folder(
            args.folder, ledger, dimensions=names, suite=suite, models=models, long=args.long,
            mixed_sizes=args.mixed_sizes, progress=progress,
        )  # fmt: skip


def compare(args: argparse.Namespace, ledger: Ledger, weights: Weights) -> pairs.PairScores:
    """Rows of fidelity; tells why LPIPS is not among them."""
    perceptual: Perceptual | None = None
    why = ""
    try:
        perceptual = load_perceptual(weights, args.convention, device=args.device)
    except MissingError as error:
        why = str(error)
    with bar("compare") as progress:
        found = pairs.score_pairs(
            args.folder, args.reference, ledger, convention=args.convention, decoded=args.decoded,
            perceptual=perceptual, progress=progress,
        )  # fmt: skip
    if why:
        tell_notes([f"without LPIPS: {why}"])
    return found


@contextmanager
def bar(label: str) -> Iterator[Callable[[str, int, int], None]]:
    """A progress bar on stderr for the time of a block."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task(label, total=None)
        yield lambda what, done, total: progress.update(
            task, description=f"{label} {what[:SHOWN]}", completed=done, total=total
        )


def write_scores(output: Path, prefix: str, scores: FolderScores, suite: Suite | None) -> None:
    save_results(output / f"{prefix}_eval_results.json", scores.results)
    write_json(output / f"{prefix}_full_info.json", full_info(scores, suite))
    write_rows(output / f"{prefix}_dimensions.csv", dimension_rows(scores), DIMENSION_COLUMNS)
    rows, columns = video_rows(scores)
    write_rows(output / f"{prefix}_videos.csv", rows, columns)
    if scores.drift:
        write_rows(output / f"{prefix}_drift.csv", drift_rows(scores), DRIFT_COLUMNS)


def fidelity_name(prefix: str, convention: str) -> str:
    """Of the table of one convention; those of several stand side by side."""
    return f"{prefix}_fidelity{'' if convention == CONVENTION else f'_{convention}'}.csv"


def write_fidelity(path: Path, found: pairs.PairScores, convention: str) -> bool:
    """Write and show the rows; where there are none, no table is left there. Whether there are any."""
    if not found.rows:
        put_aside(path)
        return False
    write_rows(path, found.rows, pairs.COLUMNS)
    show_fidelity(found.rows, convention)
    return True


def full_info(scores: FolderScores, suite: Suite | None) -> list[dict[str, Any]]:
    """The videos of each prompt and what they were scored in, as VBench writes them."""
    videos: dict[str, list[str]] = defaultdict(list)
    for path, prompt in scores.prompts.items():
        videos[prompt].append(path)
    entries: list[dict[str, Any]] = []
    for prompt, paths in videos.items():
        known = suite.prompts.get(prompt) if suite else None
        entry: dict[str, Any] = {
            "prompt_en": prompt,
            "dimension": list(known.dimensions) if known else list(scores.results),
            "video_list": paths,
        }
        entries.append(entry | ({"auxiliary_info": dict(known.auxiliary)} if known and known.auxiliary else {}))
    return entries


def show(scores: FolderScores) -> None:
    table = Table("dimension", "", "score", "95 % interval", "normalised", "videos")
    for name, result in scores.results.items():
        low, high = result.interval()
        dimension = DIMENSIONS[name]
        table.add_row(
            name, dimension.kind, f"{result.score:.4f}", f"{low:.4f} to {high:.4f}",
            f"{dimension.scale.normalised(result.score):.4f}", str(len(result.videos)),
        )  # fmt: skip
    Console(width=120).print(table)
    tell_totals({name: result.score for name, result in scores.results.items()})


def summarise(results: dict[str, DimensionResult]) -> int:
    for name, result in results.items():
        print(f"{name:<24}{result.score:.4f}  ({len(result.videos)} videos)")
    tell_totals({name: result.score for name, result in results.items()})
    return 0


def tell_totals(scores: dict[str, float]) -> None:
    """Totals, each with the dimensions that are not in it; before them, scores that enter them clipped."""
    for name, score in scores.items():
        scale = SCALES.get(name)
        if scale and not scale.minimum <= score <= scale.maximum:
            print(
                f"{name}: {score:.4f} is outside its range, {scale.minimum:g} to {scale.maximum:g}; "
                f"it counts as {scale.normalised(score):g}"
            )
    found = totals(scores)
    for group, value, missing in (
        ("quality", found.quality, found.missing_quality),
        ("semantic", found.semantic, found.missing_semantic),
    ):
        told = f"{value:.4f}" if value is not None else "none"
        print(f"{group}: {told}" + (f", without {', '.join(missing)}" if missing else ""))
    if found.total is None:
        print("total: none, since a group has no dimension at all")
    else:
        print(f"total: {found.total:.4f}" + ("" if found.complete else ", of what is there: no published figure"))


def show_fidelity(rows: list[dict[str, Any]], convention: str) -> None:
    """A table of means over videos; those that are inf are counted below it, and are not in the mean."""
    sources = ", ".join(sorted({row["frames_from"] for row in rows}))
    table = Table("metric", "mean", "95 % interval", "worst frame", title=f"{convention}, {sources} frames")
    notes = []
    for metric in pairs.METRICS:
        values = [row[metric] for row in rows if metric in row]
        finite = [value for value in values if math.isfinite(value)]
        if finite and len(finite) < len(values):
            identical = sum(math.isinf(row[f"worst_{metric}"]) for row in rows if metric in row)
            notes.append(
                f"{metric}: inf for {len(values) - len(finite)} of {len(values)} videos, {identical} of them identical "
                f"in all frames; mean and interval are of the other {len(finite)}"
            )
            values = finite
        if values:
            _, low, high = interval(values)
            worst = (max if metric in ("lpips", "latent_l1") else min)(row[f"worst_{metric}"] for row in rows)
            table.add_row(metric, f"{sum(values) / len(values):.4f}", f"{low:.4f} to {high:.4f}", f"{worst:.4f}")
    Console(width=120).print(table)
    for note in notes:
        print(note)


if __name__ == "__main__":
    run_program(main)
