"""``fuzzyroe check-data``: everything training would read, looked at before a model is loaded."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from llava.cli.errors import USER_ERROR

if TYPE_CHECKING:
    from rich.console import Console

    from llava.data.data_report import DataReport
    from llava.data.records import Record

_STYLES = {"trained": "bold green", "masked": "dim", "image": "cyan"}
_SHOWN_CHARACTERS = 400


class OnMissing(str, Enum):
    """What to do about images that are not there."""

    error = "error"
    drop = "drop"
    resolve = "resolve"


def check_data_command(
    data: Annotated[Path, typer.Argument(help="JSON or JSON Lines file of records.")],
    image_folder: Annotated[Path, typer.Option(help="Folder that image names are relative to.")],
    version: Annotated[str | None, typer.Option(help="Conversation template of the training.")] = None,
    decode: Annotated[bool, typer.Option(help="Decode every image too; minutes to hours.")] = False,
    on_missing: Annotated[
        OnMissing, typer.Option(help="error: report; drop: write a file without bad records; resolve: mend endings.")
    ] = OnMissing.error,
    output: Annotated[Path | None, typer.Option(help="File that drop and resolve write.")] = None,
    overwrite: Annotated[bool, typer.Option(help="Replace other content there.")] = False,
    model: Annotated[str | None, typer.Option(help="Checkpoint to measure lengths in tokens with.")] = None,
    model_max_length: Annotated[int, typer.Option(help="Longest sample in tokens, with --model.", min=1)] = 2048,
    show: Annotated[int, typer.Option(help="Records to show as trained and masked text, with --model.", min=0)] = 2,
) -> None:
    """Look at every record and every image that training would read; exit 2 if any cannot be trained on."""
    from llava.cli.terminal import open_console, progress_bar
    from llava.data.check import check_data

    encode = None
    if model is not None:
        if version is None:
            raise typer.BadParameter(
                "--model measures rendered conversations; name their template.", param_hint="--version"
            )
        encode = _Encoder(model, version, model_max_length)
    with progress_bar("checking records") as progress:
        report = check_data(
            data,
            image_folder,
            conv_template=version,
            decode=decode,
            on_missing=on_missing.value,
            output=output,
            overwrite=overwrite,
            command=shlex.join(["fuzzyroe", *sys.argv[1:]]),
            lengths=encode.lengths if encode else None,
            model_max_length=model_max_length if encode else None,
            progress=progress,
        )
    console = open_console()
    _print_report(console, report)
    if encode:
        _print_samples(console, encode, report.usable_path, show)
    _print_findings(open_console(stderr=True), report)
    if not report.is_ok:
        raise typer.Exit(USER_ERROR)


class _Encoder:
    """Encodes records as training does; reads a checkpoint's configuration and tokenizer, not its weights."""

    def __init__(self, model: str, version: str, max_length: int) -> None:
        from transformers import AutoTokenizer, LlavaConfig

        from llava.conversation import get_template
        from llava.data.preprocess import encode_conversation
        from llava.image_tokens import count_image_tokens

        config = LlavaConfig.from_pretrained(model)
        self.tokenizer = AutoTokenizer.from_pretrained(model)
        self.image_token_id = config.image_token_index
        self.max_length = max_length
        self._encode: Callable[..., Any] = encode_conversation
        self._settings = (self.tokenizer, get_template(version), count_image_tokens(config), self.image_token_id)

    def __call__(self, record: Record, max_length: int | None = None) -> Any:
        return self._encode(record.turns, *self._settings, max_length)

    def lengths(self, record: Record) -> tuple[int, int]:
        """Tokens in all, and trained tokens within the maximum length."""
        whole = self(record)
        total = len(whole.input_ids)
        return total, (whole if total <= self.max_length else self(record, self.max_length)).num_trained


def _print_report(console: Console, report: DataReport) -> None:
    from llava.cli.terminal import make_table

    columns = ("records", "bad", "invalid", "images", "missing", "empty", "corrupt", "resolved")
    rows = [[name, *(f"{getattr(c, key):,}" for key in columns)] for name, c in report.sources.items()]
    totals = [sum(getattr(counts, key) for counts in report.sources.values()) for key in columns]
    rows.append(["total", *(f"{total:,}" for total in totals)])
    console.print(make_table(str(report.data_path), ("source", *columns), rows, bold=[len(rows) - 1]))
    if report.lengths:
        lengths = report.lengths
        console.print(
            f"\nlongest record: {lengths.longest:,} tokens; {lengths.truncated:,} of {lengths.measured:,} "
            f"({lengths.truncated_ratio:.1%}) exceed {lengths.model_max_length:,} and are cut, {lengths.unlabelled:,} "
            f"({lengths.unlabelled_ratio:.1%}) have no trained token left"
        )
    if report.output:
        console.print(f"\n{report.num_output:,} records written to {report.output}", soft_wrap=True, markup=False)


def _print_samples(console: Console, encode: _Encoder, path: Path, count: int) -> None:
    """Show a few records as training sees them."""
    from rich.text import Text

    from llava.data.records import DataError, RecordFile
    from llava.data.token_view import view_tokens

    records, shown = RecordFile(path), 0
    for index in range(len(records)):
        if shown == count:
            return
        try:
            record = records[index]
            encoded = encode(record, encode.max_length)
        except (DataError, ValueError):
            continue  # already among the findings
        shown += 1
        console.print(f"\nrecord {record.index} (id {record.id}), {len(encoded.input_ids):,} tokens", markup=False)
        for run in view_tokens(encoded, encode.tokenizer, encode.image_token_id):
            head = Text(f"  turn {run.turn}  {run.kind:<7} {run.num_tokens:>5}  ")
            text = run.text if len(run.text) <= _SHOWN_CHARACTERS else run.text[:_SHOWN_CHARACTERS] + " ..."
            console.print(head.append(repr(text) if text else "", style=_STYLES[run.kind]), soft_wrap=True)


def _print_findings(console: Console, report: DataReport) -> None:
    for error in report.errors:
        console.print(error, soft_wrap=True, markup=False)
    more = report.num_bad - len(report.errors)
    if more > 0:
        console.print(f"... and {more:,} more", markup=False)
    if report.missing_list:
        console.print(f"all bad images: {report.missing_list}", soft_wrap=True, markup=False)
    if report.num_bad:
        verdict = "were dropped" if report.is_ok else "cannot be trained on"
        console.print(f"{report.num_bad:,} of {report.num_records:,} records {verdict}", style="bold", markup=False)
