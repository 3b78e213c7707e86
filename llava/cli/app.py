"""The command ``fuzzyroe``: one function per sub-command. Heavy imports wait until a function runs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from llava.cli.data import check_data_command, data_stats_command
from llava.cli.doctor import doctor_command
from llava.cli.rule_commands import rules_app
from llava.cli.terminal import FriendlyGroup, make_table, open_console, progress_bar, say

DOES_NOT_FIT = 1
"""Exit code of ``estimate`` where a stage needs more than the GPUs have."""


def chat(context: typer.Context) -> None:
    """Chat with a checkpoint about an image; the flags are those of ``python -m llava.serve.cli``."""
    from llava.serve.cli import main

    main(context.args, prog="fuzzyroe chat")


def convert(
    source: Annotated[str, typer.Argument(help="Checkpoint of any layout: folder or hub id.")],
    output: Annotated[Path, typer.Argument(help="Folder to write; must not exist.")],
    to: Annotated[str, typer.Option(help="Layout: transformers (llava-hf) or original (liuhaotian).")] = "transformers",
    base: Annotated[
        str | None, typer.Option(help="Base model of a projector or of LoRA weights, if they do not name it.")
    ] = None,
    dtype: Annotated[str | None, typer.Option(help="float32, float16 or bfloat16; unchanged by default.")] = None,
    max_shard_size: Annotated[str, typer.Option(help="Largest size of a file of weights.")] = "5GB",
    vision_tower: Annotated[
        str | None, typer.Option(help="For the original layout: CLIP checkpoint with the vision tower's architecture.")
    ] = None,
) -> None:
    """Merge LoRA weights, import RoE's routing, turn .bin into safetensors; verify what was written."""
    # the function of the same name does the work, this one reads flags and prints
    from llava.model.checkpoints.convert import ConvertOptions, convert

    options = ConvertOptions(to, dtype, max_shard_size, vision_tower)
    with progress_bar("writing tensors") as progress:
        done = convert(source, output, options, base, progress)
    size = f"{done.num_bytes / 2**30:.2f} GiB in {done.num_files} files"
    lines = [f"{done.num_tensors:,} tensors, {size}, read back equal"]
    if done.num_merged:
        lines.append(f"{done.num_merged:,} LoRA weights merged")
    if done.router:
        lines.append(f"routed by a {done.router} router")
    lines.append(f"{done.vocab_size:,} token ids" + (", none for <image>" if to == "original" else ""))
    say(*lines, f"written to {output}")


def explain(
    model: Annotated[str, typer.Option(help="Routed checkpoint.")],
    question: Annotated[str, typer.Option(help="The question; the image comes first, or where it says <image>.")],
    image: Annotated[Path | None, typer.Option(help="Image file.")] = None,
    version: Annotated[
        str | None, typer.Option(help="Conversation template; the checkpoint's own if left out.")
    ] = None,
    skip_rate: Annotated[
        float | None, typer.Option(help="Target skip rate; the checkpoint's own if left out.", min=0, max=1)
    ] = None,
    rules: Annotated[int, typer.Option(help="Rules to list.", min=1)] = 5,
    max_new_tokens: Annotated[int, typer.Option(help="Longest answer in tokens.", min=1)] = 64,
) -> None:
    """Answer one question and show features, rules, score and skipped layers."""
    from rich.text import Text
    from transformers.utils import logging

    from llava.eval.explain import explain_question
    from llava.model.builder import load_checkpoint

    logging.disable_progress_bar()  # loading would print over the tables
    found = explain_question(load_checkpoint(model), question, image, version, skip_rate, rules, max_new_tokens)
    console, steps = open_console(), found.rules
    features = [
        (name, steps.words[name], f"{value:.3f}", f"{found.raw_features[name]:.4f}")
        for name, value in steps.features.items()
    ]
    console.print(make_table("Features", ("feature", "in words", "scaled", "raw"), features, text_columns=2))
    fired = [
        (rule.text + (f"\n  {rule.comment}" if rule.comment else ""), rule.origin, f"{rule.strength:.3f}")
        for rule in steps.fired
    ]
    title = f"\nStrongest of {steps.num_fired} rules that fired"
    console.print(make_table(title, ("rule", "origin", "strength"), fired, text_columns=2))
    num_layers, skipped = len(found.thresholds), found.skipped
    say(
        f"\nscore {steps.score:.3f}, higher than {found.percentile:.0%} of the calibration questions "
        f"(target skip rate {found.target_skip_ratio:.0%})",
        f"{len(found.kept)} of {num_layers} layers ran, {len(skipped)} were skipped "
        f"({len(skipped) / num_layers:.0%}): {', '.join(map(str, skipped)) or 'none'}",
    )
    strip = Text()  # all layers in order: numbers of kept ones, dots for skipped ones
    for layer in range(num_layers):
        is_kept = layer in found.kept
        strip.append(f"{layer:>3}" if is_kept else "  ·", style="green" if is_kept else "dim")
    console.print(strip, soft_wrap=True)
    say(f"\nanswer: {found.answer}")


