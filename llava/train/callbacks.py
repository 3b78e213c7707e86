"""Callbacks of a training run: metrics file and console, routing and throughput meters, loss guard, hang detection."""

from __future__ import annotations

import faulthandler
import json
import math
import os
import resource
import sys
import threading
import time
from collections import defaultdict, deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor
from transformers import TrainerCallback, TrainerState

from fuzzyroe.attach import find_decoder_layers
from fuzzyroe.routing_state import RoutingState
from llava.files import atomic_write

SHOWN = {"loss": "loss", "grad_norm": "gradient", "learning_rate": "rate", "routing/skip_rate": "skipped"}
SHOWN |= {"throughput/samples_per_second": "samples/s"}
"""Logged values that are printed, with the words they are printed by."""

GIB = 2**30

MAX_BAD_STEPS, MAX_NAMED = 10, 20
"""Steps in a row after which the loss guard ends a run; samples that its message names."""

GRACE_SECONDS = 5.0
"""How long a rank that has reported a hang waits before it ends: the first one to end takes the others with it."""

HUNG = 70
"""Exit code of a rank that hang detection ended."""


class BatchCallback(TrainerCallback):
    """A callback that is told of every batch, and whose numbers the trainer adds to what it logs."""

    def on_batch_begin(self, batch: dict[str, Any]) -> None:
        """See a batch before its forward pass."""

    def on_batch_end(self, batch: dict[str, Any], routing: RoutingState | None, loss: Tensor) -> None:
        """See a batch whose loss, a scalar, is known; its backward pass follows."""

    def take_metrics(self) -> dict[str, float]:
        """Numbers since the last call, by name; called on all ranks."""
        return {}

    def close(self) -> None:
        """See that training has ended, also by an error, which no other method is told of."""


def mean_over_ranks(values: dict[str, list[float]]) -> dict[str, float]:
    """Means over the values of all ranks; call on all of them, each with the names it has."""
    sums: dict[str, tuple[float, int]] = {}
    for mine in gather_object([{name: (sum(seen), len(seen)) for name, seen in values.items()}]):
        for name, (total, count) in mine.items():
            before, number = sums.get(name, (0.0, 0))
            sums[name] = (before + total, number + count)
    return {name: total / count for name, (total, count) in sorted(sums.items()) if count}


