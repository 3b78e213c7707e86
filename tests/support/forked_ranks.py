"""Two ranks forked off a process that has imported everything, so that a stage can be killed and resumed often.

    python tests/support/forked_ranks.py PLAN.json

The plan is a list of cases, each with ``name``, ``flags`` (those of llava/train/train.py, without ``output_dir``) and
``kinds``, when it is killed. A case runs once undisturbed into ``NAME.whole``. Then it runs into ``NAME``, where both
ranks are killed -9 once for each kind: ``half``, as soon as half of its steps are saved; ``save``, inside a save;
``time``, at a random moment, drawn with ``seed``, of the time that what is left of it takes. Whenever it comes through
before the last kill, it begins anew. After each kill every step checkpoint must be whole. ``NAME.kills.json`` says when
it was killed and what was there.

A case with ``hangs`` runs once, with rank 1 standing still before its second forward pass, and must be ended by the
watchdog of each rank; what they printed is in ``NAME.log``.
"""

from __future__ import annotations

import importlib
import json
import os
import random
import shutil
import signal
import socket
import sys
import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from llava.train import train
from llava.train.callbacks import HUNG
from llava.train.checkpointing import MANIFEST, find_fault, list_checkpoints, step_of
from llava.train.trainer import LlavaTrainer
from llava.train.zero3 import import_deepspeed

NUM_RANKS = 2
TIMEOUT = 180.0


class Ranks:
    """Both ranks of one run of llava/train/train.py.

    Args:
        flags: Its command line.
        log: File that their output is appended to.
        hangs: Whether rank 1 stands still before its second forward pass.
    """

    def __init__(self, flags: list[str], log: Path, hangs: bool = False) -> None:
        self.log, self.hangs = log, hangs
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.alive = [self._fork(rank, port, flags) for rank in range(NUM_RANKS)]

    def _fork(self, rank: int, port: int, flags: list[str]) -> int:
        child = os.fork()
        if child:
            return child
        status = 1
        try:
            output = os.open(self.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(output, 1)
            os.dup2(output, 2)
            os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(NUM_RANKS)}
            os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "LOCAL_WORLD_SIZE": str(NUM_RANKS)}
            sys.argv = ["train.py", *flags]
            if self.hangs and rank == 1:
                stand_still_at(2)
            train.main()
            status = 0
        except SystemExit as exit:
            status = exit.code if isinstance(exit.code, int) else 1
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)

    def poll(self) -> bool:
        """Whether both have ended well.

        Raises:
            RuntimeError: If one of them failed.
        """
        for child in list(self.alive):
            found, status = os.waitpid(child, os.WNOHANG)
            if found:
                self.alive.remove(child)
                if status:
                    self.kill()
                    raise RuntimeError(f"a rank ended with status {status}:\n{self.log.read_text()[-5000:]}")
        return not self.alive

    def kill(self) -> None:
        """Kill -9 both, and wait until they are gone."""
        for child in self.alive:
            os.kill(child, signal.SIGKILL)
        for child in self.alive:
            os.waitpid(child, 0)
        self.alive = []

    def finish(self) -> None:
        """Wait until both have ended well."""
        deadline = time.monotonic() + TIMEOUT
        while not self.poll():
            if time.monotonic() > deadline:
                self.kill()
                raise RuntimeError(f"the ranks took longer than {TIMEOUT} s:\n{self.log.read_text()[-5000:]}")
            time.sleep(0.01)


def stand_still_at(number: int) -> None:
    """Have this process stand still before one of its forward passes."""
    calls, compute_loss = [], LlavaTrainer.compute_loss

    def compute(self: LlavaTrainer, model: Any, inputs: dict, *args: Any, **kwargs: Any) -> Any:
        calls.append(inputs)
        if len(calls) == number:
            for callback in self.batch_callbacks:
                callback.on_batch_begin(inputs)
            time.sleep(TIMEOUT)
        return compute_loss(self, model, inputs, *args, **kwargs)

    LlavaTrainer.compute_loss = compute


def run_hanging(output: Path, flags: list[str], log: Path) -> None:
    """Run one case whose ranks end themselves.

    Raises:
        RuntimeError: If one of them ends in another way.
    """
    ranks = Ranks([*flags, "--output_dir", str(output)], log, hangs=True)
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in ranks.alive]
    if codes != [HUNG] * NUM_RANKS:
        raise RuntimeError(f"the ranks ended with {codes}:\n{log.read_text()[-5000:]}")


