"""One ``evaluation.json`` from a run on the digits dataset: accuracy, skip rate and time by type of question.

    python -m llava.eval.collect outputs/digits/skip_0.3 --label "FuzzyRoE 0.30" --items 2600

Exit status 2: items are missing or duplicated, or the run left no results.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, median
from typing import Any

from llava.eval.results import ROUTING_LOG, read_run
from llava.eval.routing_log import RequestRecord, read_routing_log

METRICS = ("exact_match", "exact_match_text_only")
"""A sample has the first if its question is about an image, the second if there is none."""
EVALUATION_FILE = "evaluation.json"


@dataclass(frozen=True)
class _Item:
    record: RequestRecord
    is_correct: int

    @property
    def has_image(self) -> bool:
        return self.record.num_images > 0


def collect(output_folder: Path, routing_log: Path, label: str, expected_items: int) -> dict[str, Any]:
    """Join samples with the routing log and write ``evaluation.json`` into the run's folder.

    The skip rate of a request is 1 - kept layers / L; all means are over requests. "layers" holds, per layer, the share
    of requests that skip it. "all" covers questions with and without image, "correct" and "complexity" those
    with an image only.

    Args:
        output_folder: Folder of one run, ``--output_path`` of lmms-eval.
        routing_log: ``routing_log`` of its ``--model_args``.
        label: Name of the run in tables and figures.
        expected_items: Documents that were to be evaluated.

    Returns:
        What was written: label, checkpoint, skip_rate_target (None for dense), items, accuracy, skip_rate, prefill_ms
        and decode_ms_per_token (medians over requests), batch_size, correct (doc_id -> 0 or 1), complexity.

    Raises:
        FileNotFoundError: If results or routing log are absent.
        ValueError: If items are missing, duplicated or unknown, or several runs or tasks are mixed.
    """
    folder, log = Path(output_folder), Path(routing_log)
    samples = _only_task(read_run(folder).samples, folder)
    records = read_routing_log(log)
    _check_items([row["doc_id"] for row in samples], expected_items, folder)
    _check_items([record.doc_id for record in records], expected_items, log)
    by_id = {record.doc_id: record for record in records}
    unknown = sorted({row["doc_id"] for row in samples} - set(by_id))
    if unknown:
        raise ValueError(f"{log} knows nothing of documents {unknown[:5]}; give the log of the same run.")
    items = [_Item(by_id[row["doc_id"]], _read_correct(row, folder)) for row in samples]
    evaluation = {
        "label": label,
        "checkpoint": _only(records, lambda record: record.checkpoint, "checkpoint", log),
        "skip_rate_target": _only(records, lambda record: record.skip_rate_target, "skip_rate_target", log),
        "items": len(items),
        "accuracy": _summarise_accuracy(items),
        "skip_rate": _summarise_skip_rate(items),
        "prefill_ms": median(record.prefill_ms for record in records),
        "decode_ms_per_token": _median_if_any(record.decode_ms_per_token for record in records),
        "batch_size": max(record.batch_size for record in records),
        "correct": {str(item.record.doc_id): item.is_correct for item in _with_image(items)},
        "complexity": _summarise_complexity(items),
    }
    path = folder / EVALUATION_FILE
    unfinished = path.with_name(f".{path.name}.tmp")
    unfinished.write_text(json.dumps(evaluation, indent=2) + "\n")
    os.replace(unfinished, path)
    return evaluation


def _only_task(samples: dict[str, list[dict]], folder: Path) -> list[dict]:
    if len(samples) != 1:
        raise ValueError(
            f"{folder} holds samples of {len(samples)} tasks ({', '.join(samples) or 'none'}); one is collected. Run "
            "lmms-eval on one task, with --log_samples."
        )
    return next(iter(samples.values()))


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


def _only(records: list[RequestRecord], read: Callable[[RequestRecord], Any], name: str, log: Path) -> Any:
    values = {read(record) for record in records}
    if len(values) != 1:
        raise ValueError(f"{log} mixes the values {sorted(map(str, values))} of {name}; give the log of one run.")
    return values.pop()


def _median_if_any(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return median(known) if known else None


def _mean_correct(items: list[_Item]) -> float | None:
    return mean(item.is_correct for item in items) if items else None


def _mean_skip_rate(items: list[_Item]) -> float | None:
    return mean(item.record.skip_rate for item in items) if items else None


def _skipped_by_layer(items: list[_Item]) -> list[float]:
    return [1 - mean(layer) for layer in zip(*(item.record.kept_layers for item in items), strict=True)]


def _with_image(items: list[_Item], has_image: bool = True) -> list[_Item]:
    return [item for item in items if item.has_image == has_image]


def _group(items: list[_Item], read: Callable[[RequestRecord], Any]) -> dict[str, list[_Item]]:
    keys = sorted({read(item.record) for item in items} - {None})
    return {str(key): [item for item in items if read(item.record) == key] for key in keys}


def _summarise_accuracy(items: list[_Item]) -> dict[str, Any]:
    return {
        "all": _mean_correct(items),
        "image": _mean_correct(_with_image(items)),
        "text_only": _mean_correct(_with_image(items, False)),
        "types": {name: _mean_correct(group) for name, group in _group(items, lambda record: record.type).items()},
    }


def _summarise_skip_rate(items: list[_Item]) -> dict[str, Any]:
    types = _group(items, lambda record: record.type)
    return {
        "all": _mean_skip_rate(items),
        "image": _mean_skip_rate(_with_image(items)),
        "types": {name: _mean_skip_rate(group) for name, group in types.items()},
        "layers": _skipped_by_layer(items),
        "layers_by_type": {name: _skipped_by_layer(group) for name, group in types.items()},
    }


def _summarise_complexity(items: list[_Item]) -> dict[str, Any]:
    return {
        level: {"items": len(group), "accuracy": _mean_correct(group), "skip_rate": _mean_skip_rate(group)}
        for level, group in _group(_with_image(items), lambda record: record.complexity).items()
    }


def main(arguments: list[str] | None = None) -> int:
    """Parse the command line and collect; the exit status."""
    parser = argparse.ArgumentParser(prog="python -m llava.eval.collect", description=__doc__.splitlines()[0])
    parser.add_argument("output_folder", type=Path, help="folder of one run, --output_path of lmms-eval")
    parser.add_argument("--routing-log", type=Path, help=f"its routing log (default: OUTPUT_FOLDER/{ROUTING_LOG})")
    parser.add_argument("--label", required=True, help="name of the run in tables and figures")
    parser.add_argument("--items", type=int, required=True, help="documents that were to be evaluated")
    options = parser.parse_args(arguments)
    log = options.routing_log or options.output_folder / ROUTING_LOG
    try:
        evaluation = collect(options.output_folder, log, options.label, options.items)
    except (ValueError, FileNotFoundError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    accuracy, skip_rate = evaluation["accuracy"]["all"], evaluation["skip_rate"]["all"]
    print(f"{options.output_folder / EVALUATION_FILE}: accuracy {accuracy:.4f}, skip rate {skip_rate:.4f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
