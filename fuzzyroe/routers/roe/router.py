"""RoE's linear router: every layer asks a linear layer on two summary states whether it is needed."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fuzzyroe.routers.base import Measurer, Router
from fuzzyroe.routers.roe.tokens import SOURCES, RoEPass
from fuzzyroe.routers.roe.training import OURS, Relaxation, RoECompat
from fuzzyroe.routing_state import RoutingState

LOWEST_RATE = 0.01  # a rate at or below this counts as the lower end of a table of skip-logit biases
MAX_DOUBLINGS = 12
HARD_TEMPERATURE = 1e-6  # at which soft decisions are 0 or 1


class LinearRouter(Router):
    """Decides layer by layer, from the states of the image and of the turn in that layer's own input.

    For turn t of a row, ``z = W_l [h_image; h_t]`` gives a logit for keeping layer l and one for skipping it, where h
    are the summary states after the layer's own first norm. At inference a layer is kept iff its logit is the larger,
    decided by each row's last turn and valid for all of the row. In training, ``softmax(z / temperature)`` blends (see
    ``training.Relaxation``); the prefix with its image goes by the mean logits of the row's turns.

    It is trained by gradient for one skip ratio, and then has one operating point. A table of skip-logit biases moves
    it from there: numbers added to the logits of skipping, with the mean skip rates that were observed under them.

    Args:
        num_layers: Layers of the decoder, L.
        hidden_size: Width of the decoder, D.
        summary: What is looked at, a name in ``SOURCES``: "tokens" (RoE's routing tokens) or "pooled".
        compat: Differences to the published code, or these as JSON knows them.
        bias_table: Mean skip rates, increasing, each with its bias; empty if only the trained point is known.
        target_skip_ratio: Rate planned for by default; None or nan for the trained operating point.

    Attributes:
        layers: The linear layers, L of (2, 2 D), without bias.
        source: The summary source, with the routing tokens.
        skip_logit_bias: Number added to the logits of skipping by default.

    Reference:
        RoE (arXiv:2407.14093).
    """

    decides_layer_wise = True
    option_names = ("summary", "compat", "bias_table", "target_skip_ratio")

    def __init__(
        self,
        num_layers: int,
        hidden_size: int,
        summary: str = "tokens",
        compat: RoECompat | dict[str, Any] = OURS,
        bias_table: Sequence[tuple[float, float]] = (),
        target_skip_ratio: float | None = None,
    ) -> None:
        super().__init__()
        if summary not in SOURCES:
            raise KeyError(f"Summary source '{summary}' is unknown; use one of {', '.join(SOURCES)}.")
        self.summary = summary
        self.compat = compat if isinstance(compat, RoECompat) else RoECompat.from_dict(compat)
        self.layers = nn.ModuleList(nn.Linear(2 * hidden_size, 2, bias=False) for _ in range(num_layers))
        self.source = SOURCES[summary](hidden_size, self.compat)
        self.reset_target()
        self.set_bias_table(bias_table)
        if target_skip_ratio is not None:
            self.set_skip_rate(target_skip_ratio)

    def prepare(self, decoder: nn.Module, inputs: dict[str, Any], routing: RoutingState) -> dict[str, Any]:
        """Let the summary source prepare the pass; it may add positions to it."""
        return self.source.prepare(decoder, inputs, routing)

    def decide(self, layer: int, hidden_states: Tensor, routing: RoutingState) -> Tensor:
        """Give the keep weights of one layer, (B, T); 0 or 1 in hard mode.

        In soft mode it spreads the weights over the positions itself, as the prefix has one of its own.
        """
        relaxation = routing.roe.relaxation
        if relaxation.draws is None:
            logits = self.logits(layer, hidden_states, routing)
        else:
            logits = relaxation.draws[layer].to(hidden_states.device)
        if routing.mode != "soft":
            return self._harden(logits, routing).to(routing.turn_ids.device)
        turn_mask = routing.roe.summary.turn_mask.to(logits.device)
        logits = torch.stack([logits[..., 0] + relaxation.bias, logits[..., 1]], dim=-1)  # (B, T, 2)
        count = turn_mask.sum(dim=1)  # (B,)
        prefix = (logits * turn_mask.unsqueeze(-1)).sum(dim=1) / count.clamp(min=1).unsqueeze(-1)  # (B, 2)
        together = torch.cat([prefix.unsqueeze(1), logits], dim=1) * (1 / relaxation.temperature)
        keep = together.softmax(dim=-1)[..., 0].to(routing.turn_ids.device)  # (B, 1 + T)
        ones = torch.ones_like(keep[:, :1])
        prefix_keep = torch.where(count.to(keep.device).unsqueeze(1) > 0, keep[:, :1], ones)
        # a table of the prefix, the turns and padding, read by the turn of each position
        turn_ids = routing.turn_ids if routing.roe.layout is None else routing.roe.layout.turn_ids
        index = torch.where(turn_ids < 0, keep.shape[1], turn_ids)
        table = torch.cat([prefix_keep, keep[:, 1:], ones], dim=1)  # (B, 1 + T + 1)
        routing.result.position_weights[layer] = table.gather(1, index)
        return keep[:, 1:]

    def logits(self, layer: int, hidden_states: Tensor, routing: RoutingState) -> Tensor:
        """Logits of keeping and of skipping a layer, (B, T, 2) float32, from its input, (B, S, D)."""
        linear: Any = self.layers[layer]
        summary = routing.roe.summary
        states = summary.norms[layer](summary.read(hidden_states).to(linear.weight.device))  # (B, 1 + T, D)
        image, turns = states[:, :1], states[:, 1:]
        pairs = torch.cat([image.expand_as(turns), turns], dim=-1)  # (B, T, 2D)
        return linear(pairs.to(linear.weight.dtype)).float()

    @property
    def max_skip_ratio(self) -> float:
        """Largest rate in the table of skip-logit biases; 0 without a table."""
        return self.bias_table[-1][0] if self.bias_table else 0.0

    def check_target(self, skip_rate: Tensor | float, num_rows: int | None = None) -> None:
        """As ``Router.check_target``; without a table no target can be met."""
        if not self.bias_table:
            raise ValueError(
                f"Skip rate {skip_rate} was asked of a linear router that knows only the operating point it was "
                "trained for; ask for no skip rate, or train it with --budget_samples (docs/stages.md)."
            )
        super().check_target(skip_rate, num_rows)

    def set_skip_rate(self, skip_rate: float) -> None:
        """Plan for another mean skip rate from now on; one that the table does not reach is a ``ValueError``."""
        self.check_target(skip_rate)
        self.target_skip_ratio = float(skip_rate)
        self.skip_logit_bias = float(self._biases(torch.tensor([self.target_skip_ratio])))

    def reset_target(self) -> None:
        """Go back to the operating point that it was trained for."""
        self.target_skip_ratio, self.skip_logit_bias = math.nan, 0.0

    def set_bias_table(self, bias_table: Sequence[tuple[float, float]]) -> None:
        """Put in mean skip rates, each with its skip-logit bias, both increasing; the operating point stays."""
        for before, after in zip(bias_table[:-1], bias_table[1:], strict=True):
            if not (before[0] < after[0] and before[1] <= after[1]):
                raise ValueError(
                    f"The table of skip-logit biases goes from {before} to {after}; rates must increase, and biases "
                    "must not fall. Sort it, and drop rates that stand in it twice."
                )
        self.bias_table = [(float(rate), float(bias)) for rate, bias in bias_table]

    def fit(self, measurer: Measurer, arguments: Any) -> tuple[Router, dict[str, Any]]:
        """Measure a table of skip-logit biases; the operating point it was trained for stays the default."""
        batches = list(measurer.batches(arguments.budget_samples))

        def rate_at(bias: float) -> float:
            # so cold that decisions are 0 or 1, while all ranks compute both branches of every layer
            asked = RoEPass(Relaxation(temperature=HARD_TEMPERATURE, bias=-bias))
            return measurer.skip_rate(batches, lambda state: setattr(state, "roe", asked))

        table = search_skip_logit_biases(rate_at, arguments.max_skip_ratio)
        self.set_bias_table(table)
        return self, {"bias_table": table}

    def _biases(self, skip_rates: Tensor) -> Tensor:
        """Skip-logit biases that meet mean skip rates, by interpolation in the table; both (B,)."""
        rates, biases = torch.tensor(self.bias_table, device=skip_rates.device).unbind(dim=1)
        if len(rates) == 1:
            return biases.expand_as(skip_rates)
        cell = torch.searchsorted(rates[1:-1].contiguous(), skip_rates)
        share = ((skip_rates - rates[cell]) / (rates[cell + 1] - rates[cell])).clamp(0, 1)
        return torch.lerp(biases[cell], biases[cell + 1], share)

    def _harden(self, logits: Tensor, routing: RoutingState) -> Tensor:
        bias: Tensor | float = self.skip_logit_bias
        if routing.target_skip_ratio is not None:
            asked = torch.as_tensor(routing.target_skip_ratio, dtype=torch.float32, device=logits.device)
            bias = self._biases(asked.reshape(-1)).unsqueeze(-1)  # (B, 1) or (1, 1)
        margin = logits[..., 0] - logits[..., 1] - bias  # (B, T)
        keep = margin > 0 if self.compat.ties_skip else margin >= 0
        if self.compat.batch_decides_together:
            keep = keep.any(dim=0, keepdim=True).expand_as(keep)
        return keep.float()


def search_skip_logit_biases(
    rate_at: Callable[[float], float], max_rate: float, num_measured: int = 14
) -> list[tuple[float, float]]:
    """Measure mean skip rates at biases chosen so that the rates lie close to each other up to a largest one.

    From 0 the search doubles its steps until it has passed both ends, then halves the widest gap between two rates.
    Later layers see what earlier ones left out, so a larger bias may skip less by chance; such points are left out.

    Args:
        rate_at: Mean skip rate in [0, 1] that is observed with a bias; measures it.
        max_rate: Rate that the table reaches at least, in (0, 1).
        num_measured: Biases that are tried; a search that has not passed both ends by then goes on until it has.

    Returns:
        Pairs of rate and bias, both increasing; what ``LinearRouter.set_bias_table`` takes.

    Raises:
        ValueError: If ``max_rate`` lies outside (0, 1), or no bias reaches it.
    """
    if not 0 < max_rate < 1:
        raise ValueError(f"max_rate is {max_rate}; a rate in (0, 1) is allowed, 0.5 is usual.")
    measured = {0.0: rate_at(0.0)}
    for sign, has_passed in ((1.0, lambda rate: rate >= max_rate), (-1.0, lambda rate: rate <= LOWEST_RATE)):
        bias = 0.0
        for doubling in range(MAX_DOUBLINGS):
            if has_passed(measured[bias]):
                break
            bias = sign * 0.25 * 2**doubling
            measured[bias] = rate_at(bias)
    while len(measured) < num_measured:
        biases = sorted(measured)
        # rates above the largest one asked for need no detail
        gaps = [
            (min(measured[above], max_rate) - min(measured[below], max_rate), (below + above) / 2)
            for below, above in zip(biases[:-1], biases[1:], strict=True)
        ]
        if not gaps or max(gaps)[0] <= 0:
            break
        middle = max(gaps)[1]
        measured[middle] = rate_at(middle)
    table: list[tuple[float, float]] = []
    for bias in sorted(measured):
        if not table or measured[bias] > table[-1][0]:
            table.append((measured[bias], bias))
    if table[-1][0] < max_rate:
        raise ValueError(
            f"A skip-logit bias of {table[-1][1]} skips {table[-1][0]:.3f} of the layers, {max_rate} is wanted; ask "
            "for a smaller largest rate."
        )
    return table
