"""What a training run says about its routing: sums over batches, joined over ranks when they are logged."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, distributed, nn

from fuzzyroe.routing_state import RoutingState

GIB = 2**30


class RoutingMeter:
    """Means of keep weights and rule firings since they were last taken.

    Tensors stay where they are until then, so that a step waits for no device.

    Args:
        source_of: Source of a sample by its index in the training set.
        rules: Compiled rule base of a fuzzy router, whose firing strengths are reported; None for another router.
    """

    def __init__(self, source_of: Callable[[int], str], rules: nn.Module | None = None) -> None:
        self.source_of, self.rules = source_of, rules
        self._layers: list[Tensor] = []
        self._entropies: list[Tensor] = []
        self._firings: list[Tensor] = []
        self._samples: list[Tensor] = []

    @torch.no_grad()
    def observe(self, routing: RoutingState, sample_index: Tensor) -> None:
        """Note a batch after its forward pass.

        Args:
            routing: Its state; in hard mode the decision of the last turn counts for all of a sample.
            sample_index: Index of each sample in the training set, (B,).
        """
        turns = routing.turn_mask()  # (B, T)
        keep = routing.result.keep_weights.detach().float()  # (B, T, L)
        turns = turns.to(keep.device)
        if routing.mode == "hard":
            keep = routing.kept_layers().float().to(keep.device).unsqueeze(1).expand_as(keep)
        self._layers.append(_mean_over_turns(keep, turns))
        entropy = -(torch.xlogy(keep, keep) + torch.xlogy(1 - keep, 1 - keep)).mean(dim=2, keepdim=True)
        self._entropies.append(_mean_over_turns(entropy, turns)[:, 0])
        if self.rules is not None and routing.result.features is not None:
            self._firings.append(_mean_over_turns(self.rules.firing_strengths(routing.result.features), turns))
        self._samples.append(sample_index)

    def take(self) -> dict[str, float]:
        """Means over the samples of all ranks since the last call, by name; empty if there were none. On all ranks."""
        mine = self._empty() if not self._layers else self._summarise()
        self._layers, self._entropies, self._firings, self._samples = [], [], [], []
        everyone = gather_objects(mine)
        count = sum(part["count"] for part in everyone)
        if not count:
            return {}
        kept = _add(part["kept"] for part in everyone) / count  # (L,)
        found = {
            "routing/skip_rate": float(1 - kept.mean()),
            "routing/keep_weight_mean": float(kept.mean()),
            "routing/keep_weight_entropy": float(_add(part["entropy"] for part in everyone) / count),
        }
        found |= {f"routing/skip_rate/layer_{layer:02d}": float(1 - kept[layer]) for layer in range(len(kept))}
        for source in sorted({name for part in everyone for name in part["sources"]}):
            pairs = [part["sources"][source] for part in everyone if source in part["sources"]]
            found[f"routing/skip_rate/source_{source}"] = sum(s for s, _ in pairs) / sum(n for _, n in pairs)
        fired = [part["fired"] for part in everyone if part["fired"] is not None]
        if fired:
            shares = _add(fired) / count
            found |= {f"routing/fuzzy/rule_{rule:02d}": float(shares[rule]) for rule in range(len(shares))}
        return found

    def _summarise(self) -> dict[str, Any]:
        layers = torch.cat(self._layers).cpu()  # (samples, L)
        skipped = (1 - layers.mean(dim=1)).tolist()
        sources: dict[str, tuple[float, int]] = {}
        for index, rate in zip(torch.cat(self._samples).tolist(), skipped, strict=True):
            total, number = sources.get(self.source_of(index), (0.0, 0))
            sources[self.source_of(index)] = (total + rate, number + 1)
        return {
            "count": len(layers),
            "kept": layers.sum(dim=0),
            "entropy": torch.cat(self._entropies).sum().cpu(),
            "fired": torch.cat(self._firings).sum(dim=0).cpu() if self._firings else None,
            "sources": sources,
        }

    @staticmethod
    def _empty() -> dict[str, Any]:
        return {"count": 0, "kept": torch.zeros(()), "entropy": torch.zeros(()), "fired": None, "sources": {}}


class Throughput:
    """Samples and tokens per second since they were last taken, with the memory used at most so far."""

    def __init__(self) -> None:
        self._started = time.perf_counter()
        self._samples, self._tokens = 0, []

    def observe(self, attention_mask: Tensor) -> None:
        """Note a batch by its mask, (B, N), 0 at padding."""
        self._samples += attention_mask.shape[0]
        self._tokens.append(attention_mask.sum())

    def take(self) -> dict[str, float]:
        """Rates over all ranks since the last call and peak memory of the fullest rank; empty if nothing ran."""
        seconds = time.perf_counter() - self._started
        mine = (self._samples, sum(map(int, self._tokens)), peak_bytes())
        self._started, self._samples, self._tokens = time.perf_counter(), 0, []
        samples, tokens, peaks = zip(*gather_objects(mine), strict=True)
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


def gather_objects(mine: Any) -> list[Any]:
    """What every rank gave, in rank order; call on all of them."""
    if not distributed.is_initialized():
        return [mine]
    everyone: list[Any] = [None] * distributed.get_world_size()
    distributed.all_gather_object(everyone, mine)
    return everyone


def _mean_over_turns(values: Tensor, turns: Tensor) -> Tensor:
    """Mean of (B, T, X) over the turns that a sample has, (B, X); 1 for a sample without any, which keeps all."""
    count = turns.sum(dim=1, keepdim=True)
    mean = (values * turns.unsqueeze(-1)).sum(dim=1) / count.clamp(min=1)
    return torch.where(count > 0, mean, torch.ones_like(mean))


def _add(tensors: Any) -> Tensor:
    return sum(tensors, start=torch.zeros(()))
