"""Attachment of routing to a loaded model: the class swap of its layers, and the hook that asks the router."""

from __future__ import annotations

import inspect
from dataclasses import replace
from types import MethodType
from typing import Any

import torch
from torch import nn

from fuzzyroe.adapter import SkipAdapter
from fuzzyroe.cache import has_started, refuse_chunked_prefill, refuse_unsupported, remember_prompt
from fuzzyroe.resume import watch
from fuzzyroe.routed_layer import SKIP_UNITS, RoutedLayer, routed_class
from fuzzyroe.routing_state import RoutingState


def attach(
    model: nn.Module,
    adapter_width: int,
    adapter_init: str = "zero",
    router: nn.Module | None = None,
    skip_unit: str = "layer",
) -> nn.Module:
    """Make every decoder layer of a loaded model skippable, in place.

    Parameter names, hooks, checkpointing and weights stay as they are; each layer gains ``adapter``, the decoder gains
    ``router``. Until a state is passed as ``routing``, or the router is switched on, the model computes what it did.

    Args:
        model: A Hugging Face decoder, or a model with one (``get_decoder()``).
        adapter_width: Width of the skip adapters, at least 1.
        adapter_init: ``"zero"`` (an untrained skip is the identity) or ``"xavier"``.
        router: A module with ``plan(hidden_states, routing)``, which fills ``routing.result.keep_weights``, and with
            the bool ``enabled``: whether it routes a prompt on its own when the model is not training. None keeps every
            layer unless the caller forces otherwise. See ``fuzzyroe.routers.base.Router`` for what else it may have.
        skip_unit: What a skip leaves out, a name in ``SKIP_UNITS``: ``"layer"``, ``"attention"`` or ``"ffn"``.

    Returns:
        The same model.

    Raises:
        ValueError: If the model is attached already, has no decoder layers to route, or its layers lack a part.
        TypeError: If the router lacks ``plan`` or ``enabled``.
        KeyError: If the skip unit is unknown.
        RuntimeError: If a layer does not see routing after the swap; the model is left as it was.
    """
    decoder, layers = find_decoder(model), find_decoder_layers(model)
    _check_attachable(layers, skip_unit)
    # drawn before anything is changed, so that a bad width leaves the model alone
    adapters = [SkipAdapter(decoder.config.hidden_size, adapter_width, adapter_init) for _ in layers]
    if router is not None:
        _check_router(router)
        decoder.router = _place_router(router, layers).train(decoder.training)
    for index, (layer, adapter) in enumerate(zip(layers, adapters, strict=True)):
        device, dtype = _placement(layer)
        layer.adapter = adapter.to(device=device, dtype=dtype).train(layer.training)
        layer.route_index, layer.skip_unit = index, skip_unit
        dense_class: Any = type(layer)
        _swap_class(layer, routed_class(dense_class))
    # else a device map would match the old name and cut routed layers in two
    _rename_no_split(model, {layer.base_class.__name__: type(layer).__name__ for layer in layers})
    decoder.routed_model = (model,)  # in a tuple, so that the decoder does not become its own part
    decoder.routing_hook = decoder.register_forward_pre_hook(ask_router, with_kwargs=True)
    try:
        verify_attached(model)
    except Exception:
        detach(model)
        raise
    return model


def detach(model: nn.Module) -> nn.Module:
    """Undo ``attach``: stock layer classes, no adapters, no router, no hook.

    Args:
        model: A model that ``attach`` returned, or a deep copy of it.

    Returns:
        The same model.

    Raises:
        ValueError: If the model is not attached.
    """
    decoder, layers = find_decoder(model), find_decoder_layers(model)
    if not is_attached(model):
        raise ValueError(f"{type(model).__name__} has no routed layers; only an attached model can be detached.")
    _rename_no_split(model, {type(layer).__name__: None for layer in layers})
    for layer in layers:
        _swap_class(layer, layer.base_class)
        del layer.adapter, layer.route_index, layer.skip_unit
    decoder.routing_hook.remove()
    del decoder.routing_hook, decoder.routed_model
    if hasattr(decoder, "router"):
        del decoder.router
    return model


