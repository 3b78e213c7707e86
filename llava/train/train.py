"""One training stage from the command line: parse, check, load, train, calibrate, save.

Launched by ``deepspeed``, ``torchrun``, ``accelerate launch`` or plain ``python``::

    deepspeed llava/train/train.py --deepspeed scripts/zero3.json --stage adapter --model_name_or_path ... \
        --data_path ... --image_folder ... --output_dir ...

Bad input ends with exit code 2 and a message before a model is loaded; earlier outputs stay as they were.
"""

from __future__ import annotations

import sys
from pathlib import Path

if __package__ in (None, ""):  # launchers run this file by its path; imports start at the repository root
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import transformers

from llava.train.arguments import DataArguments, LlavaTrainingArguments, ModelArguments, RoutingArguments
from llava.train.preflight import StageInputError, check_inputs
from llava.train.run import run_stage


def main() -> None:
    """Parse flags, refuse bad input, run the stage."""
    parser = transformers.HfArgumentParser(
        (ModelArguments, DataArguments, RoutingArguments, LlavaTrainingArguments), allow_abbrev=False
    )
    try:
        model_args, data_args, routing_args, training_args = parser.parse_args_into_dataclasses()
        check_inputs(model_args, data_args, routing_args, training_args)
    except (StageInputError, ValueError, KeyError, OSError) as error:
        message = error.args[0] if isinstance(error, KeyError) and error.args else error
        print(f"error: {message}", file=sys.stderr)
        sys.exit(2)
    run_stage(model_args, data_args, routing_args, training_args)


if __name__ == "__main__":
    main()
