"""Command-line flags of training: one dataclass each for model, data and trainer, and one per stage family.

The parser of a stage knows the flags of its family alone (``FAMILIES``) and says of any other which stages take it.
LLaVA's and RoE's names are kept; flags of LLaVA's scripts that leave no choice here are ``FixedFlags``.
"""

from __future__ import annotations

import argparse
import difflib
import math
import multiprocessing
import re
from dataclasses import dataclass, field, fields
from typing import Any, Literal, NamedTuple, NoReturn

from transformers import HfArgumentParser, TrainingArguments

from fuzzyroe.routers import plan_router_names
from fuzzyroe.routers.roe.tokens import SOURCES
from fuzzyroe.routers.roe.training import PRESETS, start_bias
from llava.data import FORK_SERVER_MODULES
from llava.train.objectives import OBJECTIVES, make_objective
from llava.train.stages import PARTS, STAGES, Stage, StageInputError, choose_stage, get_stage

DEFAULT_RULE_BASE, DEFAULT_ADAPTER_WIDTH, DEFAULT_SUMMARY, DEFAULT_COMPAT = "default", 1024, "tokens", "ours"
"""What routing is attached with where flags say nothing."""

FULL_BITS = 16
"""LLaVA's name for weights that are not quantized."""

DEFAULT_EVAL_BATCH = 8
"""transformers' default of a flag that has nothing to act on here."""


def _flag(default: Any, text: str, **more: Any) -> Any:
    """A field with its line in ``--help``; argparse reads a single ``%`` as a placeholder."""
    return field(default=default, metadata={"help": text.replace("%", "%%"), **more})


def require(holds: object, flag: str, value: object, remedy: str) -> None:
    """Refuse a flag with its value and a remedy unless something holds; raises StageInputError."""
    if not holds:
        raise StageInputError(f"--{flag} {value} {remedy}")


def _check_range(arguments: Any, lowest: float, highest: float, *flags: str) -> None:
    allowed = f"must be at least {lowest}" if highest == math.inf else f"lies outside [{lowest}, {highest}]"
    for flag in flags:
        value = getattr(arguments, flag)
        require(value is None or lowest <= value <= highest, flag, value, f"{allowed}; leave it out for the default.")


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
    # the two change what a stage trains, see choose_stage
    tune_mm_mlp_adapter: bool = _flag(False, "Train the projector alone: stage pretrain.")
    freeze_backbone: bool = _flag(False, "Keep the language model as it is.")


@dataclass
class DataArguments:
    """Which data."""

    data_path: str = field(metadata={"help": "SFT records, JSON or JSONL."})
    image_folder: str = field(metadata={"help": "Folder that image paths are relative to."})
    image_aspect_ratio: Literal["pad", "square"] = _flag("pad", "pad centres an image on a square.")


@dataclass
class StageArguments:
    """Flags of every stage, and all that those without routing have; subclasses are the other families."""

    stage: str | None = _flag(None, f"One of {', '.join(STAGES)}; default dense, pretrain with tune_mm_mlp_adapter.")
    objective: str | None = _flag(
        None, f"What is minimised: {', '.join(OBJECTIVES)}; default language_model, in RoE's stages roe."
    )
    backbone_lr: float | None = _flag(None, "Rate of all but adapters and routers; default --learning_rate.")

    def __post_init__(self) -> None:
        is_known = self.objective is None or self.objective in OBJECTIVES
        require(is_known, "objective", self.objective, f"is unknown; use one of {', '.join(OBJECTIVES)}.")


