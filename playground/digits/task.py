"""Write the lmms-eval task ``digits_vqa`` for a dataset that is not in ``playground/data/digits``.

    python -m playground.digits.task --data /data/digits --output outputs/digits_task

lmms-eval then takes ``--include_path outputs/digits_task --tasks digits_vqa``, from any folder.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

TASK_FOLDER = Path(__file__).resolve().parent / "lmms_eval"
DEFAULT_DATA = "playground/data/digits"


def write_task(data: Path, output: Path) -> None:
    """Write a copy of the task that reads another dataset, in the place of an earlier copy.

    Raises:
        FileNotFoundError: If the dataset has no test split.
    """
    data = data.resolve()
    if not (data / "digits_test.json").exists():
        raise FileNotFoundError(
            f"{data} holds no digits_test.json; give the folder of a digits dataset, or generate one with "
            "`python -m playground.digits.generate`."
        )
    output.mkdir(parents=True, exist_ok=True)
    text = (TASK_FOLDER / "digits.yaml").read_text()
    (output / "digits.yaml").write_text(text.replace(f": {DEFAULT_DATA}", f": {data}"))
    shutil.copy(TASK_FOLDER / "utils.py", output / "utils.py")


def main(arguments: list[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(prog="python -m playground.digits.task", description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder of the dataset")
    parser.add_argument("--output", type=Path, required=True, help="folder of the task")
    options = parser.parse_args(arguments)
    try:
        write_task(options.data, options.output)
    except FileNotFoundError as error:
        parser.error(str(error))
    print(f"lmms-eval --include_path {options.output} --tasks digits_vqa")


if __name__ == "__main__":
    main()
