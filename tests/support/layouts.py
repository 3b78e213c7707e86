"""A tiny random checkpoint of each layout of LLaVA-1.5, all of the same weights.

Names of each layout are written down here once more, independently of the code under test.
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import sentencepiece
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPTextConfig,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from llava.model.checkpoints.tokenizer import read_tokenizer

NUM_PATCHES, IMAGE_SIZE = 16, 32

TEXT = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "rope_theta": 5000.0,
    "hidden_act": "silu",
    "initializer_range": 0.2,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "tie_word_embeddings": False,
}
VISION = {
    "hidden_size": 24,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "image_size": IMAGE_SIZE,
    "patch_size": 8,
    "projection_dim": 16,
}

SENTENCES = (
    "USER: Which digit is in the middle of the page? ASSISTANT: seven",
    "A chat between a curious human and an artificial intelligence assistant.",
    "The assistant gives helpful, detailed, and polite answers to the human's questions.",
    "Read every digit of every row, from left to right: 1 2 3 4 5 6 7 8 9 0.",
    "What colour is it?  And below,\tin the third row of the page?",
)


def train_sentencepiece(normalization: str = "identity") -> bytes:
    """A byte-fallback BPE model, trained on the spot; Llama's kind has no normalization."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(SENTENCES * 4),
        model_writer=model,
        vocab_size=384,
        model_type="bpe",
        byte_fallback=True,
        split_digits=True,
        normalization_rule_name=normalization,
        remove_extra_whitespaces=False,
        character_coverage=1.0,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    return model.getvalue()


@dataclass(frozen=True)
class Parts:
    """What all layouts are written from.

    Attributes:
        reference: transformers' own model with the weights; its vocabulary has one token more, the image's.
        vocab_size: Size of the vocabulary without it.
        sentencepiece_model: Content of ``tokenizer.model``.
        tower: Folder of a CLIP checkpoint with the vision tower.
        vicuna: Folder of a Llama checkpoint with the language model.
    """

    reference: LlavaForConditionalGeneration
    vocab_size: int
    sentencepiece_model: bytes
    tower: Path
    vicuna: Path

    @property
    def weights(self) -> dict[str, Tensor]:
        """Name in today's modules -> tensor, of the original vocabulary."""
        weights = {name: tensor.clone() for name, tensor in self.reference.state_dict().items()}
        for name in ("model.language_model.embed_tokens.weight", "lm_head.weight"):
            weights[name] = weights[name][: self.vocab_size].clone()
        return weights


