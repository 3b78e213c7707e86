"""Command-line flags of training: one dataclass for model, data and trainer each, and one per stage family.

The parser of a stage knows the flags of its family alone (``FAMILIES``), so it refuses those of another. LLaVA's and
RoE's names are kept; flags of LLaVA's scripts that leave no choice here are ``FixedFlags``.
"""

from __future__ import annotations

import argparse
import difflib
from dataclasses import Field, dataclass, field, fields
from typing import Any

from transformers import HfArgumentParser, TrainingArguments

from fuzzyroe.routers.roe.compat import PRESETS
from fuzzyroe.routers.roe.schedule import start_bias
from fuzzyroe.routers.roe.tokens import SOURCES
from llava.data.workers import preload_fork_server
from llava.train.stages import PARTS, STAGES, Stage, StageInputError, choose_stage, get_stage

SKIP_PATTERNS = ("plan", "random")

ADAPTER_OBJECTIVES = ("answers", "forecast")

PLAN_ROUTERS = ("fuzzy", "linear_score", "static", "random")
"""Routers that the stages router, adapter and finetune can attach."""

DEFAULT_PLAN_ROUTER = "fuzzy"
DEFAULT_RULE_BASE, DEFAULT_ADAPTER_WIDTH, DEFAULT_SUMMARY, DEFAULT_COMPAT = "default", 1024, "tokens", "ours"
"""What routing is attached with where flags say nothing."""

FULL_BITS, QUANT_TYPES = 16, ("nf4", "fp4")
"""LLaVA's name for weights that are not quantized; forms of a 4-bit weight."""

DEFAULT_EVAL_BATCH = 8
"""transformers' default of a flag that has nothing to act on here."""


def _flag(default: Any, text: str, *aliases: str) -> Any:
    """A field with its line in ``--help``; argparse reads a single ``%`` as a placeholder."""
    return field(default=default, metadata={"help": text.replace("%", "%%"), "aliases": list(aliases)})


def _require(holds: bool, flag: str, value: object, remedy: str) -> None:
    if not holds:
        raise StageInputError(f"--{flag} {value} {remedy}")


def _require_choice(flag: str, value: str | None, known: Any) -> None:
    _require(value is None or value in known, flag, value, f"is unknown; use {_enumerate(known)}.")


def _enumerate(names: Any) -> str:
    *first, last = map(str, names)
    return f"{', '.join(first)} or {last}" if first else last


@dataclass
class ModelArguments:
    """Which model, and how it is prompted.

    With a language model instead of a LLaVA checkpoint, ``vision_tower`` and the ``mm_`` flags say what is built
    around it; with a LLaVA checkpoint they must agree with it where they are given.
    """

    model_name_or_path: str = field(metadata={"help": "LLaVA checkpoint or language model: folder or hub id."})
    version: str = _flag("v1", "Conversation template, a key of conv_templates.")
    attn_implementation: str = _flag("sdpa", "sdpa, flash_attention_2 or eager.")
    vision_tower: str | None = _flag(None, "CLIP checkpoint of the vision tower: folder or hub id.")
    mm_projector_type: str | None = _flag(None, "mlp2x_gelu.")
    mm_vision_select_layer: int | None = _flag(None, "Layer of the tower; -2 in LLaVA.")
    mm_vision_select_feature: str | None = _flag(None, "patch, or cls_patch.")
    pretrain_mm_mlp_adapter: str | None = _flag(None, "Projector weights to start from.")
    tune_mm_mlp_adapter: bool = _flag(False, "Train the projector alone: stage pretrain.")
    freeze_backbone: bool = _flag(False, "Keep the language model as it is.")


@dataclass
class DataArguments:
    """Which data."""

    data_path: str = field(metadata={"help": "SFT records, JSON or JSONL."})
    image_folder: str = field(metadata={"help": "Folder that image paths are relative to."})
    image_aspect_ratio: str = _flag("pad", "pad (centre on a square) or square.")

    def __post_init__(self) -> None:
        _require_choice("image_aspect_ratio", self.image_aspect_ratio, ("pad", "square"))


