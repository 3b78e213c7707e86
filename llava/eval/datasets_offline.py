"""Data sets of lmms-eval tasks that are absent from this machine, listed before a model is loaded.

    python -m llava.eval.datasets_offline --tasks gqa,mme

Exit status 2: some are absent, and without the network their tasks would fail; they are listed with the command that
fetches them. A data set counts as present if the Hugging Face hub cache or the datasets cache has it; only loading it
shows whether it is complete.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import Any

DATA_SUFFIXES = (".parquet", ".arrow", ".zip", ".tar", ".json", ".jsonl", ".csv", ".tsv")
LOCAL_BUILDERS = ("json", "csv", "parquet", "text", "arrow", "imagefolder")


def find_absent(configs: dict[str, dict[str, Any]], hub_cache: Path, datasets_cache: Path) -> dict[str, str]:
    """Find the tasks whose data set is absent.

    Args:
        configs: Task -> its configuration.
        hub_cache, datasets_cache: Caches of downloaded repositories and of prepared data sets.

    Returns:
        Task -> the data set's hub id, or the local file that is missing.
    """
    absent = {}
    for task, config in configs.items():
        path, missing = config.get("dataset_path"), []
        if path in LOCAL_BUILDERS:
            files = _flatten((config.get("dataset_kwargs") or {}).get("data_files"))
            missing = [file for file in files if "://" not in file and not Path(file).exists()]
        elif path is not None and not Path(path).exists():
            # a snapshot may hold a README alone, from a look at the data set's page
            snapshots = hub_cache / f"datasets--{path.replace('/', '--')}" / "snapshots"
            prepared = {datasets_cache / name.replace("/", "___") for name in (path, path.lower())}
            is_downloaded = any(file.suffix in DATA_SUFFIXES for file in snapshots.rglob("*"))
            is_there = is_downloaded or any(any(folder.rglob("*.arrow")) for folder in prepared)
            missing = [] if is_there else [path]
        if missing:
            absent[task] = missing[0]
    return absent


def _flatten(data_files: Any) -> list[str]:
    """Names of files, however a task nests them in lists and splits."""
    if isinstance(data_files, str) or data_files is None:
        return [data_files] if data_files else []
    members = data_files.values() if isinstance(data_files, dict) else data_files
    return [file for member in members for file in _flatten(member)]


def read_task_configs(tasks: list[str], include_path: str | None = None) -> dict[str, dict[str, Any]]:
    """Look tasks up in lmms-eval, groups and tags resolved to their members.

    Raises:
        KeyError: If a name is no task.
    """
    from lmms_eval.tasks import TaskManager
    from lmms_eval.utils import load_yaml_config
    from loguru import logger

    logger.disable("lmms_eval")  # it reports every folder it reads
    index = TaskManager("ERROR", include_path=include_path).task_index
    configs: dict[str, dict[str, Any]] = {}
    waiting = list(tasks)
    while waiting:
        name = waiting.pop()
        if name not in index:
            raise KeyError(f"Task '{name}' is unknown to lmms-eval; `lmms-eval tasks list` names the known ones.")
        entry = index[name]
        if entry["type"] == "tag":
            waiting += entry["task"]
        else:
            config = load_yaml_config(entry["yaml_path"], mode="simple")
            if entry["type"] == "group":
                waiting += [member if isinstance(member, str) else member["task"] for member in config["task"]]
            else:
                configs[name] = config
    return configs


def main(arguments: list[str] | None = None) -> int:
    """Parse the command line and report; give the exit status."""
    parser = argparse.ArgumentParser(prog="python -m llava.eval.datasets_offline", description=__doc__.splitlines()[0])
    parser.add_argument("--tasks", required=True, help="names separated by commas, as for lmms-eval")
    parser.add_argument("--include-path", help="folder of local tasks")
    options = parser.parse_args(arguments)
    from huggingface_hub.constants import HF_HUB_CACHE

    home = Path(os.environ.get("HF_HOME", "~/.cache/huggingface")).expanduser()
    prepared = os.environ.get("LMMS_EVAL_DATASETS_CACHE") or os.environ.get("HF_DATASETS_CACHE") or home / "datasets"
    try:
        configs = read_task_configs(options.tasks.split(","), options.include_path or None)
    except KeyError as error:
        print(f"error: {error.args[0]}", file=sys.stderr)
        return 2
    absent = find_absent(configs, Path(HF_HUB_CACHE), Path(prepared).expanduser())
    for task, dataset in sorted(absent.items()):
        print(f"error: the data set of task {task} is not on this machine: {dataset}", file=sys.stderr)
    fetchable = sorted({dataset for task, dataset in absent.items() if configs[task]["dataset_path"] == dataset})
    if fetchable:
        print("Fetch them where there is a network, into the same HF_HOME:", file=sys.stderr)
        print("\n".join(f"  hf download --repo-type dataset {dataset}" for dataset in fetchable), file=sys.stderr)
    return 2 if absent else 0


if __name__ == "__main__":
    sys.exit(main())