def build_parts(folder: Path) -> Parts:
    """Draw the weights, and write the vision tower and the language model to folders of their own."""
    spm = train_sentencepiece()
    vocab_size = sentencepiece.SentencePieceProcessor(model_proto=spm).vocab_size()
    config = LlavaConfig(
        text_config=LlamaConfig(vocab_size=vocab_size + 1, **TEXT),
        vision_config=CLIPVisionConfig(**VISION),
        image_token_id=vocab_size,
        image_seq_length=NUM_PATCHES,
        tie_word_embeddings=False,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        reference = LlavaForConditionalGeneration(config).eval()
        clip = CLIPModel(CLIPConfig(text_config=CLIPTextConfig(**_CLIP_TEXT).to_dict(), vision_config=VISION))
    parts = Parts(reference, vocab_size, spm, folder / "clip", folder / "language model")
    _write_tower(parts, clip)
    _write_vicuna(parts)
    return parts


def _write_tower(parts: Parts, clip: CLIPModel) -> None:
    clip.vision_model.load_state_dict(parts.reference.model.vision_tower.state_dict())
    clip.save_pretrained(parts.tower)
    size = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    CLIPImageProcessorPil(size={"shortest_edge": IMAGE_SIZE}, crop_size=size).save_pretrained(parts.tower)


def _write_vicuna(parts: Parts) -> None:
    parts.vicuna.mkdir()
    config = {**TEXT, "vocab_size": parts.vocab_size, "model_type": "llama", "architectures": ["LlamaForCausalLM"]}
    (parts.vicuna / "config.json").write_text(json.dumps(config))
    weights = original_weights(parts, with_tower=False)
    torch.save(
        {name: tensor for name, tensor in weights.items() if "mm_" not in name},
        parts.vicuna / "pytorch_model.bin",
    )
    write_sentencepiece(parts, parts.vicuna)


def write_sentencepiece(parts: Parts, folder: Path) -> None:
    """A tokenizer as old checkpoints bring it: ``tokenizer.model`` and nothing else."""
    (folder / "tokenizer.model").write_bytes(parts.sentencepiece_model)


def original_names(weights: dict[str, Tensor]) -> dict[str, str]:
    """Name in today's modules -> name in the original repository."""
    starts = {
        "model.vision_tower.": "model.vision_tower.vision_tower.vision_model.",
        "model.multi_modal_projector.linear_1.": "model.mm_projector.0.",
        "model.multi_modal_projector.linear_2.": "model.mm_projector.2.",
        "model.language_model.": "model.",
        "lm_head.": "lm_head.",
    }
    return _rename(weights, starts)


def hub_names(weights: dict[str, Tensor]) -> dict[str, str]:
    """Name in today's modules -> name in the files of ``llava-hf``."""
    starts = {
        "model.vision_tower.": "vision_tower.vision_model.",
        "model.multi_modal_projector.": "multi_modal_projector.",
        "model.language_model.": "language_model.model.",
        "lm_head.": "language_model.lm_head.",
    }
    return _rename(weights, starts)


def _rename(weights: dict[str, Tensor], starts: dict[str, str]) -> dict[str, str]:
    names = {}
    for name in weights:
        start = next(start for start in starts if name.startswith(start))
        names[name] = starts[start] + name.removeprefix(start).removeprefix("vision_model.")
    return names


def original_weights(parts: Parts, with_tower: bool) -> dict[str, Tensor]:
    """The weights under the original repository's names."""
    weights = parts.weights
    names = original_names(weights)
    return {new: weights[old] for old, new in names.items() if with_tower or "vision_tower" not in new}


def original_config(parts: Parts, model_type: str = "llava") -> dict:
    """``config.json`` as the original repository writes it."""
    return {
        **TEXT,
        "vocab_size": parts.vocab_size,
        "architectures": ["LlavaLlamaForCausalLM"],
        "model_type": model_type,
        "freeze_mm_mlp_adapter": False,
        "image_aspect_ratio": "pad",
        "image_grid_pinpoints": None,
        "mm_hidden_size": VISION["hidden_size"],
        "mm_projector_type": "mlp2x_gelu",
        "mm_use_im_patch_token": False,
        "mm_use_im_start_end": False,
        "mm_vision_select_feature": "patch",
        "mm_vision_select_layer": -2,
        "mm_vision_tower": str(parts.tower),
        "tokenizer_model_max_length": 256,
        "tokenizer_padding_side": "right",
        "torch_dtype": "float32",
        "transformers_version": "4.31.0",
        "tune_mm_mlp_adapter": False,
        "use_cache": True,
        "use_mm_proj": True,
    }


def write_original(parts: Parts, folder: Path, model_type: str, suffix: str, num_shards: int, with_tower: bool) -> None:
    """A whole checkpoint in the original repository's layout."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(original_config(parts, model_type)))
    write_sentencepiece(parts, folder)
    write_shards(original_weights(parts, with_tower), folder, suffix, num_shards)


def write_shards(weights: dict[str, Tensor], folder: Path, suffix: str, num_shards: int) -> None:
    """Weights in one file, or in several with an index."""
    stem = {"bin": "pytorch_model", "safetensors": "model"}[suffix]
    if num_shards == 1:
        save(weights, folder / f"{stem}.{suffix}")
        return
    places = {}
    for number in range(num_shards):
        shard = {name: weights[name] for name in list(weights)[number::num_shards]}
        file = f"{stem}-{number + 1:05}-of-{num_shards:05}.{suffix}"
        save(shard, folder / file)
        places |= dict.fromkeys(shard, file)
    index = {"metadata": {"total_size": sum(t.nbytes for t in weights.values())}, "weight_map": places}
    (folder / f"{stem}.{suffix}.index.json").write_text(json.dumps(index))


def save(weights: dict[str, Tensor], file: Path) -> None:
    """Write a file of tensors of either kind."""
    if file.suffix == ".bin":
        torch.save(weights, file)
    else:
        save_file(weights, file, metadata={"format": "pt"})


def write_hub(parts: Parts, folder: Path, rename: Callable[[dict[str, Tensor]], dict[str, str]] = hub_names) -> None:
    """A whole checkpoint in transformers' layout, as ``llava-hf`` publishes it."""
    folder.mkdir()
    weights = parts.reference.state_dict()
    save({new: weights[old] for old, new in rename(weights).items()}, folder / "model.safetensors")
    config = parts.reference.config
    config.image_aspect_ratio = "pad"
    config.save_pretrained(folder)
    read_tokenizer(parts.vicuna).save_pretrained(folder)
    CLIPImageProcessorPil.from_pretrained(parts.tower).save_pretrained(folder)


def write_projector_only(parts: Parts, folder: Path) -> None:
    """What LLaVA's pretraining leaves: a projector, and the configuration of the whole."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(original_config(parts)))
    weights = original_weights(parts, with_tower=False)
    save({name: t for name, t in weights.items() if "mm_projector" in name}, folder / "mm_projector.bin")


def lora_factors(parts: Parts, prefix: str, rank: int = 2) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Random updates of all query maps: file content under names that begin with ``prefix``, and the updated weights.

    Args:
        parts: What is updated.
        prefix: Start of the name of a decoder layer's module, up to its number.
        rank: Rank of the updates; they are scaled by ``2 * rank / rank``.
    """
    generator, factors, updated = torch.Generator().manual_seed(1), {}, {}
    for layer in range(TEXT["num_hidden_layers"]):
        weight = parts.weights[f"model.language_model.layers.{layer}.self_attn.q_proj.weight"]
        down = torch.randn(rank, weight.shape[1], generator=generator) * 0.3
        up = torch.randn(weight.shape[0], rank, generator=generator) * 0.3
        name = f"{prefix}{layer}.self_attn.q_proj"
        factors |= {f"{name}.lora_A.weight": down, f"{name}.lora_B.weight": up}
        updated[f"model.language_model.layers.{layer}.self_attn.q_proj.weight"] = weight + 2 * up @ down
    return factors, updated


def write_lora(parts: Parts, folder: Path, prefix: str, base: str, **files: dict[str, Tensor]) -> dict[str, Tensor]:
    """LoRA weights as peft writes them, with other files of tensors beside.

    Returns:
        The updated weights, under the names of today's modules.
    """
    folder.mkdir(exist_ok=True)
    factors, updated = lora_factors(parts, prefix)
    save(factors, folder / "adapter_model.bin")
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "base_model_name_or_path": base, "bias": "none"}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    for name, weights in files.items():
        save(weights, folder / f"{name}.bin")
    return updated


def write_original_lora(parts: Parts, folder: Path) -> dict[str, Tensor]:
    """What LLaVA's LoRA training leaves: updates of Vicuna, and the whole projector in ``non_lora_trainables.bin``."""
    projector = {f"base_model.model.{name}": t for name, t in original_weights(parts, False).items() if "mm_" in name}
    prefix = "base_model.model.model.layers."
    updated = write_lora(parts, folder, prefix, str(parts.vicuna), non_lora_trainables=projector)
    (folder / "config.json").write_text(json.dumps(original_config(parts)))
    return updated


_CLIP_TEXT = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "vocab_size": 64,
    "max_position_embeddings": 16,
    "projection_dim": 16,
}
