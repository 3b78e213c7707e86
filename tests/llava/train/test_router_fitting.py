"""Promises of measuring: losses by turn, and a Measurer whose numbers are those of the model itself."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import LlavaForConditionalGeneration

from fuzzyroe.attach import attach, find_decoder_layers
from fuzzyroe.features import FEATURES
from fuzzyroe.losses import answered_turns, turn_losses
from fuzzyroe.routers import FuzzyRouter, PerLayerFuzzyRouter
from fuzzyroe.rules import load_rule_base
from llava.constants import IGNORE_INDEX as M
from llava.data.dataset import SFTCollator
from llava.model.llava_llama import make_text_batches_safe
from llava.train.router_fitting import CalibrationSize, Measurer

NUM_TURNS = 9  # of all records together
SIZE = CalibrationSize(4, 6, 6, 4, 0.5)


@pytest.fixture
def routed(reading_llava: LlavaForConditionalGeneration) -> LlavaForConditionalGeneration:
    attach(reading_llava, 4, "xavier")
    make_text_batches_safe(reading_llava)
    return reading_llava


def make_measurer(model, dataset, size: CalibrationSize = SIZE, seed: int = 0, **options) -> Measurer:
    collator = SFTCollator(dataset.tokenizer.pad_token_id)
    return Measurer(model, dataset, collator, 4, 4, size, torch.device("cpu"), seed, **options)


def test_answered_turns_have_a_learned_token() -> None:
    turn_ids = torch.tensor([[0, 1, 1, 2, 2], [1, 1, 3, 3, -1]])
    labels = torch.tensor([[M, M, 7, M, M], [M, 5, M, 6, M]])
    assert answered_turns(labels, turn_ids, 3).int().tolist() == [[1, 0, 0], [1, 0, 1]]


def test_turn_losses_are_the_mean_cross_entropy_of_each_answer() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 9, 11, generator=generator)
    turn_ids = torch.tensor(
        [[0, 0, 1, 1, 1, 2, 2, 2, 2], [1, 1, 1, 1, -1, -1, -1, -1, -1], [0, 1, 1, 2, 2, 3, 3, 3, 3]]
    )
    labels = torch.tensor([[M, M, M, 4, 5, M, M, 6, 7], [M, M, 1, 2, M, M, M, M, M], [M, M, 9, M, M, M, M, M, 3]])
    expected = []
    for row in range(3):
        for turn in range(1, 4):
            places = [p for p in range(9) if labels[row, p] != M and turn_ids[row, p] == turn]
            if places:
                log_probabilities = [logits[row, p - 1].log_softmax(0)[labels[row, p]] for p in places]
                expected.append(-torch.stack(log_probabilities).mean())
    torch.testing.assert_close(turn_losses(logits, labels, turn_ids, 3), torch.stack(expected))


def test_half_precision_logits_are_averaged_in_float32() -> None:
    logits = torch.randn(1, 5, 7, generator=torch.Generator().manual_seed(1)).bfloat16()
    labels, turns = torch.tensor([[M, 1, 2, 3, 4]]), torch.ones(1, 5, dtype=torch.long)
    found = turn_losses(logits, labels, turns, 1)
    assert found.dtype == torch.float32 and torch.equal(found, turn_losses(logits.float(), labels, turns, 1))


def test_measurements_line_up_and_count_what_they_cost(routed, sft_dataset) -> None:
    lines: list[str] = []
    measurer = make_measurer(routed, sft_dataset, progress=lines.append)
    measured = measurer.measure()
    assert measured.feature_names == tuple(FEATURES)
    assert measured.features.shape == measured.score_features.shape == (NUM_TURNS, len(FEATURES))
    assert measured.losses.shape == (NUM_TURNS, 3)
    assert np.isfinite(measured.losses).all() and np.isfinite(measured.features).all()
    assert measured.features.min() >= 0 and measured.features.max() <= 1
    assert len(measured.layer_order) == 2 and set(measured.layer_order) <= {1, 2, 3}
    np.testing.assert_allclose(measured.score_features, measured.features, atol=1e-6)
    # order: 3 + 2 candidates on 4 samples; losses: 3 skip counts on 6; features: twice 6
    assert (measurer.cost.samples, measurer.cost.passes) == (6, 5 * 4 + 3 * 6 + 2 * 6)
    assert len(lines) == 3


@torch.no_grad()
def test_losses_are_those_of_the_model_without_the_skipped_layers(routed, sft_dataset) -> None:
    measurer = make_measurer(routed, sft_dataset)
    measured = measurer.measure()
    single = [index for index in measurer.samples if index in (0, 3, 5)]  # one turn with an image
    rows = {}
    position = 0
    for index in sorted(measurer.samples, key=lambda sample: abs(sft_dataset.modality_length(sample))):
        rows[index] = position
        position += int(sft_dataset[index]["turn_ids"].max())
    for count in range(3):
        skipped = measured.layer_order[:count]
        stock = {layer: find_decoder_layers(routed)[layer].forward for layer in skipped}
        for layer in skipped:
            module = find_decoder_layers(routed)[layer]
            module.forward = lambda hidden_states, *args, module=module, **kwargs: module.skip_output(hidden_states)
        for index in single:
            batch = measurer.collator([sft_dataset[index]])
            batch.pop("turn_ids")
            assert routed(**batch).loss.item() == pytest.approx(measured.losses[rows[index], count], abs=1e-4)
        for layer in stock:
            del find_decoder_layers(routed)[layer].forward


def test_the_order_of_layers_is_the_greedy_one(routed, sft_dataset) -> None:
    measurer = make_measurer(routed, sft_dataset)
    measured = measurer.measure()
    batches = list(measurer.batches(4))
    with torch.no_grad():
        first = {layer: float(measurer.losses(batches, [layer]).mean()) for layer in (1, 2, 3)}
        best = min(first, key=first.get)
        second = {layer: float(measurer.losses(batches, [best, layer]).mean()) for layer in {1, 2, 3} - {best}}
    assert measured.layer_order == [best, min(second, key=second.get)]


def test_answers_do_not_reach_the_features(routed, sft_dataset) -> None:
    class OtherAnswers:
        def __len__(self) -> int:
            return len(sft_dataset)

        def modality_length(self, index: int) -> int:
            return sft_dataset.modality_length(index)

        def __getitem__(self, index: int) -> dict:
            sample = sft_dataset[index]
            learned = sample["labels"] != M
            sample["input_ids"][learned] = sample["labels"][learned] = 97
            return sample

    other = OtherAnswers()
    other.tokenizer = sft_dataset.tokenizer
    expected, found = make_measurer(routed, sft_dataset).measure(), make_measurer(routed, other).measure()
    np.testing.assert_array_equal(found.features, expected.features)
    assert not np.allclose(found.losses, expected.losses)


def test_the_choice_of_samples_follows_the_seed(routed, sft_dataset) -> None:
    size = CalibrationSize(2, 3, 3, 2, 0.5)
    chosen = [make_measurer(routed, sft_dataset, size, seed).samples for seed in (0, 0, 1, 2, 3)]
    assert chosen[0] == chosen[1] and len(chosen[0]) == 3 and len(set(map(tuple, chosen))) > 1


@pytest.mark.parametrize(("ratio", "count"), [(0.25, 1), (0.3, 2), (0.5, 2), (0.6, 3), (0.75, 3), (0.9, 3)])
def test_enough_layers_are_ordered_for_the_largest_ratio(routed, sft_dataset, ratio: float, count: int) -> None:
    measured = make_measurer(routed, sft_dataset, CalibrationSize(1, 1, 1, 1, ratio)).measure()
    assert len(measured.layer_order) == count and measured.losses.shape[1] == count + 1


def test_measurements_calibrate_a_router(routed, sft_dataset) -> None:
    measured = make_measurer(routed, sft_dataset).measure()
    router, report = FuzzyRouter(load_rule_base("default"), 4).calibrate(measured, 0.3)
    assert report["examples"] == NUM_TURNS and router.target_skip_ratio == pytest.approx(0.3)


def test_single_layers_are_measured_on_request_and_calibrate_tables_of_their_own(routed, sft_dataset) -> None:
    plain = make_measurer(routed, sft_dataset)
    assert plain.measure().layer_losses is None
    measurer = make_measurer(routed, sft_dataset)
    measured = measurer.measure(single_layers=True)
    assert measurer.cost.passes == plain.cost.passes + 3 * 6
    batches = list(measurer.batches(6))
    with torch.no_grad():
        expected = [measurer.losses(batches, skipped) for skipped in ([], [1], [2], [3])]
    np.testing.assert_allclose(measured.layer_losses, torch.stack(expected, dim=1).numpy(), atol=1e-6)
    router, _ = PerLayerFuzzyRouter(load_rule_base("default"), 4).calibrate(measured, 0.3)
    assert router.target_skip_ratio == pytest.approx(0.3)


def test_measuring_leaves_the_model_as_it_was(routed, sft_dataset) -> None:
    before = {name: tensor.clone() for name, tensor in routed.state_dict().items()}
    hooks = len(routed.get_decoder()._forward_pre_hooks)
    make_measurer(routed, sft_dataset).measure()
    assert all(torch.equal(tensor, before[name]) for name, tensor in routed.state_dict().items())
    assert len(routed.get_decoder()._forward_pre_hooks) == hooks
    assert all(parameter.grad is None for parameter in routed.parameters())
