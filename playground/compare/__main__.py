"""Runs the cells of the comparison that have no result yet, several processes at a time.

    python -m playground.compare                      all cells that are missing
    python -m playground.compare --cells fuzzy_0      some of them
    python -m playground.compare --list               what there is
    python -m playground.compare --page               docs/results.md and its figures, from the cells that are there

A cell that was interrupted is run again from its beginning; one whose file is there is left alone.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from playground.compare.arms import Cell, cells


def main() -> None:
    """Parse the command line; write the page, run one cell here, or many in processes of their own."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--data", type=Path, default=Path("playground/data/digits"), help="folder of the digits dataset"
    )
    parser.add_argument("--work", type=Path, default=Path("outputs/compare"), help="folder for checkpoints and logs")
    parser.add_argument("--results", type=Path, default=Path("docs/results/cells"), help="folder of the cells' files")
    parser.add_argument("--cells", nargs="*", help="names; default all")
    parser.add_argument("--workers", type=int, default=2, help="processes at a time")
    parser.add_argument("--questions", type=int, help="held-out questions; default all")
    parser.add_argument("--here", action="store_true", help="run in this process; used for each cell")
    parser.add_argument("--list", action="store_true", help="print cells and whether they have been run")
    parser.add_argument("--page", action="store_true", help="write the page from the files beside the folder of cells")
    arguments = parser.parse_args()
    if arguments.page:
        from playground.compare.page import write

        return write(arguments.results, arguments.results.parent)
    known = {cell.name: cell for cell in cells()}
    unknown = sorted(set(arguments.cells or ()) - set(known))
    if unknown:
        parser.error(f"no cells {', '.join(unknown)}; --list prints those that there are")
    chosen = [cell for name, cell in known.items() if not arguments.cells or name in arguments.cells]
    missing = [cell for cell in chosen if not (arguments.results / f"{cell.name}.json").exists()]
    if arguments.list:
        for cell in chosen:
            print(f"{cell.name:24} {'missing' if cell in missing else 'run'}")
        return
    if arguments.here:
        from playground.compare.run_cell import run_cell

        for cell in missing:
            run_cell(cell, arguments.data, arguments.work, arguments.results, arguments.questions)
        return
    failed: list[str] = []
    for wave in sorted({cell.wave for cell in missing}):
        with ThreadPoolExecutor(arguments.workers) as pool:
            ran = [*pool.map(lambda cell: _run_apart(cell, arguments), [c for c in missing if c.wave == wave])]
        failed += [name for name in ran if name]
    if failed:
        sys.exit(f"compare: these cells failed, their logs are in {arguments.work}: {', '.join(failed)}")
    print(f"compare: {len(chosen)} cells are in {arguments.results}")


def _run_apart(cell: Cell, arguments: argparse.Namespace) -> str | None:
    """Run a cell in a process of its own; give its name if it failed."""
    arguments.work.mkdir(parents=True, exist_ok=True)
    log = arguments.work / f"{cell.name}.log"
    words = [f"--{name}={getattr(arguments, name)}" for name in ("data", "work", "results")]
    words += [f"--questions={arguments.questions}"] if arguments.questions else []
    with log.open("w") as stream:
        command = [sys.executable, "-m", "playground.compare", "--here", *words, "--cells", cell.name]
        status = subprocess.run(command, stdout=stream, stderr=subprocess.STDOUT, check=False).returncode
    print(f"compare: {cell.name} {'done' if status == 0 else f'failed, see {log}'}", flush=True)
    return None if status == 0 else cell.name


if __name__ == "__main__":
    main()
