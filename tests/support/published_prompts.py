"""Prompts as they were published, written out by hand: one turn, two turns, and two turns with the last answer open.

Sources of the formats: Vicuna's v0 ("###") and v1.1 (FastChat), the model card of Llama 2 chat, MPT's and ChatML's
markup, Mistral's instruct format, and the templates of LLaVA 1.0 to 1.6. LLaVA's own ways are part of them: Llama 2's
first "<s>" is left to the tokenizer, the answer's "</s>" has a blank in front of it, and the two sentences of the
tagged system prompts are joined without one.
"""

from __future__ import annotations

HUMAN = (
    "A chat between a curious human and an artificial intelligence assistant. The assistant gives helpful, detailed, "
    "and polite answers to the human's questions."
)
USER = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed, "
    "and polite answers to the user's questions."
)
TAGGED = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant is able to understand the "
    "visual content that the user provides, and assist the user with a variety of tasks using natural language.The "
    "visual content will be provided with the following format: <Image>visual content</Image>."
)
EXAMPLE = """\
###Human: What are the key differences between renewable and non-renewable energy sources?###Assistant: Renewable \
energy sources are those that can be replenished naturally in a relatively short amount of time, such as solar, wind, \
hydro, geothermal, and biomass. Non-renewable energy sources, on the other hand, are finite and will eventually be \
depleted, such as coal, oil, and natural gas. Here are some key differences between renewable and non-renewable energy \
sources:
1. Availability: Renewable energy sources are virtually inexhaustible, while non-renewable energy sources are finite \
and will eventually run out.
2. Environmental impact: Renewable energy sources have a much lower environmental impact than non-renewable sources, \
which can lead to air and water pollution, greenhouse gas emissions, and other negative effects.
3. Cost: Renewable energy sources can be more expensive to initially set up, but they typically have lower operational \
costs than non-renewable sources.
4. Reliability: Renewable energy sources are often more reliable and can be used in more remote locations than \
non-renewable sources.
5. Flexibility: Renewable energy sources are often more flexible and can be adapted to different situations and needs, \
while non-renewable sources are more rigid and inflexible.
6. Sustainability: Renewable energy sources are more sustainable over the long term, while non-renewable sources are \
not, and their depletion can lead to economic and social instability.
"""
LLAMA_2 = """\
[INST] <<SYS>>
You are a helpful, respectful and honest assistant. Always answer as helpfully as possible, while being safe.  Your \
answers should not include any harmful, unethical, racist, sexist, toxic, dangerous, or illegal content. Please ensure \
that your responses are socially unbiased and positive in nature.

If a question does not make any sense, or is not factually coherent, explain why instead of answering something not \
correct. If you don't know the answer to a question, please don't share false information.
<</SYS>>

"""
LLAVA_LLAMA_2 = """\
[INST] <<SYS>>
You are a helpful language and vision assistant. You are able to understand the visual content that the user provides, \
and assist the user with a variety of tasks using natural language.
<</SYS>>

"""
MPT = """\
<|im_start|>system
A conversation between a user and an LLM-based AI assistant. The assistant gives helpful and honest answers.<|im_end|>\
"""
MPT_TEXT = """\
<|im_start|>system
- You are a helpful assistant chatbot trained by MosaicML.
- You answer questions.
- You are excited to be able to help the user, but will refuse to do anything that could be considered harmful to the \
user.
- You are more than just an information source, you are also able to write poetry, short stories, and make jokes.\
<|im_end|>"""
LLAVA_MPT = """\
<|im_start|>system
- You are a helpful language and vision assistant.
- You are able to understand the visual content that the user provides, and assist the user with a variety of tasks \
using natural language.
- You should follow the instructions carefully and explain your answers in detail.<|im_end|>"""
CHATML = "<|im_start|>system\nAnswer the questions.<|im_end|>"

HASHES = (
    "###Human: <image>\nq1###Assistant: a1###",
    "###Human: <image>\nq1###Assistant: a1###Human: q2###Assistant: a2###",
    "###Human: <image>\nq1###Assistant: a1###Human: q2###Assistant:",
)
VICUNA = (
    "USER: <image>\nq1 ASSISTANT: a1</s>",
    "USER: <image>\nq1 ASSISTANT: a1</s>USER: q2 ASSISTANT: a2</s>",
    "USER: <image>\nq1 ASSISTANT: a1</s>USER: q2 ASSISTANT:",
)
IM = (
    "<|im_start|>user\n<image>\nq1<|im_end|><|im_start|>assistant\na1<|im_end|>",
    "<|im_start|>user\n<image>\nq1<|im_end|><|im_start|>assistant\na1<|im_end|>"
    "<|im_start|>user\nq2<|im_end|><|im_start|>assistant\na2<|im_end|>",
    "<|im_start|>user\n<image>\nq1<|im_end|><|im_start|>assistant\na1<|im_end|>"
    "<|im_start|>user\nq2<|im_end|><|im_start|>assistant\n",
)
INSTRUCTIONS = (
    "<image>\nq1 [/INST] a1 </s>",
    "<image>\nq1 [/INST] a1 </s><s>[INST] q2 [/INST] a2 </s>",
    "<image>\nq1 [/INST] a1 </s><s>[INST] q2 [/INST]",
)
MISTRAL = (
    "[INST] <image>\nq1 [/INST] a1 </s>",
    "[INST] <image>\nq1 [/INST] a1 </s>[INST] q2 [/INST] a2 </s>",
    "[INST] <image>\nq1 [/INST] a1 </s>[INST] q2 [/INST]",
)
PLAIN = ("<image>a1\n", "<image>a1\nq2a2\n", "<image>a1\nq2")

PUBLISHED: dict[str, tuple[str, tuple[str, str, str]]] = {
    "default": (HUMAN + EXAMPLE, HASHES),
    "v0": (HUMAN + EXAMPLE, HASHES),
    "llava_v0": (HUMAN, HASHES),
    "v0_mmtag": (TAGGED, HASHES),
    "v1": (USER + " ", VICUNA),
    "vicuna_v1": (USER + " ", VICUNA),
    "llava_v1": (HUMAN + " ", VICUNA),
    "v1_mmtag": (TAGGED + " ", VICUNA),
    "digits": ("", VICUNA),
    "llama_2": (LLAMA_2, INSTRUCTIONS),
    "llava_llama_2": (LLAVA_LLAMA_2, INSTRUCTIONS),
    "mistral_instruct": ("", MISTRAL),
    "chatml_direct": (CHATML, IM),
    "mistral_direct": (CHATML, IM),
    "mpt": (MPT, IM),
    "mpt_text": (MPT_TEXT, IM),
    "llava_mpt": (LLAVA_MPT, IM),
    "plain": ("", PLAIN),
    "v0_plain": ("", PLAIN),
}
"""What stands before the first question's own markup, and the three conversations behind it, by template."""
