"""Several training stages in one process per rank, so that a two-rank launch pays for its start-up once.

    deepspeed --num_gpus 2 tests/support/zero3_cases.py PLAN.json

The plan is a list of cases, each with ``name``, ``flags`` (those of llava/train/train.py) and optionally:

- ``in_order``: samples are read in the order of the file, not shuffled;
- ``forced_plans``: every sample's plan is read off its tokens and not asked of the router, so that a plan does not
  depend on which rank has the sample.

Beside the output folder of a case, rank r writes ``NAME.rank<r>.json`` with what it saw and rank 0
``NAME.gathered.safetensors`` with all parameters as they were after the stage, gathered without the code under test.
"""

from __future__ import annotations

import gc
import json
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from accelerate.state import AcceleratorState
from safetensors.torch import save_file
from torch import Tensor, distributed, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from fuzzyroe.routing_state import RoutingState
from llava.train import checkpointing, routing_policies, stage
from llava.train.arguments import parse_arguments
from llava.train.routing_policies import BudgetedRouting
from llava.train.trainer import LlavaTrainer


class PlanFromTokens(BudgetedRouting):
    """Skips one or two layers behind the first, chosen by the sum of a sample's tokens."""

    num_layers = 4

    def __call__(self, inputs: dict[str, Any], step: int = 0, num_steps: int = 1) -> Any:
        state = RoutingState.from_batch(inputs, self.image_token_id, self.mode)
        tokens = (inputs["input_ids"] * inputs["attention_mask"]).sum(dim=1)  # (B,), the same however it is padded
        keep = torch.ones(len(tokens), state.num_turns, self.num_layers)
        for row, total in enumerate(tokens.tolist()):
            keep[row, :, 1 + total % (self.num_layers - 1)] = 0.0
            keep[row, 0, 1 + total // 2 % (self.num_layers - 1)] = 0.25
        return state.forced(keep.to(state.turn_ids.device))


def gather_all(model: nn.Module) -> dict[str, Tensor]:
    """All parameters of a model, whole, on the CPU; call on all ranks."""
    tensors = {}
    for name, parameter in model.named_parameters():
        if hasattr(parameter, "ds_id"):
            import deepspeed

            gathered = deepspeed.zero.GatheredParameters([parameter], modifier_rank=None)
        else:
            gathered = nullcontext()
        with gathered:
            tensors[name] = parameter.detach().to("cpu", copy=True).contiguous()
    return tensors


def describe_groups(trainer: LlavaTrainer) -> list[dict]:
    """Groups of the optimizer that an engine steps: name, learning rate, and its parameters with their whole sizes."""
    if trainer.deepspeed is None or trainer.optimizer is None:
        return []
    optimizer, names = trainer.deepspeed.optimizer, {id(p): name for name, p in trainer.model.named_parameters()}
    groups = [{"name": group["name"], "lr": group["lr"], "params": {}} for group in optimizer.param_groups]
    for number, parameters in enumerate(optimizer.fp16_groups):  # DeepSpeed cuts a group into these
        held = groups[optimizer.sub_group_to_group_id[number]]["params"]
        for parameter in parameters:
            held.setdefault(names[id(parameter)], []).append(parameter.ds_numel)
    return groups


def run_case(name: str, flags: list[str], in_order: bool = False, forced_plans: bool = False) -> None:
    """Run one stage as llava/train/train.py does and write down what this rank saw."""
    if in_order:
        flags = [*flags, "--train_sampling_strategy", "sequential"]
    arguments = parse_arguments(flags)
    folder = Path(arguments[-1].output_dir).parent
    seen: dict[str, list] = {"has_images": [], "plans": [], "rows_run": [], "groups": [], "trained": []}
    states = []
    rank = distributed.get_rank() if distributed.is_initialized() else 0
    compute_loss, save_stage = LlavaTrainer.compute_loss, checkpointing.save_stage

    def record_loss(trainer: LlavaTrainer, model: nn.Module, inputs: dict, *args: Any, **kwargs: Any) -> Any:
        seen["has_images"].append("pixel_values" in inputs)
        return compute_loss(trainer, model, inputs, *args, **kwargs)

    def record_weights(trainer: Any, *args: Any) -> None:
        tensors = gather_all(trainer.model)
        seen["groups"] = describe_groups(trainer)
        seen["trained"] = [name for name, parameter in trainer.model.named_parameters() if parameter.requires_grad]
        if rank == 0:
            save_file(tensors, folder / f"{name}.gathered.safetensors")
        save_stage(trainer, *args)

    class Recording(PlanFromTokens if forced_plans else BudgetedRouting):
        def __call__(self, inputs: dict[str, Any], step: int = 0, num_steps: int = 1) -> Any:
            state = super().__call__(inputs, step, num_steps)
            states.append(state)
            if state.result.keep_weights is not None:
                seen["plans"].append(state.result.keep_weights[:, 0].tolist())
            return state

    patches = [
        mock.patch.object(LlavaTrainer, "compute_loss", record_loss),
        mock.patch.object(checkpointing, "save_stage", record_weights),
        mock.patch.object(routing_policies, "BudgetedRouting", Recording),
    ]
    for patch in patches:
        patch.start()
    try:
        stage.run_stage(arguments)
    finally:
        for patch in patches:
            patch.stop()
    seen["rows_run"] = [
        [state.result.layer_runs[layer] for layer in sorted(state.result.layer_runs)] for state in states
    ]
    (folder / f"{name}.rank{rank}.json").write_text(json.dumps(seen))


def reset() -> None:
    """Forget the trainer of the case before; the process group stays."""
    gc.collect()
    AcceleratorState._reset_state()


def main() -> None:
    """Run the cases of a plan, one after the other."""
    plan = [argument for argument in sys.argv[1:] if not argument.startswith("--local_rank")]
    for case in json.loads(Path(plan[0]).read_text()):
        run_case(**case)
        reset()


if __name__ == "__main__":
    main()
