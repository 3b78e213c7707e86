"""Promises of ``skip_rate`` as an argument: one call or one row gets the budget it asks for, and nothing is kept."""

from __future__ import annotations

import pytest
import torch
from transformers import GenerationConfig, LlavaForConditionalGeneration

from fuzzyroe import detach, set_skip_rate
from fuzzyroe.attach import find_decoder, find_decoder_layers
from fuzzyroe.cache import kept_layers
from fuzzyroe.routers import KeepAllRouter, RandomRouter
from fuzzyroe.routing_state import RoutingState
from llava.model.llava_llama import attach_routing
from routed_llava import encode_questions, route


@pytest.fixture
def routed(reading_llava: LlavaForConditionalGeneration) -> LlavaForConditionalGeneration:
    """A model routed at a skip rate of 0.4."""
    return route(reading_llava)


@pytest.fixture
def prompts(bpe_tokenizer) -> dict[str, torch.Tensor]:
    """Four left-padded prompts, two of them without an image."""
    questions = ["<image>\nWhat?", "Add two.", "<image>\nRead every digit of every row from the left.", "Why is it so?"]
    return encode_questions(bpe_tokenizer, questions)


@torch.no_grad()
def run(model: LlavaForConditionalGeneration, prompts: dict, **options) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits of the last positions, and which layers each row ran."""
    output = model(**prompts, use_cache=True, **options)
    return output.logits[:, -1], kept_layers(output.past_key_values, len(prompts["input_ids"]))


@pytest.mark.parametrize("unit", ["layer", "attention", "ffn"])
def test_a_call_gets_its_own_budget_and_leaves_the_routers_alone(reading_llava, prompts, unit) -> None:
    model = route(reading_llava, unit)
    before = run(model, prompts)
    set_skip_rate(model, 0.7)
    expected = run(model, prompts)
    set_skip_rate(model, 0.4)
    found = run(model, prompts, skip_rate=0.7)
    assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1])
    assert not torch.equal(found[1], before[1]) and torch.equal(run(model, prompts)[0], before[0])
    assert run(model, prompts, skip_rate=0)[1].all()


def test_each_row_gets_its_own_budget(routed, prompts) -> None:
    rates = torch.tensor([0.0, 0.7, 0.2, 0.75])
    mixed = run(routed, prompts, skip_rate=rates)[1]
    for row, rate in enumerate(rates.tolist()):
        assert torch.equal(mixed[row], run(routed, prompts, skip_rate=rate)[1][row])
    assert mixed[0].all() and not mixed[3].all()


def test_a_call_may_ask_while_routing_is_off(routed, prompts) -> None:
    expected = run(routed, prompts)
    set_skip_rate(routed, None)
    assert run(routed, prompts)[1].all()
    found = run(routed, prompts, skip_rate=0.4)
    assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1])
    assert run(routed, prompts)[1].all() and not find_decoder(routed).router.enabled


@torch.no_grad()
def test_embeddings_alone_get_the_budget_too(routed, prompts) -> None:
    embeddings = routed.get_input_embeddings()(prompts["input_ids"])
    output = routed(inputs_embeds=embeddings, attention_mask=prompts["attention_mask"], skip_rate=0.75, use_cache=True)
    assert not kept_layers(output.past_key_values, 4).all()
    without_mask = routed(inputs_embeds=embeddings, skip_rate=0.75, use_cache=True)
    assert not kept_layers(without_mask.past_key_values, 4).all()


@pytest.mark.parametrize(
    ("skip_rate", "error", "message"),
    [
        (0.8, ValueError, r"outside the calibrated range \[0, 0.750\]"),
        (torch.tensor([0.1, 0.2, 0.3, 0.9]), ValueError, "Skip rate 0.8999.* lies outside"),
        (torch.tensor([0.1, 0.2]), ValueError, r"has shape \(2,\); allowed is one of \[\(\), \(4,\)\]"),
        ("much", TypeError, "skip_rate is a str"),
    ],
    ids=str,
)
def test_a_budget_that_cannot_be_met_is_refused(routed, prompts, skip_rate, error, message) -> None:
    with pytest.raises(error, match=message):
        run(routed, prompts, skip_rate=skip_rate)


def test_a_budget_beside_a_state_or_in_training_is_refused(routed, prompts) -> None:
    state = RoutingState.from_batch({"input_ids": prompts["input_ids"], "attention_mask": prompts["attention_mask"]}, 4)
    with pytest.raises(ValueError, match="given together with routing"):
        run(routed, prompts, skip_rate=0.2, routing=state)
    with pytest.raises(ValueError, match="given in training"):
        run(routed.train(), prompts, skip_rate=0.2)


def test_a_dense_model_refuses_a_budget_also_after_detaching(routed, prompts) -> None:
    detach(routed)
    assert not routed._forward_pre_hooks and not find_decoder(routed)._forward_pre_hooks
    with pytest.raises(ValueError, match="asked of a dense checkpoint"):
        set_skip_rate(routed, 0.2)


def test_attaching_again_describes_a_prompt_once(routed, prompts) -> None:
    detach(routed)
    attach_routing(routed, RandomRouter(4, target_skip_ratio=0.5), 4)
    assert len(find_decoder(routed)._forward_pre_hooks) == 1 and not routed._forward_pre_hooks
    kept = run(routed, prompts)[1]
    assert (kept.sum(dim=1) == 2).all()


def test_a_random_plan_follows_from_question_and_image_in_any_batch(reading_llava, prompts) -> None:
    attach_routing(reading_llava, RandomRouter(4, target_skip_ratio=0.4), 4)
    kept = run(reading_llava, prompts)[1]
    images = {0: prompts["pixel_values"][:1], 2: prompts["pixel_values"][1:]}
    for row in range(4):
        mask = prompts["attention_mask"][row].bool()
        alone = {"input_ids": prompts["input_ids"][row : row + 1, mask], "attention_mask": torch.ones(1, mask.sum())}
        assert torch.equal(run(reading_llava, alone | ({"pixel_values": images[row]} if row in images else {}))[1][0],
                           kept[row])  # fmt: skip
    seen = set()
    for seed in range(12):
        other = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(seed))
        found = run(reading_llava, {**prompts, "pixel_values": other})[1]
        assert torch.equal(found[[1, 3]], kept[[1, 3]])
        seen.add(tuple(found[0].tolist()))
    assert len(seen) > 1, "another image, another plan"


@torch.no_grad()
def test_the_router_none_keeps_all_and_refuses_to_skip(reading_llava, prompts) -> None:
    expected = reading_llava(**prompts).logits[:, -1]
    attach_routing(reading_llava, KeepAllRouter(4), 4, "xavier")
    assert torch.equal(run(reading_llava, prompts)[0], expected)
    with pytest.raises(ValueError, match=r"outside the calibrated range \[0, 0.000\]"):
        set_skip_rate(reading_llava, 0.1)


def test_drafts_behind_a_prompt_change_no_decision(routed, prompts) -> None:
    expected = run(routed, prompts)[1]
    drafts = torch.randint(5, 90, (4, 7), generator=torch.Generator().manual_seed(1))
    longer = {
        "input_ids": torch.cat([prompts["input_ids"], drafts], dim=1),
        "attention_mask": torch.cat([prompts["attention_mask"], torch.ones(4, 7, dtype=torch.long)], dim=1),
        "pixel_values": prompts["pixel_values"],
    }
    assert torch.equal(run(routed, longer, num_drafted=7)[1], expected)
    assert not torch.equal(run(routed, longer)[1], expected), "read as a part of the question they would"


@pytest.mark.parametrize("logits_to_keep", [1, 2, 8])
def test_the_logits_asked_for_change_no_decision(routed, prompts, logits_to_keep) -> None:
    logits, kept = run(routed, prompts)
    found = run(routed, prompts, logits_to_keep=logits_to_keep)
    assert torch.equal(found[1], kept)
    torch.testing.assert_close(found[0], logits)


def test_prompt_lookup_gives_the_tokens_of_plain_decoding(routed, bpe_tokenizer) -> None:
    inputs = encode_questions(bpe_tokenizer, ["<image>\nRead every row, every row, every row of every row."])
    options = {"max_new_tokens": 10, "do_sample": False, "pad_token_id": 3, "suppress_tokens": [4], "use_cache": True}
    plain = routed.generate(**inputs, **options)
    drafted: list[int] = []
    hook = routed.register_forward_pre_hook(
        lambda module, args, kwargs: drafted.append(kwargs.get("num_drafted", 0)), with_kwargs=True
    )
    assert torch.equal(routed.generate(**inputs, **options, prompt_lookup_num_tokens=3), plain)
    by_flag, drafted = drafted[0], []
    config = GenerationConfig(**options, prompt_lookup_num_tokens=3)
    assert torch.equal(routed.generate(**inputs, generation_config=config), plain)
    hook.remove()
    assert by_flag == drafted[0] > 0, "the router is told which positions are no question"


def test_a_question_without_image_in_a_batch_of_texts_is_routed(routed, bpe_tokenizer) -> None:
    inputs = encode_questions(bpe_tokenizer, ["Add two.", "Why?", "Read every digit of every row from the left."])
    logits, kept = run(routed, inputs, skip_rate=0.5)
    for row in range(3):
        mask = inputs["attention_mask"][row].bool()
        alone = {"input_ids": inputs["input_ids"][row : row + 1, mask]}
        found = run(routed, alone, skip_rate=0.5)
        assert torch.equal(found[1][0], kept[row])
        torch.testing.assert_close(found[0][0], logits[row], atol=1e-4, rtol=0)
    assert not kept.all() and len(find_decoder_layers(routed)) == 4
