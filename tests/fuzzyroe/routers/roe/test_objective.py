"""Promises of RoE's objective; its golden numbers are checked in test_golden_roe.py."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional as F

from fuzzyroe.losses import sample_losses
from fuzzyroe.routers.roe.training import routing_objective, sample_skip_rates

M = -100


def logits_of(losses: list[float]) -> torch.Tensor:
    """Logits over two tokens under which token 0 has these losses, (N, 2)."""
    return torch.tensor([[-loss, math.log(-math.expm1(-loss))] for loss in losses])


def test_losses_are_means_per_sample_over_learned_tokens() -> None:
    logits = torch.stack([logits_of([0.5, 1.5, 9.0, 0.1]), logits_of([2.0, 0.1, 0.1, 0.1])])
    labels = torch.tensor([[M, 0, 0, M], [M, 0, M, M]])
    assert sample_losses(logits, labels).tolist() == pytest.approx([1.0, 2.0], abs=1e-6)
    assert F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()) == pytest.approx(4 / 3, abs=1e-6)


def test_skip_rates_are_means_over_the_turns_a_sample_has() -> None:
    keep = torch.tensor([[[1.0, 0.5], [0.0, 0.0]], [[0.2, 0.4], [0.0, 0.6]], [[0.0, 0.0], [0.0, 0.0]]])
    turns = torch.tensor([[True, False], [True, True], [False, False]])
    assert sample_skip_rates(keep, turns).tolist() == pytest.approx([0.25, 0.7, 0.0])


@pytest.mark.parametrize("damping", [5.0, 1.0])
def test_the_hinge_is_damped_by_the_loss_of_its_own_sample(damping: float) -> None:
    logits = torch.stack([logits_of([0.04, 1.0]), logits_of([2.0, 1.0]), logits_of([0.2, 1.0])])
    labels = torch.tensor([[M, 0]] * 3)
    keep = torch.tensor([0.9, 0.9, 0.5]).view(3, 1, 1)
    found = routing_objective(logits, labels, keep, torch.ones(3, 1, dtype=torch.bool), 0.3, damping)
    assert found.hinge.tolist() == pytest.approx([0.2, 0.2, 0.0])
    expected = 0.04 + 2.0 + 0.2 + 0.2 * math.exp(-damping * 0.04) + 0.2 * math.exp(-damping * 2.0)
    assert float(found.loss) == pytest.approx(expected / 3, abs=1e-6)


def test_the_damping_is_a_constant_to_the_gradient_and_a_met_target_pushes_nothing() -> None:
    logits = logits_of([0.2, 1.0]).unsqueeze(0).repeat(2, 1, 1).requires_grad_()
    keep = torch.tensor([0.9, 0.6]).view(2, 1, 1).requires_grad_()
    labels, turns = torch.tensor([[M, 0]] * 2), torch.ones(2, 1, dtype=torch.bool)
    routing_objective(logits, labels, keep, turns, 0.3).loss.backward()
    assert keep.grad.flatten().tolist() == pytest.approx([math.exp(-1.0) / 2, 0.0], abs=1e-6)
    expected = torch.autograd.grad(sample_losses(logits, labels).mean(), logits)[0]
    assert torch.equal(logits.grad, expected)


def test_samples_without_labels_or_turns_are_defined() -> None:
    logits = torch.stack([logits_of([0.5, 1.0]), logits_of([0.5, 1.0])])
    labels = torch.tensor([[M, M], [M, 0]])
    turns = torch.tensor([[True], [False]])
    found = routing_objective(logits, labels, torch.ones(2, 1, 3), turns, 0.3)
    assert float(found.loss) == pytest.approx(0.5 + 0.3 * math.exp(-2.5), abs=1e-6)
    nothing = routing_objective(logits[:1], labels[:1], torch.ones(1, 1, 3), turns[:1], 0.3)
    assert float(nothing.loss) == 0.0


def test_half_precision_logits_are_summed_in_full_precision() -> None:
    logits = torch.randn(1, 6, 500, generator=torch.Generator().manual_seed(0)) * 4
    labels = torch.arange(6).unsqueeze(0)
    exact = sample_losses(logits.bfloat16().float(), labels)
    assert torch.equal(sample_losses(logits.bfloat16(), labels), exact)
