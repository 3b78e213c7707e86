"""The trainer: Hugging Face's, with learning rates by part and a routing state in every batch."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import DeepSpeedSchedulerWrapper
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import Trainer

from llava.data.dataset import ModalityLengthSampler
from llava.train.forecast import Forecast
from llava.train.observers import Observers
from llava.train.param_groups import build_param_groups
from llava.train.roe_routing import RoEObjective
from llava.train.routing_metrics import gather_objects
from llava.train.stages import Stage
from llava.train.step_checkpoint import SAVING, StepSaving, publish, rotate

NOT_FOR_THE_MODEL = ("turn_ids", "sample_index")
"""What a batch carries for routing and for messages."""

TRAINED_FILE = "trained.safetensors"
"""What has trained so far in one process; under DeepSpeed its own shards hold that."""


class LlavaTrainer(Trainer):
    """Hugging Face's ``Trainer`` for one stage.

    Args:
        stage: What trains and how layers are routed.
        learning_rates: Learning rate of each part that trains.
        batch_routing: Gives the routing state of a batch; None trains without routing.
        objective: Gives the loss of a batch from logits, labels and its routing state; None takes the model's own.
        forecast: Gives the loss of the adapters instead, from the model and a batch.
        step_saving: How step checkpoints are written; None if none are.
        observers: What is told of every batch; None for nothing.
        **kwargs: As for ``Trainer``.
    """

    def __init__(
        self,
        *,
        stage: Stage,
        learning_rates: dict[str, float],
        batch_routing: Any = None,
        objective: RoEObjective | None = None,
        forecast: Forecast | None = None,
        step_saving: StepSaving | None = None,
        observers: Observers | None = None,
        **kwargs,
    ) -> None:
        super().__init__(**kwargs)
        self.stage = stage
        self.learning_rates = learning_rates
        self.batch_routing = batch_routing
        self.objective = objective
        self.forecast = forecast
        self.step_saving = step_saving
        self.observers = observers

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """AdamW with one group per part and decay; a part that is frozen has no group."""
        if self.optimizer is None:
            optimizer_class, options = self.get_optimizer_cls_and_kwargs(self.args, self.model)
            groups = build_param_groups(self.model, self.learning_rates, self.args.weight_decay)
            self.optimizer = optimizer_class(groups, **options)
        return self.optimizer

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        """Language-model loss of the routed model; the one place where a routing state meets a batch."""
        batch, routing = inputs, self.batch_routing(inputs) if self.batch_routing is not None else None
        if self.observers is not None:
            self.observers.before_forward(batch)
        inputs = {name: value for name, value in batch.items() if name not in NOT_FOR_THE_MODEL}
        inputs["use_cache"] = False
        if routing is not None:
            inputs["routing"] = routing
        if self.objective is None and self.forecast is None:
            loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        else:
            labels, outputs = inputs.pop("labels"), None
            if self.forecast is not None:
                loss = self.forecast(model, inputs)
            else:
                outputs = model(**inputs)
                loss = self.objective(outputs.logits, labels, routing)
            if num_items_in_batch is not None:  # the trainer then takes the loss for a sum over the accumulated batches
                loss = loss / self.current_gradient_accumulation_steps
        if self.observers is not None:
            self.observers.after_forward(batch, routing, loss)
        return (loss, outputs) if return_outputs else loss

    def log(self, logs: dict[str, float], *args: Any) -> None:
        """Add what the observers saw and the means of the objective's parts over all ranks; called on all of them."""
        seen = {} if self.observers is None else self.observers.take()
        parts = {} if self.objective is None else self.objective.take_means()
        everyone = gather_objects({name: float(mean) for name, mean in parts.items()})
        means = {name: sum(part[name] for part in everyone) / len(everyone) for name in parts}
        super().log({**logs, **seen, **means}, *args)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write what evaluation reads of a step checkpoint; the rest of it follows in ``_save_checkpoint``."""
        folder = Path(output_dir or self.args.output_dir)
        self.step_saving.write_model(self, folder)
        if not self.is_deepspeed_enabled and self.args.should_save:
            trained = {name: p.detach().cpu() for name, p in self.model.named_parameters() if p.requires_grad}
            save_file(trained, folder / TRAINED_FILE)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Write a step checkpoint aside, then give it its manifest and name; none at the end, the stage's follows."""
        if self.state.global_step >= self.state.max_steps:
            return
        saving = Path(self._get_output_dir(trial))
        if self.args.should_save:
            shutil.rmtree(saving, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        super()._save_checkpoint(model, trial)
        self.accelerator.wait_for_everyone()  # every process has written its share
        if self.args.should_save:
            folder = saving / f"checkpoint-{self.state.global_step}"
            publish(folder, self.step_saving.run, self.step_saving.facts())
            rotate(saving.parent, self.args.save_total_limit)
        self.accelerator.wait_for_everyone()

    def _get_output_dir(self, trial: Any) -> str:
        return os.path.join(super()._get_output_dir(trial), SAVING)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if not self.is_deepspeed_enabled:
            super()._save_optimizer_and_scheduler(output_dir)
            return
        self.deepspeed.save_checkpoint(output_dir, exclude_frozen_parameters=True)  # the stage's start has the frozen
        if self.args.should_save and not isinstance(self.lr_scheduler, DeepSpeedSchedulerWrapper):
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir) / "scheduler.pt")

    def _prepare_for_training(self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: str | None) -> Any:
        prepared = super()._prepare_for_training(max_steps, train_dataloader, None)
        if resume_from_checkpoint is not None:
            if self.is_deepspeed_enabled:
                found, _ = self.deepspeed.load_checkpoint(resume_from_checkpoint, load_module_strict=False)
                if found is None:
                    raise RuntimeError(f"DeepSpeed found nothing to load in {resume_from_checkpoint}.")
            self._load_optimizer_and_scheduler(resume_from_checkpoint)
            self._load_scaler(resume_from_checkpoint)
        return prepared

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        tensors = load_file(Path(resume_from_checkpoint) / TRAINED_FILE)
        named = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        if named.keys() != tensors.keys():
            wrong = sorted(named.keys() ^ tensors.keys())[:3]
            raise ValueError(f"{resume_from_checkpoint} and the model differ in what trains: {wrong}.")
        with torch.no_grad():
            for name, parameter in named.items():
                parameter.copy_(tensors[name])

    def _get_train_sampler(self, train_dataset: Any = None) -> torch.utils.data.Sampler | None:
        dataset = train_dataset if train_dataset is not None else self.train_dataset
        if not self.args.group_by_modality_length:
            return super()._get_train_sampler(train_dataset)
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        generator = torch.Generator().manual_seed(seed)
        return ModalityLengthSampler(
            dataset.modality_lengths(),
            self.args.train_batch_size * self.args.world_size,
            generator,
            self.args.world_size,
        )