def set_router(model: nn.Module, router: nn.Module) -> None:
    """Put another router into an attached model; its adapters stay.

    Raises:
        ValueError: If the model is not attached.
        TypeError: If the router lacks ``plan`` or ``enabled``.
    """
    if not is_attached(model):
        raise ValueError(f"{type(model).__name__} has no routed layers; attach it before its router is replaced.")
    _check_router(router)
    decoder = find_decoder(model)
    decoder.router = _place_router(router, decoder.layers).train(decoder.training)


def is_attached(model: nn.Module) -> bool:
    """Say whether the decoder layers of a model are routed."""
    return all(isinstance(layer, RoutedLayer) for layer in find_decoder_layers(model))


def set_skip_rate(model: nn.Module, skip_rate: float | None) -> None:
    """Ask for a mean skip rate from now on; None switches routing off, which gives the dense model bit for bit.

    One call or one row asks for another with a ``RoutingState`` of its own, also while routing is off.

    Args:
        model: An attached model with a router; any other accepts None only.
        skip_rate: Target, in [0, ``router.max_skip_ratio``].

    Raises:
        ValueError: If the model has no router, or its router was not calibrated for such a rate.

    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> from fuzzyroe.routers import RandomRouter
    >>> sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 4, "num_attention_heads": 2}
    >>> config = LlamaConfig(vocab_size=9, **sizes)
    >>> model = attach(LlamaForCausalLM(config).eval(), adapter_width=2, router=RandomRouter(num_layers=4))
    >>> set_skip_rate(model, 0.5)
    >>> routing = RoutingState.from_batch({"attention_mask": torch.ones(1, 3)})
    >>> _ = model(torch.tensor([[1, 5, 7]]), routing=routing)
    >>> int(routing.kept_layers().sum())
    2
    """
    router = find_router(model)
    refuse_skip_rate_if_dense(model, skip_rate)
    if router is None:
        return
    if skip_rate is not None:
        router.set_skip_rate(skip_rate)
    router.enabled = skip_rate is not None


def set_escalation(model: nn.Module, escalation: Any) -> None:
    """Let rows whose first answer token is in doubt run more layers than planned; None lets every row keep its plan.

    Args:
        model: An attached model with a router and an output head.
        escalation: A ``fuzzyroe.escalation.Escalation``.

    Raises:
        ValueError: If the model has no router or no output head, or its router has no shallower plan to offer.
    """
    router = find_router(model)
    if router is None:
        raise ValueError("An escalation was given to a model without a router; attach one that plans first.")
    if escalation is not None:
        if find_decoder(model).routed_model[0].get_output_embeddings() is None:
            raise ValueError(
                f"{type(model).__name__} has no output head, whose logits an escalation reads; attach the model that "
                "has one, not its decoder."
            )
        if escalation.shallower_from is not None and getattr(router, "decides_layer_wise", False):
            raise ValueError(
                f"{type(router).__name__} decides layer by layer, so it has no shallower plan; allowed is an "
                "escalation to all layers. Leave shallower_from out."
            )
    router.escalation = escalation


def refuse_skip_rate_if_dense(model: nn.Module, skip_rate: Any) -> None:
    """Raise ValueError if a skip rate is asked of a model without a router."""
    if skip_rate is not None and find_router(model) is None:
        raise ValueError(f"Skip rate {skip_rate} was asked of a dense checkpoint; load one that a stage has routed.")


def find_decoder(model: Any) -> Any:
    """Give the module that holds the decoder layers, in stock models ``model.get_decoder()``."""
    return model.get_decoder() if hasattr(model, "get_decoder") else model


def find_router(model: nn.Module) -> Any:
    """Give the router of a model, None where there is none."""
    return getattr(find_decoder(model), "router", None)


def find_decoder_layers(model: nn.Module) -> Any:
    """Give the decoder layers of a model, in order.

    Raises:
        ValueError: If the decoder has no ``layers``.
    """
    decoder = find_decoder(model)
    layers = getattr(decoder, "layers", None)
    if not isinstance(layers, nn.ModuleList) or len(layers) == 0:
        raise ValueError(
            f"{type(decoder).__name__} has no `layers`; routing needs a decoder with a non-empty ModuleList `layers`. "
            "Pass the language model itself, or extend find_decoder_layers for this family."
        )
    return layers


