"""The model that lmms-eval runs: a LLaVA checkpoint, dense or routed at a target skip rate of the caller's choice."""

from __future__ import annotations

import inspect
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from lmms_eval.api.instance import Instance
from lmms_eval.api.model import lmms
from lmms_eval.utils import simple_parse_args_string
from loguru import logger
from tqdm import tqdm

from fuzzyroe import set_skip_rate
from fuzzyroe.attach import find_router
from llava.conversation import get_template
from llava.inference.generator import GeneratedBatch, GenerationOptions, Generator, make_message, parse_skip_rate
from llava.inference.scheduler import SCHEDULES, answer_queue
from llava.model.builder import load_checkpoint
from llava.model.families import choose_template
from llava.model.token_pruning import set_token_pruning
from llava.report.evaluation import RequestRecord, remove_routing_log, write_routing_log

DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}

WINDOW = 8
"""Batches that are planned together: their images and states are in memory at once."""


class FuzzyRoE(lmms):
    """lmms-eval's ``--model fuzzyroe``; the parameters are its ``--model_args``.

    Args:
        pretrained: Checkpoint folder or hub id.
        skip_rate: Target skip rate; "off" runs the dense model; None takes the checkpoint's own.
        conv_template: Name of a conversation template; None takes the one that the checkpoint was trained with.
        device: "cpu", "cuda" or "cuda:N"; None takes a GPU if there is one. With several processes each takes its own.
        dtype: A key of ``DTYPES``; "auto" is float32 on a CPU and float16 elsewhere, as LLaVA has it.
        attn_implementation: "sdpa", "flash_attention_2" or "eager".
        batch_size: Requests per batch, at least 1; no answer depends on it.
        routing_log: Where to write the routing log (``llava.report.evaluation``) when all requests are answered. A log
            that lies there is removed at the start.
        schedule: "plan" puts requests together whose plans nearly agree, within ``WINDOW`` batches of similar length;
            "arrival" goes by length alone. No answer depends on it.
        visual_tokens: Tokens that the decoder reads of each image; several numbers, ascending and joined by "/", let
            the router's score pick one for each request. None takes the checkpoint's own number.
        task_skip_rates: Target rates of single tasks, such as "pope:0.4/mme:off"; all others run at ``skip_rate``.
        **unknown: Refused.

    Raises:
        TypeError: If an argument is not known.
        ValueError: If an argument has a value that is not allowed, or the checkpoint cannot be routed as asked.
        KeyError: If the conversation template is not known.
    """

    is_simple = True

    def __init__(
        self,
        pretrained: str,
        skip_rate: float | str | None = None,
        conv_template: str | None = None,
        device: str | None = None,
        dtype: str = "auto",
        attn_implementation: str = "sdpa",
        batch_size: int | str = 1,
        routing_log: str | None = None,
        schedule: str = "plan",
        visual_tokens: int | str | None = None,
        task_skip_rates: str | None = None,
        **unknown: Any,
    ) -> None:
        super().__init__()
        if unknown:
            known = [name for name in inspect.signature(FuzzyRoE).parameters if name != "unknown"]
            raise TypeError(
                f"--model_args has {', '.join(sorted(unknown))}, which fuzzyroe does not know; it knows "
                f"{', '.join(known)}. Correct the name or leave it out."
            )
        # everything that can be refused without the weights comes first: loading them takes minutes
        if conv_template is not None:
            get_template(conv_template)
        words = [] if visual_tokens is None else str(visual_tokens).split("/")
        for name, value, is_allowed, allowed in (
            ("batch_size", batch_size, _is_positive(batch_size), "a number from 1 that fits in memory"),
            ("schedule", schedule, schedule in SCHEDULES, f"one of {', '.join(SCHEDULES)}"),
            ("dtype", dtype, dtype in ("auto", *DTYPES), f"one of auto, {', '.join(DTYPES)}"),
            ("visual_tokens", visual_tokens, all(map(_is_positive, words)), "numbers from 1, such as 64 or 64/576"),
        ):
            if not is_allowed:
                raise ValueError(f"{name} is {value!r}; use {allowed}.")
        self.batch_size, self._schedule, numbers = int(batch_size), schedule, tuple(map(int, words))
        rate, self._task_rates = parse_skip_rate(skip_rate), parse_task_rates(task_skip_rates)
        self.accelerator = Accelerator()
        self._rank, self._world_size = self.accelerator.process_index, self.accelerator.num_processes
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        if self._world_size > 1:
            self.device = self.accelerator.device
        self._routing_log = Path(routing_log) if routing_log else None
        if self._routing_log is not None and self._rank == 0:
            self._routing_log.parent.mkdir(parents=True, exist_ok=True)
            remove_routing_log(self._routing_log)
        is_on_cpu = self.device.type == "cpu"
        placement: dict[str, Any] = {} if is_on_cpu else {"device_map": {"": str(self.device)}}
        kind = DTYPES.get(dtype, torch.float32 if is_on_cpu else torch.float16)
        checkpoint = load_checkpoint(pretrained, kind, attn_implementation, **placement)
        model: Any = checkpoint.model
        self.model = model.to(self.device).eval()
        if skip_rate is not None:  # "off" switches routing off, nothing leaves the checkpoint's own rate
            set_skip_rate(self.model, rate)
        router = find_router(self.model)
        self._rate = float(router.target_skip_ratio) if router is not None and router.enabled else None
        self._check_task_rates()
        self._pretrained = str(pretrained)
        template, reason = choose_template(conv_template, self.model.config, "conv_template")
        logger.info(f"Conversation template {template} ({reason}).")
        # one number prunes every prompt as it is encoded; of several, the score picks one in the generator
        if len(numbers) == 1:
            set_token_pruning(self.model, numbers[0])
        self._generator = Generator(checkpoint, get_template(template), numbers if len(numbers) > 1 else ())
        self._records: list[RequestRecord] = []

    @classmethod
    def create_from_arg_string(cls, arg_string: str, additional_config: dict | None = None) -> FuzzyRoE:
        """Build the model from ``--model_args``, which win over ``--batch_size`` and ``--device``.

        lmms-eval always passes a batch size, 1 if none was asked for, so both may name one.
        """
        options = {name: value for name, value in (additional_config or {}).items() if value is not None}
        return cls(**{**options, **simple_parse_args_string(arg_string)})

    def generate_until(self, requests: list[Instance]) -> list[str]:
        """Answer the requests, in their order; then write the routing log."""
        absent = sorted(set(self._task_rates) - set(self.task_dict))
        if absent:
            raise ValueError(
                f"task_skip_rates names {', '.join(absent)}, but this run has the tasks "
                f"{', '.join(sorted(self.task_dict))}; name one of these (of a group, its single tasks)."
            )
        answers: list[str] = [""] * len(requests)
        with tqdm(total=len(requests), desc="Answering requests", disable=self._rank != 0) as progress:
            for window in self._windows(requests):
                for batch, texts in self._answer([requests[index] for index in window]):
                    for row, text in zip(batch, texts, strict=True):
                        answers[window[row]] = text
                    progress.update(len(batch))
        if self._routing_log is not None:
            write_routing_log(self._routing_log, self._records, self._rank, self._world_size)
        return answers

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        """Refuse: decisions are taken for a prompt to be continued, not for a given continuation."""
        raise _refusal(requests, "log-likelihoods")

    def generate_until_multi_round(self, requests: list[Instance]) -> list[str]:
        """Refuse: a request is one question here."""
        raise _refusal(requests, "several rounds")

    def clean(self) -> None:
        """Let go of the model, once all requests are answered."""
        del self._generator
        super().clean()

    def _check_task_rates(self) -> None:
        """Refuse rates that the router cannot meet before anything is answered."""
        if self._task_rates and self._rate is not None and math.isnan(self._rate):
            raise ValueError(
                "task_skip_rates was given, but the other tasks would run at what the checkpoint's linear router was "
                "trained for, which is no rate that one can come back to; give skip_rate as well."
            )
        for rate in self._task_rates.values():  # the router refuses what it was not calibrated for
            set_skip_rate(self.model, rate)

    def _rate_of(self, request: Instance) -> float | None:
        """Target skip rate of a request; None for the dense model."""
        return self._task_rates.get(request.args[4], self._rate)

    def _windows(self, requests: list[Instance]) -> Iterator[list[int]]:
        """Indices of requests of one rate and the same options, longest texts first, so that similar prompts meet."""
        texts = [request.args[0] for request in requests]
        lengths = [len(self._generator.tokenizer(text).input_ids) for text in texts]
        # the longest first, so that a batch that does not fit in memory fails at once
        groups: dict[str, list[int]] = {}
        for index in sorted(range(len(requests)), key=lambda index: (-lengths[index], texts[index])):
            shared = [requests[index].args[1], self._rate_of(requests[index])]
            groups.setdefault(json.dumps(shared, sort_keys=True, default=str), []).append(index)
        size = WINDOW * self.batch_size
        for group in groups.values():
            for start in range(0, len(group), size):
                yield group[start : start + size]

    def _answer(self, requests: list[Instance]) -> Iterator[tuple[list[int], list[str]]]:
        """Answer the requests of a window; yields the indices of each batch with its answers."""
        documents, messages = [], []
        # images are opened window by window: a whole benchmark would not fit in memory
        for request in requests:
            text, _, doc_to_visual, doc_id, task, split = request.args
            document = self.task_dict[task][split][doc_id]
            documents.append(document)
            messages.append(make_message(text, _check_images(doc_to_visual(document), task)))
        if self._task_rates:
            set_skip_rate(self.model, self._rate_of(requests[0]))
        options = GenerationOptions.from_gen_kwargs(requests[0].args[1])  # a window shares its options
        for batch, output in answer_queue(self._generator, messages, options, self.batch_size, self._schedule):
            answered = [(requests[row], documents[row], len(messages[row].images)) for row in batch]
            self._records += self._describe(answered, output)
            yield batch, output.texts

    def _describe(self, answered: list[tuple[Instance, dict, int]], output: GeneratedBatch) -> Iterator[RequestRecord]:
        """Records of a batch of (request, document, number of images)."""
        rate = self._rate_of(answered[0][0])
        num_later_tokens = sum(output.num_new_tokens) - len(answered)
        for row, (request, document, num_images) in enumerate(answered):
            # lmms-eval repeats requests so that all processes have equally many
            if (request.metadata or {}).get("__padding_only__"):
                continue
            kind, complexity = document.get("type"), document.get("complexity")
            yield RequestRecord(
                task=request.args[4],
                doc_id=int(request.args[3]),
                type=kind if isinstance(kind, str) else None,
                complexity=complexity if isinstance(complexity, int) else None,
                num_images=num_images,
                kept_layers=output.kept_layers[row].int().tolist(),
                prefill_ms=output.prefill_ms * output.num_prompt_tokens[row] / sum(output.num_prompt_tokens),
                decode_ms_per_token=output.decode_ms / num_later_tokens if num_later_tokens else None,
                batch_size=len(answered),
                num_prompt_tokens=output.num_prompt_tokens[row],
                num_new_tokens=output.num_new_tokens[row],
                checkpoint=self._pretrained,
                target_skip_ratio=None if rate is None else round(rate, 6),
                prefill_runs=output.prefill_runs[row].tolist(),
            )


