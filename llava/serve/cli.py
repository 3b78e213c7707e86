"""Terminal chat with a checkpoint about an image, turn by turn.

    python -m llava.serve.cli --model-path outputs/quickstart/finetune --image-file canvas.png

Flags are LLaVA's; ``--skip-rate`` is ours. An empty line ends the chat.
"""

from __future__ import annotations

import argparse
import http.client
import re
import tempfile
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from fuzzyroe import set_skip_rate
from fuzzyroe.attach import find_router
from fuzzyroe.cache import kept_layers
from llava.constants import DEFAULT_IM_END_TOKEN, DEFAULT_IM_START_TOKEN, DEFAULT_IMAGE_TOKEN, IMAGE_TOKEN_INDEX
from llava.conversation import Conversation, get_template
from llava.data.images import ImageFileError, open_rgb
from llava.inference.generator import DENSE, GenerationOptions, parse_skip_rate
from llava.mm_utils import KeywordsStoppingCriteria, process_images, tokenizer_image_token
from llava.model.families import choose_template, count_image_tokens

COMMANDS = "/image PATH talks about another image, /new forgets what was said, an empty line ends the chat."


@dataclass(frozen=True)
class Answer:
    """The model's answer, and the layers it took."""

    text: str  # without the separator that ends it
    prompt: str  # what it continues
    skipped: tuple[int, ...] | None  # layers replaced by their adapters; None for a model without routing
    num_layers: int


class Chat:
    """A conversation; every prompt holds all earlier turns.

    Args:
        tokenizer, model, image_processor, context_length: As ``load_pretrained_model`` gives them.
        template: Name of a conversation template.
        options: Options of generation.
        image: PIL image that the first question is about; None for a conversation without.
    """

    def __init__(
        self,
        tokenizer: Any,
        model: Any,
        image_processor: Any,
        context_length: int,
        template: str,
        options: GenerationOptions,
        image: Any = None,
    ) -> None:
        self.tokenizer, self.model, self.image_processor = tokenizer, model, image_processor
        self.context_length, self.template, self.options = context_length, template, options
        self.start_anew(image)

    def start_anew(self, image: Any = None) -> None:
        """Forget the conversation, and talk about another image, or none."""
        self.conversation: Conversation = get_template(self.template)
        self.image = image
        self._pixels = None if image is None else process_images([image], self.image_processor, self.model.config)
        self._marker = "" if image is None else f"{DEFAULT_IMAGE_TOKEN}\n"
        if image is not None and getattr(self.model.config, "mm_use_im_start_end", False):
            self._marker = f"{DEFAULT_IM_START_TOKEN}{DEFAULT_IMAGE_TOKEN}{DEFAULT_IM_END_TOKEN}\n"

    def ask(self, question: str, streamer: Any = None) -> Answer:
        """Answer one question.

        Args:
            question: Text without image tags; the image is put in front of the first one.
            streamer: Receives the answer's tokens as they come.

        Raises:
            ValueError: If the question fills the model's context; nothing is added to the conversation.
        """
        # a copy, so that a question without an answer leaves no trace
        conversation = self.conversation.copy()
        is_first = len(conversation.messages) == conversation.offset
        conversation.append_message(conversation.roles[0], self._marker + question if is_first else question)
        conversation.append_message(conversation.roles[1], None)
        prompt = conversation.get_prompt()
        input_ids = tokenizer_image_token(prompt, self.tokenizer, IMAGE_TOKEN_INDEX, return_tensors="pt").unsqueeze(0)
        end = (conversation.sep2 or conversation.sep).strip()
        with torch.inference_mode():
            output = self.model.generate(
                input_ids.to(self.model.device),
                images=self._pixels,
                image_sizes=None if self.image is None else [self.image.size],
                streamer=streamer,
                use_cache=True,  # a checkpoint saved by training has it off
                return_dict_in_generate=True,
                stopping_criteria=[KeywordsStoppingCriteria([end] if end else [], self.tokenizer, input_ids)],
                **{**self.options.to_generate_kwargs(), "max_new_tokens": self._longest_answer(input_ids)},
            )
        said = self.tokenizer.decode(output.sequences[0], skip_special_tokens=True)
        said = (said.partition(end)[0] if end else said).strip()
        conversation.messages[-1][1] = said
        self.conversation = conversation
        keep = kept_layers(output.past_key_values, 1)[0].tolist()
        skipped = tuple(layer for layer, is_kept in enumerate(keep) if not is_kept)
        return Answer(said, prompt, skipped if self.target_skip_ratio is not None else None, len(keep))

    @property
    def target_skip_ratio(self) -> float | None:
        """Target skip rate of a routed model; None where no layer is skipped."""
        router = find_router(self.model)
        return float(router.target_skip_ratio) if router is not None and router.enabled else None

    def _longest_answer(self, input_ids: Tensor) -> int:
        """Count the tokens that an answer may have, at least 1."""
        num_images = int((input_ids == IMAGE_TOKEN_INDEX).sum())
        num_tokens = input_ids.shape[1] + num_images * (count_image_tokens(self.model.config) - 1)
        if num_tokens >= self.context_length:
            raise ValueError(
                f"The conversation has {num_tokens:,} tokens, which leaves no room for an answer in the "
                f"model's context of {self.context_length:,}; start anew, or ask in fewer words."
            )
        return min(self.options.max_new_tokens, self.context_length - num_tokens)


