"""Batches of text prompts for tiny decoders, and their greedy answers."""

from __future__ import annotations

from typing import Any

import torch

NEW_TOKENS = 6


def prompts_of_lengths(lengths: list[int], seed: int = 5) -> list[torch.Tensor]:
    """Give random prompts of the tiny models' vocabulary."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, 95, (length,), generator=generator) for length in lengths]


def pad(rows: list[torch.Tensor], side: str = "left") -> dict[str, torch.Tensor]:
    """Put prompts into a batch, padded on one side under a mask."""
    longest = max(map(len, rows))
    ids, mask = torch.zeros(len(rows), longest, dtype=torch.long), torch.zeros(len(rows), longest, dtype=torch.long)
    for index, row in enumerate(rows):
        place = slice(longest - len(row), None) if side == "left" else slice(0, len(row))
        ids[index, place], mask[index, place] = row, 1
    return {"input_ids": ids, "attention_mask": mask}


def generate(model: Any, rows: list[torch.Tensor], **options: Any) -> tuple[torch.Tensor, torch.Tensor, Any]:
    """Answer prompts greedily; give new tokens (B, n), their logits (B, n, V) and the whole output."""
    inputs = pad(rows)
    output = model.generate(
        **inputs,
        max_new_tokens=NEW_TOKENS,
        do_sample=False,
        return_dict_in_generate=True,
        output_logits=True,
        **options,
    )
    return output.sequences[:, inputs["input_ids"].shape[1] :], torch.stack(output.logits, dim=1), output
