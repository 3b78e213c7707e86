"""Promises of routing on a LLaVA model: dense when off, planned at prefill, the same features as in training."""

from __future__ import annotations

import pytest
import torch
from transformers import LlavaForConditionalGeneration

from fuzzyroe import set_skip_rate
from fuzzyroe.attach import detach, find_decoder, find_decoder_layers
from fuzzyroe.cache import kept_layers
from fuzzyroe.features import FEATURES, compute_features, summarise
from fuzzyroe.routers import FuzzyRouter
from fuzzyroe.routing_state import RoutingState
from fuzzyroe.rules import load_rule_base
from llava.conversation import get_template
from llava.data.dataset import SFTCollator
from llava.data.preprocess import encode_conversation, encode_prompt
from llava.data.records import Turn
from llava.model.llava_llama import attach_routing
from routed_llava import encode_questions, route


@pytest.fixture
def routed(reading_llava: LlavaForConditionalGeneration) -> LlavaForConditionalGeneration:
    """A model routed at a skip rate of 0.4."""
    return route(reading_llava)


@pytest.fixture
def prompts(bpe_tokenizer) -> dict[str, torch.Tensor]:
    """Three left-padded prompts, the last without an image: ids, mask (3, N) and pixel values (2, 3, 32, 32)."""
    questions = ["<image>\nWhat?", "<image>\nRead every digit of every row from the left.", "Add two, please."]
    return encode_questions(bpe_tokenizer, questions)


def test_what_follows_the_last_image_is_the_question() -> None:
    ids = torch.tensor([[3, 1, 4, 4, 8, 4, 4, 9, 9], [3, 3, 3, 1, 8, 8, 8, 8, 8]])
    mask = torch.tensor([[0] + [1] * 8, [0, 0, 0] + [1] * 6])
    state = RoutingState.from_batch({"input_ids": ids, "attention_mask": mask}, 4)
    assert state.mode == "hard" and state.num_turns == 1 and state.result.keep_weights is None
    assert state.turn_ids.tolist() == [[-1, 0, 0, 0, 0, 0, 0, 1, 1], [-1, -1, -1, 1, 1, 1, 1, 1, 1]]
    assert state.image_mask.int().tolist() == [[0, 0, 1, 1, 0, 1, 1, 0, 0], [0] * 9]
    assert torch.equal(state.question_mask, state.turn_ids == 1)
    whole = RoutingState.from_batch({"input_ids": ids}, 4)
    assert whole.turn_ids.tolist() == [[0] * 7 + [1, 1], [1] * 9]


@pytest.mark.parametrize("template", ["digits", "v1", "llama_2", "plain"])
@pytest.mark.parametrize("question", ["<image>\nWhich?", "Which digit?\n<image>", "<image>\n<image>\nSo?", "Why?"])
def test_inference_computes_the_features_of_training(template: str, question: str, bpe_tokenizer) -> None:
    embeddings = torch.nn.Embedding(len(bpe_tokenizer), 12).requires_grad_(False)
    encoded = encode_conversation([Turn(question, "seven of them")], bpe_tokenizer, get_template(template), 16, 4)
    keys = ("input_ids", "labels", "turn_ids")
    longer = {key: torch.tensor(getattr(encoded, key) * 2) for key in keys} | {"pixel_values": None}
    sample = {key: torch.tensor(getattr(encoded, key)) for key in keys} | {"pixel_values": None}
    batch = SFTCollator(3)([sample, longer])
    trained = RoutingState.from_batch(batch, 4, "soft")
    expected = compute_features(summarise(embeddings(batch["input_ids"]), trained), tuple(FEATURES))[0, 0]

    conversation = get_template(template)
    text = "<image>\n" + question.removesuffix("\n<image>") if question.endswith("\n<image>") else question
    conversation.append_message(conversation.roles[0], text)
    conversation.append_message(conversation.roles[1], None)
    ids = torch.tensor([[3, 3, 3] + encode_prompt(conversation, bpe_tokenizer, 16, 4)[0]])
    asked = RoutingState.from_batch(
        {"input_ids": ids, "attention_mask": (torch.arange(ids.shape[1]) >= 3).long().unsqueeze(0)}, 4
    )
    found = compute_features(summarise(embeddings(ids), asked), tuple(FEATURES))[0, 0]
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)
    trained_ids = batch["input_ids"][0][trained.question_mask[0]].tolist()
    assert trained_ids == ids[asked.question_mask].tolist()


