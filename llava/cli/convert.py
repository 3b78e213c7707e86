"""``fuzzyroe convert``: a checkpoint in another layout."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def convert_command(
    source: Annotated[str, typer.Argument(help="Checkpoint of any layout: folder or hub id.")],
    output: Annotated[Path, typer.Argument(help="Folder to write; must not exist.")],
    to: Annotated[str, typer.Option(help="Layout: transformers (llava-hf) or original (liuhaotian).")] = "transformers",
    base: Annotated[
        str | None, typer.Option(help="What a projector or low-rank updates belong to, if they do not name it.")
    ] = None,
    dtype: Annotated[str | None, typer.Option(help="float32, float16 or bfloat16; kept as it is by default.")] = None,
    max_shard_size: Annotated[str, typer.Option(help="Largest size of a file of weights.")] = "5GB",
    vision_tower: Annotated[
        str | None, typer.Option(help="For the original layout: CLIP checkpoint of the vision tower's form.")
    ] = None,
) -> None:
    """Merge updates, import RoE's routing, turn .bin into safetensors; compare what was written."""
    from llava.cli.terminal import open_console, progress_bar
    from llava.model.checkpoints.convert import Target, convert

    target = Target(to, dtype, max_shard_size, vision_tower)
    with progress_bar("writing tensors") as progress:
        done = convert(source, output, target, base, progress)
    lines = [
        f"{done.num_tensors:,} tensors, {done.num_bytes / 2**30:.2f} GiB in {done.num_files} files, read back equal"
    ]
    if done.num_updates:
        lines.append(f"{done.num_updates:,} low-rank updates merged")
    if done.router:
        lines.append(f"routed by a {done.router} router")
    lines.append(f"{done.vocab_size:,} token ids" + (", none for <image>" if to == "original" else ""))
    open_console().print("\n".join([*lines, f"written to {output}"]), markup=False, soft_wrap=True)