class MetricsFile(TrainerCallback):
    """Append every logged value to ``metrics.jsonl``, one JSON object per logging step, on rank 0 alone.

    A resumed run first removes what was logged after its checkpoint, so that every step stands there once.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_begin(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Keep the lines of the steps that are not taken again."""
        if state.is_world_process_zero and self.path.exists():
            kept = [line for line in self.path.read_text().splitlines() if _step_of(line) <= state.global_step]
            with atomic_write(self.path) as unfinished:
                unfinished.write_text("".join(line + "\n" for line in kept))

    def on_log(self, args: Any, state: TrainerState, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Write one line."""
        if state.is_world_process_zero and logs:
            with self.path.open("a") as file:
                file.write(json.dumps({"step": state.global_step, **logs}) + "\n")


def _step_of(line: str) -> float:
    """Step of a logged line; beyond all steps if a kill cut the line short."""
    try:
        return json.loads(line)["step"]
    except ValueError:
        return math.inf


class Console(TrainerCallback):
    """Print the numbers that one follows a run by, one line per logging step; ``metrics.jsonl`` has them all."""

    def on_log(self, args: Any, state: TrainerState, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Print one line."""
        if state.is_world_process_zero and logs and "loss" in logs:
            numbers = ", ".join(f"{word} {logs[name]:.4g}" for name, word in SHOWN.items() if name in logs)
            print(f"step {state.global_step} of {state.max_steps}: {numbers}", flush=True)


class RoutingMeter(BatchCallback):
    """Means of keep weights and rule firings since they were last taken; until then no step waits for the device.

    Args:
        source_of: Source of a sample by its index in the training set.
        rules: Compiled rule base of a fuzzy router, whose firing strengths are reported; None for another router.
    """

    def __init__(self, source_of: Callable[[int], str], rules: Any = None) -> None:
        self.source_of, self.rules = source_of, rules
        self._batches: list[tuple[Tensor, ...]] = []

    @torch.no_grad()
    def on_batch_end(self, batch: dict[str, Any], routing: RoutingState | None, loss: Tensor | None = None) -> None:
        """Note the routing of a batch; in hard mode the decision of the last turn counts for all of a sample."""
        if routing is None or routing.result.keep_weights is None:
            return
        keep = routing.result.keep_weights.detach().float()  # (B, T, L)
        turns = routing.turn_mask().to(keep.device)  # (B, T)
        if routing.mode == "hard":
            keep = routing.kept_layers().float().to(keep.device).unsqueeze(1).expand_as(keep)
        # xlogy, as 0 log 0 counts as 0: hard decisions have no entropy
        entropy = -(torch.xlogy(keep, keep) + torch.xlogy(1 - keep, 1 - keep)).mean(dim=2, keepdim=True)
        seen = [batch["sample_index"], _mean_over_turns(keep, turns), _mean_over_turns(entropy, turns)[:, 0]]
        if self.rules is not None and routing.result.features is not None:
            seen.append(_mean_over_turns(self.rules.firing_strengths(routing.result.features), turns))
        self._batches.append(tuple(seen))

    def take_metrics(self) -> dict[str, float]:
        """Means over the samples of all ranks since the last call, by name; empty if there were none."""
        batches, self._batches = self._batches, []
        values: dict[str, list[float]] = defaultdict(list)
        if batches:
            samples, kept, entropy, *firings = (torch.cat(column).cpu() for column in zip(*batches, strict=True))
            skipped, rates = 1 - kept, (1 - kept.mean(dim=1)).tolist()  # (samples, L), (samples,)
            values["routing/skip_rate"] = rates
            values["routing/keep_weight_mean"] = [1 - rate for rate in rates]
            values["routing/keep_weight_entropy"] = entropy.tolist()
            for layer, column in enumerate(skipped.T.tolist()):
                values[f"routing/skip_rate/layer_{layer:02d}"] = column
            for index, rate in zip(samples.tolist(), rates, strict=True):
                values[f"routing/skip_rate/source_{self.source_of(index)}"].append(rate)
            for rule, column in enumerate(firings[0].T.tolist() if firings else []):
                values[f"routing/fuzzy/rule_{rule:02d}"] = column
        return mean_over_ranks(values)


def _mean_over_turns(values: Tensor, turns: Tensor) -> Tensor:
    """Mean of (B, T, X) over the turns that a sample has, (B, X); 1 for a sample without any, which keeps all."""
    count = turns.sum(dim=1, keepdim=True)
    mean = (values * turns.unsqueeze(-1)).sum(dim=1) / count.clamp(min=1)
    return torch.where(count > 0, mean, torch.ones_like(mean))


class Throughput(BatchCallback):
    """Samples and tokens per second since they were last taken, with the memory used at most so far."""

    def __init__(self) -> None:
        self._started = time.perf_counter()
        self._masks: list[tuple[int, Tensor]] = []

    def on_batch_end(self, batch: dict[str, Any], routing: Any = None, loss: Any = None) -> None:
        """Note a batch by its mask, (B, N), 0 at padding."""
        mask = batch["attention_mask"]
        self._masks.append((mask.shape[0], mask.sum()))  # counted on the device, read only when it is logged

    def take_metrics(self) -> dict[str, float]:
        """Rates over all ranks since the last call and peak memory of the fullest rank; empty if nothing ran."""
        seconds, masks = time.perf_counter() - self._started, self._masks
        self._started, self._masks = time.perf_counter(), []
        mine = (sum(rows for rows, _ in masks), sum(int(tokens) for _, tokens in masks), peak_bytes())
        samples, tokens, peaks = zip(*gather_object([mine]), strict=True)
        if not sum(samples):
            return {}
        return {
            "throughput/samples_per_second": sum(samples) / seconds,
            "throughput/tokens_per_second": sum(tokens) / seconds,
            "memory/peak_gib": max(peaks) / GIB,
        }


def peak_bytes() -> int:
    """Memory that this process used at most, on its GPU if it has one, else in RAM."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated()
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


class LossGuard(BatchCallback):
    """End a run that learns nothing: its loss has been exactly 0, nan or infinite for some steps in a row.

    Such a run goes on for hours without a sign: masked labels give a loss of 0, and a trainer leaves nan out of the
    losses that it logs. ``name_of`` names a sample by its index in the training set.
    """

    def __init__(self, name_of: Callable[[int], str]) -> None:
        self.name_of = name_of
        self._batches: list[tuple[Tensor, Tensor]] = []
        self._bad_steps, self._samples = 0, deque[int](maxlen=MAX_NAMED)

    def on_batch_end(self, batch: dict[str, Any], routing: RoutingState | None, loss: Tensor) -> None:
        """Note the loss of a batch and its samples, (B,)."""
        self._batches.append((loss.detach(), batch["sample_index"]))

    def on_step_end(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Look at the batches of a step; RuntimeError once too many in a row were bad on this rank."""
        batches, self._batches = self._batches, []
        if not batches:
            return
        losses = torch.stack([loss.float() for loss, _ in batches]).cpu()
        if losses.isfinite().all() and bool((losses != 0).any()):
            self._bad_steps, self._samples = 0, deque(maxlen=MAX_NAMED)
            return
        self._bad_steps += 1
        self._samples.extend(index for _, indices in batches for index in indices.tolist())
        if self._bad_steps >= MAX_BAD_STEPS:
            value = "exactly 0" if bool((losses == 0).all()) else f"{float(losses[~losses.isfinite()][0])}"
            raise RuntimeError(
                f"The loss was {value} for {self._bad_steps} steps in a row, up to step {state.global_step}, on rank "
                f"{args.process_index}; a loss is a number above 0. Its last samples: "
                f"{', '.join(map(self.name_of, self._samples))}. Look at their labels with fuzzyroe check-data, at "
                "--version if it is 0, at learning rate and precision if it is nan."
            )


class HangDetection(BatchCallback):
    """End this rank when training makes no progress, naming the layer and the batch at which it stopped.

    Ranks that run different parts of a sharded model wait for each other for ever, and a collective's time-out says
    nothing of layers or data. Every rank reports for itself, with the stacks of its threads.

    Args:
        model, rank: LLaVA model whose layers are followed, and the rank of this process.
        seconds: Time without progress after which the process ends.
        name_of: Name of a sample by its index in the training set.
    """

    def __init__(self, model: Any, seconds: float, name_of: Callable[[int], str], rank: int) -> None:
        self.model, self.seconds, self.name_of, self.rank = model, seconds, name_of, rank
        self._place, self._step = "the start of training", 0
        self._batch: dict[str, Any] | None = None
        self._seen = time.monotonic()
        self._stop = threading.Event()
        self._handles: list[Any] = []

    def note(self, place: str) -> None:
        """Say where this rank is; any note counts as progress."""
        self._place, self._seen = place, time.monotonic()

    def on_train_begin(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Start to watch."""
        places = {f"decoder layer {index}": layer for index, layer in enumerate(find_decoder_layers(self.model))}
        places |= {"vision tower": self.model.model.vision_tower, "projector": self.model.model.multi_modal_projector}
        for place, module in places.items():
            # ahead of ZeRO-3's own hook, whose gathering is where ranks wait for each other
            hook = module.register_forward_pre_hook(lambda *_, place=place: self.note(place), prepend=True)
            self._handles.append(hook)
        self.note("the first batch")
        threading.Thread(target=self._watch, name="hang-detection", daemon=True).start()

    def on_step_begin(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Note the step."""
        self._step = state.global_step
        self.note("the beginning of a step")

    def on_batch_begin(self, batch: dict[str, Any]) -> None:
        """Note the batch."""
        self._batch = batch
        self.note("the start of the forward pass")

    def on_batch_end(self, batch: dict[str, Any], routing: RoutingState | None, loss: Tensor) -> None:
        """Note that the forward pass is done."""
        self.note("the backward pass")

    def on_pre_optimizer_step(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Note that the backward pass is done."""
        self.note("the optimizer step")

    def on_step_end(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Note the end of a step; a save that follows has no time limit."""
        self.note("the end of a step")
        if control.should_save:
            self._seen = math.inf

    def on_save(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Watch again."""
        self.note("the end of a save")

    def close(self) -> None:
        """Stop watching: a process that outlives a failed run, such as a notebook, must not be ended by it."""
        self._stop.set()
        for handle in self._handles:
            handle.remove()

    def report(self) -> str:
        """Where this rank is, and with which batch."""
        batch, where = self._batch, "none yet"
        if batch is not None:
            index, images = batch.get("sample_index"), "with" if "pixel_values" in batch else "without"
            names = "unknown" if index is None else ", ".join(map(self.name_of, index.tolist()))
            where = f"samples {names}; {images} images; (B, N) = {tuple(batch['input_ids'].shape)}"
        return (
            f"rank {self.rank}: no progress for {self.seconds:g} s at step {self._step}, last seen at {self._place}; "
            f"batch: {where}. If other ranks stand elsewhere, they run different parts of the model: only whole "
            "decoder layers may differ, with --train_hard_skip under ZeRO-3. If they stand at the same place, it is "
            "slow, or a rank has died; --watchdog_seconds 0 turns this off."
        )

    def _watch(self) -> None:
        while not self._stop.wait(min(1.0, self.seconds / 4)):
            if time.monotonic() - self._seen > self.seconds:
                print(self.report(), file=sys.stderr, flush=True)
                faulthandler.dump_traceback(2)  # the stacks of all threads, to stderr
                time.sleep(GRACE_SECONDS)
                os._exit(HUNG)  # the main thread waits inside a collective and cannot be interrupted
