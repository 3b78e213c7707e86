"""Results of an evaluation run: its routing log, the files of lmms-eval, and ``evaluation.json``, which joins them.

    python -m llava.report.evaluation check --tasks gqa,mme outputs/eval/model/dense outputs/eval/model/skip_0.3
    python -m llava.report.evaluation collect outputs/digits/skip_0.3 --label "FuzzyRoE 0.30" --items 2600

lmms-eval exits with 0 when an evaluation fails, so a run is judged by its files. ``check`` prints a table of several
runs, ``collect`` writes ``evaluation.json`` of a run on the digits. Exit status 2: results are missing or damaged.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import sys
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from statistics import mean, median
from typing import Any

from llava.files import atomic_write, write_json

ROUTING_LOG = "routing.jsonl"
"""File name of the routing log in a run's folder, by agreement with ``scripts/v1_5/eval.sh``."""

EVALUATION_FILE = "evaluation.json"

METRICS = ("exact_match", "exact_match_text_only")
"""A sample of the digits has the first if its question is about an image, the second if there is none."""

ROUNDING = 5e-4
"""Largest difference between the accuracy in a file and the one counted from its answers."""

OBJECTS = re.compile(r"(accuracy|skip_rate)(\.types)?|skip_rate\.layers_by_type|correct|complexity(\.[^.]+)?")
"""Keys of ``evaluation.json`` that hold an object."""

NOT_RATIOS = ("items", "batch_size", "prefill_ms", "decode_ms_per_token")
"""Keys of ``evaluation.json`` that hold a number above 0; other numbers are ratios in [0, 1]."""

_RANK = re.compile(r"\.rank(\d+)-of-(\d+)")


@dataclass(frozen=True)
class RequestRecord:
    """Outcome of one request, a line of the routing log.

    A batch is timed as a whole. A request's ``prefill_ms`` is its share of the batch's prefill by prompt tokens (images
    expanded, padding not counted), so the shares add up to the batch. ``decode_ms_per_token`` is the batch's time after
    its first tokens, divided by all tokens that its requests got after their first: the cost of a useful token.
    """

    task: str  # name of the benchmark
    doc_id: int  # number of the document in its split
    type: str | None  # the document's own
    complexity: int | None  # the document's own
    num_images: int
    kept_layers: list[int]  # 1 where decoding ran the layer, 0 where it skipped it, L; all ones for a dense model
    prefill_ms: float  # from the prompt to the first token
    decode_ms_per_token: float | None  # None if no request of the batch got a second token
    batch_size: int
    num_prompt_tokens: int  # images expanded
    num_new_tokens: int
    checkpoint: str  # folder or hub id
    target_skip_ratio: float | None  # mean skip rate asked of the router; None for a dense run
    prefill_runs: list[int]  # how often the prefill ran each layer, those that ran again included, L

    @property
    def skip_rate(self) -> float:
        """Net skip rate of the prefill, reruns counted; below 0 where they cost more than the plan has saved."""
        return 1 - sum(self.prefill_runs) / len(self.prefill_runs)

    @property
    def decode_skip_rate(self) -> float:
        """Share of layers that decoding skipped, in [0, 1]."""
        return 1 - sum(self.kept_layers) / len(self.kept_layers)


def rank_path(path: Path, rank: int, world_size: int) -> Path:
    """Where a process writes: the path itself; one of several writes ``<name>.rank<r>-of-<n><suffix>`` beside it."""
    return path if world_size == 1 else path.with_name(f"{path.stem}.rank{rank}-of-{world_size}{path.suffix}")


def remove_routing_log(path: Path) -> None:
    """Remove an earlier log with the files of all its processes, so that a run that fails leaves none behind."""
    for file in (path, *_rank_files(path).values()):
        file.unlink(missing_ok=True)


def write_routing_log(path: Path, records: Iterable[RequestRecord], rank: int = 0, world_size: int = 1) -> None:
    """Write a process's records; the file appears whole or not at all."""
    with atomic_write(rank_path(path, rank, world_size)) as unfinished:
        unfinished.write_text("".join(json.dumps(asdict(record)) + "\n" for record in records))


