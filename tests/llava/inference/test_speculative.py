"""Promises of lossless mode: the tokens of plain greedy decoding, whatever is drafted, at the cost it reports."""

from __future__ import annotations

import pytest
import torch
from transformers import DynamicCache, StoppingCriteria, StoppingCriteriaList
from transformers.generation import RepetitionPenaltyLogitsProcessor

from fuzzyroe import set_skip_rate
from fuzzyroe.attach import find_decoder, find_decoder_layers
from llava.inference.speculative import LosslessReport, generate_lossless
from llava.model.llava_llama import attach_routing

PLANS = {
    "the first layer is skipped": [0, 1, 1, 1],
    "the middle is skipped": [1, 0, 0, 1],
    "the last layer is skipped": [1, 1, 1, 0],
    "every layer is skipped": [0, 0, 0, 0],
    "no layer is skipped": [1, 1, 1, 1],
}
NUM_NEW = 14
IMAGE_TOKEN = 95
GREEDY = {"do_sample": False, "suppress_tokens": [IMAGE_TOKEN]}


@pytest.fixture
def prompts(image_prompts, padded_prompts) -> dict[str, dict]:
    """Single prompts: with an image and padding in front, with an image, and text only."""
    one = {name: value[:1] for name, value in image_prompts.items()}
    two = {name: value[1:] for name, value in image_prompts.items()}
    text = {name: value[1:2] for name, value in padded_prompts.items()}
    return {"padded": one, "image": two, "text": text}


@pytest.fixture
def routed(tiny_llava, fixed_router):
    """Attach a router of one fixed plan to the tiny model, with random adapters."""

    def attach(plan, skip_unit="layer"):
        with torch.random.fork_rng():
            torch.manual_seed(1)
            attach_routing(tiny_llava, fixed_router(torch.tensor([plan])), 4, "xavier", skip_unit)
        set_skip_rate(tiny_llava, None)
        return tiny_llava

    return attach


def make_draft_perfect(model) -> None:
    """Let layers 1 and 2 add nothing, so that skipping them under zero adapters changes nothing either."""
    for layer in find_decoder_layers(model)[1:3]:
        for weight in (layer.self_attn.o_proj.weight, layer.mlp.down_proj.weight, layer.adapter.up.weight):
            torch.nn.init.zeros_(weight)


def dense(model, prompt, num_new=NUM_NEW, **options):
    """The answer of plain greedy decoding with routing off."""
    return model.generate(**prompt, max_new_tokens=num_new, use_cache=True, **{**GREEDY, **options})


def lossless(model, prompt, num_new=NUM_NEW, **options):
    """The answer of lossless mode, and its report."""
    options = {"min_confidence": 0.0, **options}
    return generate_lossless(model, **prompt, max_new_tokens=num_new, **{**GREEDY, **options})


@pytest.mark.parametrize("skip_unit", ["layer", "attention", "ffn"])
@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("kind", ["padded", "image", "text"])
def test_tokens_are_those_of_the_dense_model(routed, prompts, kind, plan, skip_unit) -> None:
    model, prompt = routed(PLANS[plan], skip_unit), prompts[kind]
    expected = dense(model, prompt)
    for num_draft_tokens in (1, 5):
        found, report = lossless(model, prompt, num_draft_tokens=num_draft_tokens)
        assert torch.equal(found, expected)
        assert report.num_new_tokens == NUM_NEW == 1 + report.accepted + report.verifications
        assert report.kept_layers.tolist() == [bool(kept) for kept in PLANS[plan]]
        assert 0 <= report.accepted <= report.drafted <= num_draft_tokens * report.verifications
        assert (report.drafted == 0) == all(PLANS[plan])


@pytest.mark.parametrize("seed", range(12))
def test_random_prompts_and_plans_give_the_tokens_of_the_dense_model(routed, seed) -> None:
    generator = torch.Generator().manual_seed(seed)
    plan = torch.randint(0, 2, (4,), generator=generator).tolist()
    input_ids = torch.randint(3, IMAGE_TOKEN, (1, 4 + seed), generator=generator)
    model = routed(plan)
    for confidence in (0.0, 0.5):
        found, _ = lossless(model, {"input_ids": input_ids}, num_draft_tokens=1 + seed % 7, min_confidence=confidence)
        assert torch.equal(found, dense(model, {"input_ids": input_ids}))


@pytest.mark.parametrize(("num_draft_tokens", "num_new", "verifications"), [(4, 21, 4), (4, 22, 5), (1, 9, 4)])
def test_a_draft_that_equals_the_model_is_accepted_whole(
    routed, prompts, num_draft_tokens, num_new, verifications
) -> None:
    model = routed(PLANS["the middle is skipped"])
    make_draft_perfect(model)
    found, report = lossless(model, prompts["image"], num_new, num_draft_tokens=num_draft_tokens)
    assert torch.equal(found, dense(model, prompts["image"], num_new))
    assert report.acceptance == 1 and report.verifications == verifications
    assert report.tokens_per_verification == (num_new - 1) / verifications


