"""Promises of the fuzzy router alone: features, percentiles, budgets, precision; those of all are in test_routers."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fuzzyroe.budget import allocate
from fuzzyroe.routers import FuzzyRouter
from fuzzyroe.routers.fuzzy import NUM_QUANTILES, PerLayerFuzzyRouter
from fuzzyroe.routing_state import RoutingState
from fuzzyroe.rules import FuzzyRuleBase, load_rule_base, skfuzzy_bridge

NUM_LAYERS, ORDER = 6, [4, 2, 5]


@pytest.fixture(scope="module")
def rule_base() -> FuzzyRuleBase:
    return load_rule_base("default").interpolate()


@pytest.fixture
def router(rule_base: FuzzyRuleBase) -> FuzzyRouter:
    """A router with 25 budgets up to a half, whose score quantiles are not straight."""
    router = FuzzyRouter(rule_base, NUM_LAYERS)
    router.score_quantiles.copy_(torch.linspace(0, 1, len(router.score_quantiles)) ** 2)
    router.feature_low.fill_(0.1)
    router.feature_high.fill_(0.8)
    losses = np.random.default_rng(0).exponential(size=(400, len(ORDER) + 1)).cumsum(axis=1)
    router.set_budget_table(allocate(losses, (np.arange(400) + 0.5) / 400, ORDER, NUM_LAYERS))
    return router


def make_batch(num_turns: int | None = None) -> tuple[Tensor, RoutingState]:
    """Three examples of one or two turns with an image: states (3, 14, 8) and their routing."""
    generator = torch.Generator().manual_seed(5)
    states = torch.randn(3, 14, 8, generator=generator)
    turn_ids = torch.tensor([[0] * 4 + [1] * 5 + [2] * 5, [0] * 4 + [1] * 10, [0] * 4 + [1] * 3 + [2] * 4 + [-1] * 3])
    image = torch.zeros(3, 14, dtype=torch.bool)
    image[:, 1:4] = True
    return states, RoutingState(turn_ids, image, turn_ids > 0, "soft", num_turns=num_turns)


def test_an_antecedent_that_is_no_feature_is_named(rule_base: FuzzyRuleBase) -> None:
    variables = (replace(rule_base.antecedents[0], name="brightness"), *rule_base.antecedents[1:])
    with pytest.raises(KeyError, match="antecedent 'brightness', which is no feature"):
        FuzzyRouter(replace(rule_base, antecedents=variables), NUM_LAYERS)


def test_a_new_router_skips_nothing(rule_base: FuzzyRuleBase) -> None:
    router = FuzzyRouter(rule_base, NUM_LAYERS)
    states, routing = make_batch()
    routing.target_skip_ratio = torch.tensor([0.0, 0.2, 0.5])
    router.plan(states, routing)
    assert routing.result.keep_weights.all()
    with pytest.raises(ValueError, match=r"range \[0, 0.000\]"):
        router.set_skip_rate(0.3)


def test_an_incomplete_rule_base_is_completed_by_interpolation(rule_base: FuzzyRuleBase) -> None:
    sparse = FuzzyRouter(load_rule_base("default"), NUM_LAYERS)
    assert torch.equal(sparse.rules.consequents, FuzzyRouter(rule_base, NUM_LAYERS).rules.consequents)


def test_plan_fills_the_state(router: FuzzyRouter) -> None:
    states, routing = make_batch()
    router.plan(states, routing)
    assert routing.result.summary.text_mean.shape == (3, 2, 8)
    assert routing.result.features.shape == (3, 2, 3) and routing.result.scores.shape == (3, 2)
    assert routing.result.features.min() >= 0 and routing.result.features.max() <= 1
    assert torch.equal(routing.result.scores, router.rules(routing.result.features))
    assert torch.equal(routing.result.keep_weights, router.keep_weights(routing.result.scores))
    assert set(routing.result.keep_weights.unique().tolist()) <= {0.0, 1.0}


def test_a_plan_ignores_the_neighbours_of_an_example(router: FuzzyRouter) -> None:
    router.set_skip_rate(0.4)
    states, routing = make_batch()
    router.plan(states, routing)
    other_states, other = make_batch()
    other_states[1:] = 3.0
    router.plan(other_states, other)
    assert torch.equal(other.result.scores[0], routing.result.scores[0])
    assert torch.equal(other.result.keep_weights[0], routing.result.keep_weights[0])


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("position", [2, 6], ids=["image", "question"])
def test_non_finite_states_keep_every_layer_and_spare_the_neighbours(
    router: FuzzyRouter, value: float, position: int
) -> None:
    router.set_skip_rate(0.5)
    half_share_the_top_score = torch.linspace(0, 2, NUM_QUANTILES).clamp(max=1)
    router.score_quantiles.copy_(half_share_the_top_score)
    states, expected = make_batch()
    router.plan(states, expected)
    broken, routing = make_batch()
    broken[1, position] = value
    router.plan(broken, routing)
    assert routing.result.keep_weights[1].all() and torch.isfinite(routing.result.scores).all()
    assert torch.equal(routing.result.keep_weights[[0, 2]], expected.result.keep_weights[[0, 2]])
    assert not expected.result.keep_weights.all()


def test_percentiles_count_the_calibration_scores_below(router: FuzzyRouter) -> None:
    shares = torch.linspace(0, 1, 77)
    torch.testing.assert_close(router.percentiles(shares**2), shares, atol=2e-3, rtol=0)
    outside = router.percentiles(torch.tensor([-1.0, 0.0, 1.0, 2.0]))
    assert outside.tolist() == pytest.approx([0, 0, 1, 1], abs=1e-3)
    scores = torch.rand(500, generator=torch.Generator().manual_seed(0)).sort().values
    assert (router.percentiles(scores).diff() >= 0).all()
    assert router.percentiles(scores.view(5, 100).T).shape == (100, 5)


def test_scores_that_many_examples_share_get_their_middle_percentile(router: FuzzyRouter) -> None:
    router.score_quantiles.copy_(torch.linspace(0, 1, NUM_QUANTILES).clamp(0.25, 0.5))
    found = router.percentiles(torch.tensor([0.24, 0.25, 0.375, 0.5, 0.51]))
    assert found.tolist() == pytest.approx([0, 0.125, 0.375, 0.75, 1], abs=1e-3)


def test_the_requested_rate_is_met_on_uniform_percentiles(router: FuzzyRouter) -> None:
    scores = torch.rand(20_000, 1, generator=torch.Generator().manual_seed(1)) ** 2
    for rate in torch.linspace(0, 0.5, 11).tolist():
        keep = router.keep_weights(scores, rate)
        assert set(keep.unique().tolist()) <= {0.0, 1.0}
        assert 1 - keep.mean().item() == pytest.approx(rate, abs=0.01)


def test_a_higher_score_keeps_a_superset_and_a_larger_budget_a_subset(router: FuzzyRouter) -> None:
    scores = torch.linspace(0, 1, 101).unsqueeze(1)
    plans = torch.stack([router.keep_weights(scores, rate) for rate in torch.linspace(0, 0.5, 14).tolist()])
    assert (plans.diff(dim=1) >= 0).all()
    assert (plans.diff(dim=0) <= 0).all()
    assert plans[0].all() and not plans[-1][..., ORDER].any()  # the largest budget spares no one


def test_thresholds_equal_those_of_the_budget_table(router: FuzzyRouter) -> None:
    rates = np.linspace(0, 0.5, 41)
    ratios, thresholds = router.budget_ratios.double().numpy(), router.budget_thresholds.double().numpy()
    expected = np.stack([np.interp(rates, ratios, column) for column in thresholds.T], axis=1)
    found = router.thresholds(torch.as_tensor(rates, dtype=torch.float32))
    np.testing.assert_allclose(found.numpy(), expected, atol=1e-6)
    assert router.thresholds(0.2).shape == (NUM_LAYERS,)


def test_a_budget_per_example_is_that_budget_alone(router: FuzzyRouter) -> None:
    states, routing = make_batch()
    routing.target_skip_ratio = torch.tensor([0.0, 0.17, 0.5])
    router.plan(states, routing)
    for index, rate in enumerate(routing.target_skip_ratio.tolist()):
        assert torch.equal(routing.result.keep_weights[index], router.keep_weights(routing.result.scores, rate)[index])


def test_set_budget_is_the_default_and_refuses_what_was_not_calibrated(router: FuzzyRouter) -> None:
    scores = torch.linspace(0, 1, 50).unsqueeze(1)
    router.set_skip_rate(0.25)
    assert torch.equal(router.keep_weights(scores), router.keep_weights(scores, 0.25))
    with pytest.raises(ValueError, match="outside the calibrated range"):
        router.set_skip_rate(0.51)
    assert router.target_skip_ratio == 0.25


def test_changing_one_term_of_the_scikit_fuzzy_system_changes_the_router(
    rule_base: FuzzyRuleBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = FuzzyRouter(rule_base, NUM_LAYERS)
    build = skfuzzy_bridge.to_control_system

    def with_another_medium(given: FuzzyRuleBase):
        system = build(given)
        variable = next(node for node in system.antecedents if node.label == "text_dispersion")
        assert variable.universe.tolist() == [0, 0.5, 1] and variable["medium"].mf.tolist() == [0, 1, 0]
        variable.universe = np.array([0, 0.3, 1])
        return system

    monkeypatch.setattr(skfuzzy_bridge, "to_control_system", with_another_medium)
    moved = FuzzyRouter(rule_base, NUM_LAYERS)
    assert moved.rules.knots[1].tolist() == pytest.approx([0, 0.3, 1])
    assert torch.equal(moved.rules.knots[[0, 2]], plain.rules.knots[[0, 2]])
    features = torch.cartesian_prod(*[torch.linspace(0, 1, 9)] * 3)
    assert (moved.rules(features) - plain.rules(features)).abs().max() > 0.02


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_casting_leaves_the_router_in_single_precision(router: FuzzyRouter, dtype: torch.dtype) -> None:
    before = {name: tensor.clone() for name, tensor in router.state_dict().items()}
    torch.nn.Sequential(router, torch.nn.Linear(2, 2)).to(dtype)
    for name, tensor in router.state_dict().items():
        assert tensor.dtype == torch.float32, name
        assert torch.equal(tensor, before[name]), name


def test_a_router_on_the_meta_device_can_be_materialised(router: FuzzyRouter) -> None:
    values = {name: tensor.clone() for name, tensor in router.state_dict().items()}
    router.to("meta")
    assert all(tensor.is_meta for tensor in router.buffers())
    router.bfloat16().to_empty(device="cpu")
    router.load_state_dict(values)
    assert all(torch.equal(tensor, values[name]) for name, tensor in router.state_dict().items())


def test_states_in_half_precision_are_routed_as_their_values(router: FuzzyRouter) -> None:
    states, routing = make_batch()
    rounded = states.bfloat16()
    router.plan(rounded, routing)
    expected = make_batch()[1]
    router.plan(rounded.float(), expected)
    assert routing.result.scores.dtype == torch.float32 and torch.equal(routing.result.scores, expected.result.scores)


def test_planning_never_reads_a_value_back(router: FuzzyRouter) -> None:
    """On meta tensors any transfer from the device, and any decision by a value, is an error."""
    router.set_skip_rate(0.3)
    states, routing = make_batch(num_turns=2)
    for skip_rate in (None, torch.full((len(states),), 0.2, device="meta")):
        masks = (routing.turn_ids.to("meta"), routing.image_mask.to("meta"), routing.question_mask.to("meta"))
        planned = RoutingState(*masks, "hard", num_turns=routing.num_turns, target_skip_ratio=skip_rate)
        router.to("meta").plan(states.to("meta"), planned)
        assert planned.result.keep_weights.shape == (len(states), routing.num_turns, NUM_LAYERS)


class Operations(TorchDispatchMode):
    """Names of the operations that ran."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.add(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("kind", [FuzzyRouter, PerLayerFuzzyRouter])