@torch.no_grad()
def test_routing_off_is_the_dense_model_bit_for_bit(
    reading_llava: LlavaForConditionalGeneration, prompts: dict[str, torch.Tensor]
) -> None:
    expected = reading_llava(**prompts).logits
    attach_routing(reading_llava, FuzzyRouter(load_rule_base("default"), 4), 4, "xavier")
    assert torch.equal(reading_llava(**prompts).logits, expected), "a new router skips nothing"
    set_skip_rate(reading_llava, None)
    assert torch.equal(reading_llava(**prompts).logits, expected)


@torch.no_grad()
def test_a_budget_can_be_changed_and_switched_off_and_on(
    routed: LlavaForConditionalGeneration, prompts: dict[str, torch.Tensor]
) -> None:
    def logits(skip_rate: float | None) -> torch.Tensor:
        set_skip_rate(routed, skip_rate)
        return routed(**prompts).logits

    sparse, dense = logits(0.4), logits(None)
    assert not torch.equal(sparse, dense)
    assert torch.equal(logits(0.0), dense) and torch.equal(logits(0.4), sparse)


def test_rows_that_enter_a_layer_are_the_decisions(
    routed: LlavaForConditionalGeneration, prompts: dict[str, torch.Tensor]
) -> None:
    rows: dict[int, list[int]] = {index: [] for index in range(4)}
    for index, layer in enumerate(find_decoder_layers(routed)):
        layer.self_attn.q_proj.register_forward_pre_hook(
            lambda module, args, index=index: rows[index].append(args[0].shape[0])
        )
    output = routed.generate(
        **prompts, max_new_tokens=5, do_sample=False, use_cache=True, return_dict_in_generate=True, pad_token_id=3
    )
    decisions = kept_layers(output.past_key_values, 3)
    assert not decisions.all() and decisions[:, 0].all() and len(set(map(tuple, decisions.tolist()))) > 1
    for index, kept in enumerate(decisions.sum(dim=0).tolist()):
        assert rows[index] == ([kept] * 5 if kept else []), f"layer {index}, prefill and four decoded tokens"


def test_decisions_of_generation_are_the_plan_of_the_prompt(
    routed: LlavaForConditionalGeneration, prompts: dict[str, torch.Tensor]
) -> None:
    state = RoutingState.from_batch({"input_ids": prompts["input_ids"], "attention_mask": prompts["attention_mask"]}, 4)
    with torch.no_grad():
        routed(**prompts, routing=state)
    output = routed.generate(
        **prompts, max_new_tokens=2, do_sample=False, use_cache=True, return_dict_in_generate=True, pad_token_id=3
    )
    assert torch.equal(kept_layers(output.past_key_values, 3), state.kept_layers())
    assert state.result.features.shape == (3, 1, 3) and not state.result.features[2, 0, 0]


@torch.no_grad()
def test_training_does_not_plan_prompts_by_itself(
    routed: LlavaForConditionalGeneration, prompts: dict[str, torch.Tensor]
) -> None:
    set_skip_rate(routed, None)
    dense = routed(**prompts).logits
    set_skip_rate(routed, 0.4)
    assert torch.equal(routed.train()(**prompts).logits, dense)


@torch.no_grad()
def test_a_detached_model_is_dense_and_can_be_attached_again(
    routed: LlavaForConditionalGeneration, prompts: dict[str, torch.Tensor]
) -> None:
    expected, router = routed(**prompts).logits, find_decoder(routed).router
    adapters = [layer.adapter.state_dict() for layer in find_decoder_layers(routed)]
    set_skip_rate(routed, None)
    dense = routed(**prompts).logits
    detach(routed)
    assert torch.equal(routed(**prompts).logits, dense)
    attach_routing(routed, router, 4)
    for layer, adapter in zip(find_decoder_layers(routed), adapters, strict=True):
        layer.adapter.load_state_dict(adapter)
    set_skip_rate(routed, 0.4)
    assert torch.equal(routed(**prompts).logits, expected)


def test_a_budget_for_a_dense_model_is_refused(reading_llava: LlavaForConditionalGeneration) -> None:
    set_skip_rate(reading_llava, None)
    with pytest.raises(ValueError, match="Skip rate 0.3 was asked of a dense checkpoint"):
        set_skip_rate(reading_llava, 0.3)


def test_a_budget_that_was_not_calibrated_is_refused_and_changes_nothing(
    routed: LlavaForConditionalGeneration,
) -> None:
    with pytest.raises(ValueError, match=r"outside the calibrated range \[0, 0.750\]"):
        set_skip_rate(routed, 0.8)
    assert find_decoder(routed).router.target_skip_ratio == pytest.approx(0.4)
