"""llava/train/train.py on many command lines, one after the other, so that importing is paid for once.

    python tests/support/refusal_cases.py CASES.json RESULTS.json

``CASES.json`` maps names to flags, ``RESULTS.json`` names to the exit code with what was printed on stderr. Loading a
model is an error.
"""

from __future__ import annotations

import contextlib
import io
import json
import sys
from pathlib import Path
from typing import NoReturn

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from llava.train import stage, train


def refuse_to_load(*args: object, **kwargs: object) -> NoReturn:
    """Stand-in for ``load_model``."""
    raise AssertionError("a model was loaded")


def main() -> None:
    """Run every case."""
    cases, results = json.loads(Path(sys.argv[1]).read_text()), {}
    target = Path(sys.argv[2])
    stage.load_model = refuse_to_load
    for name, flags in cases.items():
        sys.argv = ["llava/train/train.py", *flags]
        printed = io.StringIO()
        code: object = "returned"
        with contextlib.redirect_stderr(printed):
            try:
                train.main()
            except SystemExit as end:
                code = end.code
            except AssertionError as error:
                code = str(error)
        results[name] = [code, printed.getvalue()]
    target.write_text(json.dumps(results))


if __name__ == "__main__":
    main()
