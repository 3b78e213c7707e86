"""Resuming a prefill: rows that a policy escalates run the layers they have skipped, and nothing else twice.

While a hard routed prefill runs, the state in front of the first skipped layer of each row is kept. Behind it the
logits of the first answer token are read, and the router's escalation gives each row a level. Escalated rows alone go
once more through the layers from their stored state up, under their final plan; their keys and values there are
replaced, and so are their last states, so that decoding follows the final plan. Rows that skip the same layer first
resume together; no row depends on its neighbours.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from fuzzyroe.cache import empty_cache, replace_rows
from fuzzyroe.features import ANSWER_FEATURES, read_answer
from fuzzyroe.routed_layer import BATCH_DIMENSIONS, select_rows
from fuzzyroe.routing_state import EscalationRecord, RoutingResult, RoutingState, SkipEntries

KEEP_PLAN, SHALLOWER_PLAN, ALL_LAYERS = range(3)
"""Levels of an escalation."""


def watch(decoder: Any, router: Any, inputs: dict[str, Any], routing: RoutingState) -> RoutingState:
    """Let the pass that is about to run be escalated when it is through, by a hook that goes with the pass.

    Args:
        decoder: The module that holds the layers.
        router: Its router, with an ``escalation``.
        inputs: Keywords of the decoder's forward for the prompt alone, with ``inputs_embeds`` (B, N, D).
        routing: State that the layers get.

    Returns:
        The same state, which collects what is needed to resume the pass.
    """
    early = router.escalation.read_prompts(inputs["inputs_embeds"], routing)
    watched = replace(routing, entries=SkipEntries(routing.turn_ids.shape[0]))

    def settle(decoder: Any, args: tuple, output: Any) -> Any:
        handle.remove()
        if output is None:  # the forward failed
            return None
        final = _decide(decoder, router, inputs["inputs_embeds"], watched, early, output[0])
        cache = inputs.get("past_key_values") if isinstance(output, tuple) else output.past_key_values
        states = _resume_rows(decoder, inputs, watched, final, output[0], cache)
        if cache is not None:
            cache.escalation = watched.result.escalation
        if isinstance(output, tuple):
            return (states, *output[1:])
        output.last_hidden_state = states
        return output

    handle = decoder.register_forward_hook(settle, always_call=True)
    return watched


def _decide(
    decoder: Any, router: Any, embeddings: Tensor, routing: RoutingState, early: dict[str, Tensor], states: Tensor
) -> Tensor:
    """Read the first answer token of each row and decide; give the final plan, (B, L) bool on the CPU."""
    rows = torch.arange(len(states), device=states.device)
    with torch.no_grad():
        answer = read_answer(_head(decoder)(states[rows, _last_positions(routing).to(states.device)]))
    columns = early | {name: feature(answer) for name, feature in ANSWER_FEATURES.items()}
    # all that the policy reads comes to the host at once
    values = torch.stack([column.detach().double().to(states.device) for column in columns.values()]).cpu()
    readings = dict(zip(columns, values, strict=True))
    escalation = router.escalation
    doubts = escalation.doubts({name: column.numpy() for name, column in readings.items()})
    levels = torch.as_tensor(escalation.levels(doubts))
    planned = routing.kept_layers()
    final = planned | (levels == ALL_LAYERS).unsqueeze(1)
    if bool((levels == SHALLOWER_PLAN).any()):
        shallower = _shallower_plan(router, embeddings, routing, escalation.shallower_ratio)
        final |= shallower & (levels == SHALLOWER_PLAN).unsqueeze(1)
    is_further = (final & ~planned).any(dim=1)
    # what lies below a row's first skip has run under any plan
    again = final & ~planned.long().cumprod(dim=1).bool() & is_further.unsqueeze(1)
    routing.result.escalation = EscalationRecord(
        readings, torch.as_tensor(doubts), levels * is_further, planned, planned.long() + again
    )
    return final


def _resume_rows(
    decoder: Any, inputs: dict[str, Any], routing: RoutingState, final: Tensor, states: Tensor, cache: Any
) -> Tensor:
    """Run the rows that go further than planned; give the last states of all rows, (B, N, D)."""
    result, entries = routing.result, routing.entries
    assert entries is not None and result.escalation is not None and result.keep_weights is not None
    is_further = result.escalation.levels != KEEP_PLAN
    if not bool(is_further.any()):
        return states
    own = ("input_ids", "inputs_embeds", "past_key_values", "routing")
    shared = {name: value for name, value in inputs.items() if name not in own}
    for layer, (rows, entry) in entries.by_layer.items():
        chosen = is_further[rows].nonzero().flatten()
        if len(chosen) == 0:
            continue
        rows, index = rows[chosen], rows[chosen].to(states.device)
        entry = entry.index_select(0, chosen.to(entry.device))
        if routing.prompt_positions is not None:  # what a router has added is not seen by the prompt
            places = routing.prompt_positions.to(entry.device)[rows.to(entry.device)]
            entry = entry.gather(1, places.unsqueeze(-1).expand(-1, -1, entry.shape[-1]))
        given = {
            name: select_rows(value, index, len(states), BATCH_DIMENSIONS.get(name, 0))
            for name, value in shared.items()
        }
        where = rows.to(routing.turn_ids.device)
        masks = (getattr(routing, name)[where] for name in ("turn_ids", "image_mask", "question_mask"))
        state = replace(RoutingState(*masks).forced(final[rows]), resume=(layer, entry))
        own_cache = None if cache is None else empty_cache(len(decoder.layers))
        output = decoder(**given, inputs_embeds=entry, past_key_values=own_cache, routing=state)
        states = states.index_copy(0, index, output[0].to(states.device))
        for number in range(layer, len(decoder.layers)):
            result.layer_runs[number] = result.layer_runs.get(number, 0) + state.result.layer_runs[number]
            if own_cache is not None:
                replace_rows(cache, number, rows, own_cache.layers[number])
    weights = result.keep_weights
    kept = torch.where(is_further.unsqueeze(1), final, True).to(weights.device).unsqueeze(1)
    is_changed = is_further.to(weights.device).view(-1, 1, 1)
    result.keep_weights = torch.where(is_changed, kept.to(weights.dtype), weights)
    result.kept_layers = final
    return states


def _head(decoder: Any) -> nn.Module:
    return decoder.routed_model[0].get_output_embeddings()


def _last_positions(routing: RoutingState) -> Tensor:
    """Last position of each row's question, behind which its answer begins, else its last that is no padding, (B,)."""
    num_positions = routing.turn_ids.shape[1]
    positions = torch.arange(num_positions, device=routing.turn_ids.device)
    # drafts of an answer may follow the question
    order = torch.where(routing.turn_ids >= 0, positions, -1) + num_positions * routing.question_mask
    return order.argmax(dim=1)


def _shallower_plan(router: Any, hidden_states: Tensor, routing: RoutingState, ratio: float) -> Tensor:
    """Plan again at a share of the target skip ratio, (B, L) bool on the CPU."""
    target = (router.requested_ratios(routing, hidden_states.device) * ratio).flatten().expand(len(hidden_states))
    state = replace(routing, target_skip_ratio=target, keep_weights=None, entries=None, result=RoutingResult())
    router.plan(hidden_states, state)
    return state.kept_layers()
