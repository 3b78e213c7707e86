"""The trainer: Hugging Face's, with learning rates by part and a routing state in every batch."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import Trainer

from llava.data.sampler import ModalityLengthSampler
from llava.train.param_groups import build_param_groups
from llava.train.roe_routing import RoEObjective
from llava.train.stages import Stage


class LlavaTrainer(Trainer):
    """Hugging Face's ``Trainer`` for one stage.

    Args:
        stage: What trains and how layers are routed.
        learning_rates: Learning rate of each part that trains.
        batch_routing: Gives the routing state of a batch; None trains without routing.
        objective: Gives the loss of a batch from logits, labels and its routing state; None takes the model's own.
        **kwargs: As for ``Trainer``.
    """

    def __init__(
        self,
        *,
        stage: Stage,
        learning_rates: dict[str, float],
        batch_routing: Any = None,
        objective: RoEObjective | None = None,
        **kwargs,
    ) -> None:
        super().__init__(**kwargs)
        self.stage = stage
        self.learning_rates = learning_rates
        self.batch_routing = batch_routing
        self.objective = objective

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
        routing = self.batch_routing(inputs) if self.batch_routing is not None else None
        inputs = {key: value for key, value in inputs.items() if key != "turn_ids"}
        if routing is not None:
            inputs["routing"] = routing
        if self.objective is None:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        labels = inputs.pop("labels")
        outputs = model(**inputs)
        loss = self.objective(outputs.logits, labels, routing)
        if num_items_in_batch is not None:  # the trainer then takes the loss for a sum over the accumulated batches
            loss = loss / self.current_gradient_accumulation_steps
        return (loss, outputs) if return_outputs else loss

    def log(self, logs: dict[str, float], *args: Any) -> None:
        """Add the means of the objective's parts over all ranks; called on all of them."""
        parts = {} if self.objective is None else self.objective.take_means()
        means = {name: float(self._nested_gather(mean).mean()) for name, mean in parts.items()}
        super().log({**logs, **means}, *args)

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
