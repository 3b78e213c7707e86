#!/usr/bin/env python
"""Draw a reproducible share of a LLaVA training file: half of the 665k mixture if nothing else is said.

    python random_drop.py
    python random_drop.py --input X.json --output Y.json --keep-ratio 0.1 --seed 7 --exclude-source ocr_vqa
    python random_drop.py --input X.json --output Y.json --split router=0.067,adapter=0.3,finetune=0.5

Exit code 0: written, or there already; 2: input, options or output cannot be used, and nothing was written.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from dataclasses import fields
from pathlib import Path

from llava.data.subset import MODES, STRATA, DataError, SubsetResult, SubsetSettings, draw_subset, parse_split

DEFAULT_INPUT = Path("playground/data/llava_v1_5_mix665k.json")
DEFAULT_OUTPUT = Path("playground/data/llava_v1_5_mix665k_50.json")


def main(argv: list[str] | None = None) -> int:
    """Run the command line and give its exit code."""
    argv = sys.argv[1:] if argv is None else argv
    options = _parser().parse_args(argv)
    command, progress = shlex.join(["python", "random_drop.py", *argv]), _show_progress if sys.stderr.isatty() else None
    try:
        result = draw_subset(*_paths(options), _settings(options), command, options.overwrite, progress)
    except (DataError, OSError) as error:
        print(f"random_drop.py: {error}", file=sys.stderr)
        return 2
    _print_result(result)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add("--input", type=Path, help=f"JSON array or JSON Lines file (default: {DEFAULT_INPUT})")
    add("--output", type=Path, help=f"file to write (default with the default input: {DEFAULT_OUTPUT})")
    add("--keep-ratio", type=float, help="share of the records to keep, 0 to 1 (default: 0.5)")
    add("--seed", type=int, help="equal seeds give equal, nested results (default: 42)")
    add("--stratify", choices=STRATA, help="keep the same share of each (default: source)")
    add("--mode", choices=MODES, default="random", help="modulo: index %% 100 < 100 * ratio (default: random)")
    add(
        "--exclude-source",
        action="append",
        dest="exclude_sources",
        metavar="NAME",
        help="leave a source out, repeatable",
    )
    add("--require-images", metavar="DIR", help="leave out records whose images are not in this folder")
    add("--max-per-source", type=int, metavar="N", help="keep at most N records of a source")
    add("--split", metavar="NAME=RATIO,...", help="write disjoint parts OUTPUT_STEM.NAME.json instead of one file")
    add("--overwrite", action="store_true", help="replace an output that is not the result of this command")
    return parser


def _paths(options: argparse.Namespace) -> tuple[Path, Path]:
    if options.input is None and not DEFAULT_INPUT.exists():
        raise DataError(
            f"{DEFAULT_INPUT} does not exist; it is read when no --input is given. Download it there from "
            "https://huggingface.co/datasets/liuhaotian/LLaVA-Instruct-150K, or name a file with --input and --output."
        )
    without_options = {**vars(_parser().parse_args([])), "overwrite": options.overwrite}
    if options.output is None and vars(options) != without_options:
        raise DataError("--output is missing; only the command without options has a default. Name the file to write.")
    return options.input or DEFAULT_INPUT, options.output or DEFAULT_OUTPUT


def _settings(options: argparse.Namespace) -> SubsetSettings:
    """Turn options into settings, refusing those that would have no effect."""
    if options.split is not None and options.keep_ratio is not None:
        raise DataError("--keep-ratio and --split were both given; a split has its own ratios. Drop one of the two.")
    for name in ("seed", "stratify"):
        if options.mode == "modulo" and getattr(options, name) is not None:
            raise DataError(f"--{name} has no effect in --mode modulo; only --mode random draws. Drop --{name}.")
    settings = {name: getattr(options, name) for name in (field.name for field in fields(SubsetSettings))}
    settings["split"] = None if options.split is None else parse_split(options.split)
    return SubsetSettings(**{name: value for name, value in settings.items() if value is not None})


def _show_progress(done: int, total: int) -> None:
    print(f"\rread {done:,} of {total:,} records", end="\n" if done == total else "", file=sys.stderr, flush=True)


def _print_result(result: SubsetResult) -> None:
    counts = {"before": result.before, **{part.path.name: part.counts for part in result.parts}}
    width = max(map(len, [*result.before, "source"]))
    print("  ".join([f"{'source':<{width}}", *(f"{name:>9}" for name in counts)]))
    for source in [*result.before, None]:
        numbers = (sum(kept.values()) if source is None else kept[source] for kept in counts.values())
        cells = (f"{number:>{max(9, len(name))},}" for number, name in zip(numbers, counts, strict=True))
        print("  ".join([f"{source or 'all':<{width}}", *cells]))
    for part in result.parts:
        print(f"{part.path}: {'already there' if part.was_there else 'written'}, {part.num_records:,} records")
    for warning in result.warnings:
        print(f"warning: {warning}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
