"""Text-only batches beside image batches on other ranks: the vision tower runs on every rank, or sharding hangs."""

from __future__ import annotations

from typing import Any

import torch

from llava.model.families import HostInnerModel, HostModel


class TextBatchSafeModel(HostInnerModel):
    """``HostInnerModel`` whose soft-routed and training forward always passes through vision tower and projector.

    A batch without images gets one blank image whose features are multiplied by zero and added to the embeddings: the
    result is the same, every rank gathers the same weights in the same order, and every parameter has a gradient.
    Outside training, and with images, this is ``HostInnerModel`` unchanged.
    """

    def forward(self, input_ids: torch.Tensor | None = None, pixel_values: torch.Tensor | None = None, **kwargs: Any):
        """As ``HostInnerModel.forward``; shapes (B, N) and (images, 3, H, W)."""
        is_trained_on = self.training or getattr(kwargs.get("routing"), "mode", None) == "soft"
        if is_trained_on and pixel_values is None and input_ids is not None:
            embeddings = self.get_input_embeddings()(input_ids)
            vision: Any = self.config.vision_config
            size = vision.image_size
            blank = torch.zeros(1, 3, size, size, dtype=embeddings.dtype, device=embeddings.device)
            features = torch.cat(list(self.get_image_features(blank, return_dict=True).pooler_output))
            # zero before the sum: features summed first overflow float16, and 0 * inf is nan
            return super().forward(**{**kwargs, "inputs_embeds": embeddings + (0 * features).sum()})
        return super().forward(input_ids=input_ids, pixel_values=pixel_values, **kwargs)


def make_text_batches_safe(model: HostModel) -> None:
    """Swap the class of a loaded model's inner model; names and weights stay."""
    model.model.__class__ = TextBatchSafeModel
