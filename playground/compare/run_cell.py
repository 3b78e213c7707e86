"""Runs one cell of the comparison in one process: its stages, one after the other, then its questions."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import time
from pathlib import Path
from typing import Any

import torch

from llava.files import write_json
from llava.model.builder import load_checkpoint
from llava.train.arguments import parse_arguments
from llava.train.checks import check_inputs
from llava.train.stage import run_stage
from playground.compare.answers import REFERENCE, answer_questions, give_oracle, load_questions
from playground.compare.arms import BATCH, MAIN_TARGET, MAX_LENGTH, MAX_SKIP_RATIO, Cell, Training
from playground.compare.summary import pack

ROOT = Path(__file__).resolve().parents[2]
BASE = "playground/digits/base"

NUM_ORACLE_QUESTIONS = 480
"""The search takes fifty passes for each."""


def run_cell(cell: Cell, data: Path, work: Path, results: Path, num_questions: int | None = None) -> None:
    """Train what the cell says, ask some or all of the held-out questions about images, write ``results/NAME.json``.

    ``data`` is the folder of the digits dataset with its parts ``stages.PART.json``; ``work`` gets a folder of
    checkpoints for each cell.
    """
    torch.set_num_threads(1)
    started = time.time()
    stages, model = [], str(work / cell.start) if cell.start else BASE
    for training in cell.arm.stages:
        output = work / cell.name / training.stage
        stages.append(_run_stage(training, cell, data, model, output))
        model = str(output)
    content = {
        "cell": cell.name,
        "method": cell.arm.method,
        "seed": cell.seed,
        "target": cell.target,
        "table": cell.arm.table,
        "commit": current_commit(),
        "command": f"CELLS={cell.name} bash scripts/playground/compare.sh",
        "start": cell.start or BASE,
        "stages": stages,
        **_evaluate(cell, data, model, results, num_questions),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, one thread, torch {torch.__version__}",
        "seconds": round(time.time() - started, 1),
    }
    results.mkdir(parents=True, exist_ok=True)
    write_json(results / f"{cell.name}.json", content)


def current_commit() -> str:
    """The commit that the tracked files are at, with a mark if any of them has been changed since."""

    def git(*words: str) -> str:
        command = ["git", "-C", str(ROOT), *words]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    changed = git("status", "--porcelain", "--untracked-files=no", "--", "fuzzyroe", "llava", "playground")
    return git("rev-parse", "HEAD") + ("+changes" if changed else "")


def flags_of(training: Training, cell: Cell, data: Path, model: str, output: Path) -> list[str]:
    """The command line of a stage."""
    flags = {
        "stage": training.stage,
        "model_name_or_path": model,
        "data_path": str(data / f"stages.{training.data}.json"),
        "image_folder": str(data / "images"),
        "output_dir": str(output),
        "version": "digits",
        "model_max_length": str(MAX_LENGTH),
        "seed": str(cell.seed),
        "use_cpu": "True",
        "skip_data_check": "True",
    }
    if training.stage != "dense":
        flags["skip_ratio"] = str(cell.target or MAIN_TARGET)
    if cell.target is None and training.stage != "dense" or training.stage == "roe_finetune":
        flags["max_skip_ratio"] = str(MAX_SKIP_RATIO)
    if training.steps:
        flags |= {"max_steps": str(training.steps), "per_device_train_batch_size": str(BATCH)}
        flags |= {"warmup_steps": "0.05", "lr_scheduler_type": "cosine", "weight_decay": "0."}
        flags |= {"group_by_modality_length": "True", "logging_steps": "10", "save_strategy": "no"}
    return [*(word for name, value in flags.items() for word in (f"--{name}", value)), *training.flags]


def _run_stage(training: Training, cell: Cell, data: Path, model: str, output: Path) -> dict[str, Any]:
    words = flags_of(training, cell, data, model, output)
    arguments = parse_arguments(words)
    check_inputs(arguments)
    started = time.process_time()
    calibration = run_stage(arguments).get("calibration", {})
    return {
        "stage": training.stage,
        "flags": words,
        "steps": training.steps,
        "examples": training.steps * BATCH,
        "fitting_samples": calibration.get("samples", 0),
        "fitting_passes": calibration.get("passes", 0),
        "fitting_cpu_seconds": round(calibration.get("cpu_seconds", 0.0), 2),
        "cpu_seconds": round(time.process_time() - started, 2),
        "budgets": calibration.get("bias_table"),
        "layer_order": calibration.get("layer_order"),
        "score_correlation": calibration.get("score_correlation"),
    }


def _evaluate(cell: Cell, data: Path, model: str, results: Path, num_questions: int | None) -> dict[str, Any]:
    is_oracle = cell.arm.policy == "oracle"
    if is_oracle:
        num_questions = min(num_questions or NUM_ORACLE_QUESTIONS, NUM_ORACLE_QUESTIONS)
    questions, checkpoint, search_passes = load_questions(data, num_questions), load_checkpoint(model), 0
    checkpoint.model.eval()
    if is_oracle:
        num_layers = checkpoint.model.config.text_config.num_hidden_layers
        search_passes = give_oracle(checkpoint, questions, data, round(MAX_SKIP_RATIO * num_layers))
    answers, seconds = answer_questions(checkpoint, questions, data, cell.points)
    dense = answers[None].set_index("id").text.to_dict() if None in answers else read_dense(results, cell.seed)
    evaluations = [
        {
            "point": point,
            "accuracy": round(float(own.correct.mean()), 6),
            "agreement": round(float((own.text == own.id.map(dense)).mean()), 6),
            "skip_rate": round(float(own.skipped.mean()), 6),
            "time_ratio": round(seconds[point] / seconds[REFERENCE], 4),
            "correct": pack(own.correct.tolist()),
        }
        for point, own in answers.items()
    ]
    content = {"questions": len(questions), "search_passes": search_passes, "evaluations": evaluations}
    if is_oracle or None in answers:
        content["ids"] = [record["id"] for record in questions]
    if None in answers:
        content["texts"] = answers[None].text.tolist()
    return content


def read_dense(results: Path, seed: int) -> dict[str, str]:
    """Question -> answer of the dense model of a seed.

    Raises:
        FileNotFoundError: If its cell has not been run.
    """
    file = results / f"dense_{seed}.json"
    if not file.exists():
        raise FileNotFoundError(f"{file} is not there; answers are compared with the dense model's, run dense_{seed}.")
    cell = json.loads(file.read_text())
    return dict(zip(cell["ids"], cell["texts"], strict=True))
