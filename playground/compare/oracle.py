"""The oracle of the comparison: for every held-out question, the layers whose absence hurts its known answer least."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from torch.utils.data import DataLoader, Subset

from fuzzyroe.attach import set_router
from fuzzyroe.routers import OracleRouter
from fuzzyroe.routers.oracle import LabelledBatch, search_plans
from fuzzyroe.routing_state import RoutingState
from llava.data.dataset import SFTCollator, SFTDataset
from llava.model.builder import Checkpoint
from llava.model.families import count_image_tokens, get_image_token_id
from playground.compare.cells import MAX_LENGTH

BATCH_SIZE = 60


def give_oracle(checkpoint: Checkpoint, questions: Sequence[dict[str, Any]], data: Path, max_skips: int) -> int:
    """Put an oracle in the place of a checkpoint's router.

    Args:
        checkpoint: Routed checkpoint in eval mode.
        questions: Held-out records of the digits dataset, those that it will be asked.
        data: Folder of the dataset.
        max_skips: Layers that a plan skips at most.

    Returns:
        Passes through the decoder that the search took, in samples.
    """
    num_passes = 0

    def count(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        nonlocal num_passes
        num_passes += len(kwargs["input_ids"])

    handle = checkpoint.model.register_forward_pre_hook(count, with_kwargs=True)
    try:
        found = search_plans(checkpoint.model, _batches(checkpoint, questions, data), max_skips)
    finally:
        handle.remove()
    set_router(checkpoint.model, OracleRouter.from_search(*found))
    return num_passes


def _batches(checkpoint: Checkpoint, questions: Sequence[dict[str, Any]], data: Path) -> Iterator[LabelledBatch]:
    config, file = checkpoint.model.config, data / "digits_test.json"
    places = {record["id"]: index for index, record in enumerate(json.loads(file.read_text()))}
    dataset = SFTDataset(
        str(file),
        str(data / "images"),
        checkpoint.tokenizer,
        checkpoint.image_processor,
        "digits",
        count_image_tokens(config),
        get_image_token_id(config),
        MAX_LENGTH,
        config.image_aspect_ratio,
    )
    asked = Subset(dataset, [places[record["id"]] for record in questions])
    for batch in DataLoader(asked, BATCH_SIZE, collate_fn=SFTCollator(checkpoint.tokenizer.pad_token_id)):
        inputs = {name: batch[name] for name in ("input_ids", "attention_mask", "pixel_values")}
        yield LabelledBatch(inputs, batch["labels"], RoutingState.from_batch(batch, get_image_token_id(config)))
