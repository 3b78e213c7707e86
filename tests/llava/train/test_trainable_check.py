"""The proof that a stage trains what it names and nothing else."""

from __future__ import annotations

import pytest
import torch
from transformers import LlavaForConditionalGeneration, TrainerControl, TrainerState, TrainingArguments

from fuzzyroe.attach import attach
from llava.train.parameters import TrainableCheck, parameters_by_part
from llava.train.stages import PARTS, STAGES


class Run:
    """A training whose every step is made by hand.

    Args:
        model: A LLaVA with routing attached.
        stage: Name of the stage.
    """

    def __init__(self, model: LlavaForConditionalGeneration, stage: str, folder: str) -> None:
        self.parts = parameters_by_part(attach(model, adapter_width=4))
        self.check = TrainableCheck(model, STAGES[stage])
        self.state = (TrainingArguments(folder, use_cpu=True, report_to="none"), TrainerState(), TrainerControl())
        self.check.on_train_begin(*self.state)

    def step(self, *moving: str, learning_rate: float = 0.1) -> None:
        """Move one parameter of each of some parts."""
        optimizer = torch.optim.SGD([torch.zeros(1)], lr=learning_rate)
        self.check.on_pre_optimizer_step(*self.state, optimizer=optimizer)
        with torch.no_grad():
            for part in moving:
                next(iter(self.parts[part].values())).view(-1)[0] += 1
        self.check.on_step_end(*self.state)

    def end(self) -> dict[str, bool]:
        """End the training; what moved."""
        self.check.on_train_end(*self.state)
        return self.check.moved


@pytest.fixture
def start(tiny_llava: LlavaForConditionalGeneration, tmp_path: object):
    """Start a stage on a fresh model."""
    return lambda stage: Run(tiny_llava, stage, str(tmp_path))


def test_a_part_that_moves_late_is_no_error(start) -> None:
    run = start("adapter")
    for _ in range(4):  # warm-up at rate zero, then batches that skip nothing
        run.step(learning_rate=0.0)
        run.step()
    run.step("adapter")
    assert run.end() == {part: part == "adapter" for part in PARTS}


def test_a_part_that_never_moves_is_an_error_at_the_end(start) -> None:
    run = start("finetune")
    run.step("decoder", "adapter")
    with pytest.raises(RuntimeError, match="trains the projector, but none of its parameters moved in 1 steps"):
        run.end()


def test_a_frozen_part_that_moves_is_an_error_at_once(start) -> None:
    run = start("adapter")
    with pytest.raises(RuntimeError, match="freezes the decoder, but .* moved"):
        run.step("adapter", "decoder")


def test_a_frozen_part_that_moves_late_is_an_error_at_the_end(start) -> None:
    run = start("adapter")
    run.step("adapter")
    run.step("vision_tower")
    with pytest.raises(RuntimeError, match="freezes the vision_tower"):
        run.end()


def test_a_run_without_a_step_is_no_error(start) -> None:
    run = start("adapter")
    run.step(learning_rate=0.0)
    assert not any(run.end().values())


def test_a_part_without_parameters_need_not_move(start) -> None:
    run = start("finetune")
    run.check._before["adapter"] = {}
    run.step("projector", "decoder")
    assert run.end()["adapter"] is False