@dataclass
class StageArguments:
    """Flags of every stage; subclasses are the families."""

    stage: str | None = _flag(None, f"One of {', '.join(STAGES)}; default dense, pretrain with tune_mm_mlp_adapter.")
    backbone_lr: float | None = _flag(None, "Rate of all but adapters and routers; default --learning_rate.")


@dataclass
class DenseArguments(StageArguments):
    """Stages without routing: pretrain, dense, scratch. They have no flags of their own."""


@dataclass
class RoutedArguments(StageArguments):
    """What every stage with routing takes."""

    target_skip_ratio: float = _flag(0.3, "Skip rate that the router is set to, on average.", "--skip_ratio")
    max_skip_ratio: float = _flag(0.5, "Largest target that is trained and fitted for.")
    adapter_hidden_dim: int | None = _flag(None, f"Width of the adapters; {DEFAULT_ADAPTER_WIDTH} by default.")
    freeze_adapters: bool = _flag(False, "Keep the adapters as they are.")
    roe_lr: float = _flag(4e-4, "Learning rate of the adapters, and of linear routers.")
    calibration_batch_size: int = _flag(32, "Samples per device in the passes that fit a router.")

    def __post_init__(self) -> None:
        _require(
            0 < self.max_skip_ratio < 1, "max_skip_ratio", self.max_skip_ratio, "lies outside (0, 1); 0.5 is usual."
        )
        _require(
            0 <= self.target_skip_ratio <= self.max_skip_ratio,
            "target_skip_ratio",
            self.target_skip_ratio,
            f"lies outside [0, --max_skip_ratio {self.max_skip_ratio}]; lower it.",
        )
        if self.adapter_hidden_dim is not None:
            self._require_at_least(1, "adapter_hidden_dim")
        self._require_at_least(1, "calibration_batch_size")

    def _require_at_least(self, lowest: int, *flags: str) -> None:
        for flag in flags:
            value = getattr(self, flag)
            _require(value >= lowest, flag, value, f"must be at least {lowest}; leave it out for the default.")


@dataclass
class PlanArguments(RoutedArguments):
    """FuzzyRoE's stages, and those of the routers it is compared with: router, adapter, finetune."""

    router: str | None = _flag(None, f"What plans: {', '.join(PLAN_ROUTERS)}; default {DEFAULT_PLAN_ROUTER}.")
    rule_base: str | None = _flag(None, "Shipped rule base by name, or a YAML file.")
    skip_pattern: str = _flag("plan", "plan (the router decides) or random.")
    dense_ratio: float = _flag(0.0, "Share of samples that skip nothing, in [0, 1].")
    source_skip_ratios: str | None = _flag(
        None, "Mean targets of single sources of samples in training, such as ocr_vqa=0.2,gqa=0.4."
    )
    adapter_objective: str = _flag("answers", "answers, or forecast: adapters learn what their layers give.")
    anneal_softness: float = _flag(0.0, "Softness that plans start with, 0 after 80 % of the steps; 0.1 is soft.")
    train_hard_skip: bool = _flag(False, "Leave skipped layers out in training, whole rows by their last turn.")
    refit_router: bool = _flag(True, "Fit the router again once the stage has trained.")
    calibration_samples: int = _flag(1024, "Samples measured at each skip count.")
    order_samples: int = _flag(256, "Samples that the order of layers is searched on.")
    score_samples: int = _flag(4096, "Samples that score quantiles are taken from.")
    per_layer_tables: bool = _flag(False, "Fit a table of consequents per layer; needs a pass more for each layer.")

    def __post_init__(self) -> None:
        super().__post_init__()
        _require_choice("skip_pattern", self.skip_pattern, SKIP_PATTERNS)
        _require_choice("adapter_objective", self.adapter_objective, ADAPTER_OBJECTIVES)
        _require_choice("router", self.router, PLAN_ROUTERS)
        for flag, hint in (("anneal_softness", "0.1 is soft, 0 hard"), ("dense_ratio", "0 has none")):
            value = getattr(self, flag)
            _require(0 <= value <= 1, flag, value, f"lies outside [0, 1]; {hint}.")
        self._require_at_least(1, "calibration_samples", "order_samples", "score_samples")
        if self.source_skip_ratios is not None:
            parse_source_ratios(self.source_skip_ratios, self.max_skip_ratio)
        self._check_combinations()

    def _check_combinations(self) -> None:
        """Flags about plans act only where the router's plans are followed, as hard or soft as the flag says."""
        follows_plans = self.skip_pattern == "plan" and self.adapter_objective == "answers"
        _require(
            self.adapter_objective == "answers" or self.skip_pattern == "plan" and not self.train_hard_skip,
            "adapter_objective",
            self.adapter_objective,
            "skips nothing while it trains; leave out --train_hard_skip and --skip_pattern.",
        )
        for flag, acts in (
            ("dense_ratio", follows_plans),
            ("source_skip_ratios", follows_plans),
            ("anneal_softness", follows_plans and not self.train_hard_skip),
        ):
            value = getattr(self, flag)
            _require(
                acts or not value,
                flag,
                value,
                "was given, but nothing follows a plan that it could change; leave it out, or leave out "
                "--skip_pattern, --adapter_objective and --train_hard_skip.",
            )


