"""Results of an evaluation run: files of lmms-eval, and ``evaluation.json``, which joins them with the routing log.

    python -m llava.report.evaluation check --tasks gqa,mme outputs/eval/model/dense outputs/eval/model/skip_0.3
    python -m llava.report.evaluation collect outputs/digits/skip_0.3 --label "FuzzyRoE 0.30" --items 2600

lmms-eval exits with 0 when an evaluation fails, so a run is judged by its files. ``check`` prints a table of several
runs, ``collect`` writes ``evaluation.json`` of a run on the digits. Exit status 2: results are missing or damaged.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import mean, median
from typing import Any

from llava.files import write_json
from llava.report.routing_log import RequestRecord, read_routing_log

ROUTING_LOG = "routing.jsonl"
"""File name of the routing log in a run's folder, by agreement with ``scripts/v1_5/eval.sh``."""

EVALUATION_FILE = "evaluation.json"

METRICS = ("exact_match", "exact_match_text_only")
"""A sample of the digits has the first if its question is about an image, the second if there is none."""

ROUNDING = 5e-4
"""Largest difference between the accuracy in a file and the one counted from its answers."""


@dataclass(frozen=True)
class Evaluation:
    """One run over one set of questions: the content of ``evaluation.json``.

    Ratios are in [0, 1]; a value that was not measured is None or absent.

    Attributes:
        label: Name of the run, unique in a report.
        accuracy: ``all``, ``image`` (questions about an image), ``text_only``, ``types`` (per question type).
        correct: 1 or 0 per question about an image.
        checkpoint: Checkpoint that ran.
        target_skip_ratio: Skip rate asked for; None for a dense run.
        items: Number of questions.
        skip_rate: Observed: ``all``, ``image``, ``types``, ``layers`` (per layer, (L,)), ``layers_by_type``.
        prefill_ms: Milliseconds from a prompt to its first token, its share of a batch of ``batch_size`` prompts.
        decode_ms_per_token: Milliseconds per decoded token.
        batch_size: Prompts per batch while timing.
        complexity: Items, accuracy and skip rate per complexity of questions about an image.
        path: File it was read from; not in the file.
    """

    label: str
    accuracy: dict[str, Any]
    correct: dict[str, int] = field(repr=False)
    checkpoint: str = ""
    target_skip_ratio: float | None = None
    items: int | None = None
    skip_rate: dict[str, Any] = field(default_factory=dict)
    prefill_ms: float | None = None
    decode_ms_per_token: float | None = None
    batch_size: int | None = None
    complexity: dict[str, dict[str, Any]] = field(default_factory=dict)
    path: Path | None = None

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

    def to_dict(self) -> dict[str, Any]:
        """Give what stands in the file."""
        return {name: value for name, value in asdict(self).items() if name != "path"}


def load_evaluation(path: str | Path) -> Evaluation:
    """Read and check one ``evaluation.json``.

    Raises:
        ValueError: If it is not JSON, a key is missing, a number is out of range, or ``correct`` does not hold exactly
            the questions about an image.
        OSError: If the file cannot be read.
    """
    path = Path(path)
    content = read_json(path)
    needed = ("label", "accuracy", "correct")
    missing = [key for key in needed if key not in content]
    if missing:
        raise ValueError(
            f"{path} has no {', '.join(missing)}; an evaluation holds {', '.join(needed)}. Pass an evaluation.json, "
            "or evaluate again."
        )
    levels = _mapping(path, content, "complexity")
    evaluation = Evaluation(
        label=str(content["label"]),
        accuracy=_grouped_ratios(path, content, "accuracy"),
        correct={str(key): int(value) for key, value in _mapping(path, content, "correct").items()},
        checkpoint=str(content.get("checkpoint", "")),
        target_skip_ratio=_number(path, "target_skip_ratio", content.get("target_skip_ratio"), 1),
        items=content.get("items"),
        skip_rate=_grouped_ratios(path, content, "skip_rate"),
        prefill_ms=_number(path, "prefill_ms", content.get("prefill_ms")),
        decode_ms_per_token=_number(path, "decode_ms_per_token", content.get("decode_ms_per_token")),
        batch_size=content.get("batch_size"),
        complexity={
            level: {
                name: _number(path, name, value, math.inf if name == "items" else 1)
                for name, value in _mapping(path, levels, level).items()
            }
            for level in levels
        },
        path=path,
    )
    if evaluation.accuracy.get("image") is None:
        raise ValueError(f"{path}: 'image' is None; a ratio in [0, 1] is needed. Correct the file.")
    _check_answers(evaluation)
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


