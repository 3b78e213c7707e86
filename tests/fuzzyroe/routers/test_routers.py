"""Promises that every router keeps: one interface, its budget, no dependence on the batch, a life in checkpoints."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from fuzzyroe.attach import attach, find_decoder, is_attached, set_router
from fuzzyroe.budget import BudgetTable, allocate
from fuzzyroe.cache import kept_layers
from fuzzyroe.prompt_hash import prompt_hashes
from fuzzyroe.routers import (
    ROUTERS,
    FuzzyRouter,
    KeepAllRouter,
    LinearScoreRouter,
    OracleRouter,
    PerLayerFuzzyRouter,
    RandomRouter,
    Router,
    StaticRouter,
    get_router_class,
    get_router_name,
)
from fuzzyroe.routing_state import RoutingState
from fuzzyroe.rules import load_rule_base
from fuzzyroe.state_dict import load_routing_state_dict, routing_state_dict

NUM_LAYERS, HIDDEN, NUM_PROMPTS = 4, 32, 96


@pytest.fixture(scope="module")
def prompts() -> tuple[torch.Tensor, RoutingState]:
    """Embeddings of prompts, (96, 14, 32), five image positions each and questions of 3 to 9, and where they are."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(3, 10, (NUM_PROMPTS, 1), generator=generator)
    mask = torch.arange(14) < 5 + lengths
    image = (torch.arange(14) < 5).expand(NUM_PROMPTS, -1)
    spread = torch.rand(NUM_PROMPTS, 1, 1, generator=generator)
    states = torch.randn(NUM_PROMPTS, 14, HIDDEN, generator=generator) * spread
    states = states + torch.randn(HIDDEN, generator=generator)
    return states, RoutingState.from_batch({"input_ids": image.long(), "attention_mask": mask.long()}, image_token_id=1)


def make_fuzzy(states: torch.Tensor, routing: RoutingState, kind: type[FuzzyRouter] = FuzzyRouter) -> FuzzyRouter:
    router = kind(load_rule_base("default"), NUM_LAYERS)
    router.plan(states, routing)
    raw = routing.result.features[:, 0]
    router.feature_low.copy_(raw.amin(dim=0))
    router.feature_high.copy_(raw.amax(dim=0))
    router.plan(states, routing)
    router.score_quantiles.copy_(
        routing.result.scores[:, 0].quantile(torch.linspace(0, 1, len(router.score_quantiles)))
    )
    losses = np.random.default_rng(0).exponential(size=(80, NUM_LAYERS)).cumsum(axis=1)
    losses *= np.linspace(1, 6, 80)[:, None]  # a higher score, a larger loss
    router.set_budget_table(allocate(losses, (np.arange(80) + 0.5) / 80, [2, 1, 3], NUM_LAYERS))
    return router


def make_per_layer(states: torch.Tensor, routing: RoutingState) -> PerLayerFuzzyRouter:
    router = PerLayerFuzzyRouter(load_rule_base("default").interpolate(), NUM_LAYERS)
    table = torch.rand(router.rules.consequents.shape, generator=torch.Generator().manual_seed(2))
    router.rules.consequents.copy_(table)
    may_skip = np.arange(NUM_LAYERS) > 0
    router.set_budget_table(BudgetTable(np.array([0, may_skip.mean()]), np.stack([0 * may_skip, may_skip])))
    router.plan(states, routing)
    raw = routing.result.features[:, 0]
    router.feature_low.copy_(raw.amin(dim=0))
    router.feature_high.copy_(raw.amax(dim=0))
    router.plan(states, routing)
    pooled = router.rules(routing.result.features)[..., 1:].flatten()
    router.score_quantiles.copy_(pooled.quantile(torch.linspace(0, 1, len(router.score_quantiles))))
    return router


def make_oracle(states: torch.Tensor, routing: RoutingState) -> OracleRouter:
    generator = torch.Generator().manual_seed(1)
    places = torch.rand(NUM_PROMPTS, 1, NUM_LAYERS - 1, generator=generator).argsort(dim=-1)
    keep = torch.ones(NUM_PROMPTS, NUM_LAYERS, NUM_LAYERS, dtype=torch.bool)
    keep[..., 1:] = places >= torch.arange(NUM_LAYERS).view(1, -1, 1)
    losses = torch.rand(NUM_PROMPTS, NUM_LAYERS, generator=generator).cumsum(dim=1)
    return OracleRouter.from_search(prompt_hashes(states, routing)[:, 0], keep, losses)


MAKERS: dict[str, Callable[[torch.Tensor, RoutingState], Router]] = {
    "fuzzy": make_fuzzy,
    "linear_score": functools.partial(make_fuzzy, kind=LinearScoreRouter),
    "fuzzy_per_layer": make_per_layer,
    "random": lambda states, routing: RandomRouter(NUM_LAYERS, seed=5),
    "static": lambda states, routing: StaticRouter(NUM_LAYERS, [2, 3, 1], criterion="block influence"),
    "oracle": make_oracle,
    "none": lambda states, routing: KeepAllRouter(NUM_LAYERS),
}
planners = pytest.mark.parametrize("name", list(MAKERS))