@dataclass
class Pace:
    """How long an undisturbed run takes, in seconds.

    Attributes:
        whole: From its start to its end.
        start: From its start to the end of its first step; ``whole`` if it has no steps.
        steps: Steps that it takes.
    """

    whole: float
    start: float
    steps: int

    def left(self, done: int) -> float:
        """How long a run takes that goes on behind some steps."""
        return self.start + (self.whole - self.start) * (1 - done / max(self.steps, 1))


def run_whole(flags: list[str], output: Path, log: Path) -> Pace:
    """Run a case undisturbed."""
    metrics = output.with_name(f"{output.name}.partial") / "metrics.jsonl"
    started, first = time.monotonic(), None
    ranks = Ranks([*flags, "--output_dir", str(output)], log)
    while not ranks.poll():
        if first is None and metrics.exists():
            first = time.monotonic() - started
        if time.monotonic() > started + TIMEOUT:
            ranks.kill()
            raise RuntimeError(f"the ranks took longer than {TIMEOUT} s:\n{log.read_text()[-5000:]}")
        time.sleep(0.002)
    whole = time.monotonic() - started
    steps = json.loads((output / "stage.json").read_text()).get("steps", 0)
    return Pace(whole, whole if first is None else first, steps)


def run_case(
    name: str, flags: list[str], folder: Path, kinds: Sequence[str] = (), seed: int = 0, hangs: bool = False
) -> None:
    """Run one case of a plan, see the module."""
    generator = random.Random(seed)
    output, log = folder / name, folder / f"{name}.log"
    if hangs:
        run_hanging(output, flags, log)
        return
    partial = output.with_name(f"{name}.partial")
    pace = run_whole(flags, folder / f"{name}.whole", log)
    seen = []
    while len(seen) < len(kinds):
        kind = kinds[len(seen)]
        moment = generator.uniform(0.3, 1) * pace.left(max(map(step_of, list_checkpoints(partial)), default=0))
        started = time.monotonic()
        ranks = Ranks([*flags, "--output_dir", str(output)], log)
        has_finished = wait(ranks, kind, partial, moment, generator.uniform(0, 0.05), pace.steps // 2)
        ranks.kill()
        if has_finished:  # a first run may have compiled operators, and be no measure of the others
            pace.whole = min(pace.whole, time.monotonic() - started)
            pace.start = min(pace.start, pace.whole)
            shutil.rmtree(output)
            continue
        seen.append(look(kind, partial))
    started = time.monotonic()
    Ranks([*flags, "--output_dir", str(output)], log).finish()
    seconds = {"whole": pace.whole, "first step": pace.start, "last": time.monotonic() - started}
    (folder / f"{name}.kills.json").write_text(json.dumps({"kills": seen, "seconds": seconds}))


def wait(ranks: Ranks, kind: str, partial: Path, moment: float, later: float, half: int) -> bool:
    """Wait for the moment of a kill; True if the run has ended before it."""
    stale = set(find_unfinished(partial))  # of the kill before; the run removes them as it begins
    deadline = time.monotonic() + (moment if kind == "time" else TIMEOUT)
    while time.monotonic() < deadline:
        if ranks.poll():
            return True
        if kind == "half" and (partial / f"checkpoint-{half}" / MANIFEST).exists():
            return False
        unfinished = set(find_unfinished(partial))
        stale &= unfinished
        if kind == "save" and unfinished - stale:
            time.sleep(later)
            return ranks.poll()
        time.sleep(0.002)
    return False


def find_unfinished(partial: Path) -> list[str]:
    """Names of the step checkpoints that are being written: they have no manifest yet."""
    try:
        return [folder.name for folder in list_checkpoints(partial) if not (folder / MANIFEST).exists()]
    except FileNotFoundError:  # the stage ended between two looks: its folder has got its final name
        return []


def look(kind: str, partial: Path) -> dict:
    """What a kill left behind."""
    unfinished = find_unfinished(partial)
    folders = [folder for folder in list_checkpoints(partial) if folder.name not in unfinished]
    return {
        "kind": kind,
        "steps": [folder.name for folder in folders],
        "faults": {folder.name: find_fault(folder) for folder in folders if find_fault(folder)},
        "unfinished": unfinished,
    }


def import_all() -> None:
    """Import what a run would import on its way, so that its forks find it.

    DeepSpeed's choice of an optimizer imports torch's compiler, which takes longer than the steps of a short run.
    """
    import_deepspeed()
    importlib.import_module("deepspeed.runtime.zero.muon.muon_optimizer")


def main() -> None:
    """Run the cases of a plan, one after the other."""
    plan = Path(sys.argv[1])
    import_all()
    started = time.monotonic()
    for case in json.loads(plan.read_text()):
        run_case(**case, folder=plan.parent)
        print(f"case {case['name']} done after {time.monotonic() - started:.0f} s", flush=True)


if __name__ == "__main__":
    main()