def _check_answers(evaluation: Evaluation) -> None:
    """Check that ``correct`` holds the questions about an image: its mean is the accuracy on images."""
    if not evaluation.correct:
        raise ValueError(
            f"{evaluation.path} has no answer in 'correct'; 1 or 0 per question about an image is needed. "
            "Evaluate again."
        )
    counted = sum(evaluation.correct.values()) / len(evaluation.correct)
    if abs(counted - evaluation.image_accuracy) > ROUNDING:
        raise ValueError(
            f"{evaluation.path}: the {len(evaluation.correct)} answers in 'correct' have mean {counted:.4f}, but "
            f"accuracy.image is {evaluation.image_accuracy:.4f}; they must be the same questions. Keep the questions "
            "about an image only in 'correct'."
        )


def _mapping(path: Path, parent: dict[str, Any], key: str) -> dict[str, Any]:
    """Give a mapping, empty where it is absent or null."""
    value = parent.get(key)
    if value is not None and not isinstance(value, dict):
        raise ValueError(f"{path}: '{key}' is {value!r:.60}; an object is needed. Correct the file.")
    return value or {}


def _grouped_ratios(path: Path, content: dict[str, Any], key: str) -> dict[str, Any]:
    """Give one of the two mappings of ratios, with its groups, every number checked."""
    ratios = _mapping(path, content, key)
    checked = {name: _ratios(path, name, value) for name, value in ratios.items()}
    return {
        **checked,
        **{name: _mapping(path, checked, name) for name in ("types", "layers_by_type") if name in checked},
    }


def _ratios(path: Path, key: str, value: Any) -> Any:
    """Check a ratio, or every ratio of a mapping or list of them; mappings lose the entries without a value."""
    if isinstance(value, dict):
        checked = {str(name): _ratios(path, key, item) for name, item in value.items()}
        return {name: item for name, item in checked.items() if item is not None}
    if isinstance(value, list):
        return [_ratios(path, key, item) for item in value]
    return _number(path, key, value, 1)


def _number(path: Path, key: str, value: Any, largest: float = math.inf) -> float | None:
    """Check a finite number from 0 to ``largest``; None stays None."""
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or value < 0:
        raise ValueError(f"{path}: '{key}' is {value!r:.60}; a number from 0 up is needed. Correct the file.")
    if value > largest:
        raise ValueError(f"{path}: '{key}' is {float(value)}; a ratio in [0, 1] is needed. Correct the file.")
    return float(value)


@dataclass(frozen=True)
class RunResults:
    """Files that lmms-eval wrote for one run.

    Attributes:
        results: Content of ``*_results.json``.
        samples: Task -> its logged samples, ordered by document.
    """

    results: dict[str, Any]
    samples: dict[str, list[dict[str, Any]]]


