"""One training stage from the command line: parse, check, load, train, calibrate, save.

Launched by ``deepspeed``, ``torchrun``, ``accelerate launch`` or plain ``python``::

    deepspeed llava/train/train.py --deepspeed scripts/zero3.json --stage adapter --model_name_or_path ... \
        --data_path ... --image_folder ... --output_dir ...

Bad input ends every process with exit code 2, one of them with a message, before a model is loaded; earlier outputs
stay as they were.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

if __package__ in (None, ""):  # launchers run this file by its path; imports start at the repository root
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from llava.train.launcher_watch import watch_launcher

if __name__ == "__main__":  # before the imports that take seconds
    watch_launcher()

from torch import distributed

from llava.train.arguments import parse_arguments
from llava.train.checks import check_inputs
from llava.train.stage import run_stage
from llava.train.stages import StageInputError


def main() -> None:
    """Parse flags, refuse bad input, run the stage."""
    problem = None
    try:
        # every rank parses, as TrainingArguments sets up its device and its engine
        arguments = parse_arguments()
        if arguments[-1].process_index == 0:
            check_inputs(*arguments)
    except (StageInputError, ValueError, KeyError, OSError, ImportError) as error:
        problem = str(error.args[0] if isinstance(error, KeyError) and error.args else error)
    # rank 0 alone looks at files; the others must not go on when it refuses
    problem = agree(problem)
    if problem is not None:
        if os.environ.get("RANK", "0") == "0":
            print(f"error: {problem}", file=sys.stderr, flush=True)
        sys.exit(2)
    run_stage(*arguments)


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
