"""Promises about decoding: decided once per request, and nothing waits for the device after that."""

from __future__ import annotations

import pytest
import torch

from fuzzyroe.attach import attach
from fuzzyroe.routing_state import RoutingState
from host_transfers import HostTransfers
from layer_wise_router import LastTokenRouter

KEEP = torch.tensor([[0, 1, 1, 0], [0, 0, 0, 0], [0, 1, 0, 1], [0, 1, 1, 1]]).bool()

# these read copies that are on the host already
ON_HOST = ("fuzzyroe.routing_state:__init__", "fuzzyroe.routing_state:rows", "fuzzyroe.routing_state:split")


class Watched(torch.nn.Module):
    """Any router, with its calls counted."""

    def __init__(self, router: torch.nn.Module) -> None:
        super().__init__()
        self.router, self.enabled, self.calls = router, True, []
        self.decides_layer_wise = getattr(router, "decides_layer_wise", False)

    def plan(self, hidden_states: torch.Tensor, routing: RoutingState) -> None:
        self.calls.append("plan")
        self.router.plan(hidden_states, routing)

    def decide(self, layer: int, hidden_states: torch.Tensor, routing: RoutingState) -> torch.Tensor:
        self.calls.append(layer)
        return self.router.decide(layer, hidden_states, routing)


@pytest.fixture(params=["layer", "attention", "ffn"])
def unit(request: pytest.FixtureRequest) -> str:
    """Each skip unit in turn."""
    return request.param


def routers(fixed_router: type) -> dict[str, torch.nn.Module]:
    return {"planned ahead": fixed_router(KEEP), "layer-wise": LastTokenRouter(4, 32)}


@pytest.mark.parametrize("kind", ["planned ahead", "layer-wise"])
@torch.no_grad()
def test_the_prefill_moves_decisions_once_or_once_per_layer(tiny_llama, padded_prompts, fixed_router, unit, kind):
    attach(tiny_llama, 4, "xavier", routers(fixed_router)[kind], unit)
    with HostTransfers(("fuzzyroe",), ON_HOST) as transfers:
        tiny_llama(**padded_prompts, use_cache=True)
    moved = 1 if kind == "planned ahead" else 4
    reads_of_the_copy = {"fuzzyroe.routing_state:_harden:__bool__": 2 * moved}
    assert transfers.places == {"fuzzyroe.routing_state:_harden:cpu": moved, **reads_of_the_copy}


@pytest.mark.parametrize("options", [{}, {"do_sample": True}, {"num_beams": 3}], ids=["greedy", "sampled", "beams"])
@pytest.mark.parametrize("kind", ["planned ahead", "layer-wise"])
def test_decoding_calls_no_router_and_reads_nothing(tiny_llama, padded_prompts, fixed_router, unit, kind, options):
    watched = Watched(routers(fixed_router)[kind])
    attach(tiny_llama, 4, "xavier", watched, unit)
    transfers, after_each_forward = HostTransfers(("fuzzyroe", "llava"), ON_HOST), []
    tiny_llama.register_forward_hook(lambda *args: after_each_forward.append(transfers.places.total()))
    with transfers:
        tiny_llama.generate(**padded_prompts, max_new_tokens=6, **{"do_sample": False, **options})
    assert watched.calls == (["plan"] if kind == "planned ahead" else ["plan", 0, 1, 2, 3])
    assert len(after_each_forward) == 6 and after_each_forward[0] > 0
    assert transfers.places.total() == after_each_forward[0], transfers.places
