"""Parameters of a model by named part: what a stage freezes, at which rate a part learns, LoRA, what really moved."""

from __future__ import annotations

import copy
import logging
import zlib
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import TrainerCallback

from llava.model.builder import describe_quantization
from llava.model.families import family_of
from llava.train.arguments import FULL_BITS, LlavaTrainingArguments
from llava.train.stages import PARTS, Stage
from llava.train.zero3 import full_shape, map_parameters

logger = logging.getLogger(__name__)

LORA_FILE = "adapter_model.safetensors"
OTHER_WEIGHTS_FILE = "non_lora_trainables.safetensors"
"""What else is not in the base, such as a trained projector, under stock names; LLaVA's file of the same purpose."""

_LINEAR = r"self_attn\.(q_proj|k_proj|v_proj|o_proj)|mlp\.(gate_proj|up_proj|down_proj)"
LORA_TARGETS = rf"^model\.language_model\.layers\.\d+\.({_LINEAR})$"
"""All linear layers of the decoder; anchored, as bare names would hit the vision tower and skip adapters as well."""

_LORA_NAME, _PEFT_PREFIX = "default", "base_model.model."


def parameters_by_part(model: Any) -> dict[str, dict[str, nn.Parameter]]:
    """Assign every parameter of a LLaVA model of any family, routed or not, to exactly one part.

    Returns:
        ``{part: {parameter name: parameter}}`` for all of ``PARTS``; a part may be empty. The decoder's part holds
        its embeddings and its output head.
    """
    decoder = model.get_decoder()
    owned: list[tuple[str, nn.Module | None]] = [
        ("router", getattr(decoder, "router", None)),
        *(("adapter", getattr(layer, "adapter", None)) for layer in decoder.layers),
    ]
    for module in model.modules():  # peft names what it adds to a layer
        owned += [("lora", getattr(module, kind)) for kind in getattr(module, "adapter_layer_names", ())]
    owners = {id(p): part for part, module in owned if module is not None for p in module.parameters()}
    part_of = family_of(model.config).part_of  # a family may count weights of its tower to the projector
    parts: dict[str, dict[str, nn.Parameter]] = {part: {} for part in PARTS}
    for name, parameter in model.named_parameters():
        parts[owners.get(id(parameter)) or part_of(name)][name] = parameter
    return parts


def freeze_all_but(model: nn.Module, stage: Stage) -> list[str]:
    """Set ``requires_grad`` as a stage wants it, before an optimizer or engine exists; names of what trains."""
    parts = parameters_by_part(model)
    for part, parameters in parts.items():
        for parameter in parameters.values():
            parameter.requires_grad_(part in stage.trains)
    return [name for part, parameters in parts.items() if part in stage.trains for name in parameters]


def build_param_groups(model: nn.Module, learning_rates: dict[str, float], weight_decay: float) -> list[dict]:
    """Optimizer groups of what requires a gradient, one per part and decay, without empty ones.

    Matrices decay by ``weight_decay``, vectors (norms, biases) do not; a part has its rate in ``learning_rates``.
    """
    groups = []
    for part, parameters in parameters_by_part(model).items():
        trained = [p for p in parameters.values() if p.requires_grad]
        for kind, decay in (("decay", weight_decay), ("no_decay", 0.0)):
            params = [p for p in trained if (len(full_shape(p)) >= 2) == (kind == "decay")]
            group = {"name": f"{part}/{kind}", "params": params, "lr": learning_rates[part], "weight_decay": decay}
            groups += [group] if params else []
    return groups


def import_peft() -> Any:
    """Import peft; ImportError, which says how to install it, if it is missing."""
    try:
        import peft
    except ImportError as error:
        raise ImportError(
            f"--lora_enable was given but peft cannot be imported ({error}); install it with "
            "pip install 'fuzzyroe[train]', or leave --lora_enable out."
        ) from error
    return peft


def add_lora(model: nn.Module, rank: int, alpha: int, dropout: float) -> None:
    """Put LoRA weights into a LLaVA model; before the first step they change nothing.

    The model's class and the names of its other parameters stay. LoRA is scaled by ``alpha / rank``.

    Reference:
        LoRA (arXiv:2106.09685).
    """
    peft = import_peft()
    options: dict[str, Any] = {"target_modules": LORA_TARGETS, "bias": "none", "task_type": "CAUSAL_LM"}
    config = peft.LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=dropout, **options)
    # Injected, not wrapped as a PeftModel: attach, the trainer and state dicts go on seeing a LLaVA model.
    peft.inject_adapter_in_model(config, model, _LORA_NAME)


