"""Conversion of a checkpoint of any format into a whole one of another."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors.torch import save_file
from torch import Tensor

from llava.files import write_json
from llava.model.checkpoints.contents import CheckpointContents
from llava.model.checkpoints.reading import read_checkpoint
from llava.model.checkpoints.tokenizer import has_same_ids, save_tokenizer
from llava.model.checkpoints.weights import EMBEDDINGS, HEAD, INDEX_FILE
from llava.model.families import family_of, get_image_token_id
from llava.model.families.base import locate

LAYOUTS = ("transformers", "original")
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}

Progress = Callable[[int, int], None]

NOT_COMPUTED = ("architectures", "dtype", "pad_token_id", "transformers_version", "use_cache", "vocab_size")
"""Keys of the language model's configuration that may differ between layouts."""

COMPUTED = (
    *("vision_feature_layer", "vision_feature_select_strategy", "projector_hidden_act", "image_aspect_ratio"),
    *("num_visual_tokens", "token_pruner"),
)
"""Keys of the whole model's configuration that may not."""


@dataclass(frozen=True)
class ConvertOptions:
    """How a checkpoint is converted.

    Attributes:
        layout: "transformers" (of ``llava-hf``) or "original" (of ``liuhaotian``).
        dtype: Data type of the backbone's weights; None keeps theirs.
        max_shard_size: Largest size of a file of weights, in bytes or such as "5GB".
        vision_tower: For the original layout: CLIP checkpoint of the vision tower's architecture, folder or hub id;
            None for the one that the checkpoint names.

    Raises:
        ValueError: If the layout or the data type is unknown.
    """

    layout: str = "transformers"
    dtype: str | None = None
    max_shard_size: str | int = "5GB"
    vision_tower: str | None = None

    def __post_init__(self) -> None:
        choices = (("Layout", self.layout, LAYOUTS, " and "), ("Data type", self.dtype, (None, *DTYPES), ", "))
        for what, value, known, separator in choices:
            if value not in known:
                raise ValueError(
                    f"{what} {value} is unknown; {separator.join(filter(None, known))} are known. Use one."
                )
        if self.vision_tower is not None and self.layout != "original":
            raise ValueError(
                f"Vision tower {self.vision_tower} was named, but the transformers layout describes its tower itself; "
                "leave it out."
            )


@dataclass(frozen=True)
class ConvertResult:
    """The size of what was written.

    Attributes:
        num_tensors, num_bytes, num_files: The backbone's tensors, their size, and the files that hold them.
        num_merged: LoRA weights merged into them.
        vocab_size: Token ids that have an embedding.
        router: Name of the router; None if dense.
    """

    num_tensors: int
    num_bytes: int
    num_files: int
    num_merged: int
    vocab_size: int
    router: str | None


