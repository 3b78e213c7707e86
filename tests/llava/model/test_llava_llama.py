"""Promises of LLaVA's calling convention: it gives what transformers' gives for the same prompts, expanded by hand."""

from __future__ import annotations

import copy
import inspect
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from PIL import Image
from torch import Tensor
from transformers import LlavaForConditionalGeneration, LogitsProcessor, StoppingCriteria, TextStreamer
from transformers.generation.streamers import BaseStreamer

from fuzzyroe import find_router, set_skip_rate
from llava.constants import IGNORE_INDEX, IMAGE_TOKEN_INDEX
from llava.mm_utils import KeywordsStoppingCriteria, process_images
from llava.model.llava_llama import LlavaLlamaForCausalLM
from llava_calls import IMAGE_TOKEN_ID, ROWS, Call, expand_labels, make_call, pad
from routed_llava import route

FREE = {"max_new_tokens": 6, "suppress_tokens": [IMAGE_TOKEN_ID]}  # random weights would say it, and no image is there
GREEDY = {**FREE, "do_sample": False}


@pytest.fixture
def stock(tiny_llava) -> LlavaForConditionalGeneration:
    """transformers' own model."""
    return tiny_llava


@pytest.fixture(params=["dense", "routed"])
def models(request, tiny_llava) -> tuple[LlavaForConditionalGeneration, LlavaLlamaForCausalLM]:
    """A model of transformers' class beside one that speaks LLaVA's convention, with the same weights and routing."""
    pair = [tiny_llava, copy.deepcopy(tiny_llava)]
    if request.param == "routed":
        with torch.random.fork_rng():
            for model in pair:
                torch.manual_seed(5)
                route(model)
    return pair[0], LlavaLlamaForCausalLM.adopt(pair[1])


@pytest.fixture
def model(models) -> LlavaLlamaForCausalLM:
    """The model that speaks LLaVA's convention."""
    return models[1]


def answers(stock: LlavaForConditionalGeneration, call: Call, **options) -> Tensor:
    """New tokens of transformers' class for the prompts, padded on the left."""
    expanded = make_call(call.rows, "left").stock
    return stock.generate(**expanded, **options)[:, expanded["input_ids"].shape[1] :]


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("with_mask", [True, False])
def test_forward_is_that_of_the_expanded_prompts(models, side: str, with_mask: bool) -> None:
    stock, ours = models
    call = make_call(side=side)
    inputs = call.llava if with_mask else {"images": call.images}
    with torch.no_grad():
        expected, found = stock(**call.stock).logits, ours(call.input_ids, **inputs).logits
    assert torch.equal(found, expected)


@pytest.mark.parametrize(
    ("dtype", "form"),
    [
        (torch.float16, torch.Tensor),
        (torch.float16, list),
        (torch.bfloat16, "tiles"),
        (torch.float32, tuple),
        (torch.float64, list),
    ],
)
def test_images_may_be_a_tensor_or_a_list_of_any_float_type(models, dtype: torch.dtype, form) -> None:
    stock, ours = models
    call = make_call()
    images = call.images.to(dtype)
    given = list(images.unsqueeze(1)) if form == "tiles" else images if form is torch.Tensor else form(images)
    with torch.no_grad():
        expected = stock(**{**call.stock, "pixel_values": images.float()}).logits
        found = ours(call.input_ids, attention_mask=call.mask, images=given, image_sizes=[(32, 32)] * 4).logits
    assert torch.equal(found, expected)
    assert torch.equal(ours.generate(call.input_ids, images=given, **GREEDY)[1], answers(stock, call, **GREEDY)[1])


def test_labels_are_expanded_with_their_prompts(models) -> None:
    stock, ours = models
    call = make_call()
    labels = call.input_ids.masked_fill(call.mask == 0, 77)  # whatever stands at padding is not learned
    expected = pad([expand_labels(row) for row in ROWS], "right", IGNORE_INDEX)[0]
    theirs = stock(**call.stock, labels=expected)
    found = ours(call.input_ids, labels=labels, **call.llava)
    assert torch.equal(found.loss, theirs.loss) and found.loss.isfinite()
    found.loss.backward()
    assert ours.model.multi_modal_projector.linear_1.weight.grad.abs().sum() > 0


