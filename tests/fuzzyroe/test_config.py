"""Promises of the ``fuzzyroe`` block: what is written is read again, and damage is named."""

from __future__ import annotations

import json

import pytest

from fuzzyroe.config import FORMAT_VERSION, FuzzyRoEConfig


def test_the_block_survives_json() -> None:
    options = {"seed": 3, "target_skip_ratio": 0.25}
    config = FuzzyRoEConfig(16, "random", options, "attention", base_model="../base", stage="adapter")
    assert FuzzyRoEConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_absent_keys_take_their_defaults() -> None:
    config = FuzzyRoEConfig.from_dict({"adapter_width": 8})
    assert (config.router, config.router_options, config.skip_unit) == ("fuzzy", {}, "layer")
    assert config.base_model is None and config.format_version == FORMAT_VERSION


def test_sizes_below_one_are_refused() -> None:
    with pytest.raises(ValueError, match="must be at least 1; .*damaged"):
        FuzzyRoEConfig(adapter_width=0)


def test_an_unknown_skip_unit_is_refused() -> None:
    with pytest.raises(ValueError, match="skip_unit 'token' is unknown; known are layer, attention, ffn"):
        FuzzyRoEConfig(adapter_width=4, skip_unit="token")


def test_unknown_keys_are_named_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"unknown keys \['widht'\]; known are \['adapter_width'"):
        FuzzyRoEConfig.from_dict({"adapter_width": 4, "widht": 4})


def test_a_block_without_adapter_width_is_named() -> None:
    with pytest.raises(ValueError, match="no adapter_width"):
        FuzzyRoEConfig.from_dict({"router": "fuzzy"})


def test_another_version_is_named_before_its_keys_are_blamed() -> None:
    with pytest.raises(ValueError, match="format_version 3, this version reads 1; install"):
        FuzzyRoEConfig.from_dict({"adapter_width": 4, "format_version": 3, "new_in_three": True})
