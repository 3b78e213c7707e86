"""Lossless generation: the routed model drafts tokens, the full model verifies them.

Both use the same weights and read the same cache. The full model prefills the prompt, and the router plans on it once.
Then, in rounds, the planned layers alone propose a few tokens, and one pass of all layers over the proposal says how
many of them the full model would have chosen; that pass also gives the token after them. Every token is thus the full
model's own greedy choice, whatever the draft proposes.

Reference:
    Self-speculative decoding: "Draft & Verify" (arXiv:2309.08168) and LayerSkip (arXiv:2404.16710); the verification
    rule for greedy decoding is that of transformers' assisted generation.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteriaList
from transformers.cache_utils import Cache, DynamicLayer

from fuzzyroe.attach import find_decoder_layers, find_router
from fuzzyroe.cache import RoutedCacheLayer, has_started, refuse_unsupported
from fuzzyroe.routing_state import RoutingState, RowSplit
from llava.model.families import get_image_token_id


@dataclass(frozen=True)
class LosslessReport:
    """Counts of one lossless generation.

    Attributes:
        num_new_tokens: Tokens generated, the first one, of the prefill, included.
        drafted: Tokens that the draft proposed.
        accepted: Those of them that the full model chose too.
        verifications: Passes of the full model after the prefill.
        kept_layers: True where the draft ran the layer, (L,) bool on the CPU.
        smallest_lead: Smallest lead of a chosen token over the runner-up, in logits. Where it is no larger than the
            rounding of the data type, several tokens at once and one by one may disagree.
    """

    num_new_tokens: int
    drafted: int
    accepted: int
    verifications: int
    kept_layers: Tensor
    smallest_lead: float

    @property
    def acceptance(self) -> float:
        """Share of the drafted tokens that were accepted, in [0, 1]; 0 if none was drafted."""
        return self.accepted / self.drafted if self.drafted else 0.0

    @property
    def tokens_per_verification(self) -> float:
        """Tokens that one pass of the full model gave; 1 is plain decoding, 0 means that no pass was needed."""
        return (self.num_new_tokens - 1) / self.verifications if self.verifications else 0.0


def generate_lossless(
    model: Any,
    *,
    skip_rate: float | None = None,
    num_draft_tokens: int = 6,
    min_confidence: float = 0.6,
    **generate_kwargs: Any,
) -> tuple[Tensor, LosslessReport]:
    """Generate greedily, exactly as ``model.generate`` does with routing off, with drafts from the routed model.

    Args:
        model: A ``LlavaForConditionalGeneration`` with routing attached; whether its routing is switched on makes no
            difference.
        skip_rate: Target skip rate of the drafts; None takes the router's own.
        num_draft_tokens: Most tokens to draft before each verification, at least 1.
        min_confidence: The draft ends its proposal after a token that it gives a lower probability than this, in
            [0, 1]; 0 always drafts all of them.
        **generate_kwargs: As for ``model.generate``, one prompt: ``input_ids``, ``pixel_values``, ``max_new_tokens``,
            ``logits_processor``, ``stopping_criteria``, ``streamer`` and so on.

    Returns:
        The tokens that ``model.generate`` gives for them, int64, and a report.

    Raises:
        ValueError: If there is no router, more than one prompt, padding after it, or an option other than greedy
            decoding of tokens.
        TypeError: If the cache cannot hold kept rows only.
    """
    if find_router(model) is None:
        raise ValueError("The model has no router to draft with; load a checkpoint that a stage has routed.")
    if num_draft_tokens < 1:
        raise ValueError(f"num_draft_tokens is {num_draft_tokens}; draft at least 1, or call generate without drafts.")
    if not 0 <= min_confidence <= 1:
        raise ValueError(f"min_confidence is {min_confidence}; it is a probability, choose in [0, 1].")
    if generate_kwargs.get("stop_strings") is not None:
        raise ValueError("stop_strings is not supported here; pass a StopStringCriteria in `stopping_criteria`.")
    options = {"use_cache": True, **generate_kwargs}  # a checkpoint saved by training has the cache off
    decoding = _LosslessDecoding(skip_rate, num_draft_tokens, min_confidence, options.get("streamer"))
    sequences = model.generate(**options, custom_generate=decoding)
    return sequences, decoding.reports[-1]


class _LosslessDecoding:
    """The decoding loop that ``generate`` calls once it has prepared its inputs; each call appends a report.

    ``generate`` hands no streamer to such a loop (transformers 5.17 to 5.23), so the constructor takes it.
    """

    def __init__(self, skip_rate: float | None, num_draft_tokens: int, min_confidence: float, streamer: Any) -> None:
        self.skip_rate, self.num_draft_tokens, self.min_confidence = skip_rate, num_draft_tokens, min_confidence
        self.streamer = streamer
        self.reports: list[LosslessReport] = []

    def __call__(
        self,
        model: Any,
        input_ids: Tensor,
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        generation_config: GenerationConfig,
        **model_kwargs: Any,
    ) -> Tensor:
        """Decode one prompt, (1, N) int64; give prompt with answer, (1, N + new) int64."""
        _refuse_other_decoding(generation_config, input_ids, model_kwargs)
        logits, keep = _prefill_and_plan(model, input_ids, model_kwargs, self.skip_rate)
        passes = _DraftAndVerify(model, input_ids.shape[1], keep, model_kwargs)
        answer = _Answer(input_ids, logits_processor, stopping_criteria, self.streamer)
        answer.extend(answer.score(input_ids, logits[:, -1:]))
        end = generation_config.eos_token_id
        end_tokens = frozenset() if end is None else frozenset([end] if isinstance(end, int) else end)
        drafted = accepted = verifications = 0
        while not answer.is_finished:
            # the verification itself gives a token, and where nothing is skipped, drafting wins nothing
            room = generation_config.max_length - answer.tokens.shape[1] - 1
            limit = 0 if keep.all() else min(self.num_draft_tokens, room)
            proposal = passes.draft(answer, limit, self.min_confidence, end_tokens)
            known = answer.tokens.shape[1]
            scores = answer.score(proposal, passes.verify(proposal[:, known - 1 :]))
            # accepted are the proposed tokens up to the first that the full model would not have chosen
            matches = int((scores[:-1].argmax(dim=-1) == proposal[0, known:]).cumprod(dim=0).sum())
            answer.extend(scores[: matches + 1])
            passes.forget_beyond(answer.tokens.shape[1] - 1)
            drafted += proposal.shape[1] - known
            accepted += min(matches, answer.tokens.shape[1] - known)
            verifications += 1
        if self.streamer is not None:
            self.streamer.end()
        num_new = answer.tokens.shape[1] - input_ids.shape[1]
        self.reports.append(LosslessReport(num_new, drafted, accepted, verifications, keep, answer.smallest_lead))
        return answer.tokens


class _Answer:
    """Prompt and answer so far, and whether the answer is finished.

    Args:
        tokens: The prompt, (1, N) int64.
        logits_processor: Applied as in plain decoding, to the logits after each prefix.
        stopping_criteria: Asked after each token, as in plain decoding.
        streamer: Given each token; None for none.
    """

    def __init__(
        self,
        tokens: Tensor,
        logits_processor: Any,
        stopping_criteria: StoppingCriteriaList,
        streamer: Any,
    ) -> None:
        self.tokens, self.streamer = tokens, streamer
        self.logits_processor, self.stopping_criteria = logits_processor, stopping_criteria
        self.is_finished = False
        self.smallest_lead = math.inf

    def score(self, tokens: Tensor, logits: Tensor) -> Tensor:
        """Give the scores that greedy decoding takes the largest of.

        Args:
            tokens: (1, N) int64.
            logits: Logits after its last n prefixes, the longest being all of it, (1, n, vocabulary).

        Returns:
            Processed logits, (n, vocabulary), float32.
        """
        scores = logits[0].to(dtype=torch.float32, copy=True)  # some processors write in place
        first = tokens.shape[1] - len(scores) + 1
        # one by one, because a processor may look at all tokens before the one it scores
        for index in range(len(scores)) if self.logits_processor else ():
            scores[index] = self.logits_processor(tokens[:, : first + index], scores[index : index + 1])[0]
        return scores

    def extend(self, scores: Tensor) -> None:
        """Append the best tokens of scores, (n, vocabulary), one by one until the answer is finished."""
        best = scores.topk(2, dim=-1).values
        for token, lead in zip(scores.argmax(dim=-1), (best[:, 0] - best[:, 1]).tolist(), strict=True):
            self.tokens = torch.cat([self.tokens, token.view(1, 1)], dim=1)
            self.smallest_lead = min(self.smallest_lead, lead)
            if self.streamer is not None:
                self.streamer.put(token.view(1).cpu())
            self.is_finished = bool(self.stopping_criteria(self.tokens, None).all())
            if self.is_finished:
                return


class _DraftAndVerify:
    """Passes of the full and of the drafting model after one prefilled prompt, over the same weights and cache.

    Args:
        model: The routed model.
        prompt_length: Positions N of the prompt.
        keep: Layers that the draft runs, (L,) bool on the CPU.
        model_kwargs: Keywords that ``generate`` prepared: filled cache, mask and position ids of the prompt, (1, N).
    """

    def __init__(self, model: Any, prompt_length: int, keep: Tensor, model_kwargs: dict[str, Any]) -> None:
        self.model, self.keep = model, keep
        self.cache: Cache = model_kwargs["past_key_values"]
        self.prompt_mask: Tensor | None = model_kwargs.get("attention_mask")
        positions = model_kwargs.get("position_ids")
        # padding in front takes indices, but no positions
        self.padding = 0 if positions is None else prompt_length - 1 - positions[:, -1:]  # (1, 1)
        decoder_layers: Any = find_decoder_layers(model)
        self.stores_keys: list[bool] = [layer.stores_keys for layer in decoder_layers]

    def draft(self, answer: _Answer, limit: int, min_confidence: float, end_tokens: frozenset[int]) -> Tensor:
        """Give prompt and answer with up to ``limit`` proposed tokens more, (1, N') int64.

        An end token, or one that the draft is not sure of, is the last.
        """
        tokens, cache = answer.tokens, self._fork_cache()
        for _ in range(limit):
            scores = answer.score(tokens, self._run(tokens[:, -1:], cache))  # (1, vocabulary)
            choice = scores.argmax(dim=-1, keepdim=True)
            tokens = torch.cat([tokens, choice], dim=1)
            is_unsure = min_confidence > 0 and float(scores.softmax(dim=-1).amax()) < min_confidence
            if is_unsure or (end_tokens and int(choice) in end_tokens):
                break
        return tokens

    def verify(self, tokens: Tensor) -> Tensor:
        """Run all layers over tokens, (1, n), that follow the cache; give their logits, (1, n, vocabulary)."""
        return self._run(tokens, self.cache)

    def forget_beyond(self, length: int) -> None:
        """Cut the cache back to its first ``length`` positions."""
        surplus = self.cache.get_seq_length() - length
        if surplus > 0:
            self.cache.crop(-surplus)

    def _fork_cache(self) -> Cache:
        """Give the draft's view of the cache: kept layers go on from the full model's keys and values.

        The tensors are borrowed, and appending makes new ones, so the verified cache is never written. That the draft
        reads states of the full model, not of its own layers, changes what it proposes and nothing else.
        """
        length = self.cache.get_seq_length()
        forked: list[Any] = []
        layers: list[Any] = self.cache.layers
        for index, layer in enumerate(layers):
            stores_keys = self.stores_keys[index]
            if self.keep[index]:
                fork = DynamicLayer()
            else:
                fork = RoutedCacheLayer(RowSplit(self.keep[index : index + 1]), stores_keys)
                fork.seen = length
            if self.keep[index] or stores_keys:
                fork.lazy_initialization(layer.keys, layer.values)
                fork.keys, fork.values = layer.keys, layer.values
            forked.append(fork)
        return Cache(layers=forked)

    def _run(self, tokens: Tensor, cache: Cache) -> Tensor:
        start, stop = cache.get_seq_length(), cache.get_seq_length() + tokens.shape[1]
        # routing needs no state here: without one every layer runs, and forked layers know that they are skipped
        positions = torch.arange(start, stop, device=tokens.device).unsqueeze(0) - self.padding
        mask = self.prompt_mask
        if mask is not None:
            mask = torch.cat([mask, mask.new_ones(1, stop - mask.shape[1])], dim=1)
        output = self.model(
            input_ids=tokens, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True
        )
        return output.logits


def _prefill_and_plan(
    model: Any, input_ids: Tensor, model_kwargs: dict[str, Any], skip_rate: float | None
) -> tuple[Tensor, Tensor]:
    """Run the full model over the prompt while the router plans on it; give logits and kept layers, (L,) bool."""
    inputs = model.prepare_inputs_for_generation(input_ids, is_first_iteration=True, **model_kwargs)
    # the router decides as ever, while every row runs every layer
    routing = RoutingState.from_batch({**inputs, "input_ids": input_ids}, get_image_token_id(model.config), "observe")
    routing.target_skip_ratio = skip_rate
    logits = model(**inputs, routing=routing).logits
    return logits, routing.kept_layers()[0]


def _refuse_other_decoding(
    generation_config: GenerationConfig, input_ids: Tensor, model_kwargs: dict[str, Any]
) -> None:
    """Raise ValueError for kinds of decoding that this loop does not do."""
    if input_ids.shape[0] != 1:
        raise ValueError(
            f"Lossless mode got {input_ids.shape[0]} sequences; prompts accept different numbers of tokens, so one at "
            "a time is allowed. Call it once per prompt, without num_return_sequences."
        )
    asked = {
        "do_sample": generation_config.do_sample,
        "num_beams": generation_config.num_beams not in (None, 1),
        "prefill_chunk_size": generation_config.prefill_chunk_size is not None,
        "use_cache=False": not model_kwargs.get("use_cache", True),
        "inputs_embeds": model_kwargs.get("inputs_embeds") is not None,
        "a cache that is not empty": has_started(model_kwargs.get("past_key_values")),
        "return_dict_in_generate": generation_config.return_dict_in_generate,
    }
    found = [name for name, is_asked in asked.items() if is_asked]
    if found:
        raise ValueError(
            f"Lossless mode got {', '.join(found)}; it decodes tokens of a whole prompt greedily. Drop the option, or "
            "call generate."
        )
    refuse_unsupported(model_kwargs["past_key_values"])
    mask = model_kwargs.get("attention_mask")
    if mask is not None and not bool(mask[:, -1].all()):
        raise ValueError("The prompt is padded on the right; the answer follows its last token. Pad on the left.")