@dataclass
class RoEArguments(RoutedArguments):
    """RoE's stages: roe_adapter, roe_router, roe_finetune."""

    routing_summary: str | None = _flag(
        None, f"What linear routers look at: {' or '.join(SOURCES)}; default {DEFAULT_SUMMARY}."
    )
    roe_compat: str | None = _flag(None, f"Layout and schedule of RoE: {', '.join(PRESETS)}; default {DEFAULT_COMPAT}.")
    router_lr: float | None = _flag(None, "Rate of the routers; default --roe_lr.")
    skip_loss_weight: float = _flag(1.0, "Weight of RoE's hinge on the skip rate.")
    budget_samples: int = _flag(0, "Samples that a table of targets is measured on at the end; 0 for none.")

    def __post_init__(self) -> None:
        super().__post_init__()
        _require_choice("routing_summary", self.routing_summary, SOURCES)
        _require_choice("roe_compat", self.roe_compat, PRESETS)
        for flag in ("skip_loss_weight", "budget_samples"):
            value = getattr(self, flag)
            _require(value >= 0, flag, value, "must not be negative; 0 leaves it out.")
        _require(
            self.budget_samples > 0 or self.max_skip_ratio == RoEArguments.max_skip_ratio,
            "max_skip_ratio",
            self.max_skip_ratio,
            "was given, but bounds nothing without --budget_samples; leave it out, or give both.",
        )
        try:
            start_bias(self.target_skip_ratio)
        except ValueError as error:
            raise StageInputError(f"--target_skip_ratio: {error}") from error


FAMILIES: dict[str, type[StageArguments]] = {"off": DenseArguments, "plan": PlanArguments, "relaxed": RoEArguments}
"""Flags of the stages of each ``Stage.routing``."""


