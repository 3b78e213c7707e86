"""Flags of LLaVA's scripts that have one meaning here: that value is accepted, any other refused with the reason."""

from __future__ import annotations

from dataclasses import dataclass, fields

REASONS = {
    "lazy_preprocess": "records are always read and encoded one at a time; leave it out.",
    "mm_use_im_start_end": "LLaVA-1.5 puts no tokens around an image; leave it out.",
    "mm_use_im_patch_token": "LLaVA-1.5 has no patch token; leave it out.",
    "mm_patch_merge_type": "LLaVA-1.5 sees an image as one tile; leave it out.",
    "evaluation_strategy": "nothing is evaluated while training; run scripts/v1_5/eval.sh afterwards.",
    "lora_bias": "biases are not trained beside the updates; leave it out.",
    "lora_weight_path": "earlier updates are not continued; merge them and name the result as the model.",
    "cache_dir": "the hub's cache is chosen by the environment; set HF_HOME.",
}
"""Why a flag knows one value, and what to do instead."""


@dataclass
class LlavaFlags:
    """LLaVA's flags without a choice; that they can be given at all lets LLaVA's commands run.

    Raises:
        ValueError: If one has another value.
    """

    lazy_preprocess: bool = True
    mm_use_im_start_end: bool = False
    mm_use_im_patch_token: bool = False
    mm_patch_merge_type: str = "flat"
    evaluation_strategy: str = "no"
    lora_bias: str = "none"
    lora_weight_path: str = ""
    cache_dir: str | None = None

    def __post_init__(self) -> None:
        for item in fields(self):
            found = getattr(self, item.name)
            if found != item.default:
                raise ValueError(
                    f"--{item.name} {found} is not available, {item.default!r} is all it can be: {REASONS[item.name]}"
                )