@dataclass
class RoutedArguments(StageArguments):
    """What every stage with routing takes."""

    target_skip_ratio: float = _flag(0.3, "Mean skip rate that the router is set to.", aliases=["--skip_ratio"])
    max_skip_ratio: float = _flag(0.5, "Largest target that is trained and fitted for.")
    adapter_hidden_dim: int | None = _flag(None, f"Width of the adapters; default {DEFAULT_ADAPTER_WIDTH}.")
    freeze_adapters: bool = _flag(False, "Keep the adapters as they are.")
    roe_lr: float = _flag(4e-4, "Learning rate of the adapters, and of linear routers.")
    calibration_batch_size: int = _flag(32, "Samples per device in the passes that fit a router.")

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_range(self, 0.01, 0.99, "max_skip_ratio")
        is_allowed = 0 <= self.target_skip_ratio <= self.max_skip_ratio
        remedy = f"lies outside [0, --max_skip_ratio {self.max_skip_ratio}]; lower it."
        require(is_allowed, "target_skip_ratio", self.target_skip_ratio, remedy)
        _check_range(self, 1, math.inf, "adapter_hidden_dim", "calibration_batch_size")


@dataclass
class PlanArguments(RoutedArguments):
    """FuzzyRoE's stages, and those of the routers it is compared with: router, adapter, finetune."""

    router: str | None = _flag(None, f"What plans: {', '.join(plan_router_names())}; default the first.")
    rule_base: str | None = _flag(None, f"Shipped rule base by name, or a YAML file; default {DEFAULT_RULE_BASE}.")
    skip_pattern: Literal["plan", "random"] = _flag("plan", "Skip as the router plans, or at random.")
    dense_ratio: float = _flag(0.0, "Share of samples that skip nothing, in [0, 1].")
    source_skip_ratios: str | None = _flag(None, "Mean targets of single sources, such as ocr_vqa=0.2,gqa=0.4.")
    anneal_softness: float = _flag(0.0, "Softness that plans start with, 0 after 80 % of the steps; 0.1 is soft.")
    train_hard_skip: bool = _flag(False, "Leave skipped layers out in training, whole rows by their last turn.")
    refit_router: bool = _flag(True, "Fit the router again once the stage has trained.")
    calibration_samples: int = _flag(1024, "Samples measured at each skip count.")
    order_samples: int = _flag(256, "Samples that the order of layers is searched on.")
    score_samples: int = _flag(4096, "Samples that score quantiles are taken from.")
    per_layer_tables: bool = _flag(False, "Fit a table of consequents per layer; needs a pass more for each layer.")

    def __post_init__(self) -> None:
        super().__post_init__()
        # not argparse's choices, which would miss a router that is added to ROUTERS later
        known = plan_router_names()
        require(self.router in (None, *known), "router", self.router, f"is unknown; use one of {', '.join(known)}.")
        _check_range(self, 0, 1, "anneal_softness", "dense_ratio")
        _check_range(self, 1, math.inf, "calibration_samples", "order_samples", "score_samples")
        self.source_targets()  # a pair that cannot be read fails now, not when the first batch is drawn
        skips = self.skip_pattern != "plan" or self.train_hard_skip
        remedy = "skips nothing while it trains; leave out --train_hard_skip and --skip_pattern."
        require(not (self.skips_nothing and skips), "objective", self.objective, remedy)
        # these flags change plans, so the stage must follow some; soft plans leave no layer out
        remedy = "leave it out, or leave out --skip_pattern, --objective and --train_hard_skip."
        for flag in ("dense_ratio", "source_skip_ratios", "anneal_softness"):
            value = getattr(self, flag)
            acts = self.follows_plans and not (flag == "anneal_softness" and self.train_hard_skip)
            require(acts or not value, flag, value, f"was given, but nothing follows a plan that it changes; {remedy}")

    @property
    def skips_nothing(self) -> bool:
        """Whether every layer runs while the stage trains: a regression on what layers give needs them all."""
        return self.objective == "layer_regression"

    @property
    def follows_plans(self) -> bool:
        """Whether training, if there is any, skips what the router plans."""
        return self.skip_pattern == "plan" and not self.skips_nothing

    def source_targets(self) -> dict[str, float]:
        """Target skip ratio of each source that ``--source_skip_ratios`` names, in [0, ``max_skip_ratio``].

        Raises:
            StageInputError: If a pair cannot be read, a source stands there twice, or a ratio is out of range.
        """
        flag, targets = "source_skip_ratios", dict[str, float]()
        for pair in [] if self.source_skip_ratios is None else self.source_skip_ratios.split(","):
            # a source may hold an equals sign itself, a ratio never does
            source, _, ratio = pair.strip().rpartition("=")
            try:
                target = float(ratio)
            except ValueError:
                source, target = "", 0.0
            allowed = "SOURCE=RATIO pairs separated by commas are allowed, such as ocr_vqa=0.2,gqa=0.4. Correct it."
            require(bool(source), flag, f"has {pair!r};", allowed)
            require(source not in targets, flag, f"names {source} twice;", "give one target per source.")
            outside = f"lies outside [0, --max_skip_ratio {self.max_skip_ratio}]; lower it, or raise --max_skip_ratio."
            require(0 <= target <= self.max_skip_ratio, flag, f"{source}={ratio}", outside)
            targets[source] = target
        return targets