def read_routing_log(path: Path) -> list[RequestRecord]:
    """Read the records of all processes; ``path`` is the one that was given to the run.

    Raises:
        FileNotFoundError: If there is no log, or a process's file is missing.
        ValueError: If files of more than one run lie there, or a line has other keys.
    """
    files = _rank_files(path)
    world_sizes = {world_size for _, world_size in files} | ({1} if path.exists() else set())
    if not world_sizes:
        raise FileNotFoundError(f"There is no routing log {path}; the evaluation did not finish, run it again.")
    world_size = max(world_sizes)
    expected = [rank_path(path, rank, world_size) for rank in range(world_size)]
    missing = [file.name for file in expected if not file.exists()]
    if missing:
        raise FileNotFoundError(f"The routing log lacks {', '.join(missing)}; a process failed, run it again.")
    if len(world_sizes) > 1:
        raise ValueError(f"Routing logs of several runs lie at {path}; remove them and run the evaluation again.")
    records, wanted = [], {field.name for field in fields(RequestRecord)}
    for file in expected:
        for values in map(json.loads, file.read_text().splitlines()):
            if set(values) != wanted:
                raise ValueError(
                    f"A line of {file} has keys {sorted(values)}, a routing log has {sorted(wanted)}; run it again."
                )
            records.append(RequestRecord(**values))
    return records


def _rank_files(path: Path) -> dict[tuple[int, int], Path]:
    """Files of single processes beside a path, by rank and world size."""
    pattern = re.compile(re.escape(path.stem) + _RANK.pattern + re.escape(path.suffix))
    matches = {file: pattern.fullmatch(file.name) for file in path.parent.glob("*")}
    return {(int(match[1]), int(match[2])): file for file, match in matches.items() if match}


@dataclass(frozen=True)
class Evaluation:
    """One run over one set of questions: the content of ``evaluation.json``.

    Ratios are in [0, 1]; a value that was not measured is None or absent.
    """

    label: str  # unique in a report
    accuracy: dict[str, Any]  # all, image (questions about an image), text_only, types (per question type)
    correct: dict[str, int] = field(repr=False)  # 1 or 0 per question about an image
    checkpoint: str = ""
    target_skip_ratio: float | None = None  # skip rate asked for; None for a dense run
    items: int | None = None  # number of questions
    # observed, net of reruns in the prefill: all, image, types; in decoding: decode, layers (L), layers_by_type
    skip_rate: dict[str, Any] = field(default_factory=dict)
    prefill_ms: float | None = None  # from a prompt to its first token, its share of a batch
    decode_ms_per_token: float | None = None
    batch_size: int | None = None  # prompts per batch while timing
    complexity: dict[str, dict[str, Any]] = field(default_factory=dict)  # items, accuracy, skip_rate; image questions
    path: Path | None = None  # file it was read from; not in the file

    @property
    def is_dense(self) -> bool:
        """Whether every layer ran for every question because nothing else was asked for."""
        return self.target_skip_ratio is None

    @property
    def image_accuracy(self) -> float:
        """Accuracy on questions about an image."""
        return self.accuracy["image"]

    @property
    def image_skip_rate(self) -> float:
        """Observed skip rate on questions about an image; 0 where none was noted."""
        return self.skip_rate.get("image") or 0.0


def load_evaluation(path: str | Path) -> Evaluation:
    """Read and check one ``evaluation.json``.

    Raises:
        ValueError: If it is not JSON, a key is missing, a number is out of range, or ``correct`` does not hold exactly
            the questions about an image.
        OSError: If the file cannot be read.
    """
    path = Path(path)
    content, needed = read_json(path), ("label", "accuracy", "correct")
    missing = [key for key in needed if content.get(key) is None]
    if missing:
        raise ValueError(
            f"{path} has no {', '.join(missing)}; an evaluation holds {', '.join(needed)}. Pass an evaluation.json, "
            "or evaluate again."
        )
    names = {field.name for field in fields(Evaluation)} - {"path"}
    texts: dict[str, Any] = {name: str(content.pop(name)) for name in ("label", "checkpoint") if name in content}
    numbers = {name: _check(path, name, value) for name, value in content.items() if name in names}
    present: dict[str, Any] = {name: value for name, value in numbers.items() if value is not None}
    evaluation = Evaluation(**texts, **present, path=path)
    if evaluation.accuracy.get("image") is None:
        raise ValueError(f"{path}: 'image' is None; a ratio in [0, 1] is needed. Correct the file.")
    if not evaluation.correct:
        raise ValueError(
            f"{path} has no answer in 'correct'; 1 or 0 per question about an image is needed. Evaluate again."
        )
    counted = mean(evaluation.correct.values())
    if abs(counted - evaluation.image_accuracy) > ROUNDING:
        raise ValueError(
            f"{path}: the {len(evaluation.correct)} answers in 'correct' have mean {counted:.4f}, but accuracy.image "
            f"is {evaluation.image_accuracy:.4f}; they must be the same questions. Keep the questions about an image "
            "only in 'correct'."
        )
    return evaluation


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        ValueError: If the file holds anything else.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON ({error}); a JSON object is needed. Write it again.") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}; a JSON object is needed. Pass another file.")
    return content


