"""``fuzzyroe estimate``: whether a training stage fits the GPUs at hand, before anything is downloaded."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from llava.train.memory_estimate import MemoryEstimate, Workload

DOES_NOT_FIT = 1
"""Exit code where the stage needs more than the GPUs have."""


def estimate_command(
    stage: Annotated[str, typer.Option(help="Training stage, e.g. router, adapter, finetune.")] = "finetune",
    gpus: Annotated[int, typer.Option(help="GPUs over all nodes.")] = 8,
    gpu_mem: Annotated[float, typer.Option(help="Memory of one GPU in GiB.")] = 80.0,
    model: Annotated[
        str, typer.Option(help="7b, 13b, or the folder of a checkpoint (its config.json is read).")
    ] = "7b",
    sharding: Annotated[str, typer.Option(help="zero2, zero3 or zero3_offload.")] = "zero3",
    batch: Annotated[int, typer.Option(help="Samples per GPU and pass.")] = 4,
    length: Annotated[int, typer.Option(help="Positions per sample, images expanded.")] = 2048,
    adapter_hidden_dim: Annotated[int, typer.Option(help="Width of the skip adapters.")] = 1024,
    lora_r: Annotated[int, typer.Option(help="Rank of LoRA on the decoder; 0 trains it whole.")] = 0,
    gradient_checkpointing: Annotated[bool, typer.Option(help="Recompute layers in the backward pass.")] = True,
) -> None:
    """Estimate bytes per GPU; exit code 1 where they do not fit."""
    from pathlib import Path

    from llava.cli.terminal import make_table, open_console
    from llava.model.checkpoints.reading import read_config_and_tokenizer
    from llava.train.memory_estimate import GIB, Workload, estimate_memory, llava_config, what_fits

    if gpu_mem <= 0:
        raise ValueError(f"--gpu-mem {gpu_mem} must be above 0; give the memory of one GPU in GiB.")
    workload = Workload(
        stage, gpus, sharding, batch, length, adapter_hidden_dim, gradient_checkpointing, lora_rank=lora_r
    )
    config = read_config_and_tokenizer(model)[0] if Path(model).is_dir() else llava_config(model)
    estimate = estimate_memory(config, workload)
    gpu_bytes = int(gpu_mem * GIB)
    rows = [*estimate.per_gpu.items(), ("total", estimate.total), ("available", gpu_bytes)]
    console = open_console()
    title = f"stage {stage}, {model}, {gpus} GPUs, {sharding}, batch {batch} x {length} positions"
    cells = [[name, f"{size / GIB:,.1f}"] for name, size in rows]
    console.print(title, style="bold")
    console.print(make_table("", ("per GPU", "GiB"), cells, bold=[len(rows) - 2]))
    console.print(_parameters(estimate), style="dim")
    if estimate.on_host:
        console.print(f"host memory over all processes: {estimate.on_host / GIB:,.0f} GiB", style="dim")
    if estimate.total <= gpu_bytes:
        console.print("fits", style="bold")
        return
    console.print("does not fit", style="bold")
    for variant in what_fits(config, workload, gpu_bytes):
        total = estimate_memory(config, variant).total
        console.print(f"would fit: {_options(variant)} ({total / GIB:,.1f} GiB)")
    raise typer.Exit(DOES_NOT_FIT)


def _parameters(estimate: MemoryEstimate) -> str:
    parts = ", ".join(f"{name} {number / 1e6:,.0f} M" for name, number in estimate.parameters.items() if number)
    return f"parameters: {parts}; trained: {estimate.trained / 1e6:,.0f} M"


def _options(workload: Workload) -> str:
    lora = f" --lora-r {workload.lora_rank}" if workload.lora_rank else ""
    return f"--batch {workload.batch} --sharding {workload.sharding}{lora}"