@dataclass(frozen=True)
class TensorSpec:
    """A tensor that is to be written.

    Attributes:
        source: Name of the weight it is made of, in Hugging Face's files.
        shape, dtype: Its shape and data type; of a longer weight the first rows are taken.
    """

    source: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        """Size on disk."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize

    def cast(self, weight: Tensor) -> Tensor:
        """Give a weight this shape and data type."""
        return weight[: self.shape[0]].to(self.dtype).contiguous()


def convert(
    source: str | Path,
    output: Path,
    options: ConvertOptions,
    model_base: str | None = None,
    progress: Progress = lambda done, total: None,
) -> ConvertResult:
    """Write a checkpoint anew, whole, and compare what is read back with it.

    LoRA weights are merged, RoE's adapters and routers become routing of ours. The folder appears when all is written
    and compared, or not at all.

    Args:
        source, model_base: As for ``read_checkpoint``.
        output: Folder to write; must not exist.
        options: What to convert to.
        progress: Told of the tensors written and all there are.

    Raises:
        FileExistsError: If the output is there already.
        ValueError: If the checkpoint cannot be read, or cannot be said in the layout.
        OSError: If the disk lacks room.
        RuntimeError: If what was written differs when it is read back.
    """
    if output.exists():
        raise FileExistsError(f"{output} exists, and nothing is overwritten; name a new folder, or remove it.")
    # everything that can be refused is refused before a byte is written
    contents = read_checkpoint(source, model_base)
    specs = _plan(contents, options)
    embeddings = next(spec for spec in specs.values() if spec.source == EMBEDDINGS)
    num_bytes = sum(spec.num_bytes for spec in specs.values())
    parent = output.absolute().parent
    parent.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(parent).free
    if free < num_bytes:
        raise OSError(
            f"{parent} has {free / 2**30:.1f} GiB free, {num_bytes / 2**30:.1f} GiB are needed; make room, or name a "
            "folder on another disk."
        )
    # beside the output and so on its disk, where renaming is atomic; removed whatever happens
    with TemporaryDirectory(prefix=f".{output.name}.", dir=parent) as hidden:
        folder = Path(hidden, output.name)
        folder.mkdir()
        _write_descriptions(contents, embeddings, options, folder, str(source))
        num_files = _write_parts(contents, specs, options, folder, progress)
        _compare(contents, specs, options, folder)
        os.rename(folder, output)  # fails if somebody has filled the place meanwhile
    return ConvertResult(
        num_tensors=len(specs),
        num_bytes=num_bytes,
        num_files=num_files,
        num_merged=sum(map(len, contents.lora)),
        vocab_size=embeddings.shape[0],
        router=None if contents.routing is None else contents.routing.config.router,
    )


def _plan(contents: CheckpointContents, options: ConvertOptions) -> dict[str, TensorSpec]:
    """Name in the file -> what is written."""
    config, is_original = contents.config, options.layout == "original"
    family, num_ids = family_of(config), config.text_config.vocab_size
    if is_original:
        # there an image is a number outside the vocabulary: its row is left out with those behind it, if these are of
        # special tokens, which serve transformers alone
        image_token, tokenizer = get_image_token_id(config), contents.tokenizer
        behind = {token for token, number in tokenizer.get_vocab().items() if number >= image_token}
        num_ids = image_token if behind <= set(tokenizer.get_added_vocab()) else num_ids
    specs = {}
    for name, weight in contents.weights.items():
        shape = (num_ids, *weight.shape[1:]) if name in (EMBEDDINGS, HEAD) else tuple(weight.shape)
        dtype = DTYPES[options.dtype] if options.dtype and weight.is_floating_point() else weight.dtype
        specs[family.original_name(name) if is_original else name] = TensorSpec(name, shape, dtype)
    return specs


def _write_parts(
    contents: CheckpointContents,
    specs: dict[str, TensorSpec],
    options: ConvertOptions,
    folder: Path,
    progress: Progress,
) -> int:
    """Write the weights of each part to the folder that its family keeps it in; gives the number of files."""
    parts = family_of(contents.config).parts if options.layout == "original" else {"": ""}
    num_files = num_done = 0
    for prefix, part in parts.items():
        own = {name.removeprefix(prefix): spec for name, spec in specs.items() if name.startswith(prefix)}
        tell = partial(lambda before, done: progress(before + done, len(specs)), num_done)
        (folder / part).mkdir(exist_ok=True)
        num_files += write_weights(own, contents.tensor, folder / part, options.max_shard_size, tell)
        num_done += len(own)
    return num_files


def write_weights(
    specs: dict[str, TensorSpec],
    tensor: Callable[[str], Tensor],
    folder: Path,
    max_shard_size: str | int,
    progress: Callable[[int], None],
) -> int:
    """Write weights, and give the number of files; no more than one file's are in memory at a time.

    Args:
        specs: Name in the file -> what is written.
        tensor: Gives a weight by its name in Hugging Face's files.
        folder: Folder to write to.
        max_shard_size: Largest size of a file, in bytes or such as "5GB"; a larger tensor has one of its own.
        progress: Told of the number of tensors written.
    """
    meta = {name: torch.empty(spec.shape, dtype=spec.dtype, device="meta") for name, spec in specs.items()}
    split = split_torch_state_dict_into_shards(
        meta, filename_pattern="model{suffix}.safetensors", max_shard_size=max_shard_size
    )
    done = 0
    for file, names in split.filename_to_tensors.items():
        shard = {name: specs[name].cast(tensor(specs[name].source)) for name in names}
        save_file(shard, folder / file, metadata={"format": "pt"})
        del shard  # before the next one is made
        done += len(names)
        progress(done)
    if split.is_sharded:
        write_json(folder / INDEX_FILE, {"metadata": split.metadata, "weight_map": split.tensor_to_filename})
    return len(split.filename_to_tensors)


def _write_descriptions(
    contents: CheckpointContents, embeddings: TensorSpec, options: ConvertOptions, folder: Path, source: str
) -> None:
    """Write all but the backbone's weights."""
    config = contents.config
    config.dtype = embeddings.dtype  # one for all, in either layout
    if contents.routing is not None:
        config.fuzzyroe = contents.routing.save(folder, config.text_config)
    if options.layout == "original":
        named = options.vision_tower or getattr(config, "mm_vision_tower", None)
        if named is None:
            raise ValueError(
                "The original layout takes the architecture of the vision tower from a CLIP checkpoint, and this "
                "checkpoint names none; name it with --vision-tower, LLaVA-1.5's is openai/clip-vit-large-patch14-336."
            )
        tower = locate(named, source)
        # a folder by its whole path, as the output lies elsewhere
        tower = str(Path(tower).resolve()) if Path(tower).is_dir() else tower
        settings = family_of(config).original_config(config, tower, embeddings.shape[0])
        write_json(folder / "config.json", dict(sorted(settings.items())))
    else:
        config.save_pretrained(folder)
    save_tokenizer(contents.tokenizer, folder, options.layout)
    contents.image_processor.save_pretrained(folder)
    if contents.generation_config is not None:
        contents.generation_config.save_pretrained(folder)


