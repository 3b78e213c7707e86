"""The trainer: Hugging Face's ``Trainer`` with a routing policy, an objective and learning rates by part."""

from __future__ import annotations

import functools
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PrinterCallback, ProgressCallback, Trainer

from llava.data.dataset import ModalityLengthSampler
from llava.train.arguments import LlavaTrainingArguments
from llava.train.callbacks import BatchCallback, mean_over_ranks
from llava.train.objectives import Objective, language_model
from llava.train.parameters import build_param_groups
from llava.train.routing_policies import RoutingPolicy

TRAINED_FILE = "trained.safetensors"
"""What has trained so far in one process; under DeepSpeed its own shards hold that."""


class LlavaTrainer(Trainer):
    """Hugging Face's ``Trainer`` for one stage, with further arguments.

    Args:
        learning_rates: Learning rate of each part that trains.
        routing_policy, objective: Give the routing state of a batch, None trains without routing; and its loss.
        write_model: Writes what evaluation reads into a folder, called on all ranks; None if no step is saved.
    """

    # What is narrower, or less optional, here than in Trainer.
    args: LlavaTrainingArguments
    model: Any
    train_dataset: Any
    deepspeed: Any
    objective: Objective

    def __init__(
        self,
        *,
        learning_rates: dict[str, float],
        routing_policy: RoutingPolicy | None = None,
        objective: Objective = language_model,
        write_model: Callable[[Path], None] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.learning_rates, self.write_model = learning_rates, write_model
        self.routing_policy, self.objective = routing_policy, objective
        self._values: dict[str, list[Tensor]] = defaultdict(list)  # what the objective logs, since the last log
        for printer in (PrinterCallback, ProgressCallback):  # ``callbacks.Console`` prints instead
            self.remove_callback(printer)

    @property
    def batch_callbacks(self) -> list[BatchCallback]:
        """The callbacks that are told of every batch."""
        return [callback for callback in self.callback_handler.callbacks if isinstance(callback, BatchCallback)]

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Train as ``Trainer`` does, and tell the callbacks of the end, whatever it is."""
        try:
            return super().train(*args, **kwargs)
        finally:
            for callback in self.batch_callbacks:
                callback.close()

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """AdamW with one group per part and decay; a part that is frozen has no group."""
        if self.optimizer is None:
            optimizer_class, options = self.get_optimizer_cls_and_kwargs(self.args, self.model)
            groups = build_param_groups(self.model, self.learning_rates, self.args.weight_decay)
            self.optimizer = optimizer_class(groups, **options)
        return self.optimizer

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        # Private, but where LLaVA hooks in as well: batches of one modality and similar length each, if asked for.
        args = self.args
        if not args.group_by_modality_length:
            return super()._get_train_sampler(train_dataset)
        seed = args.seed if args.data_seed is None else args.data_seed
        return ModalityLengthSampler(
            self.train_dataset.modality_lengths(),
            args.train_batch_size * args.world_size,
            torch.Generator().manual_seed(seed),
            args.world_size,
        )

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Loss of a batch under the objective; the one place where a routing state meets a batch."""
        for callback in self.batch_callbacks:
            callback.on_batch_begin(inputs)
        routing, outputs = None, None
        if self.routing_policy is not None:
            routing = self.routing_policy(inputs, self.state.global_step, self.state.max_steps)
        batch = {name: value for name, value in inputs.items() if name not in ("turn_ids", "sample_index")}
        batch["use_cache"] = False
        if self.objective is language_model:
            # Trainer itself takes the mean over all tokens of a step: those of all ranks and accumulated batches.
            routed = batch if routing is None else {**batch, "routing": routing}
            loss, outputs = super().compute_loss(model, routed, True, num_items_in_batch)
        else:
            result = self.objective(model, batch, routing)
            loss, values = result if isinstance(result, tuple) else (result, {})
            for name, value in values.items():
                self._values[name].append(value.detach().reshape(-1))
            if num_items_in_batch is not None:
                # Trainer then adds the losses of accumulated batches up, but a mean counts for its share of the step.
                loss = loss / self.current_gradient_accumulation_steps
        for callback in self.batch_callbacks:
            callback.on_batch_end(inputs, routing, loss)
        return (loss, outputs) if return_outputs else loss

    def log(self, logs: dict[str, float], *args: Any) -> None:
        """Add the numbers of the callbacks and means of the objective's values over all ranks; called on all."""
        for callback in self.batch_callbacks:
            logs = {**logs, **callback.take_metrics()}
        values, self._values = self._values, defaultdict(list)
        means = mean_over_ranks({name: torch.cat(seen).tolist() for name, seen in values.items()})
        super().log({**logs, **means}, *args)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write what evaluation reads of a step checkpoint; Trainer adds the states of optimizer and generators."""
        folder = Path(output_dir or str(self.args.output_dir))
        if self.write_model is not None:
            self.write_model(folder)
        if not self.is_deepspeed_enabled and self.args.should_save:
            save_file({name: p.cpu() for name, p in self._trained().items()}, folder / TRAINED_FILE)

    def _prepare_for_training(self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: str | None) -> Any:
        # Private, because there is no other door: Trainer has DeepSpeed write and read frozen parameters too unless the
        # model is a PeftModel. Of a stage of adapters they are nearly everything, and the stage's start has them.
        if not self.is_deepspeed_enabled:
            return super()._prepare_for_training(max_steps, train_dataloader, resume_from_checkpoint)
        prepared = super()._prepare_for_training(max_steps, train_dataloader, None)
        engine = self.deepspeed
        engine.save_checkpoint = functools.partial(engine.save_checkpoint, exclude_frozen_parameters=True)
        if resume_from_checkpoint is not None:
            path, _ = engine.load_checkpoint(resume_from_checkpoint, load_module_strict=False)
            if path is None:
                raise RuntimeError(f"DeepSpeed found nothing to load in {resume_from_checkpoint}.")
            self._load_optimizer_and_scheduler(resume_from_checkpoint)
        return prepared

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        # Private, because Trainer refuses a folder without stock weights, which a stage of adapters does not write.
        tensors, trained = load_file(Path(resume_from_checkpoint) / TRAINED_FILE), self._trained()
        if trained.keys() != tensors.keys():
            wrong = sorted(trained.keys() ^ tensors.keys())[:3]
            raise ValueError(f"{resume_from_checkpoint} and the model differ in what trains: {wrong}.")
        for name, parameter in trained.items():
            parameter.copy_(tensors[name])

    def _trained(self) -> dict[str, Tensor]:
        """What trains, by name, detached."""
        return {name: p.detach() for name, p in self.model.named_parameters() if p.requires_grad}