@pytest.mark.parametrize(("num_new", "drafted", "verifications"), [(1, 0, 0), (2, 0, 1), (3, 1, 1)])
def test_no_token_is_drafted_beyond_the_last(routed, prompts, num_new, drafted, verifications) -> None:
    model = routed(PLANS["the middle is skipped"])
    make_draft_perfect(model)
    found, report = lossless(model, prompts["image"], num_new, num_draft_tokens=5)
    assert torch.equal(found, dense(model, prompts["image"], num_new))
    assert (report.drafted, report.verifications) == (drafted, verifications)


@pytest.mark.parametrize("is_perfect", [True, False])
@pytest.mark.parametrize("place", range(8))
def test_the_answer_ends_with_an_end_token_wherever_it_falls(routed, prompts, place, is_perfect) -> None:
    model = routed(PLANS["the middle is skipped"])
    if is_perfect:
        make_draft_perfect(model)
    length = prompts["image"]["input_ids"].shape[1]
    end = int(dense(model, prompts["image"])[0, length + place])
    expected = dense(model, prompts["image"], eos_token_id=end)
    found, report = lossless(model, prompts["image"], num_draft_tokens=3, eos_token_id=end)
    assert torch.equal(found, expected) and found.shape[1] <= length + place + 1
    assert report.num_new_tokens == found.shape[1] - length
    assert report.accepted <= report.num_new_tokens - 1


def test_an_uncertain_draft_stops_early(routed, prompts) -> None:
    model = routed(PLANS["the middle is skipped"])
    make_draft_perfect(model)
    _, report = lossless(model, prompts["image"], 13, num_draft_tokens=5, min_confidence=1.0)
    assert report.drafted == report.verifications and report.acceptance == 1


class _Recorder(StoppingCriteria):
    """Ends an answer at a length, and remembers the lengths it was asked about."""

    def __init__(self, limit: int) -> None:
        self.limit, self.lengths = limit, []

    def __call__(self, input_ids, scores, **kwargs):
        self.lengths.append(input_ids.shape[1])
        return torch.full((input_ids.shape[0],), input_ids.shape[1] >= self.limit)


def test_stopping_criteria_are_asked_after_every_token(routed, prompts) -> None:
    model = routed(PLANS["the middle is skipped"])
    make_draft_perfect(model)
    length = prompts["image"]["input_ids"].shape[1]
    answers, asked = [], []
    for generate in (dense, lambda *args, **options: lossless(*args, **options)[0]):
        recorder = _Recorder(length + 7)
        answers.append(generate(model, prompts["image"], stopping_criteria=StoppingCriteriaList([recorder])))
        asked.append(recorder.lengths)
    assert torch.equal(*answers) and asked[0] == asked[1] == list(range(length + 1, length + 8))


@pytest.mark.parametrize(
    "options",
    [
        {"min_new_tokens": 10},
        {"repetition_penalty": 1.6},
        {"no_repeat_ngram_size": 2},
        {"bad_words_ids": [[7], [9, 11]]},
    ],
    ids=lambda options: next(iter(options)),
)
def test_logits_processors_act_as_in_plain_decoding(routed, prompts, options) -> None:
    model = routed(PLANS["the middle is skipped"])
    end = int(dense(model, prompts["image"])[0, prompts["image"]["input_ids"].shape[1] + 3])
    options = {**options, "eos_token_id": end}
    expected = dense(model, prompts["image"], **options)
    assert torch.equal(lossless(model, prompts["image"], **options)[0], expected)
    processor = {"logits_processor": [RepetitionPenaltyLogitsProcessor(1.3)]}
    assert torch.equal(lossless(model, prompts["image"], **processor)[0], dense(model, prompts["image"], **processor))


class _Listener:
    """A streamer that keeps what it is given."""

    def __init__(self) -> None:
        self.tokens, self.has_ended = [], False

    def put(self, value) -> None:
        self.tokens += value.flatten().tolist()

    def end(self) -> None:
        self.has_ended = True


def test_a_streamer_gets_prompt_and_answer(routed, prompts) -> None:
    model, listener = routed(PLANS["the middle is skipped"]), _Listener()
    found, _ = lossless(model, prompts["image"], streamer=listener)
    assert listener.tokens == found[0].tolist() and listener.has_ended


