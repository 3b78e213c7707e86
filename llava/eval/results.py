"""What runs of lmms-eval wrote: finding it, refusing what is incomplete, and a table of several runs.

    python -m llava.eval.results --tasks gqa,mme outputs/eval/model/dense outputs/eval/model/skip_0.3

lmms-eval exits with 0 when an evaluation fails, so a run is judged by its files. Exit status 2: something is missing.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, median
from typing import Any

from llava.eval.routing_log import RequestRecord, read_routing_log

ROUTING_LOG = "routing.jsonl"
"""File name of the routing log in a run's folder, by agreement with ``scripts/v1_5/eval.sh``."""


@dataclass(frozen=True)
class RunResults:
    """Files of one run.

    Attributes:
        results: Content of ``*_results.json``.
        samples: Task -> its logged samples, ordered by document.
    """

    results: dict[str, Any]
    samples: dict[str, list[dict[str, Any]]]


def read_run(folder: Path) -> RunResults:
    """Read the results and samples of one run.

    Args:
        folder: What was given to lmms-eval as ``--output_path``.

    Raises:
        FileNotFoundError: If the results are absent.
        ValueError: If there are results of several runs.
    """
    files = sorted(folder.rglob("*_results.json"))
    if not files:
        raise FileNotFoundError(
            f"{folder} holds no *_results.json; the evaluation failed (lmms-eval exits with 0 even then). Read its "
            "output, correct the cause and run it again."
        )
    if len(files) > 1:
        raise ValueError(
            f"{folder} holds the results of {len(files)} runs ({', '.join(file.name for file in files)}); evaluate "
            "into an empty folder."
        )
    prefix = files[0].name.removesuffix("_results.json") + "_samples_"
    samples = {}
    for file in sorted(files[0].parent.glob(f"{prefix}*.jsonl")):
        rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
        samples[file.name.removeprefix(prefix).removesuffix(".jsonl")] = sorted(rows, key=lambda row: row["doc_id"])
    return RunResults(json.loads(files[0].read_text(encoding="utf-8")), samples)


def leaf_tasks(run: RunResults, task: str) -> list[str]:
    """The tasks a name stands for: itself, or the members of a group; empty if the run knows no such task."""
    members = run.results.get("group_subtasks", {}).get(task, [])
    return [leaf for member in members for leaf in leaf_tasks(run, member)] or [task] * (task in run.results["results"])


def find_missing(run: RunResults, tasks: list[str]) -> list[str]:
    """Say in one sentence each what a run lacks of the tasks it was asked for."""
    missing = []
    for task in tasks:
        leaves = leaf_tasks(run, task)
        if not leaves:
            missing.append(f"task {task} has no result")
        for leaf in leaves:
            wanted = run.results["n-samples"].get(leaf, {}).get("effective")
            found = len({row["doc_id"] for row in run.samples.get(leaf, [])})
            if found != wanted:
                missing.append(f"task {leaf} has samples of {found} documents, not of {wanted}")
    return missing


def read_metrics(run: RunResults, task: str) -> dict[str, float]:
    """Numeric metrics of a task as "task metric", those of its members if it is a group."""
    metrics = {}
    for leaf in leaf_tasks(run, task):
        for name, value in run.results["results"][leaf].items():
            metric = name.partition(",")[0]
            is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
            if is_number and "," in name and not metric.endswith(("_stderr", "_stderr_clt", "_stderr_clustered")):
                metrics[f"{leaf} {metric}"] = float(value)
    return metrics


def summarise_routing(records: list[RequestRecord]) -> dict[str, float]:
    """Observed mean skip rate and median times of all requests."""
    later = [record.decode_ms_per_token for record in records if record.decode_ms_per_token is not None]
    summary = {"skip rate, observed": mean(record.skip_rate for record in records)}
    summary["prefill ms, median"] = median(record.prefill_ms for record in records)
    return {**summary, "decode ms per token, median": median(later)} if later else summary


def format_table(columns: dict[str, dict[str, float]]) -> str:
    """Lay out run -> row -> number as text; a run without a row shows a dash."""
    rows = list(dict.fromkeys(row for column in columns.values() for row in column))
    cells = [["", *columns]]
    cells += [[row, *(f"{column[row]:.4f}" if row in column else "-" for column in columns.values())] for row in rows]
    widths = [max(len(line[index]) for line in cells) for index in range(len(cells[0]))]
    lines = [f"{line[0]:<{widths[0]}}  " + "  ".join(map(str.rjust, line[1:], widths[1:])) for line in cells]
    return "\n".join(line.rstrip() for line in lines)


def main(arguments: list[str] | None = None) -> int:
    """Parse the command line, check the runs, print the table; the exit status."""
    parser = argparse.ArgumentParser(prog="python -m llava.eval.results", description=__doc__.splitlines()[0])
    parser.add_argument("--tasks", required=True, help="the tasks that every run was asked for, separated by commas")
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="folder of one run")
    options = parser.parse_args(arguments)
    columns, problems = {}, []
    tasks = [task for task in options.tasks.split(",") if "*" not in task]
    for folder in options.runs:
        try:
            run = read_run(folder)
            column = summarise_routing(read_routing_log(folder / ROUTING_LOG))
        except (ValueError, FileNotFoundError) as error:
            problems.append(str(error))
            continue
        problems += [f"{folder}: {sentence}." for sentence in find_missing(run, tasks)]
        for task in tasks:
            column |= read_metrics(run, task)
        columns[folder.name] = column
    if columns:
        print(format_table(columns))
    for problem in problems:
        print(f"error: {problem}", file=sys.stderr)
    return 2 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
