"""Parity with the published RoE code: every number of its golden run, within 3e-5."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from fuzzyroe.attach import find_decoder
from fuzzyroe.routers.roe.tokens import RoEPass, find_segments
from fuzzyroe.routers.roe.training import PUBLISHED, Objective, Relaxation, routing_objective
from golden_roe import (
    NUM_LAYERS,
    NUM_TOKENS,
    Recorder,
    arrays,
    assert_close,
    build_model,
    golden,
    prompts,
    routing_name,
    training_batch,
)

SETTINGS = ("stage0", "stage1", "stage1b", "stage2")
PROMPTS = ("eval_b1_0", "eval_b1_1", "eval_b1_2")


def relaxation_of(setting: str) -> tuple[Relaxation, float]:
    """What a golden setting ran under, and its skip ratio."""
    stage, temperature, bias, skip_ratio = golden(f"{setting}/cfg").tolist()
    if stage == 0:
        return Relaxation(0.001, bias, golden(f"{setting}/rand")), skip_ratio
    return Relaxation(temperature, bias), skip_ratio


class Run:
    """A golden training setting, run here.

    Attributes:
        objective: The objective with its parts.
        recorder: What passed through the layers.
        logits: (B, N, V).
        gradients: By published parameter name.
    """

    def __init__(self, setting: str, attention: str = "sdpa", compat: Any = PUBLISHED) -> None:
        model = build_model(compat, attention)
        inputs, labels, state = training_batch(model)
        relaxation, skip_ratio = relaxation_of(setting)
        state.roe = RoEPass(relaxation)
        self.recorder = Recorder(model)
        self.logits = model(**inputs, routing=state, use_cache=False).logits
        self.objective: Objective = routing_objective(
            self.logits, labels, state.result.keep_weights, state.turn_mask(), skip_ratio, compat.damping
        )
        self.state = state
        self.objective.loss.backward()
        self.model = model

    def gradient(self, published: str) -> Tensor:
        ours = routing_name(published)
        named = dict(self.model.named_parameters())
        return named[published if ours is None else f"model.{ours}"].grad

    def router_weights(self, layer: int) -> Tensor:
        """Keep and skip weight of the image and of every turn, (B, 1 + T, 2)."""
        inner = self.recorder.states[layer]
        image = inner.roe.layout.token_positions[:, :1]  # whose token counts to the prefix
        prefix = inner.result.position_weights[layer].gather(1, image)
        keep = torch.cat([prefix, inner.result.decisions[layer]], dim=1)
        return torch.stack([keep, 1 - keep], dim=-1)


@pytest.fixture(scope="module", params=[(s, a) for s in SETTINGS for a in ("sdpa", "eager")], ids="-".join)
def case(request: pytest.FixtureRequest) -> tuple[str, Run]:
    setting, attention = request.param
    return setting, Run(setting, attention)


def test_segments_are_those_of_the_published_masks() -> None:
    model = build_model()
    _, _, state = training_batch(model)
    segments = find_segments(state, PUBLISHED)
    assert torch.equal(segments.reads.long(), golden("prep/question_mask")[..., NUM_TOKENS:])
    tokens = torch.arange(NUM_TOKENS).view(1, -1, 1)
    assert torch.equal((segments.turn_ids.unsqueeze(1) == tokens).long(), golden("prep/weight_mask")[..., NUM_TOKENS:])


def test_rows_see_what_they_saw_in_the_published_code() -> None:
    model = build_model()
    inputs, _, state = training_batch(model)
    recorder = Recorder(model)
    model(**inputs, routing=state, use_cache=False)
    layout = recorder.states[0].roe.layout
    assert torch.equal(layout.attention_mask[:, 0], golden("prep/attn_allowed"))
    assert torch.equal(layout.position_ids, golden("prep/position_ids").expand(3, -1))


def test_router_weights(case) -> None:
    setting, run = case
    for layer in range(NUM_LAYERS):
        assert_close(run.router_weights(layer), golden(f"{setting}/router_weight")[layer], f"layer {layer}")


def test_weights_of_positions(case) -> None:
    setting, run = case
    known = golden("prep/attention_mask").bool()
    known[:, :NUM_TOKENS] = True
    for layer in range(NUM_LAYERS):
        keep = run.recorder.states[layer].position_weights(layer)
        assert_close(keep[known], golden(f"{setting}/weight_0")[layer][known], f"layer {layer}")
        assert_close(1 - keep[known], golden(f"{setting}/weight_1")[layer][known], f"layer {layer}")


def test_layer_inputs_and_outputs_with_routing_tokens(case) -> None:
    setting, run = case
    known = golden("prep/attention_mask").bool()
    known[:, :NUM_TOKENS] = True
    for layer in range(NUM_LAYERS):
        assert_close(run.recorder.inputs[layer][known], golden(f"{setting}/layer_in")[layer][known], f"layer {layer}")
        assert_close(run.recorder.outputs[layer][known], golden(f"{setting}/layer_out")[layer][known], f"layer {layer}")


def test_skip_statistics(case) -> None:
    setting, run = case
    turns = run.state.turn_mask()
    for layer in range(NUM_LAYERS):
        skipped = ((1 - run.state.result.keep_weights[:, :, layer]) * turns).sum(dim=1) / turns.sum(dim=1)
        assert_close(skipped, golden(f"{setting}/skip_per_layer")[layer], f"layer {layer}")
    assert_close(run.objective.skip_rate, golden(f"{setting}/skip_per_layer").mean(dim=0))
    assert_close(run.objective.hinge, golden(f"{setting}/skip_loss"))


def test_losses(case) -> None:
    setting, run = case
    assert_close(run.objective.task, golden(f"{setting}/task_loss"))
    assert_close(run.objective.loss, golden(f"{setting}/loss"))


def test_logits(case) -> None:
    setting, run = case
    known = golden("prep/attention_mask").bool()
    assert_close(run.logits[known[:, NUM_TOKENS:]], golden(f"{setting}/logits")[known])


def test_gradients(case) -> None:
    setting, run = case
    prefix = f"{setting}/grad/"
    names = [key.removeprefix(prefix) for key in arrays("roe_golden") if key.startswith(prefix)]
    assert len(names) == (0 if setting == "stage0" else 14)
    for name in names:
        expected = golden(prefix + name)
        assert_close(run.gradient(name), expected.view_as(run.gradient(name)), name)


def test_drawn_decisions_give_the_router_no_gradient() -> None:
    run = Run("stage0")
    for layer in range(NUM_LAYERS):
        assert run.gradient(f"model.layers.{layer}.adapter_MHA_router.expert.0.weight") is None
    for kind in ("image", "text"):  # tokens take part in the forward, but nothing depends on them
        gradient = run.gradient(f"model.adapter_{kind}_token.weight")
        assert gradient is None or not gradient.any()
    assert run.gradient("model.layers.0.adapter_MHA.conv_B.weight").any()


def answer(model, inputs: dict, state):
    """Greedy generation with a given state at the prompt."""

    def give_state(decoder, args, kwargs):
        if kwargs["past_key_values"].get_seq_length() == 0:
            kwargs["routing"] = state
        return args, kwargs

    hook = find_decoder(model).register_forward_pre_hook(give_state, with_kwargs=True, prepend=True)
    try:
        return model.generate(
            **inputs,
            max_new_tokens=6,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
            pad_token_id=0,
        )
    finally:
        hook.remove()


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", PROMPTS)
def test_a_prompt_takes_the_published_path_and_gives_the_published_tokens(name: str, attention: str) -> None:
    model = build_model(attention=attention)
    inputs, state = prompts(model, name)
    seen: list[Tensor] = []
    router = find_decoder(model).router
    logits_of = router.logits
    router.logits = lambda *args: seen.append(logits_of(*args)) or seen[-1]
    output = answer(model, inputs, state)
    assert_close(torch.stack(seen), golden(f"{name}/router_logits"), "router logits")
    assert torch.equal(state.kept_layers().T, golden(f"{name}/execute"))
    assert output.sequences[0].tolist()[-6:] == golden(f"{name}/greedy")[0, 1:].tolist()
    assert_close(torch.stack(output.logits, dim=1), golden(f"{name}/greedy_scores"), "scores")


@torch.no_grad()
@pytest.mark.parametrize("name", PROMPTS)
def test_the_states_of_a_prompt_are_the_published_ones(name: str) -> None:
    model = build_model()
    inputs, state = prompts(model, name)
    recorder = Recorder(model)
    logits = model(**inputs, routing=state, use_cache=True).logits
    layout = recorder.states[0].roe.layout
    assert torch.equal(layout.position_ids, golden(f"{name}/position_ids"))
    for layer in range(NUM_LAYERS):
        assert_close(recorder.outputs[layer], golden(f"{name}/layer_out")[layer], f"layer {layer}")
    assert_close(logits, golden(f"{name}/prefill_logits")[:, 2:], "prefill logits")


@torch.no_grad()
def test_a_batch_is_decided_together_as_published_and_row_by_row_as_ours() -> None:
    model = build_model()
    inputs, state = prompts(model, "eval_b2")
    logits = model(**inputs, routing=state).logits
    own = golden("eval_b2/execute").T
    assert torch.equal(state.kept_layers(), own.any(dim=0, keepdim=True).expand(2, -1))
    assert_close(logits, golden("eval_b2/prefill_logits")[:, 2:], "prefill logits")
    alone = build_model(replace(PUBLISHED, batch_decides_together=False))
    inputs, state = prompts(alone, "eval_b2")
    alone(**inputs, routing=state)
    assert not torch.equal(state.kept_layers(), own.any(dim=0, keepdim=True).expand(2, -1))
