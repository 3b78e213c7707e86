"""Promises of escalation: planned, resumed and dense rows of one batch are what each of them is alone."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from batches import generate, pad, prompts_of_lengths
from fuzzyroe import RoutingState, attach, detach, set_escalation
from fuzzyroe.attach import find_decoder, find_router
from fuzzyroe.cache import kept_layers, prefill_runs
from fuzzyroe.escalation import Escalation
from fuzzyroe.routers import RandomRouter, StaticRouter
from fuzzyroe.routers.roe import LinearRouter

UNITS = ("layer", "attention", "ffn")
NEVER, ALWAYS = Escalation.make("never"), Escalation.make("always")
PLANS = [[1, 0, 1, 0], [0, 0, 0, 0], [1, 1, 1, 1], [1, 1, 0, 1], [0, 1, 1, 1], [1, 1, 1, 0], [1, 0, 0, 0], [1, 0, 1, 1]]


class Chosen:
    """An escalation of given levels, for rows that it knows by a number that their prompt begins with."""

    shallower_from = None
    shallower_ratio = 0.5

    def __init__(self, levels: dict[int, int]) -> None:
        self.by_prompt = levels

    def read_prompts(self, hidden_states, routing):
        first = (routing.turn_ids >= 0).int().argmax(dim=1)
        return {"begins_with": hidden_states[torch.arange(len(first)), first, 0]}

    def doubts(self, readings):
        return readings["begins_with"]

    def levels(self, doubts):
        return np.array([self.by_prompt[round(float(doubt), 5)] for doubt in doubts])


def choose(model, rows, levels) -> Chosen:
    """Escalate each prompt, told by the embedding of its first token, to a level."""
    first = model.get_input_embeddings()(torch.stack([row[0] for row in rows]))[:, 0].tolist()
    return Chosen({round(value, 5): level for value, level in zip(first, levels, strict=True)})


def distinct(rows) -> list[torch.Tensor]:
    """Let prompt number n begin with token 3 + n."""
    return [torch.cat([torch.tensor([3 + number]), row]) for number, row in enumerate(rows)]


@pytest.fixture
def batch(tiny_decoder, fixed_router, request):
    """Eight prompts with their plans and levels: some keep the plan, some go on, one is dense from the start."""
    rows, keep = distinct(prompts_of_lengths([4, 9, 1, 6, 12, 2, 7, 5])), torch.tensor(PLANS).bool()
    attach(tiny_decoder, 4, "xavier", fixed_router(keep), getattr(request, "param", "layer"))
    levels = [0, 2, 2, 2, 0, 2, 0, 2]
    set_escalation(tiny_decoder, choose(tiny_decoder, rows, levels))
    final = keep | (torch.tensor(levels) == 2).unsqueeze(1)
    return SimpleNamespace(model=tiny_decoder, rows=rows, keep=keep, levels=levels, final=final)


def run_alone(batch, index: int, **options):
    router = find_router(batch.model)
    router.keep = batch.keep[index : index + 1].float()
    try:
        return generate(batch.model, [batch.rows[index]], **options)
    finally:
        router.keep = batch.keep.float()


@pytest.mark.parametrize("batch", UNITS, indirect=True)
def test_a_mixed_batch_of_planned_escalated_and_dense_rows_equals_each_alone(batch) -> None:
    tokens, logits, output = generate(batch.model, batch.rows)
    cache = output.past_key_values
    assert torch.equal(kept_layers(cache, 8), batch.final)
    assert cache.escalation.levels.tolist() == [0, 2, 0, 2, 0, 2, 0, 2], "a dense row has nothing to resume"
    for index in range(len(batch.rows)):
        tokens_alone, logits_alone, _ = run_alone(batch, index)
        assert torch.equal(tokens[index], tokens_alone[0])
        torch.testing.assert_close(logits[index], logits_alone[0], atol=1e-4, rtol=0)


@pytest.mark.parametrize("batch", UNITS, indirect=True)
def test_a_resumed_row_has_the_answer_and_the_cache_of_its_final_plan_from_the_start(batch) -> None:
    tokens, logits, output = generate(batch.model, batch.rows)
    set_escalation(batch.model, None)
    find_router(batch.model).keep = batch.final.float()
    wanted_tokens, wanted_logits, wanted = generate(batch.model, batch.rows)
    assert torch.equal(tokens, wanted_tokens)
    torch.testing.assert_close(logits, wanted_logits, atol=1e-4, rtol=0)
    for mine, theirs in zip(output.past_key_values.layers, wanted.past_key_values.layers, strict=True):
        assert type(mine) is type(theirs) and mine.get_seq_length() == theirs.get_seq_length()
        torch.testing.assert_close(mine.keys, theirs.keys, atol=1e-4, rtol=0)
        torch.testing.assert_close(mine.values, theirs.values, atol=1e-4, rtol=0)


@pytest.mark.parametrize("seed", range(12))
def test_random_batches_plans_and_levels_equal_each_alone(tiny_llama, fixed_router, seed) -> None:
    generator = torch.Generator().manual_seed(seed)
    rows = distinct(prompts_of_lengths(torch.randint(1, 20, (8,), generator=generator).tolist(), seed))
    keep = torch.rand(8, 4, generator=generator) >= 0.5
    levels = (2 * torch.randint(0, 2, (8,), generator=generator)).tolist()
    attach(tiny_llama, 4, "xavier", fixed_router(keep), UNITS[seed % 3])
    set_escalation(tiny_llama, choose(tiny_llama, rows, levels))
    case = SimpleNamespace(model=tiny_llama, rows=rows, keep=keep)
    tokens, logits, _ = generate(tiny_llama, rows)
    for index in range(8):
        tokens_alone, logits_alone, _ = run_alone(case, index)
        assert torch.equal(tokens[index], tokens_alone[0])
        torch.testing.assert_close(logits[index], logits_alone[0], atol=1e-4, rtol=0)


def test_never_escalating_is_the_plan_alone_bit_for_bit(batch) -> None:
    set_escalation(batch.model, None)
    tokens, logits, output = generate(batch.model, batch.rows)
    set_escalation(batch.model, NEVER)
    found_tokens, found_logits, found = generate(batch.model, batch.rows)
    assert torch.equal(found_tokens, tokens) and torch.equal(found_logits, logits)
    assert found.past_key_values.escalation.levels.tolist() == [0] * 8
    assert torch.equal(prefill_runs(found.past_key_values, 8), prefill_runs(output.past_key_values, 8))


@pytest.mark.parametrize("batch", UNITS, indirect=True)
def test_escalating_all_gives_the_answers_of_the_dense_model(batch) -> None:
    set_escalation(batch.model, ALWAYS)
    tokens, logits, output = generate(batch.model, batch.rows)
    uncached = generate(batch.model, batch.rows, use_cache=False)[0]
    detach(batch.model)
    wanted_tokens, wanted_logits, _ = generate(batch.model, batch.rows)
    assert torch.equal(tokens, wanted_tokens) and torch.equal(uncached, wanted_tokens)
    torch.testing.assert_close(logits, wanted_logits, atol=1e-4, rtol=0)
    assert bool(kept_layers(output.past_key_values, 8).all())


def test_runs_count_the_layers_that_ran_twice(batch) -> None:
    output = generate(batch.model, batch.rows)[2]
    runs = prefill_runs(output.past_key_values, 8)
    assert runs[0].tolist() == [1, 0, 1, 0], "a row that keeps its plan"
    assert runs[2].tolist() == [1, 1, 1, 1], "a row that is dense"
    assert runs[3].tolist() == [1, 1, 1, 2], "layer 2 was skipped first; layer 3 runs again"
    assert runs[7].tolist() == [1, 1, 2, 2], "layer 1 was skipped; all behind it run again"


@torch.no_grad()
def test_the_state_tells_what_was_planned_what_was_read_and_what_ran(batch) -> None:
    inputs = pad(batch.rows)
    routing = RoutingState.from_batch(inputs)
    output = batch.model(**inputs, routing=routing)
    record = routing.result.escalation
    assert torch.equal(record.planned, batch.keep) and torch.equal(routing.kept_layers(), batch.final)
    assert [routing.result.layer_runs[layer] for layer in range(4)] == record.runs.sum(dim=0).tolist()
    assert torch.equal(routing.result.keep_weights[:, 0] >= 0.5, batch.final)
    # a row that kept its plan: its margin is that of the logits that it gave
    best = output.logits[0, -1].topk(2).values
    margin = float(best[0] - best[1])
    assert record.readings["answer_margin"][0].item() == pytest.approx(margin / (1 + margin), abs=1e-5)


@torch.no_grad()
def test_right_padding_and_the_logits_asked_for_change_nothing(batch) -> None:
    inputs = pad(batch.rows, "right")
    output = batch.model(**inputs)
    for index, row in enumerate(batch.rows):
        find_router(batch.model).keep = batch.keep[index : index + 1].float()
        alone = batch.model(input_ids=row.unsqueeze(0), logits_to_keep=1).logits
        torch.testing.assert_close(output.logits[index, len(row) - 1], alone[0, -1], atol=1e-4, rtol=0)


@pytest.mark.parametrize("options", [{"num_beams": 3}, {"num_beams": 2, "num_return_sequences": 2}], ids=str)
def test_beams_equal_those_of_each_prompt_alone(batch, options) -> None:
    count = options.get("num_return_sequences", 1)
    together = generate(batch.model, batch.rows, **options)[0]
    for index in range(8):
        alone = run_alone(batch, index, **options)[0]
        assert torch.equal(together[index * count : (index + 1) * count], alone)


def test_sampling_with_a_seed_draws_what_the_final_plan_draws(batch) -> None:
    inputs = pad(batch.rows)

    def draw() -> torch.Tensor:
        torch.manual_seed(3)
        return batch.model.generate(**inputs, max_new_tokens=5, do_sample=True, num_return_sequences=2)

    escalated = draw()
    set_escalation(batch.model, None)
    find_router(batch.model).keep = batch.final.float()
    assert torch.equal(escalated, draw())


def test_a_second_turn_continues_the_final_plan(batch) -> None:
    router, escalation = find_router(batch.model), find_router(batch.model).escalation
    for index in (1, 4, 7):
        set_escalation(batch.model, escalation)
        tokens, _, first = run_alone(batch, index)
        history = torch.cat([batch.rows[index], tokens[0], torch.tensor([5, 6])]).unsqueeze(0)
        output = batch.model.generate(
            history, past_key_values=first.past_key_values, max_new_tokens=4, return_dict_in_generate=True
        )
        assert torch.equal(kept_layers(output.past_key_values, 1)[0], batch.final[index])
        # the same conversation, read at once under the final plan
        set_escalation(batch.model, None)
        router.keep = batch.final[index : index + 1].float()
        assert torch.equal(output.sequences, batch.model.generate(history, max_new_tokens=4))


def test_drafts_by_prompt_lookup_change_no_token(tiny_llama, fixed_router) -> None:
    attach(tiny_llama, 4, "xavier", fixed_router(torch.tensor([[1, 0, 1, 0]])))
    set_escalation(tiny_llama, ALWAYS)
    rows = [torch.tensor([5, 6, 7, 8, 5, 6, 7, 8, 5, 6])]
    assert torch.equal(generate(tiny_llama, rows, prompt_lookup_num_tokens=3)[0], generate(tiny_llama, rows)[0])


@pytest.mark.parametrize("router", ["static", "random"])
def test_a_shallower_plan_keeps_what_was_planned_and_skips_its_share(tiny_llama, router) -> None:
    made = {"static": StaticRouter(4, [3, 1, 2], 0.5), "random": RandomRouter(4, target_skip_ratio=0.5)}[router]
    attach(tiny_llama, 4, "xavier", made)
    set_escalation(tiny_llama, Escalation.make("margin", all_from=None, shallower_from=0.0))
    rows = prompts_of_lengths([4, 9, 1, 6])
    tokens, _, output = generate(tiny_llama, rows)
    record = output.past_key_values.escalation
    kept = kept_layers(output.past_key_values, 4)
    assert record.levels.tolist() == [1] * 4 and bool((kept | ~record.planned).all())
    assert kept.sum(dim=1).tolist() == [3] * 4 and record.planned.sum(dim=1).tolist() == [2] * 4
    for index, row in enumerate(rows):
        assert torch.equal(generate(tiny_llama, [row])[0][0], tokens[index])


def test_each_row_of_a_batch_has_the_shallower_plan_of_its_own_target(tiny_llama) -> None:
    attach(tiny_llama, 4, "xavier", StaticRouter(4, [3, 1, 2, 0]))
    set_escalation(tiny_llama, Escalation.make("margin", all_from=None, shallower_from=0.0))
    inputs = pad(prompts_of_lengths([4, 9, 1]))
    routing = RoutingState.from_batch(inputs)
    routing.target_skip_ratio = torch.tensor([0.0, 0.5, 1.0])
    tiny_llama(**inputs, routing=routing)
    assert routing.result.escalation.levels.tolist() == [0, 1, 1]
    assert routing.kept_layers().sum(dim=1).tolist() == [4, 3, 2]


@pytest.mark.parametrize("summary", ["tokens", "pooled"])
def test_layer_wise_routers_are_escalated_with_and_without_routing_tokens(tiny_llama, summary) -> None:
    rows = prompts_of_lengths([4, 9, 1, 6, 12])
    wanted = generate(tiny_llama, rows)[0]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        attach(tiny_llama, 4, "xavier", LinearRouter(4, 32, summary))
    planned = kept_layers(generate(tiny_llama, rows)[2].past_key_values, 5)
    assert 0 < planned.sum() < planned.numel() and not torch.equal(planned[:1].expand_as(planned), planned)
    set_escalation(tiny_llama, ALWAYS)
    tokens, _, output = generate(tiny_llama, rows)
    assert torch.equal(tokens, wanted)
    assert torch.equal(output.past_key_values.escalation.planned, planned)
    # by chance: each row goes further or not, whoever is beside it
    set_escalation(tiny_llama, Escalation.make("random", all_from=0.5))
    tokens, _, output = generate(tiny_llama, rows)
    assert len(set(output.past_key_values.escalation.levels.tolist())) == 2
    for index, row in enumerate(rows):
        assert torch.equal(generate(tiny_llama, [row])[0][0], tokens[index])


def test_forced_plans_observed_passes_and_training_are_not_escalated(batch) -> None:
    set_escalation(batch.model, ALWAYS)
    inputs = pad(batch.rows)
    state = RoutingState.from_batch(inputs)
    forced, observed = state.forced(batch.keep), RoutingState.from_batch(inputs, mode="observe")
    for routing in (forced, observed):
        batch.model(**inputs, routing=routing)
        assert routing.result.escalation is None and torch.equal(routing.kept_layers(), batch.keep)
    batch.model.train()
    soft = RoutingState.from_batch(inputs, mode="soft")
    batch.model(**inputs, routing=soft)
    assert soft.result.escalation is None
    assert not find_decoder(batch.model)._forward_hooks, "no pass has left its hook behind"


def test_a_failed_pass_leaves_no_hook(batch) -> None:
    inputs = pad(batch.rows)
    with pytest.raises(ValueError, match="nan"):
        find_router(batch.model).keep = torch.full((8, 4), torch.nan)
        batch.model(**inputs)
    assert not find_decoder(batch.model)._forward_hooks


def test_what_cannot_be_escalated_is_refused(tiny_llama, fixed_router) -> None:
    attach(tiny_llama.model, 4)
    with pytest.raises(ValueError, match="without a router"):
        set_escalation(tiny_llama.model, ALWAYS)
    detach(tiny_llama.model)
    attach(tiny_llama.model, 4, router=fixed_router(torch.ones(1, 4)))
    with pytest.raises(ValueError, match="no output head"):
        set_escalation(tiny_llama.model, ALWAYS)
    detach(tiny_llama.model)
    attach(tiny_llama, 4, router=LinearRouter(4, 32))
    with pytest.raises(ValueError, match="layer by layer"):
        set_escalation(tiny_llama, Escalation.make("margin", shallower_from=0.2))
