"""A queue of messages: planned once, batched by plan, answered as each message alone is."""

from __future__ import annotations

import random

import pytest
import torch
from PIL import Image

from fuzzyroe.attach import find_decoder
from llava.eval import queue
from llava.eval.generation import Generator, Message, make_message
from llava.eval.generation_options import GenerationOptions
from llava.eval.queue import answer_all, answer_queue
from llava.model.planned_prompts import plan_prompts
from llava.model.routing import set_skip_rate
from llava.model.token_pruning import set_token_pruning

GREEDY = GenerationOptions(max_new_tokens=5)


@pytest.fixture
def messages(images: list[Image.Image]) -> list[Message]:
    """Eleven questions of different lengths with none, one or two images."""
    draw = random.Random(0)
    return [
        make_message(
            " ".join(f"w{draw.randrange(80)}" for _ in range(draw.randrange(1, 9))) + " ?", images[: index % 3]
        )
        for index in range(11)
    ]


@pytest.fixture
def alone(generator: Generator, messages: list[Message]) -> list[tuple[str, list[bool]]]:
    """Answer and kept layers of each message alone."""
    outputs = [generator.generate([message], GREEDY) for message in messages]
    return [(output.texts[0], output.kept_layers[0].tolist()) for output in outputs]


@pytest.mark.parametrize("schedule", queue.SCHEDULES)
@pytest.mark.parametrize("batch_size", [1, 2, 4, 11, 20])
def test_answers_are_those_of_each_message_alone(generator, messages, alone, batch_size, schedule) -> None:
    found: list = [None] * len(messages)
    for batch, output in answer_queue(generator, messages, GREEDY, batch_size, schedule):
        assert len(batch) <= batch_size
        for row, index in enumerate(batch):
            found[index] = (output.texts[row], output.kept_layers[row].tolist())
    assert found == alone
    assert len({tuple(kept) for _, kept in alone}) > 1, "the plans of this test should differ"


@pytest.mark.parametrize("seed", range(3))
def test_answers_do_not_depend_on_the_order_of_the_queue(generator, messages, alone, seed) -> None:
    order = random.Random(seed).sample(range(len(messages)), len(messages))
    answers = answer_all(generator, [messages[index] for index in order], GREEDY, 3)
    assert answers == [alone[index][0] for index in order]


def test_batches_hold_plans_that_agree_better_than_those_of_arrival(generator, messages) -> None:
    def layers_read(schedule: str) -> int:
        batches = answer_queue(generator, messages * 4, GREEDY, 4, schedule)
        return sum(int(output.kept_layers.any(dim=0).sum()) for _, output in batches)

    assert layers_read("plan") < layers_read("arrival")


def test_every_part_runs_once_for_each_message(generator, messages, monkeypatch) -> None:
    router, model = find_decoder(generator.model).router, generator.model.model
    seen = {"planned": 0, "images": 0, "layer 0": 0}

    def count(name: str, number: int) -> None:
        seen[name] += number

    plan = router.plan
    monkeypatch.setattr(router, "plan", lambda states, routing: (count("planned", len(states)), plan(states, routing)))
    model.vision_tower.register_forward_pre_hook(
        lambda module, args, kwargs: count("images", len(args[0] if args else kwargs["pixel_values"])), with_kwargs=True
    )
    list(answer_queue(generator, messages, GREEDY, 4))
    assert seen["planned"] == len(messages)
    assert seen["images"] == sum(len(message.images) for message in messages)


def test_planning_counts_as_part_of_the_prefill(generator, messages, monkeypatch) -> None:
    plan = generator.plan
    monkeypatch.setattr(generator, "plan", lambda chosen: (plan(chosen)[0], 1e6))
    outputs = [output for _, output in answer_queue(generator, messages, GREEDY, 4)]
    assert sum(output.prefill_ms for output in outputs) >= 3e6


@pytest.mark.parametrize("options", [GenerationOptions(max_new_tokens=4, num_beams=3)], ids=["beams"])
def test_beams_share_the_plan_of_their_prompt(generator, messages, options) -> None:
    expected = [generator.generate([message], options).texts[0] for message in messages[:6]]
    assert answer_all(generator, messages[:6], options, 2) == expected


def test_sampling_and_stop_strings_work_on_planned_prompts(generator, messages, alone) -> None:
    sampled = answer_all(generator, messages, GenerationOptions(max_new_tokens=4, do_sample=True, temperature=2.0), 4)
    assert all(sampled)
    words = alone[0][0].split()
    stop = next(word for index, word in enumerate(words) if index and word not in words[:index])
    answers = answer_all(generator, messages, GenerationOptions(max_new_tokens=5, until=(stop,)), 4)
    assert answers[0].split() == words[: words.index(stop)]


@pytest.mark.parametrize("is_pruned", [False, True])
def test_a_plan_ahead_is_the_plan_of_the_prefill_bit_for_bit(generator, messages, is_pruned) -> None:
    if is_pruned:
        set_token_pruning(generator.model, 5)
        generator = Generator(_as_checkpoint(generator), generator.template)
    inputs = generator.encode(messages[2:6])
    states = []
    hook = (
        find_decoder(generator.model)
        .layers[0]
        .register_forward_pre_hook(
            lambda module, args, kwargs: states.append(args[0] if args else kwargs["hidden_states"]), with_kwargs=True
        )
    )
    with torch.no_grad():
        generator.model(**inputs)
        hook.remove()
        prompts = plan_prompts(generator.model, inputs)
    for row, prompt in enumerate(prompts):
        assert torch.equal(prompt.states, states[0][row][inputs["attention_mask"][row].bool()])


def test_a_pruned_queue_is_answered_as_each_message_alone(generator, messages) -> None:
    set_token_pruning(generator.model, 3)
    generator = Generator(_as_checkpoint(generator), generator.template)
    expected = [generator.generate([message], GREEDY).texts[0] for message in messages]
    assert answer_all(generator, messages, GREEDY, 4) == expected


def test_a_dense_model_is_answered_as_it_comes(generator, messages) -> None:
    set_skip_rate(generator.model, None)
    batches = [batch for batch, _ in answer_queue(generator, messages, GREEDY, 4)]
    assert batches == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10]]
    with pytest.raises(ValueError, match="does not plan ahead"):
        generator.plan(messages[:1])


def test_misuse_is_refused(generator, messages) -> None:
    with pytest.raises(ValueError, match="Schedule 'random' is unknown; use one of plan, arrival"):
        list(answer_queue(generator, messages, GREEDY, 4, "random"))
    with pytest.raises(ValueError, match="batch_size is 0"):
        answer_all(generator, messages, GREEDY, 0)


def _as_checkpoint(generator: Generator):
    from llava.model.builder import Checkpoint

    return Checkpoint(generator.model, generator.tokenizer, generator.image_processor, "tiny", "tiny", None)