@dataclass
class LlavaTrainingArguments(TrainingArguments):
    """Hugging Face's training flags with LLaVA's additions and defaults."""

    model_max_length: int = _flag(2048, "Longest sample in tokens, images expanded.")
    group_by_modality_length: bool = _flag(False, "Batch samples of one modality and similar length together.")
    remove_unused_columns: bool = _flag(False, "Kept False: batches carry turn ids.")
    warmup_ratio: float = _flag(0.0, "Share of the steps that warm up, in [0, 1).")
    freeze_mm_mlp_adapter: bool = _flag(False, "Keep the projector as it is.")
    mm_projector_lr: float | None = _flag(None, "Rate of the projector.")
    lora_enable: bool = _flag(False, "Train LoRA weights of the decoder, not itself.")
    lora_r: int = _flag(64, "Rank of LoRA.")
    lora_alpha: int = _flag(16, "LoRA is scaled by lora_alpha / lora_r.")
    lora_dropout: float = _flag(0.05, "Dropout before LoRA, in [0, 1).")
    bits: int = _flag(FULL_BITS, "4 or 8 quantize the decoder below its LoRA weights; 16 does not.")
    double_quant: bool = _flag(True, "Quantize the scales of 4-bit weights as well.")
    quant_type: str = _flag("nf4", f"Form of 4-bit weights: {' or '.join(QUANT_TYPES)}.")
    report_to: str = _flag("none", "none, tensorboard or wandb.")
    resume_from_checkpoint: str = _flag("auto", "auto (the newest whole one of OUTPUT_DIR.partial), none, or a folder.")
    save_total_limit: int | None = _flag(1, "Step checkpoints kept, the newest ones.")
    watchdog_seconds: float = _flag(
        600.0, "Terminate a rank that makes no progress for so long, naming layer and batch; 0 never."
    )
    fingerprint: str = _flag("", "Written to OUTPUT_DIR/fingerprint with the checkpoint.")
    skip_data_check: bool = _flag(False, "Start without checking records and images.")
    allow_truncation: bool = _flag(False, "Train even if many records are cut.")

    def __post_init__(self) -> None:
        if self.warmup_ratio and self.warmup_steps not in (0, self.warmup_ratio):
            raise StageInputError(
                f"--warmup_ratio {self.warmup_ratio} and --warmup_steps {self.warmup_steps} were both given; give one."
            )
        _require(0 <= self.warmup_ratio < 1, "warmup_ratio", self.warmup_ratio, "lies outside [0, 1); 0.03 is LLaVA's.")
        self.warmup_steps = self.warmup_ratio or self.warmup_steps  # below 1 it is a share of the steps
        for flag in ("lora_r", "lora_alpha"):
            _require(getattr(self, flag) >= 1, flag, getattr(self, flag), "must be at least 1.")
        _require(0 <= self.lora_dropout < 1, "lora_dropout", self.lora_dropout, "lies outside [0, 1); 0.05 is LLaVA's.")
        _require_choice("bits", self.bits, (4, 8, FULL_BITS))
        _require_choice("quant_type", self.quant_type, QUANT_TYPES)
        if self.bits != 4 and (not self.double_quant or self.quant_type != "nf4"):
            raise StageInputError(
                f"--double_quant {self.double_quant} and --quant_type {self.quant_type} are about 4-bit weights, "
                f"--bits is {self.bits}; leave them out, or give --bits 4."
            )
        super().__post_init__()
        if self.eval_strategy.value != "no" or self.per_device_eval_batch_size != DEFAULT_EVAL_BATCH:
            raise StageInputError(
                "--eval_strategy or --per_device_eval_batch_size was given, but nothing is evaluated while training; "
                "leave them out and run scripts/v1_5/eval.sh afterwards."
            )
        if self.gradient_checkpointing and (self.gradient_checkpointing_kwargs or {}).get("use_reentrant"):
            raise StageInputError(
                "use_reentrant=True cuts the gradient of routing silently; remove it (non-reentrant is the default)."
            )
        if self.dataloader_multiprocessing_context == "forkserver":
            preload_fork_server()


def _only(value: Any, reason: str) -> Any:
    return field(default=value, metadata={"help": f"{value!r} is all it can be: {reason}"})


@dataclass
class FixedFlags:
    """Flags of LLaVA's scripts that have one meaning here; that they can be given lets LLaVA's commands run.

    Raises:
        StageInputError: If one has another value, with the reason.
    """

    lazy_preprocess: bool = _only(True, "records are always read and encoded one at a time; leave it out.")
    mm_use_im_start_end: bool = _only(False, "LLaVA-1.5 puts no tokens around an image; leave it out.")
    mm_use_im_patch_token: bool = _only(False, "LLaVA-1.5 has no patch token; leave it out.")
    mm_patch_merge_type: str = _only("flat", "LLaVA-1.5 encodes an image as one tile; leave it out.")
    evaluation_strategy: str = _only("no", "nothing is evaluated while training; run scripts/v1_5/eval.sh afterwards.")
    lora_bias: str = _only("none", "biases are not trained beside LoRA; leave it out.")
    lora_weight_path: str = _only(
        "", "earlier LoRA weights are not continued; merge them and name the result as model."
    )
    cache_dir: str | None = _only(None, "the hub's cache is chosen by the environment; set HF_HOME.")

    def __post_init__(self) -> None:
        for item in fields(self):
            value = getattr(self, item.name)
            _require(value == item.default, item.name, value, f"is not available, {item.metadata['help']}")