def test_a_call_of_lmms_evals_loglikelihood_runs_with_and_without_image(model) -> None:
    for rows, sizes in ((ROWS[:1], [[32, 32]]), (ROWS[1:2], [])):
        call = make_call(rows)
        labels = call.input_ids.clone()
        labels[0, :2] = IGNORE_INDEX
        images = call.images.half() if len(call.images) else None
        output = model(input_ids=call.input_ids, labels=labels, images=images, use_cache=True, image_sizes=sizes)
        assert output["loss"].isfinite() and output["logits"].shape[:2] == call.expanded_ids.shape


def test_logits_of_the_last_positions_only(models) -> None:
    stock, ours = models
    call = make_call(side="left")
    with torch.no_grad():
        found = ours(call.input_ids, logits_to_keep=2, **call.llava).logits
        assert torch.equal(found, stock(**call.stock, logits_to_keep=2).logits) and found.shape[1] == 2


OPTIONS = {
    "greedy": GREEDY,
    "beams": {**GREEDY, "num_beams": 3},
    "several beams kept": {**GREEDY, "num_beams": 3, "num_return_sequences": 2},
    "drawn": {**FREE, "do_sample": True, "temperature": 0.7, "top_p": 0.9},
    "several drawn": {**FREE, "do_sample": True, "num_return_sequences": 3},
    "as lmms-eval asks": {**GREEDY, "temperature": 0, "top_p": None, "num_beams": 1, "use_cache": True},
    "without cache": {**GREEDY, "use_cache": False},
}


SIDES = ("left", "right", "right", "left", "right", "right", "left")

STOCK_ENCODES_FIRST = "mm_encoder_outputs" in inspect.signature(LlavaForConditionalGeneration.forward).parameters
"""Older versions of transformers repeat images one by one for beams, which mixes up those of a row with several."""


def comparable(rows: Tensor, options: dict) -> Tensor:
    """Of a batch of ``ROWS``, those that transformers' own class answers rightly with these options."""
    num_copies = max(options.get("num_beams", 1), options.get("num_return_sequences", 1))
    if STOCK_ENCODES_FIRST or num_copies == 1:
        return rows
    is_right = torch.tensor([row.count(IMAGE_TOKEN_INDEX) < 2 for row in ROWS])
    return rows[is_right.repeat_interleave(len(rows) // len(ROWS))]


@pytest.mark.parametrize(("options", "side"), list(zip(OPTIONS.values(), SIDES, strict=True)), ids=list(OPTIONS))
def test_generate_gives_the_new_tokens_of_the_expanded_prompts(models, options: dict, side: str) -> None:
    stock, ours = models
    call = make_call(side=side)
    torch.manual_seed(11)
    expected = answers(stock, call, **options)
    torch.manual_seed(11)
    found = ours.generate(call.input_ids, pad_token_id=0, image_sizes=[(32, 32)] * 4, **call.llava, **options)
    assert torch.equal(comparable(found, options), comparable(expected, options))
    assert found.shape == (4 * options.get("num_return_sequences", 1), 6)


@pytest.mark.parametrize("use_cache", [True, False])
def test_a_checkpoint_that_training_has_saved_without_cache_answers_alike(models, use_cache: bool) -> None:
    stock, ours = models
    call = make_call()
    ours.config.use_cache = ours.config.text_config.use_cache = use_cache
    assert torch.equal(ours.generate(call.input_ids, **call.llava, **GREEDY), answers(stock, call, **GREEDY))


@pytest.mark.parametrize("keyword", ["inputs", "input_ids"])
def test_prompts_may_be_passed_by_name_and_without_mask(models, keyword: str) -> None:
    stock, ours = models
    call = make_call(side="left")
    found = ours.generate(**{keyword: call.input_ids}, images=call.images, **GREEDY)
    assert torch.equal(found, answers(stock, call, **GREEDY))


def test_text_is_in_llavas_convention_only_with_images_none(models) -> None:
    stock, ours = models
    call = make_call(ROWS[1:2])
    new = answers(stock, call, **GREEDY)
    assert torch.equal(ours.generate(call.input_ids, images=None, image_sizes=[], **GREEDY), new)
    assert torch.equal(ours.generate(call.input_ids, **GREEDY), torch.cat([call.input_ids, new], dim=1))


def test_transformers_convention_is_untouched(models) -> None:
    stock, ours = models
    call = make_call(side="left")
    for options in (GREEDY, OPTIONS["beams"]):
        found, expected = ours.generate(**call.stock, **options), stock.generate(**call.stock, **options)
        assert torch.equal(comparable(found, options), comparable(expected, options))
    with torch.no_grad():
        assert torch.equal(ours(**call.stock).logits, stock(**call.stock).logits)


def test_rows_end_on_their_own_and_are_padded_behind(models) -> None:
    stock, ours = models
    call = make_call()
    ends = answers(stock, call, **GREEDY)[:2, 2].tolist()  # rows 0 and 1 end with their third token at the latest
    options = {**GREEDY, "eos_token_id": ends, "pad_token_id": 0}
    found = ours.generate(call.input_ids, **call.llava, **options)
    assert torch.equal(found, answers(stock, call, **options)) and (found[:2, 3:] == 0).all()


def test_an_output_object_holds_new_tokens_and_scores(models) -> None:
    stock, ours = models
    call = make_call()
    output = ours.generate(
        call.input_ids, return_dict_in_generate=True, output_scores=True, output_logits=True, **call.llava, **GREEDY
    )
    assert torch.equal(output.sequences, answers(stock, call, **GREEDY))
    assert len(output.scores) == len(output.logits) == 6
    assert torch.equal(torch.stack(output.scores, dim=1).argmax(-1), output.sequences)


class Recorder(StoppingCriteria, LogitsProcessor, BaseStreamer):
    """Keeps the ids it is shown in any of its roles; stops nothing and changes nothing."""

    def __init__(self) -> None:
        self.shown: list[list] = []

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs) -> Tensor:
        self.shown.append(input_ids.tolist())
        return scores if not kwargs.get("stops") else torch.zeros(len(input_ids), dtype=torch.bool)

    def put(self, value: Tensor) -> None:
        self.shown.append(value.tolist())

    def end(self) -> None:
        self.shown.append(["end"])


class StoppingRecorder(Recorder):
    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs) -> Tensor:
        return super().__call__(input_ids, scores, stops=True)


