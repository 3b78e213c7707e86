"""Parameters by named part: what a stage freezes, and at which rate each part learns."""

from __future__ import annotations

from torch import nn

from llava.train.stages import PARTS, Stage


def parameters_by_part(model: nn.Module) -> dict[str, dict[str, nn.Parameter]]:
    """Assign every parameter of a LLaVA model to exactly one part.

    Args:
        model: A ``LlavaForConditionalGeneration``, with or without routing attached.

    Returns:
        ``{part: {parameter name: parameter}}`` for all of ``PARTS``; a part may be empty. The decoder's part holds
        its embeddings and its output head.
    """
    owners = {id(p): "vision_tower" for p in model.model.vision_tower.parameters()}
    owners |= {id(p): "projector" for p in model.model.multi_modal_projector.parameters()}
    router = getattr(model.model.language_model, "router", None)
    if router is not None:
        owners |= {id(p): "router" for p in router.parameters()}
    for layer in model.model.language_model.layers:
        adapter = getattr(layer, "adapter", None)
        if adapter is not None:
            owners |= {id(p): "adapter" for p in adapter.parameters()}
    for module in model.modules():
        for kind in getattr(module, "adapter_layer_names", ()):  # what peft adds to a layer it updates
            owners |= {id(p): "lora" for p in getattr(module, kind).parameters()}
    parts: dict[str, dict[str, nn.Parameter]] = {part: {} for part in PARTS}
    for name, parameter in model.named_parameters():
        parts[owners.get(id(parameter), "decoder")][name] = parameter
    return parts


def freeze_all_but(model: nn.Module, stage: Stage) -> list[str]:
    """Set ``requires_grad`` as a stage wants it; call before the optimizer or an engine exists.

    Returns:
        Names of the parameters that train.
    """
    trained = []
    for part, parameters in parameters_by_part(model).items():
        for name, parameter in parameters.items():
            parameter.requires_grad_(part in stage.trains)
            if part in stage.trains:
                trained.append(name)
    return trained


def build_param_groups(model: nn.Module, learning_rates: dict[str, float], weight_decay: float) -> list[dict]:
    """Optimizer groups, one per part and decay, without empty ones.

    Args:
        model: Model whose ``requires_grad`` is already set.
        learning_rates: Learning rate of each part.
        weight_decay: Decay of matrices; vectors (norms, biases) have none.

    Returns:
        Groups with ``name``, ``params``, ``lr`` and ``weight_decay``.
    """
    groups = []
    for part, parameters in parameters_by_part(model).items():
        trained = [p for p in parameters.values() if p.requires_grad]
        for decays in (True, False):
            params = [p for p in trained if (_num_dims(p) >= 2) == decays]
            if params:
                name = f"{part}/{'decay' if decays else 'no_decay'}"
                decay = weight_decay if decays else 0.0
                groups.append({"name": name, "params": params, "lr": learning_rates[part], "weight_decay": decay})
    return groups


def _num_dims(parameter: nn.Parameter) -> int:
    """Number of dimensions of the whole parameter; ZeRO-3 keeps it in ``ds_shape`` while the data is sharded."""
    return len(getattr(parameter, "ds_shape", parameter.shape))