@dataclass
class RoEArguments(RoutedArguments):
    """RoE's stages: roe_adapter, roe_router, roe_finetune."""

    routing_summary: str | None = _flag(
        None, f"What the routers look at; default {DEFAULT_SUMMARY}.", choices=list(SOURCES)
    )
    roe_compat: str | None = _flag(None, f"Layout and schedule; default {DEFAULT_COMPAT}.", choices=list(PRESETS))
    router_lr: float | None = _flag(None, "Rate of the routers; default --roe_lr.")
    skip_loss_weight: float = _flag(1.0, "Weight of RoE's hinge on the skip rate.")
    budget_samples: int = _flag(0, "Samples that a table of targets is measured on at the end; 0 for none.")

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_range(self, 0, math.inf, "skip_loss_weight", "budget_samples")
        # RoE has one operating point; only a table of targets has a largest one
        is_bound = self.budget_samples > 0 or self.max_skip_ratio == RoEArguments.max_skip_ratio
        remedy = "was given, but bounds nothing without --budget_samples; leave it out, or give both."
        require(is_bound, "max_skip_ratio", self.max_skip_ratio, remedy)
        # the schedule starts from a bias, which reaches half of the layers at most
        try:
            start_bias(self.target_skip_ratio)
        except ValueError as error:
            raise StageInputError(f"--target_skip_ratio: {error}") from error