def test_criteria_processors_and_streamers_see_the_answer_alone(model) -> None:
    call = make_call(ROWS[2:3])
    criterion, processor, streamer = StoppingRecorder(), Recorder(), Recorder()
    options = {"stopping_criteria": [criterion], "logits_processor": [processor], "streamer": streamer}
    tokens = model.generate(call.input_ids, **call.llava, **GREEDY, **options)[0].tolist()
    prefixes = [[tokens[:count]] for count in range(7)]
    assert criterion.shown == prefixes[1:] and processor.shown == prefixes[:6]
    assert streamer.shown == [[[]], *([token] for token in tokens), ["end"]]


@pytest.mark.parametrize("skip_prompt", [True, False])
def test_a_text_streamer_prints_the_answer(models, word_tokenizer, capsys, skip_prompt: bool) -> None:
    stock, ours = models
    call = make_call(ROWS[:1])
    tokens = answers(stock, call, **GREEDY)[0]
    ours.generate(
        call.input_ids, streamer=TextStreamer(word_tokenizer, skip_prompt=skip_prompt), **call.llava, **GREEDY
    )
    assert capsys.readouterr().out.strip() == word_tokenizer.decode(tokens).strip()


def test_keywords_stop_an_answer_in_either_convention(models, word_tokenizer) -> None:
    stock, ours = models
    call = make_call(ROWS[:1], "left")
    tokens = answers(stock, call, **GREEDY)[0]
    keyword = word_tokenizer.decode(tokens[2:4])
    length = next(n for n in range(1, 7) if keyword in word_tokenizer.decode(tokens[:n]))
    criterion = KeywordsStoppingCriteria([keyword], word_tokenizer, call.input_ids)
    found = ours.generate(call.input_ids, stopping_criteria=[criterion], **call.llava, **GREEDY)
    assert found[0].tolist() == tokens[:length].tolist()
    criterion = KeywordsStoppingCriteria([keyword], word_tokenizer, call.expanded_ids)
    assert stock.generate(**call.stock, stopping_criteria=[criterion], **GREEDY).shape[1] == (
        call.expanded_ids.shape[1] + length
    )


