"""The routing state: what one forward pass is asked to skip, together with what came of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from fuzzyroe.layout import Layout
from fuzzyroe.row_split import RowSplit
from fuzzyroe.schedule import Relaxation

MODES = ("soft", "hard")


@dataclass
class RoutingState:
    """Travels as the keyword ``routing`` from the model to every decoder layer and carries the results back.

    One state serves one forward pass (or one prefill): decisions and positions are computed once and remembered. Keep
    weights are known for all layers at once, or, where a router decides on arrival, layer by layer.

    Attributes:
        turn_ids: Turn of each position, (B, N) int64; 0 = system prompt and image, t >= 1 = turn t, -1 = padding.
        image_mask: True at image positions, (B, N) bool.
        question_mask: True at question positions (no answer, padding or image), (B, N) bool.
        mode: ``"soft"`` blends both branches; ``"hard"`` runs kept rows only, one decision per example.
        keep_weights: Keep weights in [0, 1], (B, T, L), index t - 1 for turn t. A router fills them; given by the
            caller they are forced and no router is called.
        num_turns: Turns T that a router plans for; None lets it count them (one device transfer).
        skip_rate: Mean skip rate asked for, one number or one per example (B,); None uses the router's own budget.
        decide: Asked for the keep weights of each layer as it is reached, ``(layer, (B, N, D), state) -> (B, T)``; None
            where they are planned ahead. Set together with ``num_layers``.
        num_layers: Layers L that ``decide`` is asked for.
        arrived: Layer index -> keep weights (B, T) that ``decide`` gave; once all L are there, they are stacked into
            ``keep_weights``.
        prefix_weights: Layer index -> keep weight of the positions of turn 0, (B,), where a router gives them one of
            their own; elsewhere they take the mean over the turns.
        relaxation: How a router that learns softens its decisions (``schedule.Relaxation``); None as they are.
        inserted: Where the routing tokens of this pass stand; None for none.
        caller: Where there are any, the state that the pass was called with, which knows the prompt only and gets the
            results too.
        pixel_values: Images of the batch in the order of its rows, (images, channels, H, W); only features that look at
            pixels read them.
        images_per_row: Images of each row, (B,); needed only where images differ in the number of their positions.
        summary: Pooled states that the features are computed from, filled by the router.
        features: Antecedents in [0, 1], (B, T, K), filled by the router.
        scores: Router scores, (B, T), filled by the router.
        counts: Layer index -> rows that ran the base layer, filled as the layers run.
    """

    turn_ids: Tensor
    image_mask: Tensor
    question_mask: Tensor
    mode: Literal["soft", "hard"]
    keep_weights: Tensor | None = None
    num_turns: int | None = None
    skip_rate: Tensor | float | None = None
    decide: Callable[[int, Tensor, RoutingState], Tensor] | None = None
    num_layers: int | None = None
    arrived: dict[int, Tensor] = field(default_factory=dict)
    prefix_weights: dict[int, Tensor] = field(default_factory=dict)
    relaxation: Relaxation | None = None
    inserted: Layout | None = None
    caller: RoutingState | None = None
    pixel_values: Tensor | None = None
    images_per_row: Tensor | None = None
    summary: Any = None
    features: Tensor | None = None
    scores: Tensor | None = None
    counts: dict[int, int] = field(default_factory=dict)
    _decisions: Tensor | None = field(default=None, init=False, repr=False)
    _splits: dict[tuple[bool, ...], RowSplit] = field(default_factory=dict, init=False, repr=False)
    _turn_index: Tensor | None = field(default=None, init=False, repr=False)
    _turn_mask: Tensor | None = field(default=None, init=False, repr=False)

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise ValueError(f"Unknown routing mode '{self.mode}'; known: {', '.join(MODES)}. Pick one of these.")
        for name in ("turn_ids", "image_mask", "question_mask"):
            shape = tuple(getattr(self, name).shape)
            if len(shape) != 2 or shape != tuple(self.turn_ids.shape):
                raise ValueError(
                    f"RoutingState.{name} has shape {shape}; turn_ids, image_mask and question_mask are all (B, N), "
                    f"here {tuple(self.turn_ids.shape)}. Build all three from the same padded batch."
                )

    @classmethod
    def for_prompt(
        cls, attention_mask: Tensor, image_mask: Tensor | None = None, mode: Literal["soft", "hard"] = "hard"
    ) -> RoutingState:
        """Give the state of prompts that are one question each, still to be planned.

        Args:
            attention_mask: Non-zero at positions that are no padding, (B, N).
            image_mask: True at image positions, (B, N) bool; None where there is no image.
            mode: Routing mode.

        Raises:
            ValueError: If the mask is not (B, N).
        """
        if attention_mask.dim() != 2:
            raise ValueError(
                f"The attention mask has shape {tuple(attention_mask.shape)}; a prompt's padding is read from a "
                "(B, N) mask. Pass a 2D mask, or a RoutingState of your own as `routing`."
            )
        is_token = attention_mask.bool()
        is_image = torch.zeros_like(is_token) if image_mask is None else image_mask.bool() & is_token
        question_mask = is_token & ~is_image
        # 1 at question positions, 0 at image positions, -1 at padding
        turn_ids = question_mask.long() - (~is_token).long()
        return cls(turn_ids, is_image, question_mask, mode, num_turns=1)

    @classmethod
    def forced(
        cls, keep_weights: Tensor, attention_mask: Tensor, mode: Literal["soft", "hard"] = "hard"
    ) -> RoutingState:
        """Give the state of prompts whose keep weights are decided by the caller.

        Args:
            keep_weights: Keep weights in [0, 1] or bool, (B, L).
            attention_mask: Non-zero at positions that are no padding, (B, N).
            mode: Routing mode.
        """
        state = cls.for_prompt(attention_mask, mode=mode)
        weights = keep_weights if keep_weights.is_floating_point() else keep_weights.float()
        state.keep_weights = weights.unsqueeze(1)  # (B, 1, L)
        return state

    def planned_turns(self) -> int:
        """Give the number of turns T that a router plans for, at least 1; counting them is a device transfer."""
        if self.num_turns is None:
            self.num_turns = max(int(self.turn_ids.max()), 1)
        return self.num_turns

    def decide_on_arrival(self, layer: int, hidden_states: Tensor) -> None:
        """Ask the router for the keep weights of one layer, unless they are known.

        Args:
            layer: Layer index.
            hidden_states: Input of that layer, (B, N, D).

        Raises:
            ValueError: If the router gives something other than (B, T).
        """
        if self.decide is None or self.keep_weights is not None:
            return
        weights = self.decide(layer, hidden_states, self)
        if weights.dim() != 2 or weights.shape[0] != self.turn_ids.shape[0] or weights.shape[1] < 1:
            raise ValueError(
                f"The router decided layer {layer} with weights of shape {tuple(weights.shape)}; allowed is (B, T) "
                f"with B = {self.turn_ids.shape[0]} and T >= 1. Give one weight per example and turn."
            )
        self.arrived[layer] = weights
        if len(self.arrived) == self.num_layers:
            self.keep_weights = torch.stack([self.arrived[index] for index in range(self.num_layers)], dim=2)

    def decisions(self) -> Tensor:
        """Give the hard decisions, those of each example's last turn; True = the layer runs.

        A keep weight of at least 0.5 runs the layer; an example without any turn runs them all. The first call makes
        the only transfer from the device.

        Returns:
            Decisions, (B, L) bool on the CPU.

        Raises:
            ValueError: If there are no keep weights or a turn has none.
        """
        if self._decisions is None:
            self._decisions = self._harden(self._checked_weights())
        return self._decisions

    def split(self, layer: int) -> RowSplit:
        """Give the rows that run layer ``layer`` under the hard decisions; layers that agree share one split."""
        if layer in self.arrived:
            keep = self._harden(self.arrived[layer].unsqueeze(2))[:, 0]
        else:
            decisions = self.decisions()
            if not 0 <= layer < decisions.shape[1]:
                raise ValueError(
                    f"Layer {layer} asked for its decision, but keep_weights cover {decisions.shape[1]} layers. "
                    "Give (B, T, L) weights with L = the number of decoder layers."
                )
            keep = decisions[:, layer]
        pattern = tuple(keep.tolist())
        if pattern not in self._splits:
            self._splits[pattern] = RowSplit(keep)
        return self._splits[pattern]

    def turn_mask(self) -> Tensor:
        """Give which turns each example has, (B, T) bool, on the device of ``turn_ids``."""
        if self._turn_mask is None:
            turns = torch.arange(1, self._count_turns() + 1, device=self.turn_ids.device)
            self._turn_mask = (self.turn_ids.unsqueeze(1) == turns.view(1, -1, 1)).any(dim=2)  # (B, T, N) -> (B, T)
        return self._turn_mask

    def position_weights(self, layer: int) -> Tensor:
        """Spread the keep weights of one layer over the positions.

        A position of turn t gets the weight of turn t; positions of turn 0 get the mean over the example's turns (1.0
        if it has none); padding gets 1.0.

        Args:
            layer: Layer index.

        Returns:
            Keep weights in [0, 1], (B, N) or, with inserted positions, (B, S), differentiable with respect to
            ``keep_weights``.

        Raises:
            ValueError: If there are no keep weights or ``turn_ids`` names a turn that has none.

        Reference:
            RoE (arXiv:2407.14093), routing per turn of a conversation.
        """
        weights = self.arrived[layer] if layer in self.arrived else self._checked_weights()[:, :, layer]  # (B, T)
        index = self._index_of_positions(weights.shape[1]).to(weights.device)
        turns = self.turn_mask().to(weights.device)
        count = turns.sum(dim=1, keepdim=True)  # (B, 1)
        mean = (weights * turns).sum(dim=1, keepdim=True) / count.clamp(min=1)
        mean = torch.where(count > 0, mean, torch.ones_like(mean))
        if layer in self.prefix_weights:
            mean = self.prefix_weights[layer].unsqueeze(1)
        table = torch.cat([mean, weights, torch.ones_like(mean)], dim=1)  # (B, 1 + T + 1)
        return table.gather(1, index)

    def mean_skip_rate(self) -> Tensor:
        """Give ``1 - mean keep weight`` over layers, then turns, then examples; a differentiable scalar in [0, 1]."""
        weights = self._checked_weights().mean(dim=2)  # (B, T)
        turns = self.turn_mask().to(weights.device)
        mean = (weights * turns).sum(dim=1) / turns.sum(dim=1).clamp(min=1)
        has_turn = turns.any(dim=1)
        return (has_turn * (1 - mean)).sum() / has_turn.sum().clamp(min=1)

    def _harden(self, weights: Tensor) -> Tensor:
        """Turn keep weights, (B, T, L'), into decisions on the CPU, (B, L') bool, by one transfer."""
        weights, num_turns = weights.detach(), weights.shape[1]
        last_turn = self.turn_ids.amax(dim=1).to(weights.device)  # (B,)
        index = (last_turn - 1).clamp(0, num_turns - 1).view(-1, 1, 1).expand(-1, 1, weights.shape[2])
        keep = (weights.gather(1, index).squeeze(1) >= 0.5) | (last_turn < 1).unsqueeze(1)  # (B, L')
        # the checks ride along as two more columns, so that there is one transfer and not three
        checks = torch.stack([last_turn > num_turns, weights.isnan().flatten(1).any(dim=1)], dim=1)
        columns = torch.cat([keep, checks], dim=1).cpu()
        self._refuse_missing_turns(bool(columns[:, -2].any()), num_turns)
        if columns[:, -1].any():
            raise ValueError(
                f"Keep weights of rows {columns[:, -1].nonzero().flatten().tolist()} are nan; a decision needs numbers "
                "in [0, 1]. The router does not know these prompts, or its parameters are damaged."
            )
        return columns[:, :-2].contiguous()

    def _count_turns(self) -> int:
        """Turns T that there are keep weights for."""
        known = next(iter(self.arrived.values()), None)
        return self._checked_weights().shape[1] if known is None else known.shape[1]

    def _index_of_positions(self, num_turns: int) -> Tensor:
        """Give each position its column in the table of ``position_weights``, (B, N) int64."""
        if self._turn_index is None:
            turn_ids = self.turn_ids if self.inserted is None else self.inserted.turn_ids
            self._refuse_missing_turns(bool((turn_ids > num_turns).any()), num_turns)
            self._turn_index = torch.where(turn_ids < 0, num_turns + 1, turn_ids)
        return self._turn_index

    def _checked_weights(self) -> Tensor:
        weights, batch = self.keep_weights, self.turn_ids.shape[0]
        if weights is None:
            raise ValueError(
                "RoutingState has no keep_weights; they are (B, T, L) in [0, 1]. Attach a router that fills them, "
                "or give them yourself."
            )
        if weights.dim() != 3 or weights.shape[0] != batch or weights.shape[1] < 1:
            raise ValueError(
                f"RoutingState.keep_weights has shape {tuple(weights.shape)}; allowed is (B, T, L) with B = {batch} "
                "and T >= 1. Give one weight per example, turn and layer."
            )
        return weights

    def _refuse_missing_turns(self, is_missing: bool, num_turns: int) -> None:
        if is_missing:
            raise ValueError(
                f"turn_ids names turn {int(self.turn_ids.max())}, but keep_weights cover turns 1 to {num_turns}. "
                "Plan one weight per turn, or number the turns from 1."
            )