def part(routing: RoutingState, rows: slice) -> RoutingState:
    """The state of some rows, still to be planned."""
    return RoutingState(routing.turn_ids[rows], routing.image_mask[rows], routing.question_mask[rows], "hard", None, 1)


@pytest.fixture
def make(prompts: tuple[torch.Tensor, RoutingState]) -> Callable[[str], Router]:
    """Makes a router of a name for the prompts."""
    states, routing = prompts

    def build(name: str) -> Router:
        return MAKERS[name](states, part(routing, slice(None)))

    return build


def plan(router: Router, prompts: tuple, rows: slice = slice(None), skip_rate=None) -> torch.Tensor:
    """Keep weights of some of the prompts, (B, L)."""
    states, routing = prompts
    state = part(routing, rows)
    state.target_skip_ratio = skip_rate
    router.plan(states[rows], state)
    assert state.result.keep_weights.shape == (len(states[rows]), 1, NUM_LAYERS)
    return state.result.keep_weights[:, 0]


def test_every_router_that_plans_ahead_is_tested_here() -> None:
    assert {name for name, router in ROUTERS.items() if not router.decides_layer_wise} == set(MAKERS)


@planners
def test_keep_weights_are_decisions_and_the_first_layer_is_kept(name, make, prompts) -> None:
    router = make(name)
    weights = plan(router, prompts, skip_rate=router.max_skip_ratio)
    assert set(weights.unique().tolist()) <= {0.0, 1.0} and weights[:, 0].all()


@planners
def test_budgets_are_met_in_the_mean_and_at_both_ends(name, make, prompts) -> None:
    router = make(name)
    for rate in (0.0, 0.25 * router.max_skip_ratio, 0.5 * router.max_skip_ratio, router.max_skip_ratio):
        tolerance = 0.5 / NUM_LAYERS + 1e-6 if name == "static" else 0.03
        asked = plan(router, prompts, skip_rate=rate)
        assert 1 - asked.mean() == pytest.approx(rate, abs=tolerance)
        router.set_skip_rate(rate)
        assert torch.equal(plan(router, prompts), asked) and float(router.target_skip_ratio) == pytest.approx(rate)
    assert plan(router, prompts, skip_rate=0.0).all()