FAMILIES: dict[str, type[StageArguments]] = {"off": StageArguments, "plan": PlanArguments, "relaxed": RoEArguments}
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
    bits: Literal[4, 8, 16] = _flag(FULL_BITS, "4 or 8 quantize the decoder below its LoRA weights; 16 does not.")
    double_quant: bool = _flag(True, "Quantize the scales of 4-bit weights as well.")
    quant_type: Literal["nf4", "fp4"] = _flag("nf4", "Form of 4-bit weights.")
    report_to: str = _flag("none", "none, tensorboard or wandb.")
    resume_from_checkpoint: str = _flag("auto", "auto (the newest whole one of OUTPUT_DIR.partial), none, or a folder.")
    save_total_limit: int | None = _flag(1, "Step checkpoints kept, the newest ones.")
    watchdog_seconds: float = _flag(600.0, "Terminate a rank that makes no progress for so long; 0 never.")
    run_hash: str = _flag("", "Written to OUTPUT_DIR/run_hash with the checkpoint; scripts tell by it what to reuse.")
    skip_data_check: bool = _flag(False, "Start without checking records and images.")
    allow_truncation: bool = _flag(False, "Train even if many records are cut.")

    def __post_init__(self) -> None:
        _check_range(self, 0, 0.99, "warmup_ratio", "lora_dropout")
        _check_range(self, 1, math.inf, "lora_r", "lora_alpha")
        given = f"{self.warmup_ratio} and --warmup_steps {self.warmup_steps}"
        is_one = not self.warmup_ratio or self.warmup_steps in (0, self.warmup_ratio)
        require(is_one, "warmup_ratio", given, "were both given; give one.")
        self.warmup_steps = self.warmup_ratio or self.warmup_steps  # below 1 it is a share of the steps
        given = f"{self.double_quant} and --quant_type {self.quant_type}"
        remedy = f"are about 4-bit weights, --bits is {self.bits}; leave them out, or give --bits 4."
        is_default = self.double_quant and self.quant_type == "nf4"
        require(self.bits == 4 or is_default, "double_quant", given, remedy)
        super().__post_init__()  # reads JSON values, such as those of gradient_checkpointing_kwargs
        is_evaluated = self.eval_strategy != "no" or self.per_device_eval_batch_size != DEFAULT_EVAL_BATCH
        remedy = "was given, but nothing is evaluated while training; leave both out and run scripts/v1_5/eval.sh."
        require(not is_evaluated, "eval_strategy", "or --per_device_eval_batch_size", remedy)
        # the reentrant form sees no gradient through the routing keyword
        options: Any = self.gradient_checkpointing_kwargs or {}
        is_reentrant = self.gradient_checkpointing and options.get("use_reentrant")
        remedy = "cuts the gradient of routing silently; remove it (non-reentrant is the default)."
        require(not is_reentrant, "gradient_checkpointing_kwargs", "use_reentrant=True", remedy)
        # the server is forked before CUDA and the model exist
        if self.dataloader_multiprocessing_context == "forkserver":
            multiprocessing.set_forkserver_preload(FORK_SERVER_MODULES)


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
    lora_weight_path: str = _only("", "LoRA weights are not continued; merge them and name the result as the model.")
    cache_dir: str | None = _only(None, "the hub's cache is chosen by the environment; set HF_HOME.")

    def __post_init__(self) -> None:
        for item in fields(self):
            value = getattr(self, item.name)
            require(value == item.default, item.name, value, f"is not available, {item.metadata['help']}")


FITTING = "fitting"

NEEDS: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("skip_pattern", "dense_ratio", "source_skip_ratios", "objective"), PARTS),
    **dict.fromkeys(("anneal_softness", "train_hard_skip"), PARTS),
    "roe_lr": ("adapter", "router"),
    "router_lr": ("router",),
    "backbone_lr": ("vision_tower", "projector", "decoder", "lora"),
    "mm_projector_lr": ("projector",),
    **dict.fromkeys(("lora_r", "lora_alpha", "lora_dropout", "bits"), ("lora",)),
    **dict.fromkeys(("calibration_samples", "order_samples", "score_samples", "per_layer_tables"), (FITTING,)),
    "calibration_batch_size": (FITTING,),
}
"""Flag -> what it acts on: parts of which the stage must train one, or the fitting of a router at its end."""


def takes(stage: Stage, flag: str) -> bool:
    """Whether the parser of a stage knows a flag, and the stage trains or fits what the flag acts on."""
    acted_on = {*stage.trains, FITTING} if stage.calibrates else set(stage.trains)
    return flag in _names(*_kinds(stage)) and (flag not in NEEDS or not acted_on.isdisjoint(NEEDS[flag]))


class StageParser(HfArgumentParser):
    """The parser of a stage, without the flags of other families."""

    def __init__(self, stage: Stage) -> None:
        self.stage = stage
        others = [name for name, other in STAGES.items() if other.routing != stage.routing]
        epilog = f"Further flags: --stage NAME --help, for the stages {', '.join(others)}."
        super().__init__(_kinds(stage), allow_abbrev=False, epilog=epilog)

    def error(self, message: str) -> NoReturn:
        """Refuse as all of training does, without argparse's list of several hundred flags."""
        # argparse names every spelling of a flag; the first is the one that we document
        message = re.sub(r"^argument (--\w+)\S*:", r"\1:", message)
        raise StageInputError(f"{message}; --stage {self.stage.name} --help lists all flags.")

    def refuse(self, unknown: list[str]) -> NoReturn:
        """Say of flags that the parser does not know which stages take the first one, or which it may have meant."""
        word, _, value = unknown[0].partition("=")
        value, flag = value or " ".join(unknown[1:2]), word.lstrip("-").replace("-", "_")
        known = _names(*FAMILIES.values())
        if flag in known:
            raise StageInputError(_refusal(known[flag], value, self.stage))
        close = difflib.get_close_matches(flag, [*known, *_names(*_kinds(self.stage))], 1)
        self.error(f"{word} {value} is no flag of training{f', did you mean --{close[0]}' if close else ''}")


