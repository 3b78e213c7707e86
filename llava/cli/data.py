"""``fuzzyroe check-data`` and ``fuzzyroe data-stats``: a file of records, looked at before a model is loaded."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.console import Console
from rich.text import Text

from llava.cli.terminal import USER_ERROR, make_table, open_console, progress_bar

if TYPE_CHECKING:
    from llava.data.check import DataReport, LengthCounts
    from llava.data.preprocess import LengthMeter

_STYLES = {"trained": "bold green", "masked": "dim", "image": "cyan"}
_SHOWN_CHARACTERS = 400
_BAR_WIDTH = 40


def check_data_command(
    data: Annotated[Path, typer.Argument(help="JSON or JSON Lines file of records.")],
    image_folder: Annotated[Path, typer.Option(help="Folder that image names are relative to.")],
    version: Annotated[str | None, typer.Option(help="Conversation template of the training.")] = None,
    decode: Annotated[bool, typer.Option(help="Decode every image too; minutes to hours.")] = False,
    on_missing: Annotated[
        Literal["error", "drop", "resolve"],
        typer.Option(help="error: report; drop: write a file without bad records; resolve: mend file extensions."),
    ] = "error",
    output: Annotated[Path | None, typer.Option(help="File that drop and resolve write.")] = None,
    overwrite: Annotated[bool, typer.Option(help="Replace other content there.")] = False,
    model: Annotated[
        str | None, typer.Option(help="Checkpoint or language model to measure lengths in tokens with.")
    ] = None,
    vision_tower: Annotated[
        str | None, typer.Option(help="CLIP checkpoint to be joined to a language model given as --model.")
    ] = None,
    model_max_length: Annotated[int, typer.Option(help="Longest sample in tokens, with --model.", min=1)] = 2048,
    allow_truncation: Annotated[
        bool, typer.Option(help="Accept that more than a fifth of the records is cut.")
    ] = False,
    show: Annotated[int, typer.Option(help="Records to show as trained and masked text, with --model.", min=0)] = 2,
) -> None:
    """Look at every record and every image that training would read; exit 2 if any cannot be trained on."""
    from llava.data.check import check_data

    meter = _open_meter(model, vision_tower, version, model_max_length) if model is not None else None
    with progress_bar("checking records") as progress:
        report = check_data(
            data,
            image_folder,
            conv_template=version,
            decode=decode,
            on_missing=on_missing,
            output=output,
            overwrite=overwrite,
            command=shlex.join(["fuzzyroe", *sys.argv[1:]]),
            meter=meter,
            allow_truncation=allow_truncation,
            progress=progress,
        )
    # Counts go to stdout, problems to stderr: a script can keep one and show the other.
    console, problems = open_console(), open_console(stderr=True)
    _print_report(console, report)
    if meter:
        _print_samples(console, meter, report.usable_path, show)
    for warning in report.warnings:
        problems.print(f"warning: {warning}", style="yellow", soft_wrap=True, markup=False)
    for line in report.problems():
        problems.print(line, soft_wrap=True, markup=False)
    if not report.is_ok:
        raise typer.Exit(USER_ERROR)


def data_stats_command(data: Annotated[Path, typer.Argument(help="JSON or JSON Lines file of records.")]) -> None:
    """Count records, images, turns and words per source; images are not looked at."""
    import numpy as np

    from llava.data.check import STATS, collect_stats

    with progress_bar("reading records") as progress:
        sources, unusable = collect_stats(data, progress)
    sources["total"] = np.concatenate([*sources.values(), np.empty((0, len(STATS)), int)])
    rows = []
    for name, counts in sources.items():
        images = counts[:, 0]
        numbers = (len(counts), (images > 0).sum(), (images == 0).sum(), images.sum())
        # "lower" gives numbers that occur, never 1.5 turns.
        spread = np.quantile(counts[:, 1:] if len(counts) else [[0, 0, 0]], [0.5, 0.95, 1], axis=0, method="lower")
        rows.append([name, *(f"{number:,}" for number in numbers), *(" / ".join(map(str, c)) for c in spread.T)])
    console = open_console()
    columns = ("source", "records", "with image", "text only", *STATS)
    console.print(make_table(str(data), columns, rows, bold=[len(rows) - 1]))
    console.print("turns and words per record: median / 95 % quantile / maximum", style="dim")
    if unusable:
        console.print(f"{unusable:,} records break the format and are not counted; see check-data", style="bold")


def _open_meter(model: str, vision_tower: str | None, version: str | None, max_length: int) -> LengthMeter:
    """Read configuration and tokenizer of a model, not its weights."""
    from llava.conversation import get_template
    from llava.data.preprocess import LengthMeter
    from llava.model.checkpoints.reading import read_config_and_tokenizer
    from llava.model.families import VisionSettings, count_image_tokens, get_image_token_id

    if version is None:
        raise typer.BadParameter("--model measures conversations; name their template.", param_hint="--version")
    # A language model alone has no image size yet: that of its future vision tower decides how long images are.
    config, tokenizer = read_config_and_tokenizer(model, VisionSettings(vision_tower) if vision_tower else None)
    image = (count_image_tokens(config), get_image_token_id(config))
    return LengthMeter(tokenizer, get_template(version), *image, max_length)


def _print_report(console: Console, report: DataReport) -> None:
    columns = ("records", "bad", "invalid", "images", "missing", "empty", "corrupt", "resolved")
    rows = [[name, *(f"{getattr(c, key):,}" for key in columns)] for name, c in report.sources.items()]
    totals = [sum(getattr(counts, key) for counts in report.sources.values()) for key in columns]
    rows.append(["total", *(f"{total:,}" for total in totals)])
    console.print(make_table(str(report.data_path), ("source", *columns), rows, bold=[len(rows) - 1]))
    if report.lengths:
        _print_lengths(console, report.lengths)
    if report.output:
        console.print(f"\n{report.num_output:,} records written to {report.output}", soft_wrap=True, markup=False)


def _print_lengths(console: Console, lengths: LengthCounts) -> None:
    edges = [f"up to {edge:,}" for edge in lengths.bin_edges()] + [f"above {lengths.model_max_length:,}"]
    most = max(lengths.histogram, default=0) or 1  # the longest bar fills the width
    rows = [
        [edge, f"{count:,}", f"{count / max(1, lengths.sampled):.1%}", "█" * round(count / most * _BAR_WIDTH)]
        for edge, count in zip(edges, lengths.histogram, strict=True)
    ]
    title = f"tokens of {lengths.sampled:,} sampled records, images expanded"
    console.print()
    console.print(make_table(title, ("tokens", "records", "share", ""), rows))
    console.print(
        f"\nlongest measured: {lengths.longest:,} tokens; {lengths.truncated:,} of {lengths.records:,} records "
        f"({lengths.truncated_ratio:.1%}) exceed {lengths.model_max_length:,} and are cut, {lengths.unlabelled:,} "
        f"({lengths.unlabelled / max(1, lengths.records):.1%}) have no trained token left"
    )


def _print_samples(console: Console, meter: LengthMeter, path: Path, count: int) -> None:
    """Show a few records as training sees them."""
    from llava.data.preprocess import view_tokens
    from llava.data.records import DataError, RecordFile

    records, shown = RecordFile(path), 0
    for index in range(len(records)):
        if shown == count:
            return
        try:
            record = records[index]
            encoded = meter.encode(record, meter.max_length)
        except (DataError, ValueError):
            continue  # is among the problems printed below
        shown += 1
        console.print(f"\nrecord {record.index} (id {record.id}), {len(encoded.input_ids):,} tokens", markup=False)
        for kind, turn, num_tokens, text in view_tokens(encoded, meter.tokenizer, meter.image_token_id):
            head = Text(f"  turn {turn}  {kind:<7} {num_tokens:>5}  ")
            text = text if len(text) <= _SHOWN_CHARACTERS else text[:_SHOWN_CHARACTERS] + " ..."
            console.print(head.append(repr(text) if text else "", style=_STYLES[kind]), soft_wrap=True)