NEEDS: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("skip_pattern", "dense_ratio", "source_skip_ratios", "adapter_objective"), PARTS),
    **dict.fromkeys(("anneal_softness", "train_hard_skip"), PARTS),
    "roe_lr": ("adapter", "router"),
    "router_lr": ("router",),
    "backbone_lr": ("vision_tower", "projector", "decoder", "lora"),
    "mm_projector_lr": ("projector",),
    **dict.fromkeys(("lora_r", "lora_alpha", "lora_dropout", "bits"), ("lora",)),
}
"""Flag -> parts of which a stage must train one, so that the flag has something to act on."""

FITTING_FLAGS = {"calibration_samples", "order_samples", "score_samples", "per_layer_tables", "calibration_batch_size"}
"""Flags that act where a router is fitted."""

Parsed = tuple[ModelArguments, DataArguments, StageArguments, LlavaTrainingArguments]


def parse_arguments(words: list[str] | None = None) -> Parsed:
    """Read a command line with the parser of its stage.

    Args:
        words: Flags with their values; those of this process if None.

    Raises:
        StageInputError: If a flag is unknown or belongs to other stages, or its value is not allowed.
        KeyError: If the stage is unknown.
    """
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--stage")
    chosen = first.parse_known_args(words)[0].stage
    stage = get_stage(chosen or "dense")  # pretrain, the other default, is of the same family
    parser = HfArgumentParser(_kinds(stage), allow_abbrev=False, epilog=_other_flags(stage))
    unknown = parser.parse_known_args(words)[1]
    if unknown:
        raise StageInputError(_explain_unknown(unknown, stage))
    parsed = parser.parse_args_into_dataclasses(words, look_for_args_file=False)[:4]
    _check_needs(*parsed)
    return parsed


def stage_of(model_args: ModelArguments, stage_args: StageArguments, training_args: LlavaTrainingArguments) -> Stage:
    """The stage that the flags ask for. Raises KeyError or ValueError as ``choose_stage`` does."""
    return choose_stage(
        stage_args.stage,
        tune_projector=model_args.tune_mm_mlp_adapter,
        freeze_decoder=model_args.freeze_backbone,
        freeze_projector=training_args.freeze_mm_mlp_adapter,
        lora=training_args.lora_enable,
        freeze_adapters=isinstance(stage_args, RoutedArguments) and stage_args.freeze_adapters,
        refit=not isinstance(stage_args, PlanArguments) or stage_args.refit_router,
        fit_budgets=isinstance(stage_args, RoEArguments) and stage_args.budget_samples > 0,
    )


def learning_rates(stage_args: StageArguments, training_args: LlavaTrainingArguments) -> dict[str, float]:
    """Learning rate of each of ``PARTS``; the most particular flag that was given decides."""
    rate = training_args.learning_rate if stage_args.backbone_lr is None else stage_args.backbone_lr
    rates = dict.fromkeys(PARTS, rate)
    if isinstance(stage_args, RoutedArguments):
        rates["adapter"] = rates["router"] = stage_args.roe_lr
    if isinstance(stage_args, RoEArguments) and stage_args.router_lr is not None:
        rates["router"] = stage_args.router_lr
    if training_args.mm_projector_lr is not None:
        rates["projector"] = training_args.mm_projector_lr
    return rates


def takes(stage: Stage, flag: str) -> bool:
    """Whether the parser of a stage knows a flag, and the stage trains or fits what the flag acts on."""
    if flag not in {item.name for kind in _kinds(stage) for item in fields(kind)}:
        return False
    if flag in FITTING_FLAGS:
        return stage.calibrates
    return flag not in NEEDS or bool(set(NEEDS[flag]) & set(stage.trains))