@pytest.fixture
def pictures(image_processor) -> Tensor:
    """A square image, two more of other shapes, and a wide one, padded to squares as LLaVA-1.5 does."""
    sizes = ((32, 32), (40, 60), (64, 32), (90, 30))
    images = [Image.linear_gradient("L").convert("RGB").rotate(40 * n).resize(size) for n, size in enumerate(sizes)]
    return process_images(images, image_processor, SimpleNamespace(image_aspect_ratio="pad"))


@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_sample_is_answered_alike_alone_and_in_a_mixed_batch(model, pictures: Tensor, side: str) -> None:
    batch = make_call(side=side, images=pictures)
    together = model(batch.input_ids, **batch.llava).logits
    tokens = model.generate(batch.input_ids, **batch.llava, **GREEDY)
    for index, row in enumerate(ROWS):
        single = make_call([row], images=pictures)
        alone = model(single.input_ids, **single.llava).logits[0]
        found = together[index, : len(alone)] if side == "right" else together[index, -len(alone) :]
        assert (found - alone).abs().max() <= 1e-4
        assert torch.equal(model.generate(single.input_ids, **single.llava, **GREEDY)[0], tokens[index])


def test_the_black_image_that_llavas_collator_gives_to_text_is_dropped(models) -> None:
    stock, ours = models
    call = make_call()
    images = torch.cat([call.images[:1], torch.zeros(1, 3, 32, 32), call.images[1:]])
    with torch.no_grad():
        found = ours(call.input_ids, attention_mask=call.mask, images=images).logits
        assert torch.equal(found, stock(**call.stock).logits)
    text = make_call(ROWS[1:2])
    found = ours.generate(text.input_ids, images=torch.zeros(1, 3, 32, 32), **GREEDY)
    assert torch.equal(found, answers(stock, text, **GREEDY))


def test_a_skip_rate_holds_for_one_call_and_for_each_row(tiny_llava) -> None:
    ours = LlavaLlamaForCausalLM.adopt(route(tiny_llava))
    call = make_call()
    set_skip_rate(ours, 0.2)
    usual = ours.generate(call.input_ids, **call.llava, **GREEDY)
    rates = torch.tensor([0.0, 0.6, 0.2, 0.6])
    mixed = ours.generate(call.input_ids, skip_rate=rates, **call.llava, **GREEDY)
    for index, rate in enumerate(rates.tolist()):
        assert torch.equal(ours.generate(call.input_ids, skip_rate=rate, **call.llava, **GREEDY)[index], mixed[index])
    assert not torch.equal(mixed, usual)
    assert torch.equal(ours.generate(call.input_ids, **call.llava, **GREEDY), usual)
    with torch.no_grad():
        assert not torch.equal(
            ours(call.input_ids, skip_rate=0.6, **call.llava).logits, ours(call.input_ids, **call.llava).logits
        )


def test_a_model_that_accelerate_has_placed_is_called_alike(stock) -> None:
    placed = copy.deepcopy(stock)
    add_hook_to_module(placed, AlignDevicesHook(io_same_device=True))  # as a device_map over several devices does
    ours, call = LlavaLlamaForCausalLM.adopt(placed), make_call()
    with torch.no_grad():
        assert torch.equal(ours(call.input_ids, **call.llava).logits, stock(**call.stock).logits)
    assert torch.equal(ours.generate(call.input_ids, **call.llava, **GREEDY), answers(stock, call, **GREEDY))


def test_it_is_saved_as_transformers_own(model, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path)
    assert isinstance(model, LlavaLlamaForCausalLM)
    assert '"LlavaForConditionalGeneration"' in (tmp_path / "config.json").read_text()
    if find_router(model) is None:
        again, call = LlavaForConditionalGeneration.from_pretrained(tmp_path), make_call()
        with torch.no_grad():
            assert torch.equal(again(**call.stock).logits, model(call.input_ids, **call.llava).logits)


def test_what_llavas_code_reads_from_a_model_is_there(stock) -> None:
    ours = LlavaLlamaForCausalLM.adopt(stock)
    assert ours.config.mm_use_im_start_end is False and ours.config.mm_use_im_patch_token is False
    assert ours.config.tokenizer_model_max_length == 256
    assert ours.get_model() is ours.model
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        features = ours.encode_images(images.half())
        expected = stock.model.get_image_features(images.half().float()).pooler_output
    assert features.shape == (2, 16, 32) and torch.equal(features, torch.stack(list(expected)))