def _check(path: Path, key: str, value: Any) -> Any:
    """Check every number below a dotted key; objects lose the entries without a value."""
    name = key.rpartition(".")[2]
    if value is None:
        return None
    if OBJECTS.fullmatch(key) and not isinstance(value, dict):
        raise ValueError(f"{path}: '{key}' is {value!r:.60}; an object is needed. Correct the file.")
    if isinstance(value, dict):
        checked = {item: _check(path, f"{key}.{item}", number) for item, number in value.items()}
        return {item: number for item, number in checked.items() if number is not None}
    if isinstance(value, list):
        return [_check(path, key, number) for number in value]
    lowest = -1 if "skip_rate" in key.split(".") else 0  # all layers may run twice
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or value < lowest:
        raise ValueError(f"{path}: '{key}' is {value!r:.60}; a number from {lowest} up is needed. Correct the file.")
    if value > 1 and name not in NOT_RATIOS:
        raise ValueError(f"{path}: '{key}' is {float(value)}; a ratio in [0, 1] is needed. Correct the file.")
    return value


Run = dict[str, Any]
"""Content of ``*_results.json``, and under "samples" the logged samples of each task, ordered by document."""


def read_run(folder: Path) -> Run:
    """Read the results and samples of one run.

    Raises:
        FileNotFoundError: If the folder, ``--output_path`` of lmms-eval, holds no results.
        ValueError: If it holds the results of several runs.
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
    return {**read_json(files[0]), "samples": samples}


def leaf_tasks(run: Run, task: str) -> list[str]:
    """Give the tasks a name stands for: itself, or the members of a group; empty if the run knows no such task."""
    members = run.get("group_subtasks", {}).get(task, [])
    return [leaf for member in members for leaf in leaf_tasks(run, member)] or [task] * (task in run["results"])


def find_missing(run: Run, tasks: list[str]) -> list[str]:
    """Name in one sentence each what a run lacks of the tasks it was asked for."""
    leaves = {task: leaf_tasks(run, task) for task in tasks}
    missing = [f"task {task} has no result" for task, members in leaves.items() if not members]
    for leaf in dict.fromkeys(leaf for members in leaves.values() for leaf in members):
        wanted = run["n-samples"].get(leaf, {}).get("effective")
        logged = len({row["doc_id"] for row in run["samples"].get(leaf, [])})
        if logged != wanted:
            missing.append(f"task {leaf} has samples of {logged} documents, not of {wanted}")
    return missing


def read_metrics(run: Run, task: str) -> dict[str, float]:
    """Give the numeric metrics of a task as "task metric", those of its members if it is a group."""
    metrics = {}
    for leaf in leaf_tasks(run, task):
        for name, value in run["results"][leaf].items():
            metric = name.partition(",")[0]
            is_number = isinstance(value, int | float) and not isinstance(value, bool)
            # lmms-eval writes "metric,filter"; names without a comma are settings, "_stderr" names are spreads
            if is_number and "," in name and not metric.endswith(("_stderr", "_stderr_clt", "_stderr_clustered")):
                metrics[f"{leaf} {metric}"] = float(value)
    return metrics


def check_runs(folders: list[Path], tasks: list[str]) -> tuple[str, list[str]]:
    """Check that runs hold the tasks they were asked for; names with a wildcard are not checked.

    Returns:
        A table with a column per run ("" if no run could be read), and one sentence for each thing that is missing.
    """
    columns: dict[str, dict[str, float]] = {}
    problems = []
    tasks = [task for task in tasks if "*" not in task]
    for folder in folders:
        try:
            run, records = read_run(folder), read_routing_log(folder / ROUTING_LOG)
        except (ValueError, FileNotFoundError) as error:
            problems.append(str(error))
            continue
        problems += [f"{folder}: {sentence}." for sentence in find_missing(run, tasks)]
        column = columns[folder.name] = {"skip rate, observed": mean(record.skip_rate for record in records)}
        column["prefill ms, median"] = median(record.prefill_ms for record in records)
        decode_ms = _median_decode_ms(records)
        if decode_ms is not None:
            column["decode ms per token, median"] = decode_ms
        for task in tasks:
            column |= read_metrics(run, task)
    return format_table(columns) if columns else "", problems


def format_table(columns: dict[str, dict[str, float]]) -> str:
    """Lay out run -> row -> number as text; a run without a row shows a dash."""
    rows = list(dict.fromkeys(row for column in columns.values() for row in column))
    cells = [["", *columns]]
    cells += [[row, *(f"{column[row]:.4f}" if row in column else "-" for column in columns.values())] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = [f"{line[0]:<{widths[0]}}  " + "  ".join(map(str.rjust, line[1:], widths[1:])) for line in cells]
    return "\n".join(line.rstrip() for line in lines)


def collect(output_folder: Path, routing_log: Path, label: str, expected_items: int) -> dict[str, Any]:
    """Join the samples of a run with its routing log and write ``evaluation.json`` into the run's folder.

    All means are over requests. "layers" holds, per layer, the share of requests that skip it.

    Args:
        output_folder: Folder of one run, ``--output_path`` of lmms-eval.
        routing_log: ``routing_log`` of its ``--model_args``.
        label: Name of the run in tables and figures.
        expected_items: Documents that were to be evaluated.

    Returns:
        Content of the file: the fields of ``Evaluation`` without its path.

    Raises:
        FileNotFoundError: If results or routing log are absent.
        ValueError: If items are missing, duplicated or unknown, or several runs or tasks are mixed.
    """
    folder, log = Path(output_folder), Path(routing_log)
    tasks = read_run(folder)["samples"]
    if len(tasks) != 1:
        raise ValueError(
            f"{folder} holds samples of {len(tasks)} tasks ({', '.join(tasks) or 'none'}); one is collected. Run "
            "lmms-eval on one task, with --log_samples."
        )
    (samples,) = tasks.values()
    records = read_routing_log(log)
    _check_items([row["doc_id"] for row in samples], expected_items, folder)
    _check_items([record.doc_id for record in records], expected_items, log)
    by_id = {record.doc_id: record for record in records}
    unknown = sorted({row["doc_id"] for row in samples} - set(by_id))
    if unknown:
        raise ValueError(f"{log} knows nothing of documents {unknown[:5]}; give the log of the same run.")
    answers = [(by_id[row["doc_id"]], _read_correct(row, folder)) for row in samples]
    about_image = [answer for answer in answers if answer[0].num_images]
    everything, image = _measure(answers), _measure(about_image)
    text_only = _measure([answer for answer in answers if not answer[0].num_images])
    by_type = _group(answers, "type")
    types = {name: _measure(group) for name, group in by_type.items()}
    accuracy = {"all": everything["accuracy"], "image": image["accuracy"], "text_only": text_only["accuracy"]}
    decode = mean(record.decode_skip_rate for record in records)
    skip_rate = {"all": everything["skip_rate"], "image": image["skip_rate"], "decode": decode}
    for name in ("checkpoint", "target_skip_ratio"):
        values = {getattr(record, name) for record in records}
        if len(values) != 1:
            raise ValueError(f"{log} mixes the values {sorted(map(str, values))} of {name}; give the log of one run.")
    evaluation = Evaluation(
        label=label,
        checkpoint=records[0].checkpoint,
        target_skip_ratio=records[0].target_skip_ratio,
        items=len(answers),
        accuracy={**accuracy, "types": {name: group["accuracy"] for name, group in types.items()}},
        skip_rate={
            **skip_rate,
            "types": {name: group["skip_rate"] for name, group in types.items()},
            "layers": _skipped_by_layer(answers),
            "layers_by_type": {name: _skipped_by_layer(group) for name, group in by_type.items()},
        },
        prefill_ms=median(record.prefill_ms for record in records),
        decode_ms_per_token=_median_decode_ms(records),
        batch_size=max(record.batch_size for record in records),
        correct={str(record.doc_id): is_correct for record, is_correct in about_image},
        complexity={level: _measure(group) for level, group in _group(about_image, "complexity").items()},
    )
    content = {name: value for name, value in asdict(evaluation).items() if name != "path"}
    write_json(folder / EVALUATION_FILE, content)
    return content


Answer = tuple[RequestRecord, int]
"""A request with 1 if its answer is right, 0 if not."""


def _check_items(doc_ids: list[int], expected: int, source: Path) -> None:
    repeated = sorted(doc_id for doc_id, count in Counter(doc_ids).items() if count > 1)
    if repeated:
        raise ValueError(f"{source} holds documents {repeated[:5]} more than once; run the evaluation again.")
    if len(doc_ids) != expected:
        raise ValueError(
            f"{source} holds {len(doc_ids)} items, {expected} were expected; run the evaluation again, or correct the "
            "expected number."
        )


def _read_correct(row: dict[str, Any], folder: Path) -> int:
    for metric in METRICS:
        if metric in row:
            return int(row[metric])
    raise ValueError(
        f"Sample {row['doc_id']} in {folder} has none of the metrics {', '.join(METRICS)}; collect a run of the task "
        "in playground/digits/lmms_eval."
    )


def _measure(answers: list[Answer]) -> dict[str, Any]:
    """Count the answers of a group, with their accuracy and skip rate; None of an empty group."""
    accuracy = mean(is_correct for _, is_correct in answers) if answers else None
    skip_rate = mean(record.skip_rate for record, _ in answers) if answers else None
    return {"items": len(answers), "accuracy": accuracy, "skip_rate": skip_rate}


def _skipped_by_layer(answers: list[Answer]) -> list[float]:
    return [1 - mean(layer) for layer in zip(*(record.kept_layers for record, _ in answers), strict=True)]


def _median_decode_ms(records: list[RequestRecord]) -> float | None:
    later = [record.decode_ms_per_token for record in records if record.decode_ms_per_token is not None]
    return median(later) if later else None


def _group(answers: list[Answer], name: str) -> dict[str, list[Answer]]:
    """Answers by an attribute of their request, where it has one."""
    keys = sorted({getattr(record, name) for record, _ in answers} - {None})
    return {str(key): [answer for answer in answers if getattr(answer[0], name) == key] for key in keys}


def main(arguments: list[str] | None = None) -> int:
    """Parse the command line and run it; the exit status."""
    parser = argparse.ArgumentParser(prog="python -m llava.report.evaluation", description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    check = commands.add_parser("check", help="print a table of several runs and what they lack")
    check.add_argument("--tasks", required=True, help="the tasks that every run was asked for, separated by commas")
    check.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="folder of one run")
    join = commands.add_parser("collect", help=f"write {EVALUATION_FILE} of one run on the digits")
    join.add_argument("output_folder", type=Path, help="folder of one run, --output_path of lmms-eval")
    join.add_argument("--routing-log", type=Path, help=f"its routing log (default: OUTPUT_FOLDER/{ROUTING_LOG})")
    join.add_argument("--label", required=True, help="name of the run in tables and figures")
    join.add_argument("--items", type=int, required=True, help="documents that were to be evaluated")
    options = parser.parse_args(arguments)
    if options.command == "check":
        text, problems = check_runs(options.runs, options.tasks.split(","))
    else:
        folder = options.output_folder
        try:
            evaluation = collect(folder, options.routing_log or folder / ROUTING_LOG, options.label, options.items)
            accuracy, skip_rate = evaluation["accuracy"]["all"], evaluation["skip_rate"]["all"]
            text, problems = f"{folder / EVALUATION_FILE}: accuracy {accuracy:.4f}, skip rate {skip_rate:.4f}", []
        except (ValueError, FileNotFoundError) as error:
            text, problems = "", [str(error)]
    if text:
        print(text)
    for problem in problems:
        print(f"error: {problem}", file=sys.stderr)
    return 2 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