@pytest.mark.parametrize("is_enabled", [True, False])
def test_the_router_is_asked_once_and_left_as_it_was(routed, prompts, is_enabled) -> None:
    model = routed(PLANS["the middle is skipped"])
    expected = dense(model, prompts["image"])
    router = find_decoder(model).router
    router.enabled = is_enabled
    found, _ = lossless(model, prompts["image"])
    assert torch.equal(found, expected)
    assert len(router.calls) == 1 and router.enabled is is_enabled


def test_the_cache_is_left_as_plain_decoding_leaves_it(routed, prompts) -> None:
    model = routed(PLANS["the middle is skipped"])
    caches = [DynamicCache(config=model.config.text_config) for _ in range(2)]
    dense(model, prompts["padded"], past_key_values=caches[0])
    lossless(model, prompts["padded"], past_key_values=caches[1], num_draft_tokens=3)
    for expected, found in zip(caches[0].layers, caches[1].layers, strict=True):
        assert type(found) is type(expected)
        torch.testing.assert_close(found.keys, expected.keys, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(found.values, expected.values, atol=1e-5, rtol=1e-5)


class _AlternateLayers(torch.nn.Module):
    """A router that decides each layer when its input is there: odd layers are skipped."""

    decides_layer_wise = True

    def __init__(self) -> None:
        super().__init__()
        self.enabled, self.seen = True, []

    def plan(self, hidden_states, routing) -> None:
        return None

    def decide(self, layer, hidden_states, routing):
        self.seen.append(layer)
        return torch.full((hidden_states.shape[0], 1), float(layer % 2 == 0))


def test_a_layer_wise_router_drafts_too(tiny_llava, prompts) -> None:
    router = _AlternateLayers()
    attach_routing(tiny_llava, router, 4, "xavier")
    found, report = lossless(tiny_llava, prompts["image"])
    assert router.seen == [0, 1, 2, 3] and report.kept_layers.tolist() == [True, False, True, False]
    router.enabled = False
    assert torch.equal(found, dense(tiny_llava, prompts["image"]))


def test_the_skip_rate_reaches_the_router(routed, prompts, monkeypatch) -> None:
    model = routed(PLANS["the middle is skipped"])
    router, asked = find_decoder(model).router, []
    plan = router.plan
    monkeypatch.setattr(
        router, "plan", lambda states, routing: (asked.append(routing.target_skip_ratio), plan(states, routing))
    )
    lossless(model, prompts["image"], skip_rate=0.25)
    lossless(model, prompts["image"])
    assert asked == [0.25, None]


def test_the_smallest_lead_is_that_of_the_dense_logits(routed, prompts) -> None:
    model = routed(PLANS["the middle is skipped"])
    output = dense(model, prompts["image"], return_dict_in_generate=True, output_scores=True)
    best = torch.stack(output.scores, dim=1)[0].topk(2, dim=-1).values
    _, report = lossless(model, prompts["image"])
    assert report.smallest_lead == pytest.approx(float((best[:, 0] - best[:, 1]).min()), abs=1e-4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"do_sample": True}, "do_sample"),
        ({"num_beams": 2}, "2 sequences|num_beams"),
        ({"use_cache": False}, "use_cache"),
        ({"prefill_chunk_size": 4}, "prefill_chunk_size"),
        ({"return_dict_in_generate": True}, "return_dict_in_generate"),
        ({"stop_strings": ["end"]}, "StopStringCriteria"),
        ({"num_draft_tokens": 0}, "num_draft_tokens is 0"),
        ({"min_confidence": 1.5}, "min_confidence is 1.5"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_other_decoding_is_refused(routed, prompts, options, message) -> None:
    with pytest.raises(ValueError, match=message):
        lossless(routed(PLANS["the middle is skipped"]), prompts["image"], **options)


def test_prompts_it_cannot_serve_are_refused(routed, image_prompts, prompts, tiny_llava) -> None:
    with pytest.raises(ValueError, match="no router"):
        lossless(tiny_llava, prompts["image"])
    model = routed(PLANS["the middle is skipped"])
    with pytest.raises(ValueError, match="2 sequences"):
        lossless(model, image_prompts)
    right = {**prompts["text"], "attention_mask": torch.tensor([[1] * 8 + [0]])}
    with pytest.raises(ValueError, match="padded on the right"):
        lossless(model, right)
    cache = DynamicCache(config=model.config.text_config)
    dense(model, prompts["text"], past_key_values=cache)
    longer = {"input_ids": torch.full((1, 60), 5)}
    with pytest.raises(ValueError, match="a cache that is not empty"):
        lossless(model, longer, past_key_values=cache)
    with pytest.raises(TypeError, match="DynamicCache"):
        lossless(model, prompts["text"], cache_implementation="static")


def test_a_report_without_drafts_has_no_acceptance() -> None:
    report = LosslessReport(1, 0, 0, 0, torch.ones(4, dtype=torch.bool), 1.0)
    assert report.acceptance == 0 and report.tokens_per_verification == 0
