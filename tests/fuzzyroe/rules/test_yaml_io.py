"""Rule-base files read back bit for bit; anything ambiguous is refused with its place."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fuzzyroe.rules import (
    Consequent,
    FuzzyRuleBase,
    LinguisticVariable,
    dump_rule_base,
    load_rule_base,
    parse_rule_base,
    save_rule_base,
    shipped_rule_bases,
)
from fuzzyroe.rules.explain import expert_rules

TEXT = """\
schema: fuzzy-rule-base/1
name: small
system: {type: tsk, order: 0, t_norm: product, defuzzification: weighted_average}
antecedents:
  - {name: a, universe: [0, 1], terms: {low: 0.0, high: 1.0}, monotone: increasing}
  - {name: b, universe: [0, 1], terms: {low: [0, 0, 0.5], mid: [0, 0.5, 1], high: 1}}
consequent: {name: y, universe: [0, 2], rescale: [0, 1]}
interpolation: {method: scale_and_move, selection: flanking, fallback: closest_3}
defaults: {non_finite: 1.0, out_of_range: clip}
rules:
  - [low, low, 0.0]
  - [low, high, 1]
  - [high, any, 2.0]
provenance: {made_by: hand, date: 2020-01-01, steps: [1, 2.5, null, true]}
"""


def test_the_schema_in_one_example():
    rule_base = parse_rule_base(TEXT)
    assert [v.peaks for v in rule_base.antecedents] == [(0, 1), (0, 0.5, 1)]
    assert [v.monotone for v in rule_base.antecedents] == ["increasing", None]
    np.testing.assert_array_equal(rule_base.table, [[0, np.nan, 1], [2, 2, 2]])
    np.testing.assert_array_equal(rule_base.output_table, [[0, np.nan, 0.5], [1, 1, 1]])
    assert rule_base.missing_cells() == [("low", "mid")]
    assert rule_base.provenance == {"made_by": "hand", "date": "2020-01-01", "steps": [1, 2.5, None, True]}


@pytest.mark.parametrize(
    ("old", "new", "line", "message"),
    [
        ("name: small", "name: small\nname: other", 3, "the key 'name' twice"),
        ("name: small", "name: small\nauthor: me", 3, "unknown key 'author'"),
        ("name: small\n", "", 1, r"lacks \['name'\]"),
        ("base/1", "base/2", 1, "schema is 'fuzzy-rule-base/2'"),
        ("t_norm: product", "t_norm: minimum", 3, "system.t_norm is 'minimum'"),
        ("{low: 0.0, high: 1.0}", "{low: 0.0, low: 1.0}", 5, "the key 'low' twice"),
        ("{low: 0.0, high: 1.0}", "{low: 1.0, high: 0.0}", 5, "peaks increase by at least"),
        ("{low: 0.0, high: 1.0}", "{low: 0.0, high: 1.5}", 5, "inside the universe"),
        ("{low: 0.0, high: 1.0}", "{no: 0.0, high: 1.0}", 5, "'no', which YAML does not read as text"),
        ("{low: 0.0, high: 1.0}", "{low: 1e-3, high: 1.0}", 5, "'1e-3', which YAML does not read as a number"),
        ("{low: 0.0, high: 1.0}", "{low: .nan, high: 1.0}", 5, "a finite number is allowed"),
        ("mid: [0, 0.5, 1]", "mid: [0.1, 0.5, 1]", 6, "on the left at 0.1, which leaves a gap"),
        ("mid: [0, 0.5, 1]", "mid: [0, 0.5, 0.9]", 6, "on the right at 0.9, which leaves a gap"),
        ("low: [0, 0, 0.5]", "low: [0, 0, 0.6]", 6, "on the right at 0.6, which leaves an overlap"),
        ("mid: [0, 0.5, 1]", "mid: [0, 0.5]", 6, "has 2 entries; 3 are allowed"),
        ("universe: [0, 2]", "universe: [2, 0]", 7, "lower < upper"),
        ("rescale: [0, 1]", "rescale: [0, 0]", 7, "lower < upper"),
        ("monotone: increasing", "monotone: up", 5, "'increasing', 'decreasing'"),
        ("method: scale_and_move", "method: spline", 8, "Unknown interpolation method"),
        ("closest_3", "all", 8, "'closest_N' is allowed"),
        ("out_of_range: clip", "out_of_range: wrap", 9, "out_of_range is 'wrap'; 'clip' is allowed"),
        ("non_finite: 1.0", "non_finite: .inf", 9, "a finite number is allowed"),
        ("[low, high, 1]", "[low, huge, 1]", 12, "'b' has no term 'huge'"),
        ("[low, high, 1]", "[low, 1]", 12, "a rule has 2 entries"),
        ("[low, high, 1]", "[low, high, 1, expert, 3]", 12, "a rule has 5 entries"),
        ("[low, high, 1]", "[low, high, .inf]", 12, "a finite number is allowed"),
        ("[low, high, 1]", "[low, high, 2.1]", 12, "consequent 2.1 is outside its universe"),
        ("[low, high, 1]", "[low, high, yes]", 12, "'yes', which YAML does not read as a number"),
        ("[low, high, 1]", "[low, high, 1, guessed]", 12, r"the origins \['guessed'\]"),
        ("[low, high, 1]", "[low, high, 1, fitted]", 12, r"the origins \['fitted'\]"),
        ("[low, high, 1]", "[low, low, 1]", 12, r"\(1\) conflicts with the rule of line 11 \(0\) for \('low', 'low'\)"),
        ("[low, high, 1]", "[low, low, 0.0]", 12, "repeats the rule of line 11"),
        ("[low, high, 1]", "[any, high, 1]", 13, "conflicts with the rule of line 12"),
        ("[low, high, 1]", "[low, high, 1", 13, "one YAML document is allowed"),
        ("provenance: {", "provenance: {made_by: me, ", 14, "the key 'made_by' twice"),
        ("rules:", "rules: {}\nnotes:", 11, "unknown key 'notes'"),
    ],
)
def test_a_broken_file_is_refused_with_file_line_and_remedy(old, new, line, message):
    assert old in TEXT
    with pytest.raises(ValueError, match=message) as caught:
        parse_rule_base(TEXT.replace(old, new, 1), "some.yaml")
    assert str(caught.value).startswith(f"some.yaml:{line}: ") and str(caught.value).count(";") >= 1


@pytest.mark.parametrize(
    ("old", "new", "line", "name"),
    [
        ("universe: [0, 1]", "universe: &unit [0, 1]", 5, "unit"),
        ("universe: [0, 2]", "universe: *unit", 7, "unit"),
        ("provenance: {", "provenance: {<<: *all, ", 14, "all"),
        ("provenance: {", "provenance: &me {again: *me, ", 14, "me"),
    ],
)
def test_anchors_and_aliases_are_refused(old, new, line, name):
    message = f"some.yaml:{line}: the anchor or alias '{name}'; .* allowed; write the value in each"
    with pytest.raises(ValueError, match=message):
        parse_rule_base(TEXT.replace(old, new, 1), "some.yaml")


def test_a_value_that_occurs_twice_is_written_twice():
    shared = [1.0, 2.0]
    rule_base = replace(parse_rule_base(TEXT), provenance={"first": shared, "second": shared})
    assert parse_rule_base(dump_rule_base(rule_base)) == rule_base


@pytest.mark.parametrize("text", ["", "just text", TEXT.split("rules:")[0] + "rules: []\n", "--- 1\n--- 2\n"])
def test_a_file_without_rules_is_refused(text):
    with pytest.raises(ValueError, match="text>:"):
        parse_rule_base(text)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.none() | st.floats(-1e5, 1e5), min_size=6, max_size=6), st.floats(0.3, 0.7), st.booleans())
def test_random_tables_read_back_bit_for_bit(values, peak, is_fitted):
    table = np.array([np.nan if value is None else value for value in values]).reshape(2, 3)
    if np.isnan(table).all() or (is_fitted and np.isnan(table).any()):
        return
    variables = (
        LinguisticVariable("a", (0, 1), ("no", "yes"), (peak / 3, peak)),
        LinguisticVariable("b", (0, 1), ("low", "medium", "high"), (0.1, peak, 0.9), "decreasing"),
    )
    source = np.where(np.isnan(table), "none", np.array([["expert"] * 3, ["interpolated"] * 3]))
    options = {"provenance": {"seed": 3, "rate": peak, "who": "on: off"}, "description": "a: b # c", "non_finite": peak}
    if is_fitted:
        options |= {"prior_table": table[::-1], "prior_source": source}
        source = np.full((2, 3), "fitted")
    rule_base = FuzzyRuleBase("any_name", variables, table, source, Consequent("y", (-1e5, 1e5), (0, 1)), **options)
    assert parse_rule_base(dump_rule_base(rule_base)) == rule_base


def test_comments_of_rules_survive_the_file_completion_and_fit():
    text = TEXT.replace("[low, high, 1]", "[low, high, 1]   # terse: one  thing # and another")
    text = text.replace("[high, any, 2.0]", "[high, any, 2.0] # much").replace("[low, low, 0.0]", "['low', low, 0.0] #")
    rule_base = parse_rule_base(text)
    much = {("high", term): "much" for term in ("low", "mid", "high")}
    assert rule_base.comments == {("low", "high"): "terse: one thing # and another", **much}
    assert parse_rule_base(dump_rule_base(rule_base)) == rule_base
    features = np.random.default_rng(0).random((40, 2))
    fitted = rule_base.interpolate().fit(features, features.mean(axis=1))
    assert parse_rule_base(dump_rule_base(fitted)).comments == rule_base.comments
    assert (
        fitted.flip_direction([1, 1]).comments == rule_base.comments and fitted.flip_direction([-1, 1]).comments == {}
    )
    with pytest.raises(ValueError, match="conflicts"):
        parse_rule_base(text.replace("[high, any", "[low, any"))


def test_a_rule_in_lines_of_its_own_takes_no_comment_from_elsewhere():
    text = TEXT.replace("  - [low, low, 0.0]\n", "  - - low\n    - low\n    - 0.0\n# a heading\n")
    assert parse_rule_base(text).comments == {}


def test_a_calibrated_and_fitted_rule_base_survives_the_file(complete, tmp_path):
    rng = np.random.default_rng(0)
    features = rng.random((60, 3)).astype(np.float32)
    fitted = complete.with_quantile_knots(features).fit(features, rng.standard_normal(60), max_change=0.15)
    path = tmp_path / "rules.yaml"
    path.write_text("old")
    save_rule_base(fitted, path)
    assert load_rule_base(path) == fitted and [file.name for file in tmp_path.iterdir()] == ["rules.yaml"]
    assert load_rule_base(str(path)).unfitted().source.tolist() == complete.source.tolist()


def test_a_failing_write_leaves_the_old_file(complete, tmp_path, monkeypatch):
    path = tmp_path / "rules.yaml"
    path.write_text("old")
    monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        save_rule_base(complete, path)
    assert path.read_text() == "old" and len(list(tmp_path.iterdir())) == 1


PLAN_RULES = [name for name in shipped_rule_bases() if name != "escalate"]


@pytest.mark.parametrize("name", PLAN_RULES)
def test_shipped_rule_bases_have_fifteen_monotone_rules_and_complete_without_violation(name):
    rule_base = load_rule_base(name)
    assert rule_base.name == name and len(expert_rules(rule_base).missing_cells()) == 12
    assert rule_base.monotonicity_violations() == rule_base.interpolate().monotonicity_violations() == []
    assert (rule_base.signs == 1).all() and rule_base.interpolate().is_complete


def test_the_rules_that_escalate_are_complete_and_doubt_falls_as_the_margin_grows():
    rule_base = load_rule_base("escalate")
    assert rule_base.name == "escalate" and rule_base.is_complete and rule_base.signs.tolist() == [-1]
    assert rule_base.monotonicity_violations() == []


def test_the_published_base_is_the_raw_one_on_the_unit_interval_and_the_default_follows_it():
    raw, scaled, default = (load_rule_base(name).table for name in ("published_raw", "published", "default"))
    assert load_rule_base("published").consequent.output_range == (0, 1)
    np.testing.assert_array_equal(raw, scaled)
    np.testing.assert_allclose(default, raw / 1.5, atol=1e-3)


def test_the_digits_base_is_a_fit_of_the_default_one_and_says_how_it_came_about():
    digits, default = load_rule_base("digits"), load_rule_base("default").interpolate()
    np.testing.assert_allclose(digits.unfitted().table, default.table, atol=1e-9)
    assert digits.comments == default.comments and set(digits.source.ravel()) == {"fitted"}
    names = [variable.name for variable in default.antecedents]
    assert list(digits.provenance["feature_range"]) == [variable.name for variable in digits.antecedents] == names
    assert digits.provenance["knots"]["examples"] >= 4000
    fit = digits.provenance["fit"]
    assert len(fit["effective_examples"]) == 27 and 0 < sum(fit["effective_examples"]) < fit["examples"]
    assert digits.provenance["calibrated_by"]["command"] == "bash scripts/quickstart.sh"


def test_unknown_names_list_the_known_ones():
    with pytest.raises(KeyError, match="known: .*default.*published"):
        load_rule_base("fancy")
    with pytest.raises(FileNotFoundError):
        load_rule_base("fancy.yaml")
