"""Conversations of three turns with what training learns of them between « and », written out by hand.

{image} stands where the first question's image is, if it has one. Answers are learned with the blank before them and
the separator behind them; system prompts, examples, questions and roles are not.
"""

from __future__ import annotations

from published_prompts import PUBLISHED

QUESTIONS = ("How many?", "And below?", "Why so?")
ANSWERS = ("4", "none, I think.", "Look: dots")

HASHES = (
    "###Human: {image}How many?###Assistant:« 4###»",
    "Human: And below?###Assistant:« none, I think.###»",
    "Human: Why so?###Assistant:« Look: dots###»",
)
VICUNA = (
    "USER: {image}How many? ASSISTANT:« 4</s>»",
    "USER: And below? ASSISTANT:« none, I think.</s>»",
    "USER: Why so? ASSISTANT:« Look: dots</s>»",
)
LLAMA_2 = (
    "{image}How many? [/INST]« 4 </s>»",
    "<s>[INST] And below? [/INST]« none, I think. </s>»",
    "<s>[INST] Why so? [/INST]« Look: dots </s>»",
)
MISTRAL = (
    "[INST] {image}How many? [/INST]« 4 </s>»",
    "[INST] And below? [/INST]« none, I think. </s>»",
    "[INST] Why so? [/INST]« Look: dots </s>»",
)
CHATML = (
    "<|im_start|>user\n{image}How many?<|im_end|><|im_start|>assistant\n«4<|im_end|>»",
    "<|im_start|>user\nAnd below?<|im_end|><|im_start|>assistant\n«none, I think.<|im_end|>»",
    "<|im_start|>user\nWhy so?<|im_end|><|im_start|>assistant\n«Look: dots<|im_end|>»",
)
PLAIN = ("How many?«4\n»", "And below?«none, I think.\n»", "Why so?«Look: dots\n»")
PLAIN_IMAGE = ("<image>«4\n»", *PLAIN[1:])

LINE, TAGS = "<image>\n", "<Image><image></Image>\n"
TEMPLATES: dict[str, tuple[tuple[str, ...], str]] = {
    "default": (HASHES, LINE),
    "v0": (HASHES, LINE),
    "llava_v0": (HASHES, LINE),
    "v0_mmtag": (HASHES, TAGS),
    "v1": (VICUNA, LINE),
    "vicuna_v1": (VICUNA, LINE),
    "llava_v1": (VICUNA, LINE),
    "v1_mmtag": (VICUNA, TAGS),
    "digits": (VICUNA, LINE),
    "llama_2": (LLAMA_2, LINE),
    "llava_llama_2": (LLAMA_2, LINE),
    "mistral_instruct": (MISTRAL, LINE),
    "chatml_direct": (CHATML, LINE),
    "mistral_direct": (CHATML, LINE),
    "mpt": (CHATML, LINE),
    "mpt_text": (CHATML, LINE),
    "llava_mpt": (CHATML, LINE),
    "plain": (PLAIN, LINE),
    "v0_plain": (PLAIN, LINE),
}
"""By template: its turns, and how it writes an image."""


def marked_prompt(name: str, num_turns: int, has_image: bool) -> str:
    """The first turns of the conversation under a template, with « and » around what is learned."""
    turns, image = TEMPLATES[name]
    if turns is PLAIN and has_image:
        turns = PLAIN_IMAGE
    text = "".join(turns[:num_turns]).replace("{image}", image if has_image else "")
    return PUBLISHED[name][0] + text