def open_image(source: str) -> Image.Image:
    """Read an image from a file or from the web as RGB; a ValueError or OSError says why there is none."""
    if not source.startswith(("http://", "https://")):
        return open_rgb(source)
    with tempfile.NamedTemporaryFile() as file:
        try:
            with urllib.request.urlopen(source, timeout=30) as response:
                file.write(response.read())
            file.flush()
            return open_rgb(file.name)
        except http.client.HTTPException as error:
            raise ValueError(
                f"{source!r} cannot be fetched ({error}); give an address as browsers copy it, %20 for a space."
            ) from error
        except ImageFileError as error:
            raise ImageFileError(str(error).replace(file.name, source)) from error


def start_chat(options: argparse.Namespace) -> tuple[Chat, str]:
    """Check the flags, cheapest first, then load the model; give the chat and a line that describes it.

    Raises:
        ValueError, KeyError, OSError, ImportError: If a flag, the image or the checkpoint cannot be used.
    """
    if options.temperature < 0:
        raise ValueError(f"--temperature is {options.temperature}; it is 0 (the likeliest token) or more.")
    if options.top_p is not None and not 0 < options.top_p <= 1:
        raise ValueError(f"--top-p is {options.top_p}; it lies in (0, 1]. Leave it out to sample from all tokens.")
    if options.max_new_tokens < 1:
        raise ValueError(f"--max-new-tokens is {options.max_new_tokens}; it is at least 1.")
    flags = {name: getattr(options, name) for name in ("temperature", "top_p", "max_new_tokens")}
    settings = GenerationOptions.from_gen_kwargs(flags)
    if options.conv_mode is not None:
        get_template(options.conv_mode)
    rate = parse_skip_rate(options.skip_rate, "--skip-rate")
    image = None if options.image_file is None else open_image(options.image_file)

    # imported here, so that a wrong flag is refused before seconds of imports
    from transformers.utils import logging

    from llava.model.builder import load_pretrained_model

    logging.disable_progress_bar()
    quantized = {"load_8bit": options.load_8bit, "load_4bit": options.load_4bit}
    loaded = load_pretrained_model(
        options.model_path, options.model_base, device=options.device, skip_rate=rate, **quantized
    )
    model = loaded[1]
    if options.skip_rate == DENSE:
        set_skip_rate(model, None)
    template, reason = choose_template(options.conv_mode, model.config, "--conv-mode")
    chat = Chat(*loaded, template=template, options=settings, image=image)
    target = chat.target_skip_ratio
    skips = "no layer is skipped" if target is None else f"target mean skip rate {target:.0%}"
    return chat, f"{options.model_path}, {skips}; template {template} ({reason})."


