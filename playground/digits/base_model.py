"""The playground's base model before training: a small LLaVA of transformers' own classes with random weights.

CLIP vision tower (32 px images, 8 px patches, 16 image tokens), two-layer GELU projector, Llama decoder of 12 layers.
Everything a LLaVA checkpoint folder holds is written, so the folder is trained and loaded like any other.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from transformers import CLIPVisionConfig, GenerationConfig, LlamaConfig, LlavaConfig, PreTrainedTokenizerFast
from transformers import LlavaForConditionalGeneration as Llava
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

IMAGE_SIZE, PATCH_SIZE = 32, 8

INITIALIZER_RANGE = 0.06
"""Standard deviation of random weights: stock 0.02 suits width 4096; about 1/sqrt(width) lets a narrow model start."""

POSITION_RANGE = 0.5
"""The same for the tower's position embeddings, so that where a patch lies is as loud as what it shows."""


def build_config(tokenizer: PreTrainedTokenizerFast, width: int = 112, num_layers: int = 12) -> LlavaConfig:
    """Configuration of the small LLaVA for a tokenizer that knows ``<image>``."""
    ids = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    vision = CLIPVisionConfig(
        hidden_size=96,
        intermediate_size=192,
        num_hidden_layers=4,
        num_attention_heads=4,
        image_size=IMAGE_SIZE,
        patch_size=PATCH_SIZE,
        projection_dim=96,
        initializer_range=INITIALIZER_RANGE,
    )
    text = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=num_layers,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=512,
        initializer_range=INITIALIZER_RANGE,
        **ids,
    )
    return LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        projector_hidden_act="gelu",
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
        image_seq_length=(IMAGE_SIZE // PATCH_SIZE) ** 2,
        tie_word_embeddings=False,
        **ids,
    )


def build_base_model(tokenizer_folder: str | Path, output: str | Path, seed: int = 0) -> Llava:
    """Write the untrained base model, given back too, with its tokenizer and image processor to ``output``."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(tokenizer_folder)
    torch.manual_seed(seed)
    model = Llava(build_config(tokenizer))
    torch.nn.init.normal_(model.model.vision_tower.embeddings.position_embedding.weight, std=POSITION_RANGE)
    ids = {name: getattr(model.config, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    model.generation_config = GenerationConfig(**ids, max_new_tokens=64)
    model.save_pretrained(output)
    tokenizer.save_pretrained(output)
    CLIPImageProcessorPil(
        size={"shortest_edge": IMAGE_SIZE},
        crop_size={"height": IMAGE_SIZE, "width": IMAGE_SIZE},
        image_mean=[0.5, 0.5, 0.5],
        image_std=[0.5, 0.5, 0.5],
    ).save_pretrained(output)
    return model


def main() -> None:
    """Command line: ``python -m playground.digits.base_model --tokenizer DIR --output DIR``."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokenizer", required=True)
    parser.add_argument("--output", required=True)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    model = build_base_model(arguments.tokenizer, arguments.output, arguments.seed)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    print(f"{parameters:,} parameters, {parameters * 4 / 2**20:.2f} MiB in fp32, written to {arguments.output}")


if __name__ == "__main__":
    main()
