"""Promises of the ``fuzzyroe`` block: what is written is read again, and damage is named."""

from __future__ import annotations

import json

import pytest

from fuzzyroe.config import FORMAT_VERSION, FuzzyRoEConfig


def test_the_block_survives_json() -> None:
    config = FuzzyRoEConfig(adapter_width=16, num_budgets=49, base_model="../base", stage="adapter")
    assert FuzzyRoEConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_absent_keys_take_their_defaults() -> None:
    config = FuzzyRoEConfig.from_dict({"adapter_width": 8})
    assert (config.router, config.rule_base, config.num_budgets) == ("fuzzy", "rule_base.yaml", 1)
    assert config.base_model is None and config.format_version == FORMAT_VERSION


@pytest.mark.parametrize("sizes", [{"adapter_width": 0}, {"adapter_width": 4, "num_budgets": 0}])
def test_sizes_below_one_are_refused(sizes: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="must be at least 1; .*damaged"):
        FuzzyRoEConfig(**sizes)


def test_unknown_keys_are_named_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"unknown keys \['widht'\]; known are \['adapter_width'"):
        FuzzyRoEConfig.from_dict({"adapter_width": 4, "widht": 4})


def test_a_block_without_adapter_width_is_named() -> None:
    with pytest.raises(ValueError, match="no adapter_width"):
        FuzzyRoEConfig.from_dict({"router": "fuzzy"})


def test_another_version_is_named_before_its_keys_are_blamed() -> None:
    with pytest.raises(ValueError, match=f"format_version 2, this version reads {FORMAT_VERSION}; install"):
        FuzzyRoEConfig.from_dict({"adapter_width": 4, "format_version": 2, "new_in_two": True})
