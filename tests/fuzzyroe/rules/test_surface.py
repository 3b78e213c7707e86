"""A tabulated control surface is what it tabulates, within the error that it states."""

from __future__ import annotations

import numpy as np
import pytest
import skfuzzy
import torch
from skfuzzy import control
from torch.func import functional_call

from fuzzyroe.rules import ZeroOrderTSK, oracle
from fuzzyroe.rules.surface import ControlSurface, tabulate, tabulate_control_system

NAMES = ["detail", "length"]


def mamdani(has_gap: bool = False) -> control.ControlSystem:
    """Trapezoids on one axis, Gaussians on the other, minimum, maximum, centroid."""
    detail = control.Antecedent(np.linspace(0, 1, 101), "detail")
    length = control.Antecedent(np.linspace(0, 1, 101), "length")
    weight = control.Consequent(np.linspace(0, 1, 51), "weight")
    detail["low"] = skfuzzy.trapmf(detail.universe, [0, 0, 0.2, 0.3 if has_gap else 0.6])
    detail["high"] = skfuzzy.trapmf(detail.universe, [0.4, 0.8, 1, 1])
    length["short"] = skfuzzy.gaussmf(length.universe, 0, 0.3)
    length["long"] = skfuzzy.gaussmf(length.universe, 1, 0.3)
    for name, centre in (("small", 0), ("middle", 0.5), ("large", 1)):
        weight[name] = skfuzzy.trimf(weight.universe, [centre - 0.5, centre, centre + 0.5])
    return control.ControlSystem(
        [
            control.Rule(detail["low"] & length["short"], weight["small"]),
            control.Rule(detail["low"] & length["long"], weight["middle"]),
            control.Rule(detail["high"] & length["short"], weight["middle"]),
            control.Rule(detail["high"] & length["long"], weight["large"]),
        ]
    )


@pytest.fixture(scope="module")
def system() -> control.ControlSystem:
    return mamdani()


@pytest.fixture(scope="module")
def surface(system: control.ControlSystem) -> ControlSurface:
    return tabulate_control_system(system, NAMES, "weight", points_per_feature=17, num_checks=1000)


def test_a_mamdani_system_is_met_within_the_stated_error(system, surface) -> None:
    points = np.random.default_rng(1).random((1500, 2))
    errors = np.abs(surface(torch.from_numpy(points)).numpy() - oracle.evaluate(system, points, NAMES, "weight"))
    bound = surface.bound
    assert bound.exceedance == pytest.approx(1 - 0.001 ** (1 / 1000)) and bound.largest < 0.03
    assert (errors > bound.largest).mean() <= bound.exceedance
    assert errors.max() <= 2 * bound.largest
    assert errors.mean() == pytest.approx(bound.mean, rel=0.25)


def test_grid_points_are_exact_and_hold_the_shoulders_of_trapezoids(system, surface) -> None:
    detail, length = (surface.knots[axis, :count] for axis, count in enumerate(surface.term_counts))
    for kink in (0, 0.2, 0.4, 0.6, 0.8, 1):
        assert (detail - kink).abs().min() < 1e-6
    assert detail.diff().max() <= 1 / 16 + 1e-6 and length.diff().max() <= 1 / 16 + 1e-6
    nodes = torch.cartesian_prod(detail[::3], length[::3]).double().clamp(0, 1)
    expected = oracle.evaluate(system, nodes.numpy(), NAMES, "weight")
    np.testing.assert_allclose(surface(nodes).numpy(), expected, atol=1e-6)


def test_a_finer_grid_has_a_smaller_error(system, surface) -> None:
    coarse = tabulate_control_system(system, NAMES, "weight", points_per_feature=3, num_checks=500)
    assert surface.bound.mean < coarse.bound.mean / 2 and surface.bound.largest < coarse.bound.largest


@pytest.mark.parametrize("name", ["complete", "uneven"])
def test_a_table_of_rules_is_its_own_surface(name, request) -> None:
    rule_base = request.getfixturevalue(name)
    module = ZeroOrderTSK.from_rule_base(rule_base)
    kinks = [sorted({*variable.universe, *variable.peaks}) for variable in rule_base.antecedents]
    surface = tabulate(rule_base.evaluate, kinks, points_per_feature=2, num_checks=200)
    assert surface.bound.largest < 1e-6
    lower, upper = np.array([variable.universe for variable in rule_base.antecedents]).T
    points = torch.tensor(np.random.default_rng(0).uniform(lower - 0.2, upper + 0.2, (4, 50, 3)))
    torch.testing.assert_close(surface(points), module(points), atol=1e-6, rtol=0)


def test_one_and_five_features_are_looked_up() -> None:
    line = tabulate(lambda points: points[:, 0] ** 2, [(0, 1)], points_per_feature=65)
    assert line.bound.largest <= 1 / 64**2 / 4 + 1e-6  # (h / 2)^2 times half the second derivative
    plane = tabulate(lambda points: points @ np.arange(5), [(0, 1)] * 5, points_per_feature=3, num_checks=100)
    assert plane.bound.largest < 1e-5


def test_several_outputs_are_several_surfaces() -> None:
    grid, table, points = [np.linspace(0, 1, 5)] * 2, torch.rand(25, 3), torch.rand(7, 2)
    joint = ControlSurface(grid, table)(points)
    for index in range(3):
        torch.testing.assert_close(joint[:, index], ControlSurface(grid, table[:, index])(points))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_non_finite_feature_gives_the_default_for_that_example_only(surface, bad: float) -> None:
    points = torch.rand(4, 2)
    expected = surface(points).index_fill(0, torch.tensor([2]), 1.0)
    points[2, 1] = bad
    points.requires_grad_()
    outputs = surface(points)
    torch.testing.assert_close(outputs, expected)
    outputs.sum().backward()
    assert torch.isfinite(points.grad).all() and (points.grad[2] == 0).all()


def test_gradients_reach_features_and_table(surface) -> None:
    inputs = [torch.rand(5, 2).double().requires_grad_(), surface.consequents.double().requires_grad_()]
    assert torch.autograd.gradcheck(
        lambda features, table: functional_call(surface, {"consequents": table}, (features,)), inputs
    )


def test_runs_on_meta_exports_and_compiles_without_a_break(surface) -> None:
    points, more = torch.rand(5, 2), torch.rand(9, 2)
    exported = torch.export.export(surface, (points,), dynamic_shapes=({0: torch.export.Dim("batch", min=2)},))
    torch.testing.assert_close(exported.module()(more), surface(more))
    torch.testing.assert_close(torch.compile(surface, fullgraph=True, backend="eager")(points), surface(points))
    meta = ControlSurface([(0, 1), (0, 0.5, 1)], torch.rand(6)).to("meta")
    assert meta(points.to("meta")).shape == (5,)


def test_misuse_is_refused(system) -> None:
    with pytest.raises(ValueError, match="name all, in the order of the features"):
        tabulate_control_system(system, ["detail"], "weight")
    with pytest.raises(ValueError, match="Some point fires no rule"):
        tabulate_control_system(mamdani(has_gap=True), NAMES, "weight", points_per_feature=9, num_checks=10)
    with pytest.raises(ValueError, match="17 and 4000 are usual"):
        tabulate(np.sum, [(0, 1)], points_per_feature=1)
    with pytest.raises(ValueError, match="non-finite outputs"):
        tabulate(lambda points: np.where(points[:, 0] > 0.5, np.nan, 0), [(0, 1)])
