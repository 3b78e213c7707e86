"""A queue of messages: planned once, batched by plan, answered as each message alone is."""

from __future__ import annotations

import random

import pytest
import torch
from PIL import Image

from fuzzyroe import set_skip_rate
from fuzzyroe.attach import find_decoder
from llava.inference.generator import GenerationOptions, Generator, Message, make_message
from llava.inference.scheduler import SCHEDULES, WorkModel, answer_all, answer_queue, form_batches
from llava.model.prefill_plans import plan_prompts
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


@pytest.mark.parametrize("schedule", SCHEDULES)
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


NUM_LAYERS, BATCH = 16, 8


def nested(skips: torch.Tensor) -> torch.Tensor:
    """Plans that skip the first layers of one order."""
    return torch.arange(NUM_LAYERS) >= skips.unsqueeze(1)


def draw_queue(number: int, seed: int = 0) -> torch.Tensor:
    return nested(torch.randint(0, 9, (number,), generator=torch.Generator().manual_seed(seed)))


def layers_read(plans: torch.Tensor, batches: list[list[int]]) -> int:
    return sum(int(plans[batch].any(dim=0).sum()) for batch in batches)


@pytest.mark.parametrize("number", [0, 1, 7, 8, 9, 64, 65])
def test_every_request_is_in_one_batch_and_only_the_last_is_smaller(number) -> None:
    batches = form_batches(draw_queue(number), [5 + index % 3 for index in range(number)], BATCH)
    assert sorted(index for batch in batches for index in batch) == list(range(number))
    assert all(len(batch) == BATCH for batch in batches[:-1]) and len(batches) == -(-number // BATCH)


def test_requests_of_one_length_are_ordered_by_their_skips() -> None:
    plans = draw_queue(64)
    batches = form_batches(plans, [640] * 64, BATCH)
    kept = plans.sum(dim=1)[[index for batch in batches for index in batch]]
    assert torch.equal(kept, kept.sort(descending=True).values)


@pytest.mark.parametrize("seed", range(5))
def test_fewer_layers_are_read_than_in_the_order_of_arrival(seed) -> None:
    plans = draw_queue(64, seed)
    arrival = [list(range(start, start + BATCH)) for start in range(0, 64, BATCH)]
    scheduled = layers_read(plans, form_batches(plans, [640] * 64, BATCH))
    # no order reads less than each request's own layers, shared by full batches
    least = float(plans.sum()) / BATCH
    assert least <= scheduled < 0.9 * layers_read(plans, arrival)
    assert scheduled <= 1.12 * least


def test_skip_rates_order_like_the_plans_they_stand_for() -> None:
    plans = draw_queue(64)
    rates = 1 - plans.float().mean(dim=1)
    assert form_batches(rates, [640] * 64, BATCH) == form_batches(plans, [640] * 64, BATCH)


def test_long_prompts_are_kept_apart_where_padding_costs_more_than_plans() -> None:
    plans = draw_queue(64)
    lengths = torch.randint(16, 2048, (64,), generator=torch.Generator().manual_seed(1)).tolist()

    def padding(batches: list[list[int]]) -> int:
        return sum(max(lengths[i] for i in batch) - lengths[index] for batch in batches for index in batch)

    short_answers = form_batches(plans, lengths, BATCH, WorkModel(new_tokens=1))
    long_answers = form_batches(plans, lengths, BATCH, WorkModel(new_tokens=4096))
    assert padding(short_answers) < 0.5 * padding(long_answers)
    assert layers_read(plans, long_answers) < layers_read(plans, short_answers)


@pytest.mark.parametrize("new_tokens", [1, 16, 512])
def test_the_chosen_order_is_no_worse_than_by_length_or_by_plan_alone(new_tokens) -> None:
    model, plans = WorkModel(new_tokens), draw_queue(64, 3)
    lengths = torch.randint(16, 900, (64,), generator=torch.Generator().manual_seed(4))

    def work(order: list[int]) -> float:
        return sum(model.work(plans[order[s : s + BATCH]], lengths[order[s : s + BATCH]]) for s in range(0, 64, BATCH))

    chosen = form_batches(plans, lengths.tolist(), BATCH, model)
    assert work([i for batch in chosen for i in batch]) <= work(plans.sum(dim=1).argsort(stable=True).tolist())
    assert work([i for batch in chosen for i in batch]) <= work(lengths.argsort(stable=True).tolist())


def test_the_work_of_a_batch_is_counted_as_documented() -> None:
    plans = torch.tensor([[1, 1, 0], [1, 0, 0]]).bool()
    assert WorkModel(1, 10.0).work(plans, torch.tensor([4, 6])) == 6 * 3
    assert WorkModel(3, 10.0).work(plans, torch.tensor([4, 6])) == 6 * 3 + 2 * (2 * 10 + 3)


def test_sizes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="batch_size is 0"):
        form_batches(draw_queue(2), [3, 3], 0)
    with pytest.raises(ValueError, match="for 3 prompts"):
        form_batches(draw_queue(2), [3, 3, 3], 2)
    with pytest.raises(ValueError, match="at least 1"):
        form_batches(draw_queue(2), [3, 0], 2)
    with pytest.raises(ValueError, match="new_tokens=0"):
        WorkModel(0)
