"""The routing state: what one forward pass is asked to skip, and in ``result`` what came of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor

from fuzzyroe.losses import IGNORED_LABEL

Mode = Literal["soft", "hard", "observe"]
MODES = ("soft", "hard", "observe")


class RowSplit:
    """One decision per row of a batch, held on the host so that asking it never waits for a device.

    Args:
        keep: True where the row runs the layer, (B,) bool on the CPU.

    Attributes:
        num_rows: Batch size B.
        num_kept: Rows that run the layer.
        all_kept, none_kept: Whether every row does, and whether none does.
    """

    def __init__(self, keep: Tensor) -> None:
        self.keep = keep
        self.num_rows = keep.shape[0]
        self.num_kept = sum(keep.tolist())
        self.all_kept = self.num_kept == self.num_rows
        self.none_kept = self.num_kept == 0
        self._rows: dict[torch.device, tuple[Tensor, Tensor]] = {}
        self._slots: dict[torch.device, Tensor] = {}

    def rows(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Give the indices of the kept and of the skipped rows, copied to ``device`` once.

        Returns:
            Kept rows, (num_kept,) int64, and skipped rows, (B - num_kept,) int64, both ascending.
        """
        if device not in self._rows:
            kept, skipped = self.keep.nonzero().flatten(), (~self.keep).nonzero().flatten()
            self._rows[device] = (kept.to(device), skipped.to(device))
        return self._rows[device]

    def slots(self, device: torch.device) -> Tensor:
        """Give where each row stands among the kept ones, (B,) int64 on ``device``; B for a row that skips."""
        if device not in self._slots:
            slots = torch.where(self.keep, self.keep.cumsum(dim=0) - 1, self.num_rows)
            self._slots[device] = slots.to(device)
        return self._slots[device]


class SkipEntries:
    """States in front of the first layer that each row skips, kept while a pass runs, so that it can resume there.

    Args:
        num_rows: Batch size B.

    Attributes:
        by_layer: Layer index -> the rows whose first skip it is, (E,) int64 on the CPU, and its input of these,
            (E, N, D).
    """

    def __init__(self, num_rows: int) -> None:
        self.by_layer: dict[int, tuple[Tensor, Tensor]] = {}
        self._has_skipped = torch.zeros(num_rows, dtype=torch.bool)

    def note(self, layer: int, split: RowSplit, hidden_states: Tensor) -> None:
        """Keep the input of a layer, (B, N, D), for the rows that skip it and have skipped none before."""
        is_first = ~split.keep & ~self._has_skipped
        rows = is_first.nonzero().flatten()
        if len(rows) == 0:
            return
        # no layer writes into its input, so that of a whole batch need not be copied
        whole = len(rows) == len(is_first)
        states = hidden_states if whole else hidden_states.index_select(0, rows.to(hidden_states.device))
        self.by_layer[layer] = (rows, states)
        self._has_skipped |= is_first


@dataclass(frozen=True)
class EscalationRecord:
    """What an escalation read behind a prefill, and what it decided; everything on the CPU.

    Attributes:
        readings: Antecedents by name, (B,) each, among them ``answer_margin`` and ``answer_entropy``.
        doubt: What the policy made of them, in [0, 1], (B,).
        levels: 0 where the row kept its plan, 1 where it went on under a shallower one, 2 under all layers, (B,) int64.
        planned: Plan of the first prefill, (B, L) bool.
        runs: How often each row ran each layer in its prefill, reruns included, (B, L) int64.
    """

    readings: dict[str, Tensor]
    doubt: Tensor
    levels: Tensor
    planned: Tensor
    runs: Tensor


@dataclass
class RoutingResult:
    """What came of one forward pass, written by router and layers, read by the caller.

    Attributes:
        keep_weights: Keep weights in [0, 1], (B, T, L), index t - 1 for turn t; forced, planned by the router, or
            stacked once a layer-wise router has decided the last layer; those of the final plan after an escalation.
        kept_layers: The hard decisions, once somebody has asked for them; see ``RoutingState.kept_layers``.
        decisions: Layer index -> keep weights (B, T), of a layer-wise router.
        position_weights: Layer index -> keep weight of each position, (B, N), from a layer-wise router that spreads
            its weights over the positions itself.
        summary: Pooled states that the router looked at.
        features: Antecedents in [0, 1], (B, T, K).
        scores: Router scores, (B, T).
        layer_runs: Layer index -> rows that ran the base layer, counted again where they ran it again.
        escalation: What an escalation read and decided; None without one.
    """

    keep_weights: Tensor | None = None
    kept_layers: Tensor | None = None
    decisions: dict[int, Tensor] = field(default_factory=dict)
    position_weights: dict[int, Tensor] = field(default_factory=dict)
    summary: Any = None
    features: Tensor | None = None
    scores: Tensor | None = None
    layer_runs: dict[int, int] = field(default_factory=dict)
    escalation: EscalationRecord | None = None


