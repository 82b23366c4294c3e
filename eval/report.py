"""One self-contained HTML page about a comparison: tables, charts, block maps, and videos side by side on one clock.

    python eval/compare_methods.py --frames 81 --output rows.csv --keep-videos 4
    python eval/report.py rows.csv --videos rows-videos --output report.html

Takes the rows of any number of comparisons; a video that several tables have counts once. The page needs no network
and no server: style, script, charts, maps and videos are in the file, which can be sent as it is. It shows for every
size the means with 95 % bootstrap intervals, quality against density and against time, what drifts from quarter to
quarter, and which blocks each method reads; with `--videos`, the folder of `--keep-videos`, all videos of a prompt play
together.
"""

from __future__ import annotations

from videosparse.program import run_program

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from videosparse.evaluation.page.build import build_page
from videosparse.evaluation.page.gathering import gather
from videosparse.evaluation.page.summary import sizes_of
from videosparse.files import write_text
from videosparse.generation.output import check_place


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", type=Path, nargs="+", help="tables of eval/compare_methods.py, .csv or .parquet")
    parser.add_argument("--videos", type=Path, metavar="FOLDER", help="of --keep-videos; without it the page has none")
    parser.add_argument("--output", type=Path, default=Path("report.html"))
    parser.add_argument("--title", default="Block-sparse video attention, method by method")
    return parser.parse_args(argv)


def check_output(args: argparse.Namespace) -> None:
    """Raise ValueError unless the page can be written here, over nothing that it is made of."""
    if args.output.suffix.lower() in (".csv", ".parquet"):
        raise ValueError(f"--output {args.output} is the name of a table, and a page is HTML; use report.html.")
    for path in args.rows:
        is_same = args.output.resolve() == path.resolve()
        if is_same or (args.output.exists() and path.exists() and args.output.samefile(path)):
            raise ValueError(f"--output {args.output} is the table {path}, which it would replace; use another name.")
    check_place(args.output)


def main(argv: Sequence[str] | None = None) -> int:
    args = arguments(argv)
    try:
        check_output(args)
        if args.videos and not args.videos.is_dir():
            raise ValueError(f"--videos {args.videos} is no folder; give the one that --keep-videos made.")
        rows = gather(args.rows)
        if not rows:
            raise ValueError(f"{args.rows[0]} has no rows; run eval/compare_methods.py.")
        write_text(args.output, build_page(sizes_of(rows), args.title, args.videos))
    except (ValueError, OSError) as error:
        print(f"Error: {error}", file=sys.stderr)
        return 2
    print(f"{args.output}: {len(rows)} rows, {args.output.stat().st_size / 1e6:.1f} MB")
    return 0


if __name__ == "__main__":
    run_program(main)
