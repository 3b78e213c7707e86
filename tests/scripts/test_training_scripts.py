"""Every training script prints commands whose every flag is one that training acts on."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest

from llava.train.arguments import LlavaTrainingArguments, learning_rates, parse_arguments, stage_of

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "scripts" / "v1_5"
SOURCED, EVALUATION = ("common.sh", "launch.sh", "stage.sh"), ("eval.sh",)
ON_GPU = {"--bf16", "--tf32", "--deepspeed"}
"""Flags that this machine cannot parse: they look for a GPU, or for an engine that is running."""
SCRIPTS = sorted(path.stem for path in FOLDER.glob("*.sh") if path.name not in (*SOURCED, *EVALUATION))

# script: the stages it launches, by name, with what trains
STAGES = {
    "pretrain": [("pretrain", ("projector",))],
    "finetune": [("dense", ("projector", "decoder"))],
    "finetune_lora": [("dense", ("projector", "lora"))],
    "finetune_task": [("dense", ("projector", "decoder"))],
    "fuzzyroe_router": [("router", ())],
    "fuzzyroe_adapter": [("adapter", ("adapter",))],
    "fuzzyroe_finetune": [("finetune", ("projector", "decoder", "adapter"))],
    "finetune_roe": [
        ("roe_adapter", ("adapter",)),
        ("roe_router", ("adapter", "router")),
        ("roe_finetune", ("projector", "decoder", "adapter", "router")),
    ],
}
STAGES["finetune_fuzzyroe"] = STAGES["train_all"] = [
    STAGES[f"fuzzyroe_{name}"][0] for name in ("router", "adapter", "finetune")
]


def dry_run(script: str, *arguments: str, **variables: str) -> list[list[str]]:
    """The words of the commands that a script would run."""
    kept = {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ}
    environment = {**kept, "DRY_RUN": "1", "DATA_PATH": "data.json", "CUDA_VISIBLE_DEVICES": "", **variables}
    command = ["bash", str(FOLDER / f"{script}.sh"), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd="/")
    assert done.returncode == 0, done.stderr
    return [shlex.split(line) for line in done.stdout.splitlines() if not line.startswith("[")]


def refuse(script: str, **variables: str) -> str:
    """What a script prints that must fail."""
    environment = {"PATH": os.environ["PATH"], "DRY_RUN": "1", "DATA_PATH": "data.json", **variables}
    done = subprocess.run(["bash", str(FOLDER / f"{script}.sh")], capture_output=True, text=True, env=environment)
    assert done.returncode != 0
    return done.stdout + done.stderr


@pytest.mark.parametrize("script", [*SCRIPTS, "eval"])
def test_help_and_a_missing_variable_are_answered_before_anything_else(script: str) -> None:
    for words, status in ((["--help"], 0), ([], 2)):
        command = ["bash", str(FOLDER / f"{script}.sh"), *words]
        done = subprocess.run(command, capture_output=True, text=True, env={"PATH": os.environ["PATH"]}, timeout=20)
        assert done.returncode == status, done.stderr
        assert "[env]" not in done.stdout + done.stderr, "nothing was installed or looked for"
    name = "MODEL_PATH" if script == "eval" else "DATA_PATH"
    assert f"error: {name} is not set; bash " in done.stderr and ".sh --help says what it is" in done.stderr


def parse(command: list[str], output: Path) -> tuple:
    """The arguments of a launch as training reads them; on this machine's CPU."""
    flags = command[command.index("llava/train/train.py") + 1 :]
    kept = [word for name, value in zip(flags[::2], flags[1::2], strict=True) if name not in ON_GPU
            for word in (name, value)]  # fmt: skip
    kept[kept.index("--output_dir") + 1] = str(output)
    return parse_arguments([*kept, "--use_cpu", "True"])


def launches(script: str, output: Path, **variables: str) -> list[tuple]:
    """Parsed arguments of every launch of a script."""
    commands = [command for command in dry_run(script, **variables) if "llava/train/train.py" in command]
    return [parse(command, output) for command in commands]


