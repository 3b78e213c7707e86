"""What a checkpoint's ``config.json`` says about its routing."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields
from typing import Any

from fuzzyroe.skip_units import SKIP_UNITS

FORMAT_VERSION = 2
READABLE_VERSIONS = (1, 2)


@dataclass(frozen=True)
class FuzzyRoEConfig:
    """The ``fuzzyroe`` block of a configuration.

    Attributes:
        adapter_width: Width of the skip adapters' bottleneck, at least 1.
        router: Name in ``ROUTERS``.
        router_options: What that router needs to be rebuilt, besides its tensors and files (``Router.settings``).
        skip_unit: What a skip leaves out, a name in ``SKIP_UNITS``.
        base_model: Checkpoint that holds the backbone's weights, relative to this one's folder, or a hub id; None if
            the weights are here.
        stage: Training stage that wrote the checkpoint.
        format_version: Version of this block.
    """

    adapter_width: int
    router: str = "fuzzy"
    router_options: dict[str, Any] = field(default_factory=dict)
    skip_unit: str = "layer"
    base_model: str | None = None
    stage: str = ""
    format_version: int = FORMAT_VERSION

    def __post_init__(self) -> None:
        if self.adapter_width < 1:
            raise ValueError(
                f"adapter_width {self.adapter_width} must be at least 1; the fuzzyroe block of config.json is damaged, "
                "write the checkpoint again."
            )
        if self.skip_unit not in SKIP_UNITS:
            raise ValueError(
                f"skip_unit '{self.skip_unit}' is unknown; known are {', '.join(SKIP_UNITS)}. Correct config.json."
            )

    @classmethod
    def from_dict(cls, block: dict[str, Any]) -> FuzzyRoEConfig:
        """Read the block, also one of an older version.

        Raises:
            ValueError: If it is of another version, lacks ``adapter_width``, or has a key that is not known.
        """
        version = block.get("format_version", FORMAT_VERSION)
        if version not in READABLE_VERSIONS:
            raise ValueError(
                f"The checkpoint's fuzzyroe block has format_version {version}, this version reads "
                f"{', '.join(map(str, READABLE_VERSIONS))}; install the fuzzyroe that wrote it."
            )
        if version == 1:
            block = _upgrade_from_1(block)
        known = {item.name for item in fields(cls)}
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


def _upgrade_from_1(block: dict[str, Any]) -> dict[str, Any]:
    """Version 1 knew one router, whose options stood in the block itself."""
    options = {"rule_base": block.get("rule_base", "rule_base.yaml"), "num_budgets": block.get("num_budgets", 1)}
    kept = {key: value for key, value in block.items() if key not in options}
    return {**kept, "router_options": options, "format_version": FORMAT_VERSION}