def save_lora(model: Any, weights: dict[str, Tensor], others: dict[str, Tensor], folder: Path, base_model: str) -> None:
    """Write whole LoRA weights as peft does, and others that are not in the base, by their names in the model.

    The base model is named by hub id, or by a folder relative to where the weights will lie.
    """
    config = copy.deepcopy(model.peft_config[_LORA_NAME])
    config.base_model_name_or_path = base_model
    config.save_pretrained(folder)
    renamed = {_PEFT_PREFIX + name.replace(f".{_LORA_NAME}.", "."): tensor for name, tensor in weights.items()}
    save_file(renamed, folder / LORA_FILE, metadata={"format": "pt"})
    if others:
        save_file(others, folder / OTHER_WEIGHTS_FILE, metadata={"format": "pt"})


def quantization_options(training_args: LlavaTrainingArguments, dtype: torch.dtype) -> dict[str, Any]:
    """Options of ``from_pretrained`` that quantize the decoder while it loads, for ``dtype``; none with 16 bits."""
    bits = training_args.bits
    if bits == FULL_BITS:
        return {}
    config = describe_quantization(load_8bit=bits == 8, load_4bit=bits == 4, dtype=dtype)
    config.bnb_4bit_use_double_quant = training_args.double_quant
    config.bnb_4bit_quant_type = training_args.quant_type
    return {"quantization_config": config, "device_map": {"": training_args.device}}


def prepare_quantized(model: Any) -> None:
    """Cast to float32 what is not quantized, as QLoRA (arXiv:2305.14314) does; call before ``add_lora``."""
    import_peft().prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    del model.config.quantization_config  # what is saved names the whole base, which is not quantized
    model._hf_peft_config_loaded = True  # else transformers' trainer refuses the model as one without LoRA


class TrainableCheck(TrainerCallback):
    """Compare gathered weights with those before training: frozen parts early and late, trained parts until they moved.

    A trained part may stand still for some steps and be right: warm-up starts at rate zero, a batch whose plans skip no
    layer gives adapters no gradient, and a small step can vanish in half precision or be left out on overflow. So it is
    looked at again after 1, 2, 4, 8, ... steps, and only a part that never moved is an error.

    Attributes:
        model, stage: The model that trains and the parts that must move; all others must keep their bits.
        moved: Part -> whether it moved, at first what had moved when a resumed run was saved; complete in the end.
    """

    def __init__(self, model: nn.Module, stage: Stage, moved: dict[str, bool] | None = None) -> None:
        self.model, self.stage = model, stage
        self.moved: dict[str, bool] = {**dict.fromkeys(PARTS, False), **(moved or {})}
        self._before: dict[str, dict[str, int]] = {}
        self._learning_rate, self._num_steps = 0.0, 0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Take checksums."""
        self._before, self._num_steps = {part: self._checksums(part) for part in PARTS}, 0

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, optimizer: Any = None, **kwargs: Any) -> None:
        """Note the learning rate of the step to come; warm-up starts at zero."""
        self._learning_rate = max(group["lr"] for group in optimizer.param_groups)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Compare after the first step at a non-zero rate; what has not moved yet again after 2, 4, 8, ... of them."""
        if self._learning_rate == 0:
            return
        self._num_steps += 1
        if self._num_steps & (self._num_steps - 1) == 0:  # a power of two: gathering all parts is not free
            self._compare(PARTS if self._num_steps == 1 else self.stage.trains)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Compare for the last time; RuntimeError if a part that trains never moved."""
        if self._num_steps == 0:
            logger.warning("stage %s took no step at a non-zero learning rate; nothing was trained", self.stage.name)
            return
        self._compare(PARTS)
        for part in self.stage.trains:
            if not self.moved[part] and self._before[part]:
                raise RuntimeError(
                    f"Stage {self.stage.name} trains the {part}, but none of its parameters moved in "
                    f"{self._num_steps} steps; raise its learning rate or the number of steps."
                )
        logger.info("stage %s moved %s and nothing else", self.stage.name, ", ".join(self.stage.trains))

    def _compare(self, parts: tuple[str, ...]) -> None:
        for part in parts:
            if self.moved[part]:
                continue
            after = self._checksums(part)
            changed = [name for name, value in self._before[part].items() if after[name] != value]
            self.moved[part] = bool(changed)
            if changed and part not in self.stage.trains:
                raise RuntimeError(
                    f"Stage {self.stage.name} freezes the {part}, but {changed[:3]} moved; set requires_grad=False "
                    "before the optimizer is made, and leave its groups alone."
                )

    def _checksums(self, part: str) -> dict[str, int]:
        """Checksums of the bits of a part's parameters; gathers, so call on all ranks."""

        def checksum(tensor: Tensor) -> int:
            return zlib.crc32(tensor.cpu().contiguous().view(-1).view(torch.uint8).numpy().data)

        return map_parameters(parameters_by_part(self.model)[part], checksum)