def talk(chat: Chat, is_verbose: bool = False) -> None:
    """Ask on the terminal until an empty line; answers appear token by token."""
    from transformers import TextStreamer

    # chat templates wrap their roles in <|...|>
    user, assistant = (re.sub(r"<\|.*?\|>|\s", "", role) for role in chat.conversation.roles)
    while True:
        # the end of the input and Ctrl-C end the chat as an empty line does
        try:
            question = input(f"{user or 'USER'}: ").strip()
        except (EOFError, KeyboardInterrupt):
            question = ""
        if not question:
            print("exit...")
            return
        try:
            if question.startswith("/"):
                print(f"[{_run_command(chat, question)}]")
                continue
            print(f"{assistant or 'ASSISTANT'}: ", end="", flush=True)
            answer = chat.ask(question, TextStreamer(chat.tokenizer, skip_prompt=True, skip_special_tokens=True))
        except (ValueError, OSError) as error:  # no image, or a question too long; the conversation goes on without it
            print(f"\n[{error}]")
            continue
        if answer.skipped is not None:
            share, layers = len(answer.skipped) / answer.num_layers, ", ".join(map(str, answer.skipped))
            listed = f": {layers}" if layers else ""
            print(f"[skip rate {share:.0%}, skipped {len(answer.skipped)} of {answer.num_layers} layers{listed}]")
        if is_verbose:
            print({"prompt": answer.prompt, "outputs": answer.text})


def _run_command(chat: Chat, line: str) -> str:
    """Run a line that starts with a slash; what to tell the user."""
    command, _, argument = line.partition(" ")
    if command == "/image" and argument.strip():
        chat.start_anew(open_image(argument.strip()))
        return "a new conversation about this image"
    if command == "/new":
        chat.start_anew(chat.image)
        return "a new conversation"
    return f"{command} is unknown or lacks something. {COMMANDS}"


def main(arguments: Sequence[str] | None = None, prog: str = "python -m llava.serve.cli") -> None:
    """Run the command line; a mistake ends it with exit code 2 and one line."""
    parser = argparse.ArgumentParser(prog=prog, description="Chat with a checkpoint about an image.", epilog=COMMANDS)
    parser.add_argument("--model-path", required=True, help="checkpoint folder or hub id, in any layout of LLaVA-1.5")
    parser.add_argument("--model-base", help="base model of a projector or of LoRA weights, if they do not name it")
    parser.add_argument("--image-file", help="path or http(s) address of the image; left out for a chat without one")
    parser.add_argument("--device", default="cuda", help="cuda (a CPU where there is none) or cpu; default: cuda")
    parser.add_argument("--conv-mode", help="conversation template; default: the checkpoint's own if it names one")
    parser.add_argument("--temperature", type=float, default=0.2, help="0 takes the likeliest token; default: 0.2")
    parser.add_argument("--top-p", type=float, help="probability mass to sample from; default: all")
    parser.add_argument("--max-new-tokens", type=int, default=512, help="longest answer in tokens; default: 512")
    parser.add_argument("--skip-rate", help=f"target skip rate of a routed checkpoint, or {DENSE}; default: its own")
    parser.add_argument("--load-8bit", action="store_true", help="quantize the decoder with bitsandbytes")
    parser.add_argument("--load-4bit", action="store_true", help="quantize the decoder with bitsandbytes")
    parser.add_argument("--debug", action="store_true", help="show prompts, and where an error was raised")
    options = parser.parse_args(arguments)
    try:
        chat, described = start_chat(options)
    except (ValueError, KeyError, OSError, ImportError) as error:
        if options.debug:
            raise
        parser.exit(2, f"{prog}: error: {error.args[0] if isinstance(error, KeyError) else error}\n")
    print(described, COMMANDS, sep="\n")
    talk(chat, options.debug)


if __name__ == "__main__":
    main()
