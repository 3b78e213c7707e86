"""Promises of the memory estimate."""

from __future__ import annotations

import pytest
from transformers import LlavaConfig

from llava.model.families import published_config
from llava.train.memory_estimate import (
    GIB,
    SHARDINGS,
    Workload,
    count_parameters,
    estimate_memory,
    what_fits,
)
from llava.train.parameters import parameters_by_part
from llava.train.stages import STAGES

LLAMA_7B = 6_738_415_616 + 2 * 64 * 4096
"""Llama-2-7B's published count, plus the 64 added rows of embeddings and head."""


@pytest.fixture
def tiny_config(tiny_llava) -> LlavaConfig:
    return tiny_llava.config


def test_seven_billion_parameters_are_counted_as_published():
    parts = count_parameters(published_config("7b"), adapter_width=1024)
    assert parts["decoder"] == LLAMA_7B
    assert parts["projector"] == (1024 * 4096 + 4096) + (4096 * 4096 + 4096)
    assert parts["adapter"] == 32 * 2 * 4096 * 1024


def test_counts_are_those_of_a_real_model(tiny_llava, tiny_config):
    real = {part: sum(p.numel() for p in named.values()) for part, named in parameters_by_part(tiny_llava).items()}
    assert count_parameters(tiny_config, None) == real


def test_all_states_of_a_fully_trained_model_take_sixteen_bytes_per_parameter(tiny_config):
    estimate = estimate_memory(tiny_config, Workload("scratch", num_gpus=1, batch=1, length=8))
    states = sum(estimate.per_gpu[name] for name in ("weights", "gradients", "optimizer"))
    assert states == 16 * sum(estimate.parameters.values())


@pytest.mark.parametrize("stage", [name for name, stage in STAGES.items() if stage.trains])
def test_more_gpus_take_less_of_each(stage, tiny_config):
    one, eight = (estimate_memory(tiny_config, Workload(stage, gpus, batch=1, length=8)) for gpus in (1, 8))
    for name in ("weights", "gradients", "optimizer"):
        assert eight.per_gpu[name] == one.per_gpu[name] // 8


def test_the_router_stage_has_no_gradients_and_no_optimizer(tiny_config):
    estimate = estimate_memory(tiny_config, Workload("router", num_gpus=2))
    assert estimate.trained == estimate.per_gpu["gradients"] == estimate.per_gpu["optimizer"] == 0


def test_offloading_moves_every_state_to_the_host(tiny_config):
    offloaded = estimate_memory(tiny_config, Workload("scratch", 2, "zero3_offload", batch=1, length=8))
    assert offloaded.per_gpu["weights"] == offloaded.per_gpu["optimizer"] == offloaded.per_gpu["gradients"] == 0
    assert offloaded.on_host == 18 * sum(offloaded.parameters.values())


def test_zero2_keeps_all_weights_on_every_gpu(tiny_config):
    sharded, whole = (estimate_memory(tiny_config, Workload("finetune", 4, name)) for name in ("zero3", "zero2"))
    assert whole.per_gpu["weights"] == pytest.approx(4 * sharded.per_gpu["weights"], abs=4)


def test_checkpointing_takes_fewer_activations():
    config = published_config("7b")
    kept, recomputed = (
        estimate_memory(config, Workload("finetune", 8, checkpoints_activations=flag)) for flag in (False, True)
    )
    assert recomputed.per_gpu["activations"] < kept.per_gpu["activations"] / 4


def test_lora_trains_less_than_the_decoder():
    config = published_config("7b")
    estimate = estimate_memory(config, Workload("dense", 8, lora_rank=128))
    # LLaVA's own LoRA of rank 128 has 320 M weights beside the projector's 21 M
    assert estimate.trained == 32 * 128 * (4 * 2 * 4096 + 3 * (4096 + 11008)) + estimate.parameters["projector"]


def test_what_is_offered_instead_does_fit():
    config, too_much = published_config("7b"), Workload("finetune", num_gpus=2)
    assert estimate_memory(config, too_much).total > 40 * GIB
    variants = what_fits(config, too_much, 40 * GIB)
    assert variants and all(estimate_memory(config, variant).total <= 40 * GIB for variant in variants)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sharding": "zero9"}, f"use one of {', '.join(SHARDINGS)}"),
        ({"num_gpus": 0}, "num_gpus is 0"),
        ({"batch": -1}, "batch is -1"),
        ({"lora_rank": -1}, "lora_rank is -1"),
    ],
)
def test_impossible_workloads_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Workload(**{"stage": "finetune", "num_gpus": 1, **options})
