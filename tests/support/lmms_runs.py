"""The released lmms-eval in a process of its own, on a tiny digits dataset, and what it wrote."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from playground.digits.generate import Settings, generate
from playground.digits.task import write_task

ROOT = Path(__file__).resolve().parents[2]


def write_work(folder: Path, num_tests: int) -> None:
    """Write ``data``, ``task`` and ``plugin``, the entry point as pyproject.toml declares it."""
    generate(folder / "data", Settings(train=24, validation=12, test=num_tests))
    write_task(folder / "data", folder / "task")
    declared = (ROOT / "pyproject.toml").read_text().partition('entry-points."lmms_eval.models"]\n')[2].splitlines()[0]
    info = folder / "plugin" / "fuzzyroe-0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: fuzzyroe\nVersion: 0\n")
    (info / "entry_points.txt").write_text(f"[lmms_eval.models]\n{declared.replace(chr(34), '')}\n")


def run(work: Path, command: list, **variables: str) -> subprocess.CompletedProcess:
    """Run a command from the repository root with the plug-in on the path, offline, on the CPU."""
    path = os.pathsep.join([str(ROOT), str(work / "plugin"), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path, "HF_HOME": str(work / "hf"), "HF_HUB_OFFLINE": "1"}
    environment |= {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "FUZZYROE_PYTHON": sys.executable} | variables
    result = subprocess.run(list(map(str, command)), cwd=ROOT, env=environment, capture_output=True, text=True)
    result.output = result.stdout + result.stderr
    return result


def evaluate(work: Path, output: Path, model: str, model_args: str, batch_size: int, *more: str) -> dict[int, str]:
    """Answers of one evaluation of the digits task, by item.

    Raises:
        AssertionError: If lmms-eval fails; ``--verbosity DEBUG`` makes it say so by its exit code.
    """
    arguments = ["--model", model, "--model_args", model_args, "--include_path", work / "task"]
    arguments += ["--tasks", "digits_vqa", "--batch_size", batch_size, "--log_samples", "--output_path", output]
    result = run(work, [sys.executable, "-m", "lmms_eval", *arguments, "--verbosity", "DEBUG", *more])
    assert result.returncode == 0, result.output
    (samples,) = output.rglob("*_samples_digits_vqa.jsonl")
    lines = [json.loads(line) for line in samples.read_text().splitlines()]
    return {line["doc_id"]: line["filtered_resps"] for line in lines}