def parse_task_rates(text: str | None) -> dict[str, float | None]:
    """Read ``TASK:RATE`` pairs joined by "/"; no pair for None, and None for the rate of the dense model.

    Raises:
        ValueError: If a pair cannot be read, or a task is named twice.

    Example:
        >>> parse_task_rates("pope:0.4/mme:off")
        {'pope': 0.4, 'mme': None}
    """
    rates: dict[str, float | None] = {}
    for pair in [] if text is None else str(text).split("/"):
        task, _, rate = pair.strip().rpartition(":")
        if not task or task in rates:
            raise ValueError(
                f"task_skip_rates is {text!r}, where {pair!r} is {'there twice' if task else 'no TASK:RATE'}; allowed "
                "are pairs joined by '/', one per task, such as pope:0.4/mme:0.2. Correct it."
            )
        rates[task] = parse_skip_rate(rate, f"task_skip_rates, {task}: skip_rate")
    return rates


def _is_positive(value: int | str) -> bool:
    return str(value).isdecimal() and int(value) > 0


def _check_images(visuals: Any, task: str) -> list[Any]:
    """Give the images of a document; None or an empty list stands for a question without image."""
    images = [visual for visual in visuals or [] if visual is not None]
    for image in images:
        if not hasattr(image, "convert"):
            raise ValueError(f"Task {task} gave a {type(image).__name__}; fuzzyroe takes PIL images. Leave it out.")
    return images


def _refusal(requests: list[Instance], what: str) -> NotImplementedError:
    tasks = sorted({str(request.metadata.get("task")) for request in requests if request.metadata})
    return NotImplementedError(
        f"Task {', '.join(tasks) or '?'} asks for {what}; fuzzyroe answers with generated text only. Choose a variant "
        "of the task with output_type generate_until."
    )
