"""Batches of requests: each request once, plans that agree together, lengths minded where they cost more."""

from __future__ import annotations

import pytest
import torch

from fuzzyroe.batching import WorkModel, form_batches

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


def test_misuse_is_refused() -> None:
    with pytest.raises(ValueError, match="batch_size is 0"):
        form_batches(draw_queue(2), [3, 3], 0)
    with pytest.raises(ValueError, match="for 3 prompts"):
        form_batches(draw_queue(2), [3, 3, 3], 2)
    with pytest.raises(ValueError, match="at least 1"):
        form_batches(draw_queue(2), [3, 0], 2)
    with pytest.raises(ValueError, match="new_tokens=0"):
        WorkModel(0)