def test_every_script_is_in_the_table() -> None:
    assert SCRIPTS == sorted(STAGES)
    assert ON_GPU <= {f"--{field.name}" for field in fields(LlavaTrainingArguments)}


@pytest.mark.parametrize("script", STAGES)
def test_every_flag_of_a_script_is_known_and_its_stages_train_what_they_say(script: str, tmp_path: Path) -> None:
    found = []
    for arguments in launches(script, tmp_path):
        found.append(stage_of(arguments))
    assert [(stage.name, stage.trains) for stage in found] == STAGES[script]


def test_the_quickstart_launches_stages_with_known_flags(tmp_path: Path) -> None:
    text = (ROOT / "scripts" / "quickstart.sh").read_text()
    first, last = text.index("shared=("), text.index("check_engines()")
    program = (
        'train_stage() { local stage="$1"; shift 4; printf "%s\\n" "--stage $stage ${*@Q}"; }; '
        "DATA=data OUTPUT=output BASE=base; " + text[first:last]
    )
    for order in ("router-first", "adapter-first"):
        done = subprocess.run(
            ["bash", "-euc", program], capture_output=True, text=True, env={"ORDER": order, "PATH": os.environ["PATH"]}
        )
        assert done.returncode == 0, done.stderr
        lines = [shlex.split(line) for line in done.stdout.splitlines()]
        assert len(lines) == 3
        required = ["--model_name_or_path", "m", "--data_path", "d", "--image_folder", "i", "--output_dir"]
        for flags in lines:
            parse_arguments([*required, str(tmp_path), "--use_cpu", "True", *flags])


# script: (learning rates that matter, global batch, samples per device, warm-up, template, ZeRO configuration)
PUBLISHED = {
    "pretrain": [({"projector": 1e-3}, 256, 32, 0.03, "plain", "zero2")],
    "finetune": [({"projector": 2e-5, "decoder": 2e-5}, 128, 16, 0.03, "v1", "zero3")],
    "finetune_lora": [({"projector": 2e-5, "lora": 2e-4}, 128, 16, 0.03, "v1", "zero3")],
    "finetune_task": [({"projector": 2e-5, "decoder": 2e-5}, 128, 16, 0.03, "v1", "zero3")],
    "finetune_roe": [
        ({"adapter": 4e-4}, 128, 4, 0.05, "v1", "zero3"),
        ({"adapter": 4e-4, "router": 4e-4}, 128, 4, 0.05, "v1", "zero3"),
        ({"adapter": 4e-4, "router": 4e-4, "decoder": 2e-6, "projector": 2e-6}, 128, 4, 0.05, "v1", "zero3"),
    ],
}


@pytest.mark.parametrize("script", PUBLISHED)
def test_scripts_train_with_the_published_hyper_parameters(script: str, tmp_path: Path) -> None:
    commands = [command for command in dry_run(script, NUM_GPUS="8") if "llava/train/train.py" in command]
    for command, published in zip(commands, PUBLISHED[script], strict=True):
        rates, batch, per_device, warmup, template, zero = published
        model, data, routing, training = parse(command, tmp_path)
        found = learning_rates(routing, training)
        assert {part: found[part] for part in rates} == rates
        assert training.per_device_train_batch_size == per_device
        assert per_device * training.gradient_accumulation_steps * 8 == batch
        assert training.warmup_ratio == training.warmup_steps == warmup
        assert (model.version, training.num_train_epochs, training.weight_decay) == (template, 1, 0)
        assert training.lr_scheduler_type == "cosine" and training.model_max_length == 2048
        assert command[command.index("--deepspeed") + 1] == f"scripts/{zero}.json"
        assert data.image_aspect_ratio == ("square" if script == "pretrain" else "pad")
        assert training.group_by_modality_length == (script != "pretrain")