def parse_source_ratios(text: str, max_skip_ratio: float) -> dict[str, float]:
    """Read the value of ``--source_skip_ratios``.

    Args:
        text: ``SOURCE=RATIO`` pairs separated by commas, such as ``ocr_vqa=0.2,gqa=0.4``.
        max_skip_ratio: Largest ratio, in (0, 1).

    Returns:
        Target skip ratio of each source, in [0, ``max_skip_ratio``].

    Raises:
        StageInputError: If a pair cannot be read, a source stands there twice, or a ratio is out of range.
    """
    targets: dict[str, float] = {}
    for pair in text.split(","):
        source, _, ratio = pair.strip().rpartition("=")
        try:
            target = float(ratio)
        except ValueError:
            source = ""
        if not source:
            raise StageInputError(
                f"--source_skip_ratios has {pair!r}; SOURCE=RATIO pairs separated by commas are allowed, such as "
                "ocr_vqa=0.2,gqa=0.4. Correct it."
            )
        if source in targets:
            raise StageInputError(f"--source_skip_ratios names {source} twice; give one target per source.")
        if not 0 <= target <= max_skip_ratio:
            raise StageInputError(
                f"--source_skip_ratios {source}={ratio} lies outside [0, --max_skip_ratio {max_skip_ratio}]; lower it, "
                "or raise --max_skip_ratio."
            )
        targets[source] = target
    return targets


def _kinds(stage: Stage) -> tuple[Any, ...]:
    return ModelArguments, DataArguments, FAMILIES[stage.routing], LlavaTrainingArguments, FixedFlags


def _check_needs(
    model_args: ModelArguments,
    data_args: DataArguments,
    stage_args: StageArguments,
    training_args: LlavaTrainingArguments,
) -> None:
    """Refuse a flag of the family that finds nothing to act on, because of the stage or because of other flags."""
    stage = stage_of(model_args, stage_args, training_args)
    for arguments in (stage_args, training_args):
        for item in fields(arguments):
            value = getattr(arguments, item.name)
            if value != item.default and not takes(stage, item.name):
                raise StageInputError(_refusal(item.name, value, stage))
    is_forecast = isinstance(stage_args, PlanArguments) and stage_args.adapter_objective == "forecast"
    if is_forecast and stage.trains != ("adapter",):
        raise StageInputError(
            f"--adapter_objective forecast was given, but it trains adapters alone, not stage {stage}; leave it out, "
            "or use the stage adapter."
        )


def _refusal(flag: str, value: object, stage: Stage) -> str:
    others = [name for name, other in STAGES.items() if takes(other, flag) and name != stage.name]
    remedy = f", or use one of the stages {', '.join(others)}" if others else ""
    if NEEDS.get(flag) == ("lora",) and "decoder" in STAGES[stage.name].trains:
        remedy = ", or add --lora_enable True"
    return f"--{flag} {value} was given, but finds nothing to act on in stage {stage}; leave it out{remedy}."


def _explain_unknown(unknown: list[str], stage: Stage) -> str:
    """What to say of words that the parser of a stage does not know."""
    word, _, value = unknown[0].partition("=")
    value = value or " ".join(unknown[1:2])
    flag = word.lstrip("-").replace("-", "_")
    names = {name: item.name for kind in FAMILIES.values() for item in fields(kind) for name in _names(item)}
    if flag in names:
        return _refusal(names[flag], value, stage)
    close = difflib.get_close_matches(
        flag, [*names, *(item.name for kind in _kinds(stage) for item in fields(kind))], 1
    )
    meant = f" did you mean --{close[0]}?" if close else ""
    return f"{word} {value} is no flag of training;{meant} --stage {stage.name} --help lists them."


def _names(item: Field) -> list[str]:
    return [item.name, *(alias.removeprefix("--") for alias in item.metadata.get("aliases", ()))]


def _other_flags(stage: Stage) -> str:
    """The end of ``--help``: which stages take further flags."""
    lines = []
    for routing, family in FAMILIES.items():
        names = [name for name, other in STAGES.items() if other.routing == routing]
        flags = [f"--{item.name}" for item in fields(family) if item.name not in StageArguments.__annotations__]
        if routing != stage.routing and names:
            lines.append(f"--stage {'|'.join(names)} takes {' '.join(flags)}.")
    return " ".join(lines)
