"""Conversion of a checkpoint of any layout into a whole one of another."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from llava.model.checkpoints.backbone import Backbone
from llava.model.checkpoints.key_maps import EMBEDDINGS, HEAD, original_name
from llava.model.checkpoints.original import VISION_KEYS, translate_config
from llava.model.checkpoints.reading import read_backbone
from llava.model.checkpoints.saved_tokenizer import compare_tokenizers, original_vocab_size, save_tokenizer
from llava.model.checkpoints.writing import Form, Progress, compare_weights, write_weights

LAYOUTS = ("transformers", "original")
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}

NOT_COMPUTED = ("architectures", "dtype", "pad_token_id", "transformers_version", "use_cache", "vocab_size")
"""Keys of the language model's configuration that may differ between layouts."""


@dataclass(frozen=True)
class Target:
    """What a checkpoint is converted to.

    Attributes:
        layout: "transformers" (of ``llava-hf``) or "original" (of ``liuhaotian``).
        dtype: Data type of the backbone's weights; None keeps theirs.
        max_shard_size: Largest size of a file of weights, in bytes or such as "5GB".
        vision_tower: For the original layout: CLIP checkpoint that names the form of the vision tower, folder or hub
            id; None for the one that the checkpoint names.

    Raises:
        ValueError: If the layout or the data type is unknown.
    """

    layout: str = "transformers"
    dtype: str | None = None
    max_shard_size: str | int = "5GB"
    vision_tower: str | None = None

    def __post_init__(self) -> None:
        if self.layout not in LAYOUTS:
            raise ValueError(f"Layout {self.layout} is unknown; {' and '.join(LAYOUTS)} are known. Use one.")
        if self.dtype is not None and self.dtype not in DTYPES:
            raise ValueError(f"Data type {self.dtype} is unknown; {', '.join(DTYPES)} are known. Use one.")
        if self.vision_tower is not None and self.layout != "original":
            raise ValueError(
                f"Vision tower {self.vision_tower} was named, but the transformers layout describes its tower itself; "
                "leave it out."
            )


@dataclass(frozen=True)
class Converted:
    """What was written.

    Attributes:
        num_tensors: Tensors of the backbone.
        num_bytes: Their size.
        num_files: Files that hold them.
        num_updates: Low-rank updates merged into them.
        vocab_size: Token ids that have an embedding.
        router: Name of the router; None if dense.
    """

    num_tensors: int
    num_bytes: int
    num_files: int
    num_updates: int
    vocab_size: int
    router: str | None


def convert(
    source: str | Path,
    output: Path,
    target: Target,
    model_base: str | None = None,
    progress: Progress = lambda done, total: None,
) -> Converted:
    """Write a checkpoint anew, whole, and compare what is read back with it.

    Low-rank updates are merged, RoE's adapters and routers become routing of ours. The folder appears when all is
    written and compared, or not at all.

    Args:
        source: Folder or hub id of a checkpoint of any layout.
        output: Folder to write; must not exist.
        target: What to convert to.
        model_base: As for ``read_backbone``.
        progress: Told of the tensors written and all there are.

    Raises:
        FileExistsError: If the output is there already.
        ValueError: If the checkpoint cannot be read, or cannot be said in the layout.
        OSError: If the disk lacks room.
        RuntimeError: If what was written differs when it is read back.
    """
    if output.exists():
        raise FileExistsError(f"{output} exists, and nothing is overwritten; name a new folder, or remove it.")
    backbone = read_backbone(source, model_base)
    forms = _plan(backbone, target)
    output.absolute().parent.mkdir(parents=True, exist_ok=True)
    _check_room(output, sum(form.num_bytes for form in forms.values()))
    with _appear_whole(output) as folder:
        _write_rest(backbone, forms, target, folder, str(source))
        num_files = write_weights(forms, backbone.tensor, folder, target.max_shard_size, progress)
        _compare(backbone, forms, target, folder)
    return Converted(
        num_tensors=len(forms),
        num_bytes=sum(form.num_bytes for form in forms.values()),
        num_files=num_files,
        num_updates=sum(map(len, backbone.updates)),
        vocab_size=next(form.shape[0] for form in forms.values() if form.source == EMBEDDINGS),
        router=None if backbone.routing is None else backbone.routing.config.router,
    )


