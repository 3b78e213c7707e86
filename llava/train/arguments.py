"""Command-line flags of training: LLaVA's and RoE's names, every one of them acted on."""

from __future__ import annotations

from dataclasses import dataclass, field

from transformers import TrainingArguments

from llava.train.stages import STAGES

SKIP_PATTERNS = ("plan", "random")

DEFAULT_RULE_BASE, DEFAULT_ADAPTER_WIDTH = "default", 1024
"""What routing is attached with where flags say nothing."""


@dataclass
class ModelArguments:
    """Which model, and how it is prompted."""

    model_name_or_path: str = field(metadata={"help": "Checkpoint folder or hub id of the model to start from."})
    version: str = field(default="v1", metadata={"help": "Conversation template, a key of conv_templates."})
    attn_implementation: str = field(default="sdpa", metadata={"help": "sdpa, flash_attention_2 or eager."})


@dataclass
class DataArguments:
    """Which data."""

    data_path: str = field(metadata={"help": "SFT records, JSON or JSONL."})
    image_folder: str = field(metadata={"help": "Folder that image paths are relative to."})
    image_aspect_ratio: str = field(default="pad", metadata={"help": "pad (centre on a square) or square."})

    def __post_init__(self) -> None:
        if self.image_aspect_ratio not in ("pad", "square"):
            raise ValueError(f"--image_aspect_ratio {self.image_aspect_ratio} is unknown; use pad or square.")


@dataclass
class RoutingArguments:
    """What is skipped, and how the router is fitted."""

    stage: str = field(default="finetune", metadata={"help": f"One of {', '.join(STAGES)}."})
    rule_base: str | None = field(default=None, metadata={"help": "Shipped rule base by name, or a YAML file."})
    adapter_hidden_dim: int | None = field(default=None, metadata={"help": "Width of the adapters; 1024 in RoE."})
    skip_ratio: float = field(default=0.3, metadata={"help": "Mean skip rate the router is set to."})
    max_skip_ratio: float = field(default=0.5, metadata={"help": "Largest budget that is calibrated and trained for."})
    skip_pattern: str = field(default="plan", metadata={"help": "plan (the router decides) or random."})
    dense_ratio: float = field(default=0.0, metadata={"help": "Share of samples that skip nothing, in [0, 1]."})
    calibration_samples: int = field(default=1024, metadata={"help": "Samples measured at each skip count."})
    order_samples: int = field(default=256, metadata={"help": "Samples that the order of layers is searched on."})
    score_samples: int = field(default=4096, metadata={"help": "Samples that score quantiles are taken from."})
    calibration_batch_size: int = field(default=32, metadata={"help": "Samples per device in calibration passes."})
    roe_lr: float = field(default=4e-4, metadata={"help": "Learning rate of the adapters."})
    backbone_lr: float | None = field(default=None, metadata={"help": "Rate of all else; default --learning_rate."})

    def __post_init__(self) -> None:
        if not 0 <= self.skip_ratio <= self.max_skip_ratio:
            raise ValueError(
                f"--skip_ratio {self.skip_ratio} lies outside [0, --max_skip_ratio {self.max_skip_ratio}]; lower it."
            )
        if not 0 < self.max_skip_ratio < 1:
            raise ValueError(f"--max_skip_ratio {self.max_skip_ratio} lies outside (0, 1); 0.5 is usual.")
        if self.skip_pattern not in SKIP_PATTERNS:
            raise ValueError(f"--skip_pattern {self.skip_pattern} is unknown; use {' or '.join(SKIP_PATTERNS)}.")
        if not 0 <= self.dense_ratio <= 1:
            raise ValueError(f"--dense_ratio {self.dense_ratio} lies outside [0, 1].")
        if self.adapter_hidden_dim is not None and self.adapter_hidden_dim < 1:
            raise ValueError(f"--adapter_hidden_dim {self.adapter_hidden_dim} must be at least 1; RoE uses 1024.")
        for name in ("calibration_samples", "order_samples", "score_samples", "calibration_batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name} {getattr(self, name)} must be at least 1; leave it out for the default.")


@dataclass
class LlavaTrainingArguments(TrainingArguments):
    """Hugging Face's training flags with LLaVA's additions and defaults."""

    model_max_length: int = field(default=2048, metadata={"help": "Longest sample in tokens, images expanded."})
    group_by_modality_length: bool = field(
        default=False, metadata={"help": "Batch samples of one modality and similar length together."}
    )
    remove_unused_columns: bool = field(default=False, metadata={"help": "Kept False: batches carry turn ids."})
    report_to: str = field(default="none", metadata={"help": "none, tensorboard or wandb."})
    fingerprint: str = field(default="", metadata={"help": "Written to OUTPUT_DIR/fingerprint with the checkpoint."})
    skip_data_check: bool = field(default=False, metadata={"help": "Start without checking records and images."})
