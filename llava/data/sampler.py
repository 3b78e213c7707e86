"""Order of training samples: batches of one modality and of similar length."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch.utils.data import Sampler

MEGABATCH = 50
"""Batches that are shuffled together before being sorted by length."""


class ModalityLengthSampler(Sampler[int]):
    """A random order in which each global batch holds one modality and samples of similar length.

    Samples are shuffled, cut into megabatches, sorted by length inside each, cut into batches, and the batches are
    shuffled. What is left of each modality ends in a last, mixed batch. Works for one modality alone and for fewer
    samples than a batch.

    Args:
        lengths: Length of each sample in tokens, negative for text-only samples (LLaVA's convention).
        batch_size: Samples per global batch.
        generator: Source of randomness; its state when iteration starts decides the order.
        num_ranks: Processes that a global batch is cut up for.
    """

    def __init__(
        self, lengths: Sequence[int], batch_size: int, generator: torch.Generator | None = None, num_ranks: int = 1
    ) -> None:
        self.lengths = torch.as_tensor(lengths)
        self.batch_size = batch_size
        self.generator = generator
        self.num_ranks = num_ranks
        self._seed = None if generator is None else generator.initial_seed()

    def set_epoch(self, epoch: int) -> None:
        """Have the next order be that of an epoch, whatever was drawn before; a run resumed in it draws the same."""
        if self._seed is not None and epoch > 0:
            self.generator.manual_seed(self._seed + epoch)

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        batches, rest = [], []
        for members in (self.lengths >= 0, self.lengths < 0):
            indices = members.nonzero().flatten()
            indices = indices[torch.randperm(len(indices), generator=self.generator)]
            full = len(indices) // self.batch_size * self.batch_size
            rest.append(indices[full:])
            for megabatch in indices[:full].split(self.batch_size * MEGABATCH):
                by_length = self.lengths[megabatch].abs().argsort(descending=True, stable=True)
                batches.extend(megabatch[by_length].split(self.batch_size))
        order = torch.randperm(len(batches), generator=self.generator).tolist()
        # Ranks take equal parts of a global batch one after the other: deal its lengths out evenly among them.
        chosen = [batches[position][rank :: self.num_ranks] for position in order for rank in range(self.num_ranks)]
        yield from torch.cat([*chosen, *rest]).tolist()