def test_lora_has_llavas_size(tmp_path: Path) -> None:
    for variables, script in (({}, "finetune_lora"), ({"LORA": "1"}, "finetune_task")):
        ((_, _, _, training),) = launches(script, tmp_path, **variables)
        assert training.lora_enable and (training.lora_r, training.lora_alpha) == (128, 256)


@pytest.mark.parametrize("script", sorted(set(STAGES) - {"train_all"}))
def test_the_model_size_names_models_and_folders(script: str) -> None:
    for size, other in (("7b", "13b"), ("13b", "7b")):
        told = " ".join(word for command in dry_run(script, MODEL_SIZE=size) for word in command)
        assert size in told and other not in told


def test_a_step_takes_the_global_batch_on_any_number_of_gpus(tmp_path: Path) -> None:
    for number, accumulation in (("1", 8), ("4", 2), ("8", 1)):
        ((_, _, _, training),) = launches("finetune", tmp_path, NUM_GPUS=number)
        assert training.gradient_accumulation_steps == accumulation


def test_roes_stages_are_parts_of_one_run(tmp_path: Path) -> None:
    commands = dry_run("finetune_roe")
    assert commands[1][-1] == "adapter=0.3,router=0.2,finetune=0.5"
    models = [arguments[0].model_name_or_path for arguments in launches("finetune_roe", tmp_path)]
    assert models == ["llava-hf/llava-1.5-7b-hf", "checkpoints/roe-7b-adapter", "checkpoints/roe-7b-router"]


def test_no_script_launches_training_but_through_the_check() -> None:
    launching = [path.name for path in FOLDER.glob("*.sh") if "llava/train/train.py \\\n" in path.read_text()]
    assert launching == ["stage.sh"]
    stage = (FOLDER / "stage.sh").read_text()
    assert stage.index('[[ -n "${SKIP_DATA_CHECK:-}" ]] || check_data "${flags[@]}"') < stage.index("  launch ")


TWO_NODES = {"NUM_NODES": "2", "NODE_RANK": "1", "MASTER_ADDR": "node-0", "NUM_GPUS": "4"}

# variables: what starts the processes of training; each launch has 8 of them
LAUNCHES = [
    ({"NUM_GPUS": "8"}, "deepspeed --num_gpus 8 --master_port 29500"),
    ({"HOSTFILE": "{hosts}"}, "deepspeed --hostfile {hosts} --master_port 29500"),
    (
        {"HOSTFILE": "{hosts}", "MASTER_ADDR": "node-1", "MASTER_PORT": "3000"},
        "deepspeed --hostfile {hosts} --master_addr node-1 --master_port 3000",
    ),
    (
        {"LAUNCHER": "torchrun", "NUM_GPUS": "8"},
        "torchrun --nproc_per_node 8 --nnodes 1 --node_rank 0 --master_addr 127.0.0.1 --master_port 29500",
    ),
    (
        {"LAUNCHER": "torchrun", **TWO_NODES, "MASTER_PORT": "3000"},
        "torchrun --nproc_per_node 4 --nnodes 2 --node_rank 1 --master_addr node-0 --master_port 3000",
    ),
    (
        {"LAUNCHER": "accelerate", "NUM_GPUS": "8"},
        "accelerate launch --multi_gpu --gpu_ids all --mixed_precision no --dynamo_backend no --num_processes 8 "
        "--num_machines 1 --machine_rank 0 --main_process_ip 127.0.0.1 --main_process_port 29500",
    ),
    (
        {"LAUNCHER": "accelerate", **TWO_NODES},
        "accelerate launch --multi_gpu --gpu_ids all --mixed_precision no --dynamo_backend no --num_processes 8 "
        "--num_machines 2 --machine_rank 1 --main_process_ip node-0 --main_process_port 29500",
    ),
]


