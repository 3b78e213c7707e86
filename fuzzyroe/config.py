"""What a checkpoint's ``config.json`` says about its routing."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import Any

FORMAT_VERSION = 1


@dataclass(frozen=True)
class FuzzyRoEConfig:
    """The ``fuzzyroe`` block of a configuration.

    Attributes:
        adapter_width: Width of the skip adapters' bottleneck, at least 1.
        router: Name in ``ROUTERS``.
        rule_base: File of the fitted rule base, relative to the checkpoint folder.
        num_budgets: Rows of the router's table of budgets, at least 1.
        base_model: Checkpoint that holds the backbone's weights, relative to this one's folder, or a hub id; None if
            the weights are here.
        stage: Training stage that wrote the checkpoint.
        format_version: Version of this block.
    """

    adapter_width: int
    router: str = "fuzzy"
    rule_base: str = "rule_base.yaml"
    num_budgets: int = 1
    base_model: str | None = None
    stage: str = ""
    format_version: int = FORMAT_VERSION

    def __post_init__(self) -> None:
        _check_version(self.format_version)
        if self.adapter_width < 1 or self.num_budgets < 1:
            raise ValueError(
                f"adapter_width {self.adapter_width} and num_budgets {self.num_budgets} must be at least 1; the "
                "fuzzyroe block of config.json is damaged, write the checkpoint again."
            )

    @classmethod
    def from_dict(cls, block: dict[str, Any]) -> FuzzyRoEConfig:
        """Read the block.

        Raises:
            ValueError: If it is of another version, lacks ``adapter_width``, or has a key that is not known.
        """
        _check_version(block.get("format_version", FORMAT_VERSION))
        known = {field.name for field in fields(cls)}
        unknown = sorted(set(block) - known)
        if unknown:
            raise ValueError(
                f"The fuzzyroe block has unknown keys {unknown}; known are {sorted(known)}. Correct config.json."
            )
        if "adapter_width" not in block:
            raise ValueError(
                f"The fuzzyroe block has no adapter_width, only {sorted(block)}; a whole number of at least 1 is "
                "needed. Write the checkpoint again."
            )
        return cls(**block)

    def to_dict(self) -> dict[str, Any]:
        """The block as it is written to ``config.json``."""
        return asdict(self)


def _check_version(version: int) -> None:
    if version != FORMAT_VERSION:
        raise ValueError(
            f"The checkpoint's fuzzyroe block has format_version {version}, this version reads {FORMAT_VERSION}; "
            "install the fuzzyroe that wrote it."
        )