@dataclass
class RoutingState:
    """Travels as the keyword ``routing`` from the model to every decoder layer.

    One state serves one forward pass, or one prefill. Its fields say what is asked; whatever the pass finds out goes
    into ``result``. A router that changes the pass, e.g. one that inserts positions, hands the layers a copy with
    other fields and the same result.

    Attributes:
        turn_ids: Turn of each position, (B, N) int64; 0 = system prompt and image, t >= 1 = turn t, -1 = padding.
        image_mask: True at image positions, (B, N) bool.
        question_mask: True at question positions (no answer, padding or image), (B, N) bool.
        mode: ``"soft"`` blends both branches; ``"hard"`` runs kept rows only, one decision per example; ``"observe"``
            lets the router decide as in hard mode while every row runs every layer.
        keep_weights: Keep weights that the caller forces, (B, T, L); no router is called then. See ``forced``.
        num_turns: Turns T that a router plans for; None lets it count them (one device transfer).
        target_skip_ratio: Mean skip rate asked for, one number or one per example (B,); None uses the router's own.
        softness: How soft the plans of a router that does not learn are, see ``FuzzyRouter.keep_weights``; 0 is hard.
        pixel_values: Images of the batch in the order of its rows, (images, channels, H, W); only features that look at
            pixels read them.
        images_per_row: Images of each row, (B,); needed only where images differ in the number of their positions.
        roe: What RoE's router alone is asked and remembers (``fuzzyroe.routers.roe.RoEPass``); None for its defaults.
        decide: Layer-wise routing: asked for each layer as it is reached, ``(layer, (B, N, D), state) -> (B, T)``; None
            where all layers are planned ahead. The decoder's hook sets it, with ``num_layers``, for the layers.
        num_layers: Layers L that ``decide`` is asked for.
        prompt_positions: Where the positions of the prompt stand, (B, N), if the router has added others to the pass.
        entries: Collects what is needed to resume the pass; None where it will not be.
        resume: Layer from which an earlier pass of these rows is resumed, with the states in front of it, (B, N, D);
            earlier layers do nothing.
        result: What came of the pass.
    """

    turn_ids: Tensor
    image_mask: Tensor
    question_mask: Tensor
    mode: Mode = "hard"
    keep_weights: Tensor | None = None
    num_turns: int | None = None
    target_skip_ratio: Tensor | float | None = None
    softness: float = 0.0
    pixel_values: Tensor | None = None
    images_per_row: Tensor | None = None
    roe: Any = None
    decide: Callable[[int, Tensor, RoutingState], Tensor] | None = None
    num_layers: int | None = None
    prompt_positions: Tensor | None = None
    entries: SkipEntries | None = None
    resume: tuple[int, Tensor] | None = None
    result: RoutingResult = field(default_factory=RoutingResult)
    _splits: dict[tuple[bool, ...], RowSplit] = field(default_factory=dict, init=False, repr=False)
    _table_index: Tensor | None = field(default=None, init=False, repr=False)
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
        if self.keep_weights is not None:
            self.result.keep_weights = self.keep_weights

    @classmethod
    def from_batch(
        cls,
        batch: Mapping[str, Any],
        image_token_id: int | None = None,
        mode: Mode = "hard",
        num_drafted: int = 0,
    ) -> RoutingState:
        """Describe the prompts or training samples of a batch; nothing is planned yet.

        Without ``turn_ids`` each row is one prompt: what follows its last image is the question, and a prompt without
        an image is a question from its first token. With them, as in training, answers are no part of a question, so
        they cannot influence a route, and the prefix of a sample without an image counts to its first question, since
        at inference nothing but an image ends the prefix.

        Args:
            batch: Inputs of the model, of which are read: ``input_ids`` and ``attention_mask``, (B, N), at least one
                of them; ``turn_ids`` with ``labels``, (B, N); ``pixel_values``.
            image_token_id: Token id of image positions; None for text.
            mode: Routing mode.
            num_drafted: Last positions of every row that are drafts of an answer, and hence no part of the question.

        Raises:
            ValueError: If the attention mask is not (B, N).

        >>> RoutingState.from_batch({"input_ids": torch.tensor([[1, 9, 9, 5, 7]])}, image_token_id=9).turn_ids
        tensor([[0, 0, 0, 1, 1]])
        """
        input_ids: Any = batch.get("input_ids")
        mask, turn_ids = batch.get("attention_mask"), batch.get("turn_ids")
        if mask is not None and mask.dim() != 2:
            raise ValueError(
                f"The attention mask has shape {tuple(mask.shape)}; a prompt's padding is read from a (B, N) mask. "
                "Pass a 2D mask, or a RoutingState of your own as `routing`."
            )
        is_token = torch.ones_like(input_ids, dtype=torch.bool) if mask is None else mask.bool()
        if input_ids is None or image_token_id is None:
            image_mask = torch.zeros_like(is_token)
        else:
            image_mask = input_ids == image_token_id
        if turn_ids is None:
            # an id at a padded position means nothing, and would end the question
            image_mask = image_mask & is_token
            images_from_here = image_mask.flip(1).cumsum(1).flip(1)  # (B, N), image positions at or behind each one
            question_mask = is_token & (images_from_here == 0)
            turn_ids, num_turns = question_mask.long() - (~is_token).long(), 1
            if num_drafted:
                question_mask[:, -num_drafted:] = False
        else:
            # what inference cannot tell apart, training must not
            has_image = image_mask.any(dim=1, keepdim=True)
            turn_ids = turn_ids.masked_fill((turn_ids == 0) & ~has_image, 1)
            question_mask = (turn_ids > 0) & (batch["labels"] == IGNORED_LABEL) & ~image_mask
            num_turns = max(int(turn_ids.max()), 1)
        return cls(
            turn_ids, image_mask, question_mask, mode, num_turns=num_turns, pixel_values=batch.get("pixel_values")
        )

    def forced(self, keep_weights: Tensor, mode: Mode | None = None) -> RoutingState:
        """Give a state of the same batch whose keep weights the caller decides, with a result of its own.

        Args:
            keep_weights: Keep weights in [0, 1] or bool, (B, T, L), or (B, L) for the same in every turn.
            mode: Routing mode; None keeps this state's.

        >>> state = RoutingState.from_batch({"attention_mask": torch.ones(1, 3)})
        >>> state.forced(torch.tensor([[True, False]])).kept_layers()
        tensor([[ True, False]])
        """
        weights = keep_weights if keep_weights.is_floating_point() else keep_weights.float()
        if weights.dim() == 2:
            weights = weights.unsqueeze(1).expand(-1, self.planned_turns(), -1)
        return replace(self, keep_weights=weights, mode=mode or self.mode, result=RoutingResult())

    def planned_turns(self) -> int:
        """Give the number of turns T that a router plans for, at least 1; counting them is a device transfer."""
        if self.num_turns is None:
            self.num_turns = max(int(self.turn_ids.max()), 1)
        return self.num_turns

    def decide_layer(self, layer: int, hidden_states: Tensor) -> None:
        """Ask a layer-wise router for the keep weights of one layer, unless they are known.

        Args:
            layer: Layer index.
            hidden_states: Input of that layer, (B, N, D).

        Raises:
            ValueError: If the router gives something other than (B, T).
        """
        if self.decide is None or self.result.keep_weights is not None:
            return
        weights = self.decide(layer, hidden_states, self)
        if weights.dim() != 2 or weights.shape[0] != self.turn_ids.shape[0] or weights.shape[1] < 1:
            raise ValueError(
                f"The router decided layer {layer} with weights of shape {tuple(weights.shape)}; allowed is (B, T) "
                f"with B = {self.turn_ids.shape[0]} and T >= 1. Give one weight per example and turn."
            )
        decisions = self.result.decisions
        decisions[layer] = weights
        if len(decisions) == self.num_layers:
            self.result.keep_weights = torch.stack([decisions[index] for index in range(self.num_layers)], dim=2)

    def kept_layers(self) -> Tensor:
        """Give the hard decisions, those of each example's last turn; True = the layer runs.

        A keep weight of at least 0.5 runs the layer; an example without any turn runs them all. The first call makes
        the only transfer from the device.

        Returns:
            Decisions, (B, L) bool on the CPU.

        Raises:
            ValueError: If there are no keep weights or a turn has none.
        """
        if self.result.kept_layers is None:
            self.result.kept_layers = self._harden(self._checked_weights())
        return self.result.kept_layers

    def split(self, layer: int) -> RowSplit:
        """Give the rows that run layer ``layer`` under the hard decisions; layers that agree share one split."""
        if self.mode == "observe":
            keep = torch.ones(self.turn_ids.shape[0], dtype=torch.bool)
        elif layer in self.result.decisions:
            keep = self._harden(self.result.decisions[layer].unsqueeze(2))[:, 0]
        else:
            decisions = self.kept_layers()
            if not 0 <= layer < decisions.shape[1]:
                raise ValueError(
                    f"Layer {layer} asked for its decision, but keep_weights cover {decisions.shape[1]} layers. "
                    "Give (B, T, L) weights with L = the number of decoder layers."
                )
            keep = decisions[:, layer]
        # nested plans repeat few patterns: each is copied to the device once, not once per layer
        pattern = tuple(keep.tolist())
        if pattern not in self._splits:
            self._splits[pattern] = RowSplit(keep)
        return self._splits[pattern]

    def turn_mask(self) -> Tensor:
        """Give which turns each example has, (B, T) bool, on the device of ``turn_ids``."""
        if self._turn_mask is None:
            decided = next(iter(self.result.decisions.values()), None)
            num_turns = self._checked_weights().shape[1] if decided is None else decided.shape[1]
            turns = torch.arange(1, num_turns + 1, device=self.turn_ids.device)
            self._turn_mask = (self.turn_ids.unsqueeze(1) == turns.view(1, -1, 1)).any(dim=2)  # (B, T, N) -> (B, T)
        return self._turn_mask

    def position_weights(self, layer: int) -> Tensor:
        """Spread the keep weights of one layer over the positions.

        A position of turn t gets the weight of turn t; positions of turn 0 get the mean over the example's turns (1.0
        if it has none); padding gets 1.0.

        Args:
            layer: Layer index.

        Returns:
            Keep weights in [0, 1], (B, N), differentiable with respect to the keep weights.

        Raises:
            ValueError: If there are no keep weights or ``turn_ids`` names a turn that has none.

        Reference:
            RoE (arXiv:2407.14093), routing per turn of a conversation.
        """
        result = self.result
        if layer in result.position_weights:
            return result.position_weights[layer]
        weights = result.decisions[layer] if layer in result.decisions else self._checked_weights()[:, :, layer]
        if self._table_index is None:
            num_turns = weights.shape[1]
            self._refuse_missing_turns(bool((self.turn_ids > num_turns).any()), num_turns)
            self._table_index = torch.where(self.turn_ids < 0, num_turns + 1, self.turn_ids)
        turns = self.turn_mask().to(weights.device)
        count = turns.sum(dim=1, keepdim=True)  # (B, 1)
        mean = (weights * turns).sum(dim=1, keepdim=True) / count.clamp(min=1)
        mean = torch.where(count > 0, mean, torch.ones_like(mean))
        table = torch.cat([mean, weights, torch.ones_like(mean)], dim=1)  # (B, 1 + T + 1)
        return table.gather(1, self._table_index.to(weights.device))

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

    def _checked_weights(self) -> Tensor:
        weights, batch = self.result.keep_weights, self.turn_ids.shape[0]
        if weights is None:
            raise ValueError(
                "RoutingState has no keep_weights; they are (B, T, L) in [0, 1]. Attach a router that fills them, "
                "or give them yourself."
            )
        if weights.dim() != 3 or weights.shape[0] != batch or weights.shape[1] < 1:
            raise ValueError(
                f"keep_weights has shape {tuple(weights.shape)}; allowed is (B, T, L) with B = {batch} "
                "and T >= 1. Give one weight per example, turn and layer."
            )
        return weights

    def _refuse_missing_turns(self, is_missing: bool, num_turns: int) -> None:
        if is_missing:
            raise ValueError(
                f"turn_ids names turn {int(self.turn_ids.max())}, but keep_weights cover turns 1 to {num_turns}. "
                "Plan one weight per turn, or number the turns from 1."
            )
