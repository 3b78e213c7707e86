"""The torch module is the table: exact at the peaks, monotone with it, bounded, differentiable, exportable."""

from __future__ import annotations

import copy
import itertools
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.func import functional_call

from fuzzyroe.rules import ZeroOrderTSK


@pytest.fixture(params=["complete", "uneven"])
def rule_base(request):
    return request.getfixturevalue(request.param)


def random_points(rule_base, count, seed=0, margin=0.3):
    lower, upper = np.array([variable.universe for variable in rule_base.antecedents]).T
    spread = np.random.default_rng(seed).uniform(-margin, 1 + margin, (count, len(lower)))
    return torch.tensor(lower + spread * (upper - lower))


def test_output_at_a_vertex_is_the_consequent(rule_base):
    vertices = torch.tensor(list(itertools.product(*(variable.peaks for variable in rule_base.antecedents))))
    outputs = ZeroOrderTSK.from_rule_base(rule_base)(vertices.float())
    torch.testing.assert_close(outputs, torch.tensor(rule_base.output_table.ravel()).float(), atol=1e-6, rtol=0)


def test_module_equals_the_double_precision_rule_base(rule_base):
    module, points = ZeroOrderTSK.from_rule_base(rule_base), random_points(rule_base, 500)
    np.testing.assert_allclose(module(points.float()).numpy(), rule_base.evaluate(points.numpy()), atol=2e-6)
    np.testing.assert_allclose(
        module.firing_strengths(points.float()).numpy(), rule_base.firing_strengths(points.numpy()), atol=2e-6
    )


def test_firing_strengths_are_a_partition(rule_base):
    firing = ZeroOrderTSK.from_rule_base(rule_base).firing_strengths(random_points(rule_base, 200).float())
    assert firing.shape == (200, rule_base.num_rules) and firing.min() >= 0
    torch.testing.assert_close(firing.sum(dim=-1), torch.ones(200))


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6))
def test_a_monotone_table_gives_a_monotone_bounded_surface(uneven_seed):
    rng = np.random.default_rng(uneven_seed)
    table = rng.random((3, 2, 4))
    for axis in range(3):
        table = np.sort(table, axis=axis)
    peaks = [np.sort(rng.random(size)) + 0.01 * np.arange(size) for size in table.shape]
    module = ZeroOrderTSK(peaks, table.ravel())
    lower = torch.tensor(rng.uniform(-0.2, 1.2, (50, 3)))
    upper = lower + torch.tensor(rng.random((50, 3)))
    assert (module(lower) <= module(upper) + 1e-9).all()
    assert module(lower).min() >= table.min() - 1e-6 and module(upper).max() <= table.max() + 1e-6


@given(st.permutations(range(3)))
@settings(max_examples=6, deadline=None)
def test_permuting_antecedents_permutes_features(order):
    rng = np.random.default_rng(0)
    table, points = rng.random((2, 3, 4)), torch.tensor(rng.random((20, 3)))
    peaks = [np.linspace(0.1, 0.9, size).tolist() for size in table.shape]
    permuted = ZeroOrderTSK([peaks[axis] for axis in order], table.transpose(order).ravel())
    torch.testing.assert_close(permuted(points[:, list(order)]), ZeroOrderTSK(peaks, table.ravel())(points))


def test_several_outputs_are_several_modules(rule_base):
    peaks, points = [variable.peaks for variable in rule_base.antecedents], random_points(rule_base, 24).view(4, 6, 3)
    table = torch.rand(rule_base.num_rules, 5)
    joint = ZeroOrderTSK(peaks, table)(points)
    assert joint.shape == (4, 6, 5)
    for index in range(5):
        torch.testing.assert_close(joint[..., index], ZeroOrderTSK(peaks, table[:, index])(points))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_non_finite_feature_gives_the_default_for_that_example_only(complete, bad):
    module = ZeroOrderTSK.from_rule_base(complete)
    points = torch.rand(4, 3)
    expected = module(points).index_fill(0, torch.tensor([2]), 1.0)
    points[2, 1] = bad
    points.requires_grad_()
    outputs = module(points)
    torch.testing.assert_close(outputs, expected)
    assert module.firing_strengths(points)[2].abs().sum() == 0
    outputs.sum().backward()
    assert torch.isfinite(points.grad).all() and (points.grad[2] == 0).all()


def test_gradients_reach_features_knots_and_consequents(uneven):
    module = ZeroOrderTSK.from_rule_base(uneven)
    inputs = [tensor.double().requires_grad_() for tensor in (torch.rand(6, 3), module.knots, module.consequents)]

    def infer(features, knots, consequents):
        widened = {"knots": knots, "consequents": consequents}
        return functional_call(module, widened, (features,))

    assert torch.autograd.gradcheck(infer, inputs)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_low_precision_features_are_inferred_in_float32(complete, dtype):
    module, points = ZeroOrderTSK.from_rule_base(complete), torch.rand(64, 3).to(dtype)
    outputs = module(points)
    assert outputs.dtype == torch.float32
    np.testing.assert_allclose(outputs, complete.evaluate(points.double().numpy()), atol=1e-6)


def test_casting_the_model_does_not_round_the_tables(complete):
    module = ZeroOrderTSK.from_rule_base(complete)
    before = {key: value.clone() for key, value in module.state_dict().items()}
    torch.nn.Sequential(module).to(torch.bfloat16).half()
    assert all(torch.equal(before[key], value) for key, value in module.state_dict().items())


def test_runs_on_meta_and_exports_with_any_batch(complete):
    module = ZeroOrderTSK.from_rule_base(complete)
    points = torch.rand(5, 3)
    exported = torch.export.export(module, (points,), dynamic_shapes=({0: torch.export.Dim("batch", min=2)},))
    more = torch.rand(9, 3)
    torch.testing.assert_close(exported.module()(more), module(more))
    assert ZeroOrderTSK.from_rule_base(complete).to("meta")(points.to("meta")).shape == (5,)


def test_compiles_without_a_graph_break(complete, uneven):
    for rule_base in (complete, uneven):
        module, points = ZeroOrderTSK.from_rule_base(rule_base), torch.rand(5, 3)
        compiled = torch.compile(module, fullgraph=True, backend="eager")
        torch.testing.assert_close(compiled(points), module(points))


def test_state_dict_round_trip(complete, uneven):
    source, target = (
        ZeroOrderTSK.from_rule_base(complete),
        ZeroOrderTSK.from_rule_base(complete.flip_direction((-1, 1, 1))),
    )
    target.load_state_dict(source.state_dict())
    points = torch.rand(10, 3)
    assert torch.equal(source(points), target(points))
    assert set(source.state_dict()) == {"knots", "consequents"}


def test_copies_and_pickles_infer_the_same(rule_base):
    module, points = ZeroOrderTSK.from_rule_base(rule_base), random_points(rule_base, 20)
    for twin in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert torch.equal(twin(points), module(points)) and twin.term_counts == module.term_counts


def test_misuse_is_refused(sparse, complete):
    with pytest.raises(ValueError, match=r"call interpolate\(\) first"):
        ZeroOrderTSK.from_rule_base(sparse)
    with pytest.raises(ValueError, match=r"\(\.\.\., 3\) is allowed"):
        ZeroOrderTSK.from_rule_base(complete)(torch.rand(2, 4))
    with pytest.raises(ValueError, match="complete the table"):
        ZeroOrderTSK([(0, 1), (0, 1)], torch.rand(3))
    with pytest.raises(ValueError, match="strictly increasing"):
        ZeroOrderTSK([(0, 0)], torch.rand(2))
