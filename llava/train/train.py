"""One training stage from the command line: parse, check, load, train, fit, save.

Launched by ``deepspeed``, ``torchrun``, ``accelerate launch`` or plain ``python``::

    deepspeed llava/train/train.py --deepspeed scripts/zero3.json --stage adapter --model_name_or_path ... \
        --data_path ... --image_folder ... --output_dir ...

Bad input ends every process with exit code 2, one of them with a message, before a model is loaded; earlier outputs
stay as they were.
"""

# ruff: noqa: E402 -- the launcher is watched before the imports that take seconds
from __future__ import annotations

import gc
import os
import sys
import threading
import time
from pathlib import Path

ORPHANED = 71
"""Exit code of a process whose launcher is gone."""


def watch_launcher(poll_seconds: float = 0.5) -> None:
    """End this process when the launcher that started it is gone; without it, ranks stay behind and hold their GPUs.

    A launcher that is killed cannot end its ranks, and a rank may wait for another in a collective for as long as that
    one's time-out. A process started by hand, not as a rank, outlives its shell as any other does and is not watched.
    """
    launcher = os.getppid()

    def watch() -> None:
        # an orphan gets another parent; prctl's signal would come when the launcher's thread ends, not the launcher
        while os.getppid() == launcher:
            time.sleep(poll_seconds)
        rank = os.environ.get("RANK", "?")
        print(f"rank {rank}: the launcher (process {launcher}) is gone; ending.", file=sys.stderr, flush=True)
        os._exit(ORPHANED)

    if "LOCAL_RANK" in os.environ:
        threading.Thread(target=watch, name="launcher-watch", daemon=True).start()


if __package__ in (None, ""):  # launchers run this file by its path; imports start at the repository root
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
if __name__ == "__main__":  # before the imports that take seconds
    watch_launcher()
    gc.disable()  # what is imported stays, so looking for garbage among it only takes time

from torch import distributed

from llava.train.arguments import parse_arguments
from llava.train.checks import check_inputs
from llava.train.stage import run_stage
from llava.train.stages import StageInputError
from llava.train.zero3 import find_dead_build

if __name__ == "__main__":
    gc.freeze()  # nor later: this saves two seconds at the end, and data workers share these pages
    gc.enable()


def main() -> None:
    """Parse flags, refuse bad input, run the stage."""
    problem = None
    try:
        # parsing sets up DeepSpeed's communication, which waits for an operator that is being built
        lock = find_dead_build() if any(word.startswith("--deepspeed") for word in sys.argv) else None
        if lock is not None:
            raise StageInputError(
                f"{lock} is {(time.time() - lock.stat().st_mtime) / 60:.0f} minutes old and no process here has it "
                "open: a build of a DeepSpeed operator was killed, and a launch would wait for it for ever. Unless "
                f"another machine builds there, rm {lock} and start again."
            )
        # every rank parses, as TrainingArguments sets up its device and its engine
        arguments = parse_arguments()
        if arguments.training.process_index == 0:
            check_inputs(arguments)
    except (ValueError, KeyError, OSError, ImportError) as error:
        problem = str(error.args[0] if isinstance(error, KeyError) and error.args else error)
    # rank 0 alone looks at files; the others must not go on when it refuses
    problem = agree(problem)
    if problem is not None:
        if os.environ.get("RANK", "0") == "0":
            print(f"error: {problem}", file=sys.stderr, flush=True)
        sys.exit(2)
    run_stage(arguments)


def agree(problem: str | None) -> str | None:
    """Give every process the first problem that any of them found, so that none goes on alone; None if there is none.

    Flags that cannot be parsed stop all processes before they know of each other; then each has its own.
    """
    if not distributed.is_initialized():
        return problem
    problems: list[str | None] = [None] * distributed.get_world_size()
    distributed.all_gather_object(problems, problem)
    return next((found for found in problems if found is not None), None)


if __name__ == "__main__":
    main()