def _compare(contents: CheckpointContents, specs: dict[str, TensorSpec], options: ConvertOptions, folder: Path) -> None:
    """Read what was written as any checkpoint, and compare it with what it was made of."""
    # the loader itself is the witness: what it reads is what users will get
    again = read_checkpoint(folder)
    kept = _describe(again)
    wrong = {key: (value, kept[key]) for key, value in _describe(contents).items() if kept[key] != value}
    if wrong:
        raise ValueError(
            f"The {options.layout} layout does not keep {wrong} of the configuration (first as it is, then as read "
            "back); a conversion must change nothing. Keep the layout it has."
        )
    if not has_same_ids(contents.tokenizer, again.tokenizer):
        raise RuntimeError(
            "Read back, the tokenizer gives other ids than the checkpoint's own; report this checkpoint."
        )
    damaged = []
    for name, spec in specs.items():  # one tensor at a time in memory
        ours, theirs = spec.cast(contents.tensor(spec.source)), again.weights[spec.source][: spec.shape[0]]
        # as bytes, because NaN differs from itself
        if ours.dtype != theirs.dtype or not torch.equal(ours.view(torch.uint8), theirs.contiguous().view(torch.uint8)):
            damaged.append(name)
    if damaged:
        raise RuntimeError(
            f"Read back, {len(damaged)} of {len(specs)} weights differ, {damaged[0]} first; check the disk."
        )


def _describe(contents: CheckpointContents) -> dict[str, Any]:
    """What a configuration says about what is computed."""
    config = contents.config
    text = {key: value for key, value in config.text_config.to_dict().items() if key not in NOT_COMPUTED}
    vision = {f"vision {key}": getattr(config.vision_config, key) for key in family_of(config).vision_keys}
    routing = None if contents.routing is None else {**contents.routing.config.to_dict(), "base_model": None}
    own = {key: getattr(config, key, None) for key in COMPUTED}
    return {**text, **vision, **own, "image_token_id": get_image_token_id(config), "fuzzyroe": routing}