class Arguments(NamedTuple):
    """What a command line asks for: the flags of model, data, stage and trainer."""

    model: ModelArguments
    data: DataArguments
    stage: StageArguments
    training: LlavaTrainingArguments


def parse_arguments(words: list[str] | None = None) -> Arguments:
    """Read a command line with the parser of its stage.

    Args:
        words: Flags with their values; those of this process if None.

    Raises:
        StageInputError: If a flag is unknown, belongs to other stages or finds nothing to act on, or its value is not
            allowed.
        KeyError: If the stage is unknown.
    """
    # two parsers: the stage chooses which flags there are, so it is read first
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--stage")
    name = first.parse_known_args(words)[0].stage
    parser = StageParser(get_stage(name or "dense"))  # pretrain, the other default, is of the same family
    # looked at before any dataclass is made: TrainingArguments may start communication between ranks
    unknown = parser.parse_known_args(words)[1]
    if unknown:
        parser.refuse(unknown)
    arguments = Arguments(*parser.parse_args_into_dataclasses(words, look_for_args_file=False)[:4])
    # what a stage takes depends on other flags too, such as those that freeze a part
    stage, stage_args = stage_of(arguments), arguments.stage
    for group in (stage_args, arguments.training):
        for item in fields(group):
            value = getattr(group, item.name)
            if value != item.default and not takes(stage, item.name):
                raise StageInputError(_refusal(item.name, value, stage))
    make_objective(stage_args.objective or stage.objective, stage_args)  # which refuses flags that the family lacks
    # the regression is on the states of the dense model, so nothing else may move
    is_alone = stage_args.objective != "layer_regression" or stage.trains == ("adapter",)
    remedy = f"was given, but it trains adapters alone, not stage {stage}; leave it out, or use the stage adapter."
    require(is_alone, "objective", stage_args.objective, remedy)
    return arguments


def stage_of(arguments: Arguments) -> Stage:
    """The stage that the flags ask for. Raises KeyError or ValueError as ``choose_stage`` does."""
    model_args, _, stage_args, training_args = arguments
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
    # from here on a more particular flag overrides
    if isinstance(stage_args, RoEArguments) and stage_args.router_lr is not None:
        rates["router"] = stage_args.router_lr
    if training_args.mm_projector_lr is not None:
        rates["projector"] = training_args.mm_projector_lr
    return rates


def _kinds(stage: Stage) -> tuple[Any, ...]:
    return ModelArguments, DataArguments, FAMILIES[stage.routing], LlavaTrainingArguments, FixedFlags


def _names(*kinds: Any) -> dict[str, str]:
    """Flags of dataclasses with the names of their fields, which differ for aliases."""
    items = [item for kind in kinds for item in fields(kind)]
    aliases = {alias.strip("-"): item.name for item in items for alias in item.metadata.get("aliases", ())}
    return {item.name: item.name for item in items} | aliases


def _refusal(flag: str, value: object, stage: Stage) -> str:
    others = [name for name, other in STAGES.items() if takes(other, flag) and name != stage.name]
    remedy = f", or use one of the stages {', '.join(others)}" if others else ""
    # no stage trains LoRA by itself; a flag makes one do so
    if NEEDS.get(flag) == ("lora",) and "decoder" in STAGES[stage.name].trains:
        remedy = ", or add --lora_enable True"
    return f"--{flag} {value} was given, but finds nothing to act on in stage {stage}; leave it out{remedy}."
