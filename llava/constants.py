"""Token names and sentinel values of LLaVA, a public contract with lmms-eval.

The values are those of LLaVA-1.5 (``llava/constants.py`` upstream): tools that exchange data with a LLaVA
checkpoint compare against them.
"""

# The values are part of the contract: checkpoints and data were made with them.
IGNORE_INDEX = -100
"""Label of a position that is not trained."""

IMAGE_TOKEN_INDEX = -200
"""Placeholder id of one image in ``tokenizer_image_token`` output, before expansion to image tokens."""

DEFAULT_IMAGE_TOKEN = "<image>"
DEFAULT_IMAGE_PATCH_TOKEN = "<im_patch>"
DEFAULT_IM_START_TOKEN = "<im_start>"
DEFAULT_IM_END_TOKEN = "<im_end>"
IMAGE_PLACEHOLDER = "<image-placeholder>"

PADDING_TURN = -1
"""Turn id of padding; turn 0 is the system prompt with the image, turns from 1 are questions with their answers."""