def read_run(folder: Path) -> RunResults:
    """Read the results and samples of one run.

    Args:
        folder: Folder that lmms-eval got as ``--output_path``.

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
    """Give the tasks a name stands for: itself, or the members of a group; empty if the run knows no such task."""
    members = run.results.get("group_subtasks", {}).get(task, [])
    return [leaf for member in members for leaf in leaf_tasks(run, member)] or [task] * (task in run.results["results"])


def find_missing(run: RunResults, tasks: list[str]) -> list[str]:
    """Name in one sentence each what a run lacks of the tasks it was asked for."""
    missing = []
    for task in tasks:
        leaves = leaf_tasks(run, task)
        if not leaves:
            missing.append(f"task {task} has no result")
        for leaf in leaves:
            wanted = run.results["n-samples"].get(leaf, {}).get("effective")
            logged = len({row["doc_id"] for row in run.samples.get(leaf, [])})
            if logged != wanted:
                missing.append(f"task {leaf} has samples of {logged} documents, not of {wanted}")
    return missing


def read_metrics(run: RunResults, task: str) -> dict[str, float]:
    """Give the numeric metrics of a task as "task metric", those of its members if it is a group."""
    metrics = {}
    for leaf in leaf_tasks(run, task):
        for name, value in run.results["results"][leaf].items():
            metric = name.partition(",")[0]
            is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
            # lmms-eval writes "metric,filter"; names without a comma are settings, "_stderr" names are spreads
            if is_number and "," in name and not metric.endswith(("_stderr", "_stderr_clt", "_stderr_clustered")):
                metrics[f"{leaf} {metric}"] = float(value)
    return metrics


def summarise_routing(records: list[RequestRecord]) -> dict[str, float]:
    """Give the observed mean skip rate and the median times of all requests."""
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


def collect(output_folder: Path, routing_log: Path, label: str, expected_items: int) -> dict[str, Any]:
    """Join the samples of a run with its routing log and write ``evaluation.json`` into the run's folder.

    The skip rate of a request is 1 - kept layers / L; all means are over requests. "layers" holds, per layer, the share
    of requests that skip it. "all" covers questions with and without image, "correct" and "complexity" those
    with an image only.

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
    tasks = read_run(folder).samples
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
    types = _group(answers, lambda record: record.type)
    later = [record.decode_ms_per_token for record in records if record.decode_ms_per_token is not None]
    evaluation = Evaluation(
        label=label,
        checkpoint=_only(records, "checkpoint", log),
        target_skip_ratio=_only(records, "target_skip_ratio", log),
        items=len(answers),
        accuracy={
            "all": _accuracy(answers),
            "image": _accuracy(about_image),
            "text_only": _accuracy([answer for answer in answers if not answer[0].num_images]),
            "types": {name: _accuracy(group) for name, group in types.items()},
        },
        skip_rate={
            "all": _skip_rate(answers),
            "image": _skip_rate(about_image),
            "types": {name: _skip_rate(group) for name, group in types.items()},
            "layers": _skipped_by_layer(answers),
            "layers_by_type": {name: _skipped_by_layer(group) for name, group in types.items()},
        },
        prefill_ms=median(record.prefill_ms for record in records),
        decode_ms_per_token=median(later) if later else None,
        batch_size=max(record.batch_size for record in records),
        correct={str(record.doc_id): is_correct for record, is_correct in about_image},
        complexity={
            level: {"items": len(group), "accuracy": _accuracy(group), "skip_rate": _skip_rate(group)}
            for level, group in _group(about_image, lambda record: record.complexity).items()
        },
    ).to_dict()
    write_json(folder / EVALUATION_FILE, evaluation)
    return evaluation


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


def _only(records: list[RequestRecord], name: str, log: Path) -> Any:
    """Give the value that all records share."""
    values = {getattr(record, name) for record in records}
    if len(values) != 1:
        raise ValueError(f"{log} mixes the values {sorted(map(str, values))} of {name}; give the log of one run.")
    return values.pop()


def _accuracy(answers: list[Answer]) -> float | None:
    return mean(is_correct for _, is_correct in answers) if answers else None


def _skip_rate(answers: list[Answer]) -> float | None:
    return mean(record.skip_rate for record, _ in answers) if answers else None


def _skipped_by_layer(answers: list[Answer]) -> list[float]:
    return [1 - mean(layer) for layer in zip(*(record.kept_layers for record, _ in answers), strict=True)]


def _group(answers: list[Answer], read: Callable[[RequestRecord], Any]) -> dict[str, list[Answer]]:
    keys = sorted({read(record) for record, _ in answers} - {None})
    return {str(key): [answer for answer in answers if read(answer[0]) == key] for key in keys}


def check_runs(folders: list[Path], tasks: list[str]) -> tuple[str, list[str]]:
    """Check the files of several runs.

    Args:
        folders: Folder of each run.
        tasks: Tasks that every run was asked for; names with a wildcard are not checked.

    Returns:
        A table with a column per run ("" if no run could be read), and one sentence for each thing that is missing.
    """
    columns, problems = {}, []
    tasks = [task for task in tasks if "*" not in task]
    for folder in folders:
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
    return format_table(columns) if columns else "", problems


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
        table, problems = check_runs(options.runs, options.tasks.split(","))
        if table:
            print(table)
    else:
        problems, log = [], options.routing_log or options.output_folder / ROUTING_LOG
        try:
            evaluation = collect(options.output_folder, log, options.label, options.items)
            accuracy, skip_rate = evaluation["accuracy"]["all"], evaluation["skip_rate"]["all"]
            print(f"{options.output_folder / EVALUATION_FILE}: accuracy {accuracy:.4f}, skip rate {skip_rate:.4f}")
        except (ValueError, FileNotFoundError) as error:
            problems = [str(error)]
    for problem in problems:
        print(f"error: {problem}", file=sys.stderr)
    return 2 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
