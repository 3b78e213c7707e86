"""Escalation of whole answers: images, pruned tokens, queues, lossless drafts, and what results say of it."""

from __future__ import annotations

import pytest
import torch
from PIL import Image

from fuzzyroe import find_router, set_escalation, set_skip_rate
from fuzzyroe.escalation import Escalation
from llava.inference.generator import GenerationOptions, Generator, make_message
from llava.inference.scheduler import answer_all
from llava.inference.speculative import generate_lossless
from llava.model.token_pruning import set_token_pruning

GREEDY = GenerationOptions(max_new_tokens=5)


@pytest.fixture
def messages(images: list[Image.Image]):
    """Nine questions with none, one or two images."""
    words = ["w1", "w2 w3", "w4 w5 w6", "w7", "w8 w9", "w10 w11", "w12 w13 w14", "w15", "w16 w17 w18"]
    return [make_message(f"{text} ?", images[: index % 3]) for index, text in enumerate(words)]


@pytest.fixture
def escalated(generator: Generator, messages) -> Generator:
    """A generator that escalates about half of those questions by their margin."""
    generator.model.eval()
    set_escalation(generator.model, Escalation.make("never"))
    inputs = generator.encode(messages)
    cache = generator.model.generate(**inputs, max_new_tokens=1, return_dict_in_generate=True).past_key_values
    readings = {name: values.numpy() for name, values in cache.escalation.readings.items()}
    set_escalation(generator.model, Escalation.make("fuzzy").calibrate(readings, 0.4))
    return generator


@pytest.mark.parametrize("pruned", [False, True])
def test_answers_of_a_batch_and_of_a_queue_are_those_of_each_message_alone(escalated, routed, messages, pruned) -> None:
    if pruned:
        set_token_pruning(routed.model, 7)
        escalated = Generator(routed, escalated.template)
    alone = [escalated.generate([message], GREEDY) for message in messages]
    batch = escalated.generate(messages, GREEDY)
    assert batch.texts == [answer.texts[0] for answer in alone]
    assert torch.equal(batch.kept_layers, torch.cat([answer.kept_layers for answer in alone]))
    assert torch.equal(batch.prefill_runs, torch.cat([answer.prefill_runs for answer in alone]))
    assert answer_all(escalated, messages, GREEDY, batch_size=4) == batch.texts
    is_resumed = (batch.prefill_runs > 1).any(dim=1)
    if not pruned:
        assert 0 < is_resumed.sum() < len(messages)


@pytest.mark.parametrize("options", [{"num_beams": 3}, {"do_sample": True, "temperature": 0.7}], ids=str)
def test_beams_and_samples_carry_the_runs_of_their_prompt(escalated, messages, options) -> None:
    torch.manual_seed(0)
    batch = escalated.generate(messages, GenerationOptions(max_new_tokens=3, **options))
    greedy = escalated.generate(messages, GenerationOptions(max_new_tokens=1))
    assert torch.equal(batch.prefill_runs, greedy.prefill_runs) and torch.equal(batch.kept_layers, greedy.kept_layers)


def test_net_skip_rates_count_reruns_in_the_prefill_alone(escalated, messages) -> None:
    batch = escalated.generate(messages, GREEDY)
    runs, kept = batch.prefill_runs.float(), batch.kept_layers.float()
    torch.testing.assert_close(batch.prefill_skip_rates, 1 - runs.mean(dim=1))
    torch.testing.assert_close(batch.decode_skip_rates, 1 - kept.mean(dim=1))
    assert bool((batch.prefill_skip_rates <= batch.decode_skip_rates).all())
    set_skip_rate(escalated.model, None)
    dense = escalated.generate(messages, GREEDY)
    assert not dense.prefill_skip_rates.any() and not dense.decode_skip_rates.any()


def test_lossless_mode_stays_lossless(escalated, messages) -> None:
    model = escalated.model
    set_escalation(model, Escalation.make("always"))
    for message in messages[:4]:
        inputs = escalated.encode([message])
        tokens, report = generate_lossless(model, **inputs, max_new_tokens=6, do_sample=False, skip_rate=0.4)
        router = find_router(model)
        router.enabled = False
        dense = model.generate(**inputs, max_new_tokens=6, do_sample=False, use_cache=True)
        router.enabled = True
        assert torch.equal(tokens, dense)
        assert not report.kept_layers.all(), "drafts go by the plan: the verifier is dense already"