@planners
def test_each_row_gets_the_budget_it_asks_for(name, make, prompts) -> None:
    router = make(name)
    low, high = 0.2 * router.max_skip_ratio, 0.9 * router.max_skip_ratio
    rates = torch.tensor([low, high]).repeat(NUM_PROMPTS // 2)
    mixed = plan(router, prompts, skip_rate=rates)
    assert torch.equal(mixed[::2], plan(router, prompts, skip_rate=low)[::2])
    assert torch.equal(mixed[1::2], plan(router, prompts, skip_rate=high)[1::2])


@planners
def test_a_plan_does_not_depend_on_the_batch(name, make, prompts) -> None:
    router = make(name)
    router.set_skip_rate(0.5 * router.max_skip_ratio)
    together = plan(router, prompts)
    for row in (0, 7, 50):
        assert torch.equal(plan(router, prompts, slice(row, row + 1)), together[row : row + 1])
    assert torch.equal(plan(router, prompts, slice(30, 60)), together[30:60])
    if name in ("fuzzy", "random", "oracle"):
        assert len(together.unique(dim=0)) > 1, "plans differ between prompts"


@planners
@pytest.mark.parametrize(
    ("skip_rate", "error", "message"),
    [
        (1.1, ValueError, "outside the calibrated range"),
        (-0.1, ValueError, "outside the calibrated range"),
        (torch.tensor([0.0, 0.0, 2.0]), ValueError, "outside the calibrated range"),
        (torch.zeros(2), ValueError, r"shape \(2,\); allowed is one of \[\(\), \(3,\)\]"),
        (torch.zeros(3, dtype=torch.long), TypeError, "tensor of torch.int64"),
        ("0.3", TypeError, "skip_rate is a str"),
        (True, TypeError, "skip_rate is a bool"),
        (float("nan"), ValueError, "outside the calibrated range"),
    ],
    ids=str,
)
def test_budgets_that_mean_nothing_are_refused(name, make, skip_rate, error, message) -> None:
    with pytest.raises(error, match=message):
        make(name).check_target(skip_rate, num_rows=3)


@planners
def test_a_refused_budget_changes_nothing(name, make) -> None:
    router = make(name)
    router.set_skip_rate(0.5 * router.max_skip_ratio)
    for wrong in (router.max_skip_ratio + 0.01, torch.zeros(3)):
        with pytest.raises(ValueError):
            router.set_skip_rate(wrong)
    assert float(router.target_skip_ratio) == pytest.approx(0.5 * router.max_skip_ratio)


@planners
def test_a_saved_router_is_rebuilt_with_its_plans(name, make, prompts, tiny_llama, tmp_path: Path) -> None:
    router = make(name)
    router.set_skip_rate(0.5 * router.max_skip_ratio)
    attach(tiny_llama, 4, "xavier", router)
    assert get_router_name(router) == name
    options, tensors = json.loads(json.dumps(router.save_options(tmp_path))), routing_state_dict(tiny_llama)
    rebuilt = get_router_class(name).build(options, NUM_LAYERS, HIDDEN, lambda file: str(tmp_path / file))
    set_router(tiny_llama, rebuilt)
    load_routing_state_dict(tiny_llama, tensors)
    assert torch.equal(plan(rebuilt, prompts), plan(router, prompts))
    assert float(rebuilt.target_skip_ratio) == float(router.target_skip_ratio)
    assert rebuilt.save_options(tmp_path) == options


@planners
def test_plans_are_those_of_float32_whatever_the_models_type(name, make, prompts) -> None:
    router = make(name)
    expected = plan(router, prompts, skip_rate=0.5 * router.max_skip_ratio)
    router.to(torch.bfloat16)
    assert torch.equal(plan(router, prompts, skip_rate=0.5 * router.max_skip_ratio), expected)


@pytest.mark.parametrize("name", ["random", "static", "none"])
def test_a_generation_follows_the_plan_of_its_prompt(name, make, tiny_llama, padded_prompts) -> None:
    router = make(name)
    router.set_skip_rate(0.5 * router.max_skip_ratio)
    attach(tiny_llama, 4, "xavier", router)
    state = RoutingState.from_batch({"attention_mask": padded_prompts["attention_mask"]})
    tiny_llama(**padded_prompts, routing=state)
    output = tiny_llama.generate(**padded_prompts, max_new_tokens=3, do_sample=False, return_dict_in_generate=True)
    assert torch.equal(kept_layers(output.past_key_values, 4), state.kept_layers())
    for row in range(4):
        mask = padded_prompts["attention_mask"][row].bool()
        alone = {"input_ids": padded_prompts["input_ids"][row : row + 1, mask]}
        tokens = tiny_llama.generate(**alone, max_new_tokens=3, do_sample=False)[0, -3:]
        assert torch.equal(tokens, output.sequences[row, -3:])


@torch.no_grad()
def test_the_router_none_is_the_dense_model_bit_for_bit(tiny_llama, padded_prompts) -> None:
    expected = tiny_llama(**padded_prompts).logits
    attach(tiny_llama, 4, "xavier", KeepAllRouter(NUM_LAYERS))
    assert torch.equal(tiny_llama(**padded_prompts).logits, expected)


def test_random_plans_change_with_the_seed_and_spread_over_the_layers(prompts) -> None:
    weights = plan(RandomRouter(NUM_LAYERS, seed=1), prompts, skip_rate=0.5)
    assert not torch.equal(plan(RandomRouter(NUM_LAYERS, seed=2), prompts, skip_rate=0.5), weights)
    assert (weights.sum(dim=1) == 2).all(), "two of four layers, for every prompt"
    assert ((1 - weights[:, 1:]).mean(dim=0) - 2 / 3).abs().max() < 0.15
    between = (1 - plan(RandomRouter(NUM_LAYERS), prompts, skip_rate=0.4)).sum(dim=1)
    assert set(between.tolist()) == {1.0, 2.0}


@pytest.mark.parametrize("order", [[1, 1], [4], [-1]])
def test_an_order_of_layers_that_are_not_there_is_refused(order) -> None:
    with pytest.raises(ValueError, match="allowed are layers 0 to 3, each once"):
        StaticRouter(NUM_LAYERS, order)


def test_a_router_is_replaced_only_in_an_attached_model(tiny_llama, padded_prompts) -> None:
    with pytest.raises(ValueError, match="attach it before"):
        set_router(tiny_llama, KeepAllRouter(NUM_LAYERS))
    attach(tiny_llama, 4)
    with pytest.raises(TypeError, match="no plan and no enabled"):
        set_router(tiny_llama, torch.nn.Linear(1, 1))
    set_router(tiny_llama, StaticRouter(NUM_LAYERS, [3], target_skip_ratio=0.25))
    assert is_attached(tiny_llama) and find_decoder(tiny_llama).router.layer_order == [3]


def test_an_unknown_router_is_named_with_the_known_ones() -> None:
    with pytest.raises(KeyError, match="Router 'lucky' is unknown; use one of fuzzy, fuzzy_per_layer, linear_score"):
        get_router_class("lucky")
    with pytest.raises(KeyError, match="Router is none of the routers"):
        get_router_name(Router())