def _plan(backbone: Backbone, target: Target) -> dict[str, Form]:
    """Name in the file -> form of what is written."""
    num_ids = backbone.config.text_config.vocab_size
    if target.layout == "original":
        num_ids = original_vocab_size(backbone.config, backbone.tokenizer)
    forms = {}
    for name, weight in backbone.weights.items():
        shape = (num_ids, *weight.shape[1:]) if name in (EMBEDDINGS, HEAD) else tuple(weight.shape)
        dtype = DTYPES[target.dtype] if target.dtype and weight.is_floating_point() else weight.dtype
        forms[original_name(name) if target.layout == "original" else name] = Form(name, shape, dtype)
    return forms


def _write_rest(backbone: Backbone, forms: dict[str, Form], target: Target, folder: Path, source: str) -> None:
    """Write all but the backbone's weights."""
    config = backbone.config
    embeddings = next(form for form in forms.values() if form.source == EMBEDDINGS)
    config.dtype = embeddings.dtype
    if backbone.routing is not None:
        config.fuzzyroe = backbone.routing.save(folder, config.text_config)
    if target.layout == "original":
        written = translate_config(config, _find_tower(config, target, source), embeddings.shape[0])
        _write_json(folder / "config.json", written)
    else:
        config.save_pretrained(folder)
    save_tokenizer(backbone.tokenizer, folder, target.layout)
    backbone.image_processor.save_pretrained(folder)
    if backbone.generation_config is not None:
        backbone.generation_config.save_pretrained(folder)


def _find_tower(config: Any, target: Target, source: str) -> str:
    named = target.vision_tower or getattr(config, "mm_vision_tower", None)
    if named is None:
        raise ValueError(
            "The original layout takes the form of the vision tower from a CLIP checkpoint, and this checkpoint names "
            "none; name it with --vision-tower, LLaVA-1.5's is openai/clip-vit-large-patch14-336."
        )
    for folder in (Path(source) / named, Path(named)):
        if folder.is_dir():
            return str(folder.resolve())
    return named


def _compare(backbone: Backbone, forms: dict[str, Form], target: Target, folder: Path) -> None:
    """Read what was written as any checkpoint, and compare it with what it was made of."""
    again = read_backbone(folder)
    ours, theirs = _describe(backbone), _describe(again)
    wrong = {key: (value, theirs[key]) for key, value in ours.items() if theirs[key] != value}
    if wrong:
        raise ValueError(
            f"The {target.layout} layout does not keep {wrong} of the configuration (first as it is, then as read "
            "back); a conversion must change nothing. Keep the layout it has."
        )
    compare_tokenizers(backbone.tokenizer, again.tokenizer)
    compare_weights(forms, backbone.tensor, again.weights.__getitem__)


def _describe(backbone: Backbone) -> dict[str, Any]:
    """What a configuration says about what is computed."""
    config = backbone.config
    text = {key: value for key, value in config.text_config.to_dict().items() if key not in NOT_COMPUTED}
    vision = {f"vision {key}": getattr(config.vision_config, key) for key in VISION_KEYS}
    keys = ("image_token_id", "vision_feature_layer", "vision_feature_select_strategy", "projector_hidden_act")
    routing = None if backbone.routing is None else {**backbone.routing.config.to_dict(), "base_model": None}
    extra = ("image_aspect_ratio", "num_visual_tokens", "token_pruner")
    return {
        **text,
        **vision,
        **{key: getattr(config, key) for key in keys},
        **{key: getattr(config, key, None) for key in extra},
        "fuzzyroe": routing,
    }


@contextmanager
def _appear_whole(output: Path) -> Iterator[Path]:
    """Give a folder beside the output, which takes its place if the block succeeds and is removed if not."""
    folder = Path(tempfile.mkdtemp(prefix=f".{output.name}.", dir=output.absolute().parent))
    try:
        yield folder
        folder.chmod(0o777 & ~_umask())
        os.rename(folder, output)  # fails if somebody has filled the place meanwhile
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _umask() -> int:
    value = os.umask(0)
    os.umask(value)
    return value


def _check_room(output: Path, num_bytes: int) -> None:
    free = shutil.disk_usage(output.absolute().parent).free
    if free < num_bytes:
        raise OSError(
            f"{output.absolute().parent} has {free / 2**30:.1f} GiB free, {num_bytes / 2**30:.1f} GiB are needed; make "
            "room, or name a folder on another disk."
        )


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")