@pytest.fixture
def hosts(tmp_path: Path) -> Path:
    """A hostfile of 8 processes on three nodes, with what deepspeed passes over."""
    file = tmp_path / "hosts"
    file.write_text("# the cluster\nnode-0 slots=2\n\n  node-1\tslots=2  \nnode-2 slots=4")
    return file


@pytest.mark.parametrize(("variables", "expected"), LAUNCHES)
def test_a_launcher_is_told_of_all_nodes_and_starts_the_same_training(
    variables: dict[str, str], expected: str, hosts: Path
) -> None:
    variables = {name: value.format(hosts=hosts) for name, value in variables.items()}
    *_, command = dry_run("finetune", PER_DEVICE_BATCH="4", **variables)
    start = command.index("llava/train/train.py")
    assert " ".join(command[:start]) == expected.format(hosts=hosts)
    *_, alone = dry_run("finetune", PER_DEVICE_BATCH="4", NUM_GPUS="8")
    assert command[start:] == alone[alone.index("llava/train/train.py") :]
    assert command[command.index("--gradient_accumulation_steps") + 1] == "4"  # 128 / (4 samples x 8 processes)


@pytest.mark.parametrize(("text", "message"), [
    ("node-0 slots=2\nnode-1 4\n", "line 2 is 'node-1 4'; write 'NAME slots=GPUS'"),
    ("node-0 slots=0\n", "line 1 is 'node-0 slots=0'; write 'NAME slots=GPUS', GPUS from 1"),
    ("node-0 slots=2\n# again\nnode-0 slots=2\n", "line 3 names node-0 again"),
    ("# none\n", "names no node"),
])  # fmt: skip
def test_a_hostfile_that_deepspeed_cannot_follow_is_refused(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "hosts").write_text(text)
    refused = refuse("finetune", HOSTFILE=str(tmp_path / "hosts"))
    assert f"HOSTFILE {tmp_path / 'hosts'}" in refused and message in refused


def test_a_hostfile_is_refused_on_a_machine_without_gpus(hosts: Path) -> None:
    kept = {"FUZZYROE_PYTHON": sys.executable, "CUDA_VISIBLE_DEVICES": "", "DRY_RUN": ""}
    assert "HOSTFILE is set, but this machine has no GPU" in refuse("finetune", HOSTFILE=str(hosts), **kept)


def test_other_nodes_wait_for_what_node_0_writes(tmp_path: Path) -> None:
    text = (FOLDER / "launch.sh").read_text()
    program = text[text.index("wait_for_node_0() {") :] + f'wait_for_node_0 "{tmp_path / "written"}"'
    environment = {"PATH": os.environ["PATH"]}
    assert subprocess.run(["bash", "-euc", program], env={**environment, "NODE_RANK": "0"}, timeout=30).returncode == 0
    waiting = subprocess.Popen(["bash", "-euc", program], env={**environment, "NODE_RANK": "1"})
    try:
        with pytest.raises(subprocess.TimeoutExpired):
            waiting.wait(1.5)
        (tmp_path / "written").touch()
        assert waiting.wait(30) == 0
    finally:
        waiting.kill()


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        ([], ["--model-max-length", "2048"]),
        (["--model_max_length", "256", "--model_max_length=128"], ["--model-max-length", "128"]),
        (["--vision_tower", "a clip"], ["--vision-tower", "a clip", "--model-max-length", "2048"]),
        (["--allow_truncation", "True"], ["--model-max-length", "2048", "--allow-truncation"]),
    ],
)
def test_the_check_before_a_stage_measures_what_the_stage_will_read(more: list[str], expected: list[str]) -> None:
    text = (FOLDER / "stage.sh").read_text()
    functions = text[text.index("value_of() {") : text.index("run_hash() {")]
    flags = ["--stage", "dense", "--model_name_or_path", "m", "--data_path", "d.json", "--image_folder", "i"]
    flags += ["--version", "v1", "--model_max_length", "2048", *more]
    program = f"""echo_words() {{ printf '%s\\n' "${{@:3}}"; }}; PYTHON=echo_words; {functions} check_data "$@" """
    done = subprocess.run(["bash", "-euc", program, "bash", *flags], capture_output=True, text=True, check=True)
    start = ["check-data", "d.json", "--image-folder", "i", "--version", "v1", "--model", "m"]
    assert done.stdout.splitlines() == [*start, *expected]


