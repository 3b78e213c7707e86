"""The inference bench compares what it says it compares, and names what misses its bar."""

from __future__ import annotations

import json
import sys

import pytest
import torch
from transformers import LlamaForCausalLM

from fuzzyroe.attach import find_decoder_layers
from fuzzyroe.cache import kept_layers
from fuzzyroe.routers import KeepAllRouter
from routed_llava import route
from scripts.bench.bench import Line, Spread, markdown, take_turns
from scripts.bench.speed import bars, checkpoint, grid, overhead
from scripts.bench.speed.decoders import SHAPES, Bench, Shape, cache_bytes, nested_plans, spread_skips

TINY = Shape("tiny", 64, 8, 4, 2, 96, 100)
EFFORT = bars.Effort(length=24, prefills=2, alone=1, blocks=2, steps=2, queue=16, slack=0.93)


@pytest.fixture(scope="module")
def bench() -> Bench:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Bench(TINY, KeepAllRouter(TINY.layers))


@pytest.mark.parametrize("num_layers", [8, 12, 16, 32, 40])
@pytest.mark.parametrize("skip_rate", [0.25, 0.5])
@pytest.mark.parametrize("count", [1, 4, 8])
def test_skips_spread_around_the_asked_mean_and_plans_are_nested(num_layers, skip_rate, count) -> None:
    skips = spread_skips(num_layers, skip_rate, count)
    assert sum(skips) == skip_rate * num_layers * count and skips == sorted(skips)
    plans = nested_plans(num_layers, skips)
    assert (~plans).sum(dim=1).tolist() == skips
    assert all((upper | ~lower).all() for upper, lower in zip(plans, plans[1:], strict=False))
    assert plans[:, 0].all(), "the first layer is the last to go"


@torch.no_grad()
def test_the_ideal_is_a_stock_model_of_the_first_layers_with_shared_weights(bench) -> None:
    short = bench.ideal(3).model
    assert type(short) is LlamaForCausalLM and len(find_decoder_layers(short)) == 5
    assert not hasattr(find_decoder_layers(short)[0], "adapter") and not hasattr(short.model, "router")
    assert find_decoder_layers(short)[4].mlp.up_proj.weight is find_decoder_layers(bench.routed)[4].mlp.up_proj.weight
    assert len(find_decoder_layers(bench.routed)) == 8, "the routed model keeps its layers"
    ids = torch.tensor([[5, 6, 7]])
    hidden = bench.routed.model.embed_tokens(ids)
    rotary = bench.routed.model.rotary_emb(hidden, torch.arange(3).unsqueeze(0))
    for layer in list(find_decoder_layers(bench.routed))[:5]:
        hidden = layer(hidden, position_embeddings=rotary)
    torch.testing.assert_close(short(ids).logits, bench.routed.lm_head(bench.routed.model.norm(hidden)))


def test_a_filled_cache_is_what_a_prefill_leaves(bench) -> None:
    form = bench.planned(nested_plans(8, spread_skips(8, 0.5)))
    real, filled = bench.prefill(form, 8, 12), bench.filled(form, 8, 12)
    assert torch.equal(kept_layers(real, 8), form.plans) and torch.equal(kept_layers(filled, 8), form.plans)
    assert cache_bytes(real) == cache_bytes(filled) == cache_bytes(bench.filled(bench.whole(), 8, 12)) // 2
    for mine, theirs in zip(filled.layers, real.layers, strict=True):
        assert type(mine) is type(theirs) and mine.get_seq_length() == theirs.get_seq_length() == 12
    bench.decode(form, filled, 8, 3)
    assert filled.get_seq_length() == 12


def test_every_bar_is_measured_and_named(bench) -> None:
    lines = list(bars.measure_bars(bench, EFFORT, (0.25, 0.5)))
    barred = [line.name for line in lines if line.has_bar]
    for rate in ("25%", "50%"):
        for what in ("prefill, batch 1", "prefill, batch 8", "decode, batch 1", "decode, batch 8, equal plans"):
            assert f"skip {rate}, {what}: ideal over routed" in barred
        assert f"skip {rate}, decode, queue of 16, batch 8, scheduled: of ideal throughput" in barred
    assert "skip 50%, KV bytes, batch 8: of dense" in barred
    assert {line.value for line in lines if "KV bytes" in line.name} == {0.5, 0.75}
    assert all(line.value > 0 for line in lines)