def verify_attached(model: nn.Module) -> None:
    """Run one position through the decoder, every layer skipped, and check that every routed layer saw it.

    A wrapper that bound the old ``forward`` before the swap (offloading hooks, compiled layers) leaves a model silently
    dense; this finds it in the first second. Only norms and adapters are computed, random state and buffers stay.

    Args:
        model: An attached model.

    Raises:
        RuntimeError: If a routed layer did not run.
    """
    decoder, layers = find_decoder(model), find_decoder_layers(model)
    weights = [parameter for layer in layers for parameter in layer.parameters()]
    # on meta and in shards (ZeRO-3) there are no numbers to run on, and a lone forward would hang the other ranks
    if any(weight.is_meta or weight.numel() == 0 or hasattr(weight, "ds_id") for weight in weights):
        return
    device, dtype = _placement(layers[0])
    mask = torch.ones(1, 1, dtype=torch.long, device=device)
    routing = RoutingState.from_batch({"attention_mask": mask}).forced(torch.zeros(1, len(layers), device=device))
    devices = {weight.device for weight in weights if weight.is_cuda}
    with torch.no_grad(), torch.random.fork_rng(devices=devices):  # attention that a skip leaves in may drop out
        embedding = torch.zeros(1, 1, decoder.config.hidden_size, device=device, dtype=dtype)
        decoder(inputs_embeds=embedding, attention_mask=mask, use_cache=False, routing=routing)
    silent = sorted(set(range(len(layers))) - set(routing.result.layer_runs))
    if silent:
        raise RuntimeError(
            f"Layers {silent} of {len(layers)} ran without routing; after attach every layer must see it. "
            "Attach before wrapping, compiling or offloading the layers."
        )


def ask_router(decoder: Any, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]] | None:
    """Forward pre-hook of the decoder: let the router decide, once per sequence, before the first layer.

    A state that comes with keep weights passes untouched. In decoding, when the cache has positions, nothing is
    decided: every layer reads its decision from its cache. A layer-wise router is put into a copy of the state, for the
    layers to ask.

    Args:
        decoder: The module that holds the layers, with ``router``.
        args: Positional arguments of its forward.
        kwargs: Keyword arguments of its forward; ``routing`` and ``past_key_values`` are read.

    Returns:
        The arguments with ``routing`` planned, or None to leave them as they are.
    """
    router, routing = getattr(decoder, "router", None), kwargs.get("routing")
    # forced weights need no router, and in training only a caller's state routes
    is_planned = routing is not None and routing.result.keep_weights is not None
    is_silent = routing is None and (decoder.training or not getattr(router, "enabled", False))
    if router is None or is_planned or is_silent:
        return None
    kwargs = _as_keywords(decoder, args, kwargs)
    cache, mask = kwargs.get("past_key_values"), kwargs.get("attention_mask")
    inputs_embeds = kwargs.get("inputs_embeds")
    if has_started(cache):
        given = kwargs["input_ids"] if inputs_embeds is None else inputs_embeds
        refuse_chunked_prefill(cache, mask, given.shape[1])
        return None
    refuse_unsupported(cache)
    # the router reads embeddings; handing them on spares the decoder from looking them up again
    if inputs_embeds is None:
        inputs_embeds = decoder.get_input_embeddings()(kwargs["input_ids"])
        kwargs.update(input_ids=None, inputs_embeds=inputs_embeds)
    if routing is None:
        if mask is None:
            mask = torch.ones(inputs_embeds.shape[:2], dtype=torch.long, device=inputs_embeds.device)
        routing = RoutingState.from_batch({"attention_mask": mask})
    if routing.target_skip_ratio is not None and hasattr(router, "check_target"):
        router.check_target(routing.target_skip_ratio, inputs_embeds.shape[0])
    router.plan(inputs_embeds, routing)
    if getattr(router, "decides_layer_wise", False):
        routing = replace(routing, decide=router.decide, num_layers=len(decoder.layers))
    # the mask recognises a second chunk of this prompt, which would have to be decided again
    remember_prompt(cache, mask)
    kwargs["routing"] = routing
    prepared = router.prepare(decoder, kwargs, routing) if hasattr(router, "prepare") else dict(kwargs)
    if getattr(router, "escalation", None) is not None and routing.mode == "hard" and not decoder.training:
        prepared["routing"] = watch(decoder, router, kwargs, prepared["routing"])
    return (), prepared