def test_planning_on_a_gpu_multiplies_no_matrices_which_would_follow_the_flags_of_tf32(
    rule_base: FuzzyRuleBase, monkeypatch: pytest.MonkeyPatch, kind: type[FuzzyRouter]
) -> None:
    router = kind(rule_base, NUM_LAYERS)
    router.rules.consequents.copy_(torch.rand(router.rules.consequents.shape))
    planned = []
    for is_cuda in (False, True):
        monkeypatch.setattr(torch.Tensor, "is_cuda", is_cuda)
        states, routing = make_batch(num_turns=2)
        with Operations() as operations:
            router.plan(states, routing)
        planned.append(routing.result)
        assert bool(operations.names & {"mm", "bmm", "mv", "addmv", "dot"}) is not is_cuda
    for name in ("features", "scores"):
        torch.testing.assert_close(getattr(planned[0], name), getattr(planned[1], name), rtol=0, atol=1e-6)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_tf32_changes_nothing_that_is_planned_on_a_gpu(router: FuzzyRouter) -> None:
    states = torch.randn(64, 600, 512, device="cuda")
    scores, precision = [], torch.get_float32_matmul_precision()
    for wanted in ("highest", "high"):
        torch.set_float32_matmul_precision(wanted)
        try:
            routing = RoutingState.from_batch({"attention_mask": torch.ones(64, 600, device="cuda")})
            router.cuda().plan(states, routing)
        finally:
            torch.set_float32_matmul_precision(precision)
        scores.append(routing.result.scores)
    assert torch.equal(*scores)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_planning_never_waits_for_a_gpu(router: FuzzyRouter) -> None:
    router.set_skip_rate(0.3)
    states, routing = make_batch(num_turns=2)
    masks = (routing.turn_ids.cuda(), routing.image_mask.cuda(), routing.question_mask.cuda())
    router, states = router.cuda(), states.cuda()
    torch.cuda.set_sync_debug_mode("error")
    try:
        router.plan(states, RoutingState(*masks, "hard", num_turns=routing.num_turns))
    finally:
        torch.cuda.set_sync_debug_mode("default")