def estimate(
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
    """Estimate bytes per GPU of a training stage; exit code 1 where they do not fit."""
    from llava.model.checkpoints.reading import read_config_and_tokenizer
    from llava.model.families import published_config
    from llava.train.memory_estimate import GIB, Workload, estimate_memory, what_fits

    if gpu_mem <= 0:
        raise ValueError(f"--gpu-mem {gpu_mem} must be above 0; give the memory of one GPU in GiB.")
    workload = Workload(stage, gpus, sharding, batch, length, adapter_hidden_dim, gradient_checkpointing, lora_r)
    config = read_config_and_tokenizer(model)[0] if Path(model).is_dir() else published_config(model)
    needed, gpu_bytes = estimate_memory(config, workload), int(gpu_mem * GIB)
    say(f"stage {stage}, {model}, {gpus} GPUs, {sharding}, batch {batch} x {length} positions", style="bold")
    rows = [*needed.per_gpu.items(), ("total", needed.total), ("available", gpu_bytes)]
    cells = [[name, f"{size / GIB:,.1f}"] for name, size in rows]
    open_console().print(make_table("", ("per GPU", "GiB"), cells, bold=[len(rows) - 2]))
    parts = ", ".join(f"{name} {number / 1e6:,.0f} M" for name, number in needed.parameters.items() if number)
    say(f"parameters: {parts}; trained: {needed.trained / 1e6:,.0f} M", style="dim")
    if needed.on_host:
        say(f"host memory over all processes: {needed.on_host / GIB:,.0f} GiB", style="dim")
    if needed.total <= gpu_bytes:
        say("fits", style="bold")
        return
    say("does not fit", style="bold")
    for variant in what_fits(config, workload, gpu_bytes):
        lora = f" --lora-r {variant.lora_rank}" if variant.lora_rank else ""
        total = estimate_memory(config, variant).total / GIB
        say(f"would fit: --batch {variant.batch} --sharding {variant.sharding}{lora} ({total:,.1f} GiB)")
    raise typer.Exit(DOES_NOT_FIT)


def report(
    evaluations: Annotated[list[Path], typer.Argument(help="evaluation.json files, at least one of a dense run.")],
    output: Annotated[Path, typer.Option(help="Folder for report.html, report.json and figures.")],
    stages: Annotated[
        list[Path] | None, typer.Option(help="Output folder of a stage; repeat it for each, in order.")
    ] = None,
) -> None:
    """Compare runs on the same questions and write a page that needs no other file."""
    from llava.report.comparison import load_report, report_tables
    from llava.report.page import write_report

    content, console = load_report(evaluations, stages or []), open_console()
    for table in report_tables(content):
        console.print(make_table(table.title, table.columns, table.rows, bold=sorted(table.highlighted)), "")
    say(f"written to {output}: {', '.join(path.name for path in write_report(content, output))}")


COMMANDS: dict[str, Callable[..., None]] = {
    "check-data": check_data_command,
    "data-stats": data_stats_command,
    "convert": convert,
    "explain": explain,
    "estimate": estimate,
    "doctor": doctor_command,
    "report": report,
}
"""Commands by name, in the order of the help text; ``chat`` and ``rules`` are added below."""

app = typer.Typer(
    cls=FriendlyGroup,
    help="Layer skipping for LLaVA-1.5, routed by a fuzzy rule base.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for name, command in COMMANDS.items():
    app.command(name)(command)
# chat reads its flags itself: they are LLaVA's, in argparse
PASS_ON = {"allow_extra_args": True, "ignore_unknown_options": True}
app.command("chat", add_help_option=False, context_settings=PASS_ON)(chat)
app.add_typer(rules_app, name="rules")


def main() -> None:
    """Run the command ``fuzzyroe``."""
    app(prog_name="fuzzyroe")
