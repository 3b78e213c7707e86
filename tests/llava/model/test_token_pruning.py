"""Promises of token pruning: all tokens are the stock model, fewer compose with routing, generation and training."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import LlavaForConditionalGeneration, LlavaModel

from fuzzyroe import set_skip_rate
from fuzzyroe.attach import find_decoder
from fuzzyroe.cache import kept_layers
from fuzzyroe.features import compute_features, summarise
from fuzzyroe.routers import FuzzyRouter
from fuzzyroe.routing_state import RoutingState
from fuzzyroe.rules import load_rule_base
from llava.inference.speculative import generate_lossless
from llava.model.families import count_image_features, count_image_tokens
from llava.model.llava_llama import LlavaLlamaForCausalLM, attach_routing, make_text_batches_safe
from llava.model.token_pruning import PRUNERS, plan_visual_tokens, prune_inputs, set_token_pruning
from llava.model.visual_tokens import encode_images

IMAGE_TOKEN = 95
PRUNER_NAMES = list(PRUNERS)


@pytest.fixture
def llava(tiny_llava) -> LlavaLlamaForCausalLM:
    """The tiny model, of the class that ``load_checkpoint`` gives."""
    return LlavaLlamaForCausalLM.adopt(tiny_llava)


def generate(model, inputs, num_new: int = 6, **options):
    return model.generate(
        **inputs,
        max_new_tokens=num_new,
        do_sample=False,
        suppress_tokens=[IMAGE_TOKEN],
        return_dict_in_generate=True,
        output_logits=True,
        **options,
    )


def alone(inputs, row):
    """One prompt without its padding, with its image."""
    mask = inputs["attention_mask"][row].bool()
    return {
        "input_ids": inputs["input_ids"][row : row + 1, mask],
        "pixel_values": inputs["pixel_values"][row : row + 1],
    }


@torch.no_grad()
def reference_embeddings(model, inputs, lengths, pruner):
    """What the decoder should read, put together by hand: text embeddings, and pruned tokens where images are."""
    ids = inputs["input_ids"]
    embeddings = model.get_input_embeddings()(ids)
    for row, length in enumerate(lengths):
        tokens = encode_images(model.model, inputs["pixel_values"][row : row + 1])
        places = (ids[row] == IMAGE_TOKEN).nonzero().flatten()
        assert len(places) == length
        embeddings[row, places] = tokens.features[0] if length == 16 else PRUNERS[pruner](tokens, length)[0]
    return embeddings


@pytest.mark.parametrize("num_kept", [16, None])
def test_keeping_all_tokens_is_the_stock_model_bit_for_bit(llava, image_prompts, num_kept) -> None:
    expected = generate(llava, image_prompts)
    set_token_pruning(llava, 16)
    inputs = prune_inputs(llava, image_prompts, 16)
    if num_kept is None:
        set_token_pruning(llava, None)
        assert type(llava.model) is LlavaModel and not hasattr(llava.config, "num_visual_tokens")
    found = generate(llava, inputs)
    assert torch.equal(found.sequences, expected.sequences)
    assert all(torch.equal(a, b) for a, b in zip(found.logits, expected.logits, strict=True))


@pytest.mark.parametrize("pruner", PRUNER_NAMES)
@pytest.mark.parametrize("lengths", [[5, 5], [3, 16], [12, 1]], ids=str)
@torch.no_grad()
def test_the_decoder_reads_the_pruned_tokens_where_the_image_was(llava, image_prompts, pruner, lengths) -> None:
    set_token_pruning(llava, 8, pruner)
    inputs = prune_inputs(llava, image_prompts, torch.tensor(lengths))
    embeddings = reference_embeddings(llava, inputs, lengths, pruner)
    expected = llava(inputs_embeds=embeddings, attention_mask=inputs["attention_mask"]).logits
    torch.testing.assert_close(llava(**inputs).logits, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("lengths", [4, torch.tensor([3, 11])], ids=["equal", "different"])
def test_generation_in_a_batch_equals_generation_alone(llava, image_prompts, lengths) -> None:
    set_token_pruning(llava, 4)
    together = generate(llava, prune_inputs(llava, image_prompts, lengths))
    for row in range(2):
        number = lengths if isinstance(lengths, int) else int(lengths[row])
        single = generate(llava, prune_inputs(llava, alone(image_prompts, row), number))
        for a, b in zip(together.logits, single.logits, strict=True):
            torch.testing.assert_close(a[row], b[0], atol=1e-4, rtol=1e-4)


def test_beams_keep_their_image(llava, image_prompts) -> None:
    set_token_pruning(llava, 4)
    inputs = prune_inputs(llava, image_prompts, torch.tensor([4, 9]))
    together = generate(llava, inputs, num_beams=3).sequences[:, inputs["input_ids"].shape[1] :]
    for row, number in enumerate([4, 9]):
        single = prune_inputs(llava, alone(image_prompts, row), number)
        found = generate(llava, single, num_beams=3).sequences[:, single["input_ids"].shape[1] :]
        assert torch.equal(found[0], together[row])


@pytest.mark.parametrize("lengths", [[6, 6], [2, 13]], ids=str)
def test_hard_routing_composes(llava, image_prompts, fixed_router, lengths) -> None:
    plan = torch.tensor([[0, 1, 0, 1], [1, 0, 1, 1]])
    with torch.random.fork_rng():
        torch.manual_seed(1)
        attach_routing(llava, fixed_router(plan), 4, "xavier")
    set_token_pruning(llava, 6)
    together = generate(llava, prune_inputs(llava, image_prompts, torch.tensor(lengths)))
    assert torch.equal(kept_layers(together.past_key_values, 2), plan.bool())
    for row in range(2):
        find_decoder(llava).router.keep = plan[row : row + 1].float()
        single = generate(llava, prune_inputs(llava, alone(image_prompts, row), lengths[row]))
        for a, b in zip(together.logits, single.logits, strict=True):
            torch.testing.assert_close(a[row], b[0], atol=1e-4, rtol=1e-4)


class _Watching(torch.nn.Module):
    """A router that keeps every layer, and the state it was asked with."""

    def __init__(self) -> None:
        super().__init__()
        self.enabled, self.states = True, []

    def plan(self, hidden_states, routing) -> None:
        self.states.append((hidden_states, routing))
        routing.result.keep_weights = torch.ones(len(hidden_states), 1, 4)


@pytest.mark.parametrize("lengths", [[6, 6], [2, 13]], ids=str)
def test_the_router_sees_image_positions_and_the_row_s_own_pixels(llava, image_prompts, lengths) -> None:
    router = _Watching()
    attach_routing(llava, router, 4)
    set_token_pruning(llava, 6)
    generate(llava, prune_inputs(llava, image_prompts, torch.tensor(lengths)))
    ((hidden_states, routing),) = router.states
    assert routing.image_mask.sum(dim=1).tolist() == lengths
    features = compute_features(summarise(hidden_states, routing), ["coding_cost", "edge_density", "question_length"])
    full = RoutingState.from_batch(
        {
            "input_ids": image_prompts["input_ids"],
            "attention_mask": image_prompts["attention_mask"],
            "pixel_values": image_prompts["pixel_values"],
        },
        IMAGE_TOKEN,
    )
    states = torch.zeros(2, image_prompts["input_ids"].shape[1], 32)
    expected = compute_features(summarise(states, full), ["coding_cost", "edge_density", "question_length"])
    torch.testing.assert_close(features, expected)


def test_lossless_mode_composes(llava, image_prompts, fixed_router) -> None:
    attach_routing(llava, fixed_router(torch.tensor([[1, 0, 1, 0]])), 4, "xavier")
    set_token_pruning(llava, 5)
    inputs = prune_inputs(llava, alone(image_prompts, 1), 5)
    set_skip_rate(llava, None)
    expected = generate(llava, inputs, 12).sequences
    options = {"max_new_tokens": 12, "suppress_tokens": [IMAGE_TOKEN]}
    found, report = generate_lossless(llava, **inputs, **options, min_confidence=0.0)
    assert torch.equal(found, expected) and report.drafted > 0


@pytest.fixture
def training_batch(image_prompts) -> dict[str, torch.Tensor]:
    """Two right-padded samples of 22 and 20 positions with labels and turns, as the collator gives them."""
    ids = image_prompts["input_ids"].clone()
    ids[0] = torch.cat([ids[0, 2:], torch.zeros(2, dtype=torch.long)])
    turn_ids = torch.ones_like(ids)
    turn_ids[:, :19] = 0
    turn_ids[0, 17:20], turn_ids[0, 20:] = 1, -1
    is_token = turn_ids >= 0
    labels = torch.where((turn_ids == 1) & is_token, ids, -100)
    return {
        "input_ids": ids,
        "labels": labels,
        "turn_ids": turn_ids,
        "attention_mask": is_token.long(),
        "pixel_values": image_prompts["pixel_values"],
    }


@pytest.mark.parametrize("pruner", PRUNER_NAMES)
@pytest.mark.parametrize("is_safe", [False, True])
def test_training_learns_through_pruned_images_under_soft_routing(llava, training_batch, pruner, is_safe) -> None:
    if is_safe:
        make_text_batches_safe(llava)
    attach_routing(llava, _Watching(), 4, "xavier")
    set_token_pruning(llava, 5, pruner)
    batch = prune_inputs(llava, training_batch, 5)
    turn_ids = batch.pop("turn_ids")
    image_mask = batch["input_ids"] == IMAGE_TOKEN
    routing = RoutingState(turn_ids, image_mask, (turn_ids == 1), "soft", keep_weights=torch.full((2, 1, 4), 0.7))
    llava.train()
    loss = llava(**batch, routing=routing).loss
    loss.backward()
    assert torch.isfinite(loss) and sorted(routing.result.layer_runs) == [0, 1, 2, 3]
    projector = llava.model.multi_modal_projector
    assert all(bool(weight.grad.abs().sum() > 0) for weight in projector.parameters())
    text = {"input_ids": torch.tensor([[1, 5, 6, 7]]), "labels": torch.tensor([[-100, 5, 6, 7]])}
    assert torch.isfinite(llava(**text).loss)


def test_the_loss_is_that_of_the_tokens_put_in_by_hand(llava, training_batch) -> None:
    set_token_pruning(llava, 5)
    batch = prune_inputs(llava, training_batch, 5)
    embeddings = reference_embeddings(llava, batch, [5, 5], "dominant_merged")
    by_hand = {"inputs_embeds": embeddings, "attention_mask": batch["attention_mask"], "labels": batch["labels"]}
    batch.pop("turn_ids")
    with torch.no_grad():
        torch.testing.assert_close(llava(**batch).loss, llava(**by_hand).loss)
    learned = training_batch["labels"][training_batch["labels"] != -100]
    assert torch.equal(batch["labels"][batch["labels"] != -100], learned)


@pytest.fixture
def scored_llava(llava):
    """The tiny model with a fuzzy router whose score rises with the detail of the image, spread over [0, 1]."""
    attach_routing(llava, FuzzyRouter(load_rule_base("digits"), 4), 4)
    return llava


def test_a_higher_score_keeps_more_tokens(scored_llava, image_prompts) -> None:
    set_token_pruning(scored_llava, 4)
    router = find_decoder(scored_llava).router
    routing = RoutingState.from_batch(
        {
            "input_ids": image_prompts["input_ids"],
            "attention_mask": image_prompts["attention_mask"],
            "pixel_values": image_prompts["pixel_values"],
        },
        IMAGE_TOKEN,
    )
    features = torch.stack(list(scored_llava.get_image_features(image_prompts["pixel_values"]).pooler_output))
    states = scored_llava.get_input_embeddings()(image_prompts["input_ids"])
    states[image_prompts["input_ids"] == IMAGE_TOKEN] = features.flatten(0, 1)
    router.plan(states.detach(), routing)
    scores = routing.result.scores[:, 0]
    assert scores[0] != scores[1]
    between = float(scores.mean())
    router.score_quantiles.copy_(torch.linspace(between - 0.5, between + 0.5, len(router.score_quantiles)))
    found = plan_visual_tokens(scored_llava, image_prompts, [3, 12])
    assert found.tolist() == [12 if score > between else 3 for score in scores.tolist()]
    inputs = prune_inputs(scored_llava, image_prompts, found)
    assert (inputs["input_ids"] == IMAGE_TOKEN).sum(dim=1).tolist() == found.tolist()
    generate(scored_llava, inputs)


def test_every_image_of_a_row_keeps_the_row_s_number(scored_llava, image_prompts) -> None:
    set_token_pruning(scored_llava, 4)
    ids = image_prompts["input_ids"]
    both = torch.cat([torch.cat([ids[1:], ids[1:]], dim=1), torch.randint(3, 90, (1, 44))])
    inputs = {"input_ids": both, "pixel_values": image_prompts["pixel_values"]}
    numbers = plan_visual_tokens(scored_llava, inputs, [2, 5, 7])
    assert len(numbers) == 2 and numbers[0] == numbers[1]
    assert prune_inputs(scored_llava, inputs, numbers)["input_ids"].shape[1] == 44


def test_the_setting_is_part_of_the_configuration(llava) -> None:
    set_token_pruning(llava, 6, "even")
    assert count_image_tokens(llava.config) == 6 and count_image_features(llava.config) == 16
    assert llava.config.to_dict()["num_visual_tokens"] == 6
    set_token_pruning(llava, 7)  # once more
    assert count_image_tokens(llava.config) == 7 and type(llava.model).__mro__.count(LlavaModel) == 1
    set_token_pruning(llava, None)
    assert count_image_tokens(llava.config) == 16 and "token_pruner" not in llava.config.to_dict()


def test_a_copy_prunes_by_itself(llava, image_prompts) -> None:
    set_token_pruning(llava, 6)
    twin = copy.deepcopy(llava)
    inputs = prune_inputs(twin, image_prompts, 6)
    set_token_pruning(llava, None)
    generate(twin, inputs)
    with pytest.raises(ValueError, match="do not match"):
        generate(llava, inputs)


@pytest.mark.parametrize("num_kept", [0, 17])
def test_numbers_out_of_range_are_refused(llava, num_kept) -> None:
    with pytest.raises(ValueError, match=f"num_kept is {num_kept}"):
        set_token_pruning(llava, num_kept)


def test_a_model_whose_images_would_be_encoded_first_is_refused(tiny_llava) -> None:
    class EncodesFirst(LlavaForConditionalGeneration):
        """As transformers' own class is from 5.18 on."""

        def forward(self, *args, mm_encoder_outputs=None, **kwargs):
            return super().forward(*args, **kwargs)

    tiny_llava.__class__ = EncodesFirst
    with pytest.raises(TypeError, match="load_checkpoint"):
        set_token_pruning(tiny_llava, 4)


def test_misuse_is_named(llava, image_prompts) -> None:
    with pytest.raises(ValueError, match="set_token_pruning first"):
        prune_inputs(llava, image_prompts, 4)
    with pytest.raises(KeyError, match="dominant_merged"):
        set_token_pruning(llava, 4, "best")
    assert type(llava.model) is LlavaModel
    set_token_pruning(llava, 4)
    with pytest.raises(ValueError, match="no router"):
        plan_visual_tokens(llava, image_prompts, [4, 8])
    with pytest.raises(ValueError, match="ascending"):
        plan_visual_tokens(llava, image_prompts, [8, 4])
    longer = image_prompts["input_ids"].clone()
    longer[:, 19] = IMAGE_TOKEN
    with pytest.raises(ValueError, match="17 image tokens, but 16 features"):
        llava(**{**image_prompts, "input_ids": longer})
