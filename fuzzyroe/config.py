"""Routing block of a checkpoint's ``config.json``."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields
from typing import Any

from fuzzyroe.routed_layer import SKIP_UNITS

FORMAT_VERSION = 1


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
        """Read the block.

        Raises:
            ValueError: If it is of another version, lacks ``adapter_width``, or has a key that is not known.
        """
        version, known = block.get("format_version", FORMAT_VERSION), {item.name for item in fields(cls)}
        # before the keys: a later version may have keys of its own, which are no mistake
        if version != FORMAT_VERSION:
            raise ValueError(
                f"The checkpoint's fuzzyroe block has format_version {version}, this version reads {FORMAT_VERSION}; "
                "install the fuzzyroe that wrote it."
            )
        # a misspelt key would be dropped in silence and its default taken
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
