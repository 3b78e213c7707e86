"""The released lmms-eval with the plug-in, from ``scripts/v1_5/eval.sh`` and by hand, on a tiny digits dataset."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from llava.report.evaluation import collect, read_routing_log
from lmms_runs import ROOT, run, write_work
from playground.digits.base_model import build_base_model
from playground.digits.tokenizer import train_tokenizer
from routed_checkpoints import write_routing

SCRIPT = ROOT / "scripts" / "v1_5" / "eval.sh"
NUM_LAYERS, NUM_ITEMS = 12, 26


def build_checkpoint(data: Path, folder: Path) -> None:
    """Write the untrained base model of the playground, routed by the shipped rule base with an even plan."""
    train_tokenizer(json.loads((data / "digits_train.json").read_text())).save_pretrained(folder / "tokenizer")
    model = build_base_model(folder / "tokenizer", folder)
    write_routing(model, folder)


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with ``data``, ``task``, ``model`` and ``plugin``, the entry point as pyproject.toml declares it."""
    folder = tmp_path_factory.mktemp("lmms_eval")
    write_work(folder, num_tests=24)
    build_checkpoint(folder / "data", folder / "model")
    return folder


def lmms_eval(work: Path, output: Path) -> list:
    """The arguments of lmms-eval for the whole test split, at the checkpoint's own skip rate."""
    model_args = f"pretrained={work / 'model'},conv_template=digits,device=cpu,routing_log={output / 'routing.jsonl'}"
    arguments = ["--model", "fuzzyroe", "--model_args", model_args, "--include_path", work / "task"]
    arguments += ["--tasks", "digits_vqa", "--batch_size", 8, "--gen_kwargs", "max_new_tokens=4"]
    return ["-m", "lmms_eval", *arguments, "--log_samples", "--output_path", output]


@pytest.mark.slow
def test_lmms_eval_runs_the_plug_in_and_its_files_are_collected(work: Path) -> None:
    output = work / "by_hand"
    result = run(work, [sys.executable, *lmms_eval(work, output)])
    assert result.returncode == 0, result.output
    evaluation = collect(output, output / "routing.jsonl", "tiny", NUM_ITEMS)
    assert evaluation["target_skip_ratio"] == 0.25
    assert len(evaluation["correct"]) == 24 and len(evaluation["accuracy"]["types"]) == 14
    assert len(evaluation["skip_rate"]["layers"]) == NUM_LAYERS
    assert 0 < evaluation["skip_rate"]["all"] < 1


@pytest.mark.slow
def test_two_processes_share_the_documents(work: Path) -> None:
    output = work / "two_processes"
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", 2]
    result = run(work, [*launcher, *lmms_eval(work, output)], ACCELERATE_USE_CPU="1")
    assert result.returncode == 0, result.output
    names = sorted(file.name for file in output.glob("routing*"))
    assert names == ["routing.rank0-of-2.jsonl", "routing.rank1-of-2.jsonl"]
    assert collect(output, output / "routing.jsonl", "tiny", NUM_ITEMS)["items"] == NUM_ITEMS


@pytest.mark.slow
def test_the_script_evaluates_the_local_task(work: Path) -> None:
    output = work / "by_script"
    settings = {"MODEL_PATH": work / "model", "INCLUDE_PATH": work / "task", "OUTPUT": output, "TASKS": "digits_vqa"}
    settings |= {"CONV_TEMPLATE": "digits", "SKIP_RATES": "0.4", "OFFLINE": "1"}
    variables = {name: str(value) for name, value in settings.items()}
    result = run(work, ["bash", SCRIPT, "--limit", 12, "--gen_kwargs", "max_new_tokens=4"], **variables)
    assert result.returncode == 0, result.output
    assert "skip rate, observed" in result.stdout and "digits_vqa exact_match" in result.stdout
    assert {record.target_skip_ratio for record in read_routing_log(output / "skip_0.4" / "routing.jsonl")} == {0.4}
    again = run(work, ["bash", SCRIPT], **variables)
    assert again.returncode == 2 and "holds the results of an earlier run" in again.stderr