def _as_keywords(decoder: nn.Module, args: tuple, kwargs: dict[str, Any]) -> dict[str, Any]:
    if not args:
        return dict(kwargs)
    return {**dict(zip(inspect.signature(decoder.forward).parameters, args, strict=False)), **kwargs}


def _placement(layer: Any) -> tuple[torch.device, torch.dtype]:
    """Give device and dtype of the layer's norm: linear weights may be quantised, offloaded ones live on meta."""
    reference = layer.input_layernorm.weight
    execution_device = getattr(getattr(layer, "_hf_hook", None), "execution_device", None)
    return torch.device(reference.device if execution_device is None else execution_device), reference.dtype


def _place_router(router: nn.Module, layers: nn.ModuleList) -> nn.Module:
    """Move a router to the first decoder layer, and what it has for each layer, in ``router.layers``, beside that one.

    Returns:
        The router.
    """
    router.to(_placement(layers[0])[0])
    # parts of a layer-wise router run in front of their own layer, wherever a device map has put it
    for part, layer in zip(getattr(router, "layers", ()), layers, strict=False):
        part.to(_placement(layer)[0])
    return router


def _check_attachable(layers: nn.ModuleList, skip_unit: str) -> None:
    if skip_unit not in SKIP_UNITS:
        raise KeyError(f"Skip unit '{skip_unit}' is unknown; use one of {', '.join(SKIP_UNITS)}.")
    parts = [part for part in ("input_layernorm", SKIP_UNITS[skip_unit]) if part is not None]
    for index, layer in enumerate(layers):
        name = type(layer).__name__
        if isinstance(layer, RoutedLayer):
            raise ValueError(f"Layer {index} is a {name} already; a model is attached once. Call detach first.")
        missing = [part for part in parts if not isinstance(getattr(layer, part, None), nn.Module)]
        if missing:
            raise ValueError(
                f"Layer {index} ({name}) has no `{missing[0]}`, which the skip branch needs. Use a decoder family "
                "that normalises before attention, built of `input_layernorm`, `self_attn` and `mlp`."
            )
        if "forward" in layer.__dict__ and not _is_own_method(layer) and "_old_forward" not in layer.__dict__:
            raise ValueError(
                f"Layer {index} ({name}) has a `forward` of its own, which would hide the routed one; allowed are "
                "stock layers and accelerate's hooks. Attach before compiling or patching."
            )


def _check_router(router: nn.Module) -> None:
    missing = [name for name in ("plan", "enabled") if not hasattr(router, name)]
    if missing:
        raise TypeError(
            f"{type(router).__name__} has no {' and no '.join(missing)}; a router is an nn.Module with "
            "plan(hidden_states, routing) and the bool enabled. Add them, or pass a router of fuzzyroe.routers."
        )


def _is_own_method(layer: nn.Module) -> bool:
    """Say whether the instance's ``forward`` is merely its class's, as removed accelerate hooks leave it behind."""
    forward = layer.__dict__["forward"]
    return isinstance(forward, MethodType) and forward.__func__ is type(layer).forward


def _swap_class(layer: Any, new_class: type[nn.Module]) -> None:
    if "_old_forward" in layer.__dict__:  # accelerate's hook calls this bound method instead of the class's
        layer._old_forward = MethodType(new_class.forward, layer)
    elif "forward" in layer.__dict__:
        del layer.forward
    layer.__class__ = new_class


def _rename_no_split(model: nn.Module, names: dict[str, str | None]) -> None:
    """Add each new class name beside the old one, or remove names that map to None, wherever they are listed.

    Device maps match class names, so that a routed layer under its new name would be split over devices.
    """
    for module in model.modules():
        listed = getattr(module, "_no_split_modules", None)
        if listed is None or not set(listed) & set(names):
            continue
        removed = {name for name, new in names.items() if new is None}
        added = {new for name, new in names.items() if new is not None and name in listed}
        module._no_split_modules = type(listed)(name for name in [*listed, *sorted(added)] if name not in removed)
