"""The entry point by which lmms-eval finds ``--model fuzzyroe``; the model's own imports wait until it is used."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lmms_eval.models.registry_v2 import ModelManifest


def manifest() -> ModelManifest:
    """Give lmms-eval the name of the model with the path of its class."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest(model_id="fuzzyroe", simple_class_path="llava.eval.lmms_model.FuzzyRoE")
