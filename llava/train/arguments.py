"""Command-line flags of training: LLaVA's and RoE's names, every one of them acted on or refused."""

from __future__ import annotations

from dataclasses import dataclass, field

from transformers import HfArgumentParser, TrainingArguments

from fuzzyroe.compat import PRESETS
from fuzzyroe.summary_sources import SOURCES
from llava.data.workers import preload_fork_server
from llava.train.llava_flags import LlavaFlags
from llava.train.stages import STAGES, Stage, choose_stage
from llava.train.task_targets import parse_task_targets

SKIP_PATTERNS = ("plan", "random")

ADAPTER_OBJECTIVES = ("answers", "forecast")

PLAN_ROUTERS = ("fuzzy", "linear_score", "static", "random")
"""Routers that the stages router, adapter and finetune can attach."""

DEFAULT_PLAN_ROUTER = "fuzzy"
DEFAULT_RULE_BASE, DEFAULT_ADAPTER_WIDTH, DEFAULT_SUMMARY, DEFAULT_COMPAT = "default", 1024, "tokens", "ours"
"""What routing is attached with where flags say nothing."""

FULL_BITS, QUANT_TYPES = 16, ("nf4", "fp4")
"""LLaVA's name for weights that are not quantized; forms of a 4-bit weight."""


@dataclass
class ModelArguments:
    """Which model, and how it is prompted.

    With a language model instead of a LLaVA checkpoint, ``vision_tower`` and the ``mm_`` flags say what is built
    around it; with a LLaVA checkpoint they must agree with it where they are given.
    """

    model_name_or_path: str = field(metadata={"help": "LLaVA checkpoint or language model: folder or hub id."})
    version: str = field(default="v1", metadata={"help": "Conversation template, a key of conv_templates."})
    attn_implementation: str = field(default="sdpa", metadata={"help": "sdpa, flash_attention_2 or eager."})
    vision_tower: str | None = field(default=None, metadata={"help": "CLIP checkpoint to see with: folder or hub id."})
    mm_projector_type: str | None = field(default=None, metadata={"help": "mlp2x_gelu."})
    mm_vision_select_layer: int | None = field(default=None, metadata={"help": "Layer of the tower; -2 in LLaVA."})
    mm_vision_select_feature: str | None = field(default=None, metadata={"help": "patch, or cls_patch."})
    pretrain_mm_mlp_adapter: str | None = field(default=None, metadata={"help": "Projector weights to start from."})
    tune_mm_mlp_adapter: bool = field(default=False, metadata={"help": "Train the projector alone: stage pretrain."})
    freeze_backbone: bool = field(default=False, metadata={"help": "Keep the language model as it is."})


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

    stage: str | None = field(
        default=None,
        metadata={"help": f"One of {', '.join(STAGES)}; default dense, pretrain with tune_mm_mlp_adapter."},
    )
    router: str | None = field(
        default=None, metadata={"help": f"What plans: {', '.join(PLAN_ROUTERS)}; default fuzzy, the rest to compare."}
    )
    rule_base: str | None = field(default=None, metadata={"help": "Shipped rule base by name, or a YAML file."})
    adapter_hidden_dim: int | None = field(default=None, metadata={"help": "Width of the adapters; 1024 in RoE."})
    skip_ratio: float = field(default=0.3, metadata={"help": "Mean skip rate the router is set to."})
    max_skip_ratio: float = field(default=0.5, metadata={"help": "Largest budget that is calibrated and trained for."})
    skip_pattern: str = field(default="plan", metadata={"help": "plan (the router decides) or random."})
    dense_ratio: float = field(default=0.0, metadata={"help": "Share of samples that skip nothing, in [0, 1]."})
    task_skip_ratios: str | None = field(
        default=None, metadata={"help": "Mean budgets of single sources in training, such as ocr_vqa=0.2,gqa=0.4."}
    )
    adapter_objective: str = field(
        default="answers", metadata={"help": "answers, or forecast: adapters learn what their layers give."}
    )
    anneal_softness: float = field(
        default=0.0, metadata={"help": "Softness that plans start with, 0 after 80 % of the steps; 0.1 is soft."}
    )
    refit_router: bool = field(default=True, metadata={"help": "Fit the router again once the stage has trained."})
    freeze_adapters: bool = field(default=False, metadata={"help": "Keep the adapters as they are."})
    skip_loss_weight: float = field(default=1.0, metadata={"help": "Weight of RoE's hinge on the skip rate."})
    train_hard_skip: bool = field(
        default=False, metadata={"help": "Leave skipped layers out in training, whole rows by their last turn."}
    )
    calibration_samples: int = field(default=1024, metadata={"help": "Samples measured at each skip count."})
    order_samples: int = field(default=256, metadata={"help": "Samples that the order of layers is searched on."})
    score_samples: int = field(default=4096, metadata={"help": "Samples that score quantiles are taken from."})
    budget_samples: int = field(
        default=0, metadata={"help": "Samples that linear routers are given a table of budgets on; 0 for none."}
    )
    per_layer_tables: bool = field(
        default=False, metadata={"help": "Fit a table of consequents per layer; needs a pass more for each layer."}
    )
    calibration_batch_size: int = field(default=32, metadata={"help": "Samples per device in calibration passes."})
    routing_summary: str | None = field(
        default=None, metadata={"help": f"What linear routers look at: {' or '.join(SOURCES)}; default tokens."}
    )
    roe_compat: str | None = field(
        default=None, metadata={"help": f"Layout and schedule of RoE: {', '.join(PRESETS)}; default ours."}
    )
    roe_lr: float = field(default=4e-4, metadata={"help": "Learning rate of the adapters, and of linear routers."})
    router_lr: float | None = field(default=None, metadata={"help": "Rate of linear routers; default --roe_lr."})
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
        if self.router not in (None, *PLAN_ROUTERS):
            raise ValueError(f"--router {self.router} is unknown; use one of {', '.join(PLAN_ROUTERS)}.")
        if self.skip_loss_weight < 0 or self.budget_samples < 0:
            raise ValueError(
                f"--skip_loss_weight {self.skip_loss_weight} and --budget_samples {self.budget_samples} must not be "
                "negative; 0 leaves either out."
            )
        if not 0 <= self.anneal_softness <= 1:
            raise ValueError(f"--anneal_softness {self.anneal_softness} lies outside [0, 1]; 0.1 is soft, 0 hard.")
        if self.adapter_objective not in ADAPTER_OBJECTIVES:
            raise ValueError(
                f"--adapter_objective {self.adapter_objective} is unknown; use {' or '.join(ADAPTER_OBJECTIVES)}."
            )
        if self.task_skip_ratios is not None:
            parse_task_targets(self.task_skip_ratios, self.max_skip_ratio)
        if not 0 <= self.dense_ratio <= 1:
            raise ValueError(f"--dense_ratio {self.dense_ratio} lies outside [0, 1].")
        if self.adapter_hidden_dim is not None and self.adapter_hidden_dim < 1:
            raise ValueError(f"--adapter_hidden_dim {self.adapter_hidden_dim} must be at least 1; RoE uses 1024.")
        for name, known in (("routing_summary", SOURCES), ("roe_compat", PRESETS)):
            if getattr(self, name) not in (None, *known):
                raise ValueError(f"--{name} {getattr(self, name)} is unknown; use one of {', '.join(known)}.")
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
    warmup_ratio: float = field(default=0.0, metadata={"help": "Share of the steps that warm up, in [0, 1)."})
    freeze_mm_mlp_adapter: bool = field(default=False, metadata={"help": "Keep the projector as it is."})
    mm_projector_lr: float | None = field(default=None, metadata={"help": "Rate of the projector."})
    lora_enable: bool = field(default=False, metadata={"help": "Train low-rank updates of the decoder, not itself."})
    lora_r: int = field(default=64, metadata={"help": "Rank of the updates."})
    lora_alpha: int = field(default=16, metadata={"help": "Updates are scaled by lora_alpha / lora_r."})
    lora_dropout: float = field(default=0.05, metadata={"help": "Dropout before the updates, in [0, 1)."})
    bits: int = field(
        default=FULL_BITS, metadata={"help": "4 or 8 quantize the decoder below its updates; 16 does not."}
    )
    double_quant: bool = field(default=True, metadata={"help": "Quantize the scales of 4-bit weights as well."})
    quant_type: str = field(default="nf4", metadata={"help": f"Form of 4-bit weights: {' or '.join(QUANT_TYPES)}."})
    report_to: str = field(default="none", metadata={"help": "none, tensorboard or wandb."})
    resume_from_checkpoint: str = field(
        default="auto", metadata={"help": "auto (the newest whole one of OUTPUT_DIR.partial), none, or a folder."}
    )
    save_total_limit: int | None = field(default=1, metadata={"help": "Step checkpoints kept, the newest ones."})
    watchdog_seconds: float = field(
        default=600.0, metadata={"help": "End a rank that stands still for so long, naming layer and batch; 0 never."}
    )
    fingerprint: str = field(default="", metadata={"help": "Written to OUTPUT_DIR/fingerprint with the checkpoint."})
    skip_data_check: bool = field(default=False, metadata={"help": "Start without checking records and images."})
    allow_truncation: bool = field(default=False, metadata={"help": "Train even if many records are cut."})

    def __post_init__(self) -> None:
        if self.warmup_ratio and self.warmup_steps not in (0, self.warmup_ratio):
            raise ValueError(
                f"--warmup_ratio {self.warmup_ratio} and --warmup_steps {self.warmup_steps} were both given; give one."
            )
        if not 0 <= self.warmup_ratio < 1:
            raise ValueError(f"--warmup_ratio {self.warmup_ratio} lies outside [0, 1); 0.03 is LLaVA's.")
        self.warmup_steps = self.warmup_ratio or self.warmup_steps  # below 1 it is a share of the steps
        if self.lora_r < 1 or self.lora_alpha < 1:
            raise ValueError(f"--lora_r {self.lora_r} and --lora_alpha {self.lora_alpha} must be at least 1.")
        if not 0 <= self.lora_dropout < 1:
            raise ValueError(f"--lora_dropout {self.lora_dropout} lies outside [0, 1); 0.05 is LLaVA's.")
        if self.bits not in (4, 8, FULL_BITS):
            raise ValueError(f"--bits {self.bits} is unknown; use 4, 8 or {FULL_BITS}.")
        if self.quant_type not in QUANT_TYPES:
            raise ValueError(f"--quant_type {self.quant_type} is unknown; use {' or '.join(QUANT_TYPES)}.")
        super().__post_init__()
        if self.dataloader_multiprocessing_context == "forkserver":
            preload_fork_server()


def parse_arguments(
    words: list[str] | None = None,
) -> tuple[ModelArguments, DataArguments, RoutingArguments, LlavaTrainingArguments]:
    """Read a command line.

    Args:
        words: Flags with their values; those of this process if None.

    Raises:
        ValueError: If a flag is unknown, or its value is not allowed.
    """
    kinds = (ModelArguments, DataArguments, RoutingArguments, LlavaTrainingArguments, LlavaFlags)
    return HfArgumentParser(kinds, allow_abbrev=False).parse_args_into_dataclasses(words, look_for_args_file=False)[:4]


def stage_of(
    model_args: ModelArguments, routing_args: RoutingArguments, training_args: LlavaTrainingArguments
) -> Stage:
    """The stage that the flags ask for. Raises KeyError or ValueError as ``choose_stage`` does."""
    return choose_stage(
        routing_args.stage,
        tune_projector=model_args.tune_mm_mlp_adapter,
        freeze_decoder=model_args.freeze_backbone,
        freeze_projector=training_args.freeze_mm_mlp_adapter,
        lora=training_args.lora_enable,
        freeze_adapters=routing_args.freeze_adapters,
        refit=routing_args.refit_router,
        fit_budgets=routing_args.budget_samples > 0,
    )