@pytest.mark.slow
def test_a_failed_evaluation_fails_the_script(work: Path) -> None:
    settings = {"MODEL_PATH": work / "model", "INCLUDE_PATH": work / "task", "OUTPUT": work / "failed"}
    settings |= {"TASKS": "digits_vqa", "CONV_TEMPLATE": "no_such_template"}
    result = run(work, ["bash", SCRIPT], **{name: str(value) for name, value in settings.items()})
    assert result.returncode == 2, result.output
    assert "Conversation template 'no_such_template' is unknown" in result.output
    assert "the evaluation failed" in result.stderr
    assert result.output.count("into ") == 1, "it should stop at the first failure"


@pytest.mark.slow
def test_offline_absent_data_sets_are_listed_before_a_model_is_loaded(work: Path) -> None:
    settings = {"MODEL_PATH": "no/such/model", "INCLUDE_PATH": str(work / "task"), "OFFLINE": "1"}
    result = run(work, ["bash", SCRIPT], TASKS="digits_vqa,mme,mmbench_en", OUTPUT=str(work / "offline"), **settings)
    assert result.returncode == 2, result.output
    listed = [line for line in result.stderr.splitlines() if line.startswith("error: the data set of task")]
    assert [line.split()[6] for line in listed] == ["mmbench_en_dev", "mmbench_en_test", "mme"]
    assert "hf download --repo-type dataset" in result.stderr
    assert "no/such/model" not in result.output.partition("error: ")[2]


def dry_run(**variables: str) -> subprocess.CompletedProcess:
    """The commands of the script, on a machine that shows no GPU."""
    names = ("TASKS", "SKIP_RATES", "OUTPUT", "OPENAI_API_KEY", "MODEL_PATH", "OFFLINE", "NUM_GPUS", "INCLUDE_PATH")
    environment = {name: value for name, value in os.environ.items() if name not in names}
    environment |= {"DRY_RUN": "1", "CUDA_VISIBLE_DEVICES": ""} | variables
    command = ["bash", str(SCRIPT), "--limit", "8"]
    return subprocess.run(command, cwd="/", env=environment, capture_output=True, text=True)


def test_a_dry_run_shows_the_commands() -> None:
    result = dry_run(MODEL_PATH="checkpoints/ours", INCLUDE_PATH="my tasks", OPENAI_API_KEY="key")
    assert result.returncode == 0, result.stderr
    launches = [line for line in result.stdout.splitlines() if "accelerate.commands.launch" in line]
    assert len(launches) == 3
    assert launches[0].startswith("python -m accelerate.commands.launch --num_processes 1 ")
    for launch, rate, name in zip(launches, ("off", "0.25", "0.3"), ("dense", "skip_0.25", "skip_0.3"), strict=True):
        assert f"pretrained=checkpoints/ours,skip_rate={rate},dtype=auto" in launch
        assert f"--output_path outputs/eval/ours/{name}" in launch
        assert "--tasks gqa,textvqa_val,mme,pope,scienceqa_img,mmbench_en,seedbench,mmvet " in launch
        assert launch.endswith("--include_path 'my tasks' --limit 8")


def test_without_a_key_no_task_needs_one_and_gpus_are_counted() -> None:
    result = dry_run(MODEL_PATH="ours", NUM_GPUS="4", SKIP_RATES="off")
    assert "mmvet" not in result.stdout
    assert "accelerate.commands.launch --num_processes 4 " in result.stdout and "--multi_gpu" in result.stdout


def test_what_the_script_needs_is_asked_for_by_name() -> None:
    result = dry_run()
    assert result.returncode == 2 and "MODEL_PATH is not set" in result.stderr
    wrong = dry_run(MODEL_PATH="ours", NUM_GPUS="all")
    assert wrong.returncode == 2 and "NUM_GPUS is 'all'" in wrong.stderr
