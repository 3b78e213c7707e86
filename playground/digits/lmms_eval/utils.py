"""Functions of the lmms-eval task ``digits_vqa``; lmms-eval loads this file by its path, beside ``digits.yaml``."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from PIL import Image

IMAGE_MARKER = "<image>\n"


def doc_to_visual(doc: dict[str, Any], settings: dict[str, Any]) -> list[Image.Image]:
    """The image of a question, from ``images`` in the dataset's folder; none for a question without image.

    Args:
        doc: A record of the digits dataset.
        settings: ``data_folder`` names the dataset's folder; the environment variable ``DIGITS_DATA`` wins over it.
    """
    if not doc.get("image"):
        return []
    folder = Path(os.environ.get("DIGITS_DATA") or settings["data_folder"])
    with Image.open(folder / "images" / doc["image"]) as image:
        return [image.convert("RGB")]


def doc_to_text(doc: dict[str, Any], settings: dict[str, Any]) -> str:
    """The question; where its image goes is the model's business. ``settings`` is passed by lmms-eval and unused."""
    return doc["conversations"][0]["value"].removeprefix(IMAGE_MARKER)


def doc_to_target(doc: dict[str, Any]) -> str:
    """The answer."""
    return doc["conversations"][1]["value"]


def normalise(answer: str) -> str:
    """An answer in lower case with single blanks and without a full stop at its end."""
    return " ".join(answer.lower().split()).removesuffix(".")


def process_results(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
    """Score one answer: exact match, overall (apart for a question without image) and for the type of the question."""
    is_correct = float(normalise(results[0]) == normalise(doc_to_target(doc)))
    overall = "exact_match" if doc.get("image") else "exact_match_text_only"
    return {overall: is_correct, f"exact_match_{doc['type']}": is_correct}
