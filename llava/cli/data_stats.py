"""``fuzzyroe data-stats``: what training data consists of."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from llava.data.data_stats import SourceStats


def data_stats_command(data: Annotated[Path, typer.Argument(help="JSON or JSON Lines file of records.")]) -> None:
    """Count records, images, turns and words per source; images are not looked at."""
    from llava.cli.terminal import make_table, open_console, progress_bar
    from llava.data.data_stats import collect_stats

    with progress_bar("reading records") as progress:
        stats = collect_stats(data, progress)
    columns = ("source", "records", "with image", "text only", "images", "turns", "question words", "answer words")
    rows = [_row(name, counts) for name, counts in [*stats.sources.items(), ("total", stats.total)]]
    console = open_console()
    console.print(make_table(str(data), columns, rows, bold=[len(rows) - 1]))
    console.print("turns and words per record: median / 95 % quantile / maximum", style="dim")
    if stats.unusable:
        console.print(f"{stats.unusable:,} records break the format and are not counted; see check-data", style="bold")


def _row(name: str, counts: SourceStats) -> list[str]:
    from llava.data.data_stats import quantiles

    numbers = (counts.records, counts.with_image, counts.text_only, counts.images)
    lengths = (counts.turns, counts.question_words, counts.answer_words)
    return [name, *(f"{number:,}" for number in numbers), *(" / ".join(map(str, quantiles(each))) for each in lengths)]
