"""Terminal chat with a checkpoint about an image.

    python -m llava.serve.cli --model-path outputs/quickstart/finetune --image-file canvas.png --conv-mode digits

Flags are LLaVA's; ``--skip-rate`` is ours. An empty line ends the chat.
"""

from __future__ import annotations

import argparse
import io
import re
import urllib.request
from collections.abc import Sequence

from PIL import Image

from llava.conversation import get_template
from llava.data.images import open_rgb
from llava.inference.generator import DENSE, GenerationOptions, parse_skip_rate
from llava.serve.chat import Answer, Chat, choose_template

COMMANDS = "/image PATH talks about another image, /new forgets what was said, an empty line ends the chat."


def build_parser(prog: str) -> argparse.ArgumentParser:
    """Declare the flags of the command."""
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
    return parser


def open_image(source: str) -> Image.Image:
    """Read an image from a file or from the web as RGB.

    Raises:
        ValueError: If a file is no image.
        OSError: If there is none at the address.
    """
    if not source.startswith(("http://", "https://")):
        return open_rgb(source)
    with urllib.request.urlopen(source, timeout=30) as response:
        return Image.open(io.BytesIO(response.read())).convert("RGB")


def start_chat(options: argparse.Namespace) -> tuple[Chat, str]:
    """Check the flags, cheapest first, then load the model.

    Returns:
        The chat, and a line that describes checkpoint, target skip rate and template.

    Raises:
        ValueError, KeyError, OSError, ImportError: If a flag, the image or the checkpoint cannot be used.
    """
    settings = _read_generation_options(options)
    if options.conv_mode is not None:
        get_template(options.conv_mode)
    rate = parse_skip_rate(options.skip_rate, "--skip-rate")
    image = None if options.image_file is None else open_image(options.image_file)

    # imported here, so that a wrong flag is refused before seconds of imports
    from transformers.utils import logging

    from fuzzyroe import set_skip_rate
    from llava.model.builder import load_pretrained_model

    logging.disable_progress_bar()
    loaded = load_pretrained_model(
        options.model_path,
        options.model_base,
        load_8bit=options.load_8bit,
        load_4bit=options.load_4bit,
        device=options.device,
        skip_rate=rate,
    )
    model = loaded[1]
    if options.skip_rate == DENSE:
        set_skip_rate(model, None)
    template, reason = choose_template(options.conv_mode, model.config)
    chat = Chat(*loaded, template=template, options=settings, image=image)
    target = chat.target_skip_ratio
    skips = "no layer is skipped" if target is None else f"target mean skip rate {target:.0%}"
    return chat, f"{options.model_path}, {skips}; template {template} ({reason})."


def _read_generation_options(options: argparse.Namespace) -> GenerationOptions:
    """Check the flags of generation; a temperature of 0 is greedy."""
    if options.temperature < 0:
        raise ValueError(f"--temperature is {options.temperature}; it is 0 (the likeliest token) or more.")
    if options.top_p is not None and not 0 < options.top_p <= 1:
        raise ValueError(f"--top-p is {options.top_p}; it lies in (0, 1]. Leave it out to sample from all tokens.")
    if options.max_new_tokens < 1:
        raise ValueError(f"--max-new-tokens is {options.max_new_tokens}; it is at least 1.")
    flags = {name: getattr(options, name) for name in ("temperature", "top_p", "max_new_tokens")}
    return GenerationOptions.from_gen_kwargs(flags)


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
        if question.startswith("/"):
            _run_command(chat, question)
            continue
        print(f"{assistant or 'ASSISTANT'}: ", end="", flush=True)
        try:
            answer = chat.ask(question, TextStreamer(chat.tokenizer, skip_prompt=True, skip_special_tokens=True))
        except ValueError as error:  # the question is too long; the conversation goes on without it
            print(f"\n[{error}]")
            continue
        if answer.skipped is not None:
            print(describe_skips(answer))
        if is_verbose:
            print({"prompt": answer.prompt, "outputs": answer.text})


def describe_skips(answer: Answer) -> str:
    """Describe the skipped layers of an answer in one line."""
    number, layers = len(answer.skipped or ()), ", ".join(map(str, answer.skipped or ()))
    listed = f": {layers}" if layers else ""
    return f"[skip rate {number / answer.num_layers:.0%}, skipped {number} of {answer.num_layers} layers{listed}]"


def main(arguments: Sequence[str] | None = None, prog: str = "python -m llava.serve.cli") -> None:
    """Run the command line; a mistake ends it with exit code 2 and one line."""
    parser = build_parser(prog)
    options = parser.parse_args(arguments)
    try:
        chat, described = start_chat(options)
    except (ValueError, KeyError, OSError, ImportError) as error:
        if options.debug:
            raise
        parser.exit(2, f"{prog}: error: {error.args[0] if isinstance(error, KeyError) else error}\n")
    print(described, COMMANDS, sep="\n")
    talk(chat, options.debug)


def _run_command(chat: Chat, line: str) -> None:
    command, _, argument = line.partition(" ")
    try:
        if command == "/image" and argument.strip():
            chat.start_anew(open_image(argument.strip()))
            print("[a new conversation about this image]")
        elif command == "/new":
            chat.start_anew(chat.image)
            print("[a new conversation]")
        else:
            print(f"[{command} is unknown or lacks something. {COMMANDS}]")
    except (ValueError, OSError) as error:
        print(f"[{error}]")


if __name__ == "__main__":
    main()