def test_a_driver_trains_the_method_it_is_told() -> None:
    assert dry_run("train_all", METHOD="roe") == dry_run("finetune_roe")
    assert dry_run("train_all") == dry_run("finetune_fuzzyroe")


@pytest.mark.parametrize(
    ("script", "variables", "message"),
    [
        ("train_all", {"METHOD": "moe"}, "METHOD is 'moe'; use fuzzyroe or roe"),
        ("train_all", {"ATTEMPTS": "0"}, "ATTEMPTS is '0'"),
        ("finetune", {"MODEL_SIZE": "3b"}, "MODEL_SIZE is '3b'; use 7b or 13b"),
        ("pretrain", {"NUM_GPUS": "3"}, "GLOBAL_BATCH 256 is no multiple of PER_DEVICE_BATCH 32 x 3"),
        ("finetune_roe", {"DATA_PATH": ""}, "DATA_PATH is not set"),
        ("finetune", {"LAUNCHER": "mpirun"}, "LAUNCHER is 'mpirun'; use deepspeed, torchrun or accelerate"),
        ("finetune", {"LAUNCHER": "accelerate"}, "LAUNCHER is accelerate, which starts no single process"),
        ("finetune", {"HOSTFILE": "none"}, "HOSTFILE none is no file"),
        ("finetune", {"HOSTFILE": "none", "LAUNCHER": "torchrun"}, "HOSTFILE is read by deepspeed alone"),
        ("finetune", {"NUM_NODES": "some"}, "NUM_NODES is 'some'"),
        ("finetune", {"NUM_NODES": "2", "MASTER_ADDR": "node-0"}, "NUM_NODES is 2, but deepspeed takes its nodes from"),
        ("finetune", {"NUM_NODES": "2", "LAUNCHER": "torchrun"}, "MASTER_ADDR is not set"),
        ("finetune", {"NODE_RANK": "1"}, "NODE_RANK is '1'; give a number from 0 to 0"),
        ("finetune", {**TWO_NODES, "LAUNCHER": "torchrun", "NUM_GPUS": "3"}, "no multiple of PER_DEVICE_BATCH 16 x 6"),
    ],
)
def test_a_wrong_variable_is_named(script: str, variables: dict[str, str], message: str) -> None:
    assert message in refuse(script, **variables)


@pytest.mark.parametrize(("statuses", "attempts", "launched", "ends"), [
    ("1 137 0", "3", 3, 0),
    ("1 1 1", "2", 2, 1),
    ("2 0", "3", 1, 2),
    ("130 0", "3", 1, 130),
])  # fmt: skip
def test_a_driver_starts_an_interrupted_run_again(
    statuses: str, attempts: str, launched: int, ends: int, tmp_path: Path
) -> None:
    shutil.copy(FOLDER / "train_all.sh", tmp_path)
    (tmp_path / "finetune_roe.sh").write_text(
        'count=$(cat count 2>/dev/null || echo 0); echo $((count + 1)) >count; echo "FRESH=${FRESH:-}" >>log\n'
        "statuses=($STATUSES); exit ${statuses[count]}\n"
    )
    environment = {"PATH": os.environ["PATH"], "METHOD": "roe", "ATTEMPTS": attempts, "FRESH": "1"}
    command = ["bash", str(tmp_path / "train_all.sh")]
    done = subprocess.run(command, env={**environment, "STATUSES": statuses}, cwd=tmp_path)
    assert done.returncode == ends and (tmp_path / "count").read_text() == f"{launched}\n"
    assert (tmp_path / "log").read_text().splitlines() == ["FRESH=1", *["FRESH="] * (launched - 1)]