def test_the_published_rule_skips_only_where_all_rows_agree(bench) -> None:
    plans = nested_plans(8, spread_skips(8, 0.5))
    lines = list(bars.published_rule(bench, EFFORT, 0.5))
    assert [line.note for line in lines] == ["skips 0.50 of the layers"] * 2 + ["skips 0.12 of the layers"] * 2
    assert float((~plans.any(dim=0)).float().mean()) == pytest.approx(0.125)


def test_overheads_are_measured_for_every_policy_and_decoding_asks_nothing(bench) -> None:
    assert len(overhead.policy_overheads(bench, 24, 1)) == 8
    counts = overhead.decode_counts(bench, 24)
    assert [line.value for line in counts] == [0, 0] and all(line.is_met for line in counts)
    assert overhead.router_share(bench, 24)[0].value > 0


def test_a_table_names_what_does_not_fit_and_what_would_take_too_long(monkeypatch) -> None:
    monkeypatch.setitem(SHAPES, "tiny", TINY)
    monkeypatch.setitem(SHAPES, "huge", Shape("huge", 2**20, 100, 8, 8, 2**22, 100))
    cells = list(grid.measure_grid(("tiny", "huge"), ("float32",), (1, 4), (8,), (0.0, 0.5), "cpu", 5, 60.0))
    assert [cell["size"] for cell in cells] == ["tiny"] * 4 + ["huge"] * 4
    assert all(cell["not_run"] is None and cell["prefill_routed"].count == 5 for cell in cells[:4])
    assert all("GiB" in cell["not_run"] for cell in cells[4:])
    assert (cells[1]["kv_share"], cells[1]["achieved_skip"]) == (0.5, 0.5) and cells[1]["closed_form"] > 1.5
    assert all(
        cell["not_run"] for cell in grid.measure_grid(("tiny",), ("float32",), (1,), (8,), (0.0,), "cpu", 5, 0.0)
    )
    table = markdown([grid.to_row(cell) for cell in cells]).splitlines()
    assert len(table) == 10 and len({row.count("|") for row in table}) == 1


def test_a_checkpoint_is_measured_by_its_own_plans(tiny_llava) -> None:
    route(tiny_llava)
    generator = torch.Generator().manual_seed(0)
    prompts = []
    for length in range(3, 9):
        text = torch.randint(3, 90, (1, length), generator=generator)
        ids = torch.cat([torch.full((1, 16), tiny_llava.config.image_token_id), text], dim=1)
        pixels = torch.randn(1, 3, 32, 32, generator=generator)
        prompts.append({"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels})
    found = checkpoint.measure_prompts(tiny_llava, prompts, 0.4, 2)
    assert 0 < found[-1].value < 1 and found[0].spread.count == 2 and "of 6 prompts" in found[0].note
    assert found[0].name.startswith("prefill, batch 1, 4 layers, skip 0.") and "(target 0.4)" in found[0].name
    assert found[0].at_most == 1.0


def test_calls_take_turns(bench) -> None:
    order = []
    times = take_turns(bench.clock, 3, {name: lambda n=name: order.append(n) for name in "ab"})
    assert "".join(order) == "abbaab" and {len(values) for values in times.values()} == {3}
    assert Spread.of([3.0, 1.0, 2.0]) == Spread(2.0, 1.5, 2.5, 3)


@pytest.mark.parametrize("value", [0.5, None])
def test_a_bar_that_is_missed_or_not_measured_ends_with_its_name(load_script, monkeypatch, tmp_path, value) -> None:
    script = load_script("bench/inference.py")
    lines = [Line("slow thing", value, at_least=0.9), Line("fine", 1.0, at_least=0.9), Line("other", 3.0)]
    monkeypatch.setattr(script, "measure_lines", lambda arguments: lines)
    monkeypatch.setattr(sys, "argv", ["inference.py", "--quick", "--check", "--json", str(tmp_path / "numbers.json")])
    with pytest.raises(SystemExit, match="slow thing") as stopped:
        script.main()
    assert "fine" not in str(stopped.value)
    assert [line["met"] for line in json.loads((tmp_path / "numbers.json").read_text())["lines"]] == [False, True, None]
