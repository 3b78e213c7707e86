"""The report of a stage: one page that needs nothing else, from ``stage.json`` and ``metrics.jsonl``."""

from __future__ import annotations

import json
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

from llava.train.svg import bar_chart, line_chart

REPORT_FILE = "report.html"

MAX_POINTS = 400
"""Points of a line: longer runs are drawn as means over equal stretches."""

_STYLE = """
:root { color-scheme: light dark; --page: #fff; --ink: #1f2933; --quiet: #5b6773; --line: #d8dee4;
  --first: #1f6fb2; --second: #c2571a; --third: #3d8a4e; }
@media (prefers-color-scheme: dark) { :root { --page: #14181d; --ink: #e3e8ee; --quiet: #9aa7b4; --line: #39424c;
  --first: #63b0f0; --second: #f29b5c; --third: #7cc88c; } }
body { margin: 0 auto; padding: 1.25rem; max-width: 46rem; background: var(--page); color: var(--ink);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
h1 { font-size: 1.4rem; } h2 { font-size: 1.1rem; margin: 1.8rem 0 .4rem; }
p { color: var(--quiet); margin: .3rem 0; }
svg { width: 100%; height: auto; } svg text { font-size: 12px; fill: var(--ink); } .grid { stroke: var(--line); }
table { border-collapse: collapse; font-size: .92rem; font-variant-numeric: tabular-nums; }
td { padding: .2rem .8rem .2rem 0; border-bottom: 1px solid var(--line); vertical-align: top; }
td:first-child { color: var(--quiet); white-space: nowrap; }
"""

LINES = (
    ("Loss", "What is minimised, and of RoE's objective its parts.", {
        "loss": "loss", "routing/task_loss": "answers", "routing/hinge": "hinge",
    }),
    ("Skip rate", "Share of the layers that samples left out, a mean over turns and layers.", {
        "routing/skip_rate": "skipped",
    }),
    ("Keep weights", "Their mean, and their entropy in nats: 0 where every decision is hard.", {
        "routing/keep_weight_mean": "mean", "routing/keep_weight_entropy": "entropy",
    }),
    ("Gradient norm", "Before clipping.", {"grad_norm": "norm"}),
    ("Learning rate", "Of the first group of parameters.", {"learning_rate": "rate"}),
    ("Throughput", "Tokens per second over all processes.", {"throughput/tokens_per_second": "tokens/s"}),
)  # fmt: skip
"""Title, caption and lines of each chart over steps."""

BARS = (
    ("Skip rate by layer", "Mean over the run.", "routing/skip_rate/layer_"),
    ("Skip rate by source", "Mean over the logged steps that had such samples.", "routing/skip_rate/source_"),
    ("Firing of rules", "Mean firing strength over the run, in the order of the rule table.", "routing/fuzzy/rule_"),
)
"""Title, caption and prefix of each chart of means."""


def write_report(folder: Path) -> Path:
    """Write ``report.html`` beside the files it is made of.

    Args:
        folder: Output of a stage, with ``stage.json`` and, if the stage took steps, ``metrics.jsonl``.
    """
    summary = json.loads((folder / "stage.json").read_text())
    file = folder / "metrics.jsonl"
    lines = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    report = folder / REPORT_FILE
    report.write_text(render(summary, [line for line in lines if "loss" in line]))
    return report


def render(summary: dict[str, Any], steps: Sequence[dict[str, Any]]) -> str:
    """The page.

    Args:
        summary: Content of ``stage.json``.
        steps: Logged steps in order; none for a stage of forward passes only.
    """
    sections = [f"<h2>Facts</h2>{_table(_facts(summary))}"]
    for title, caption, names in LINES:
        series = {label: _thin(points) for name, label in names.items() if (points := _points(steps, name))}
        if series:
            sections.append(f"<h2>{title}</h2><p>{caption}</p>{line_chart(series)}")
    for title, caption, prefix in BARS:
        means = _means(steps, prefix)
        if means:
            sections.append(f"<h2>{title}</h2><p>{caption}</p>{bar_chart(means)}")
    calibration = summary.get("calibration") or {}
    if calibration:
        numbers = {name: value for name, value in calibration.items() if not isinstance(value, (list, dict))}
        sections.append(f"<h2>Calibration</h2>{_table(numbers)}")
    name = escape(str(summary["stage"]))
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>Stage {name}</title>'
        f'<meta name="viewport" content="width=device-width"><style>{_STYLE}</style></head><body>'
        f"<h1>Stage {name}</h1><p>{escape(str(summary.get('purpose', '')))}</p>{''.join(sections)}</body></html>\n"
    )


def _facts(summary: dict[str, Any]) -> dict[str, Any]:
    facts = {name: value for name, value in summary.items() if not isinstance(value, (dict, list))}
    facts = {name: value for name, value in facts.items() if name not in ("stage", "purpose") and value is not None}
    moved = [part for part, has_moved in (summary.get("moved") or {}).items() if has_moved]
    return {**facts, "moved": ", ".join(moved)} if moved else facts


def _table(values: dict[str, Any]) -> str:
    rows = [
        f"<tr><td>{escape(name.replace('_', ' '))}</td><td>"
        f"{escape(f'{value:.6g}' if isinstance(value, float) else str(value))}</td></tr>"
        for name, value in values.items()
    ]
    return f"<table>{''.join(rows)}</table>"


def _points(steps: Sequence[dict[str, Any]], name: str) -> list[tuple[float, float]]:
    return [(line["step"], float(line[name])) for line in steps if name in line]


def _thin(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """Means over equal stretches, at most ``MAX_POINTS`` of them; each stands at its last step."""
    stretch = -(-len(points) // MAX_POINTS)
    parts = [points[start : start + stretch] for start in range(0, len(points), stretch)]
    return [(part[-1][0], sum(value for _, value in part) / len(part)) for part in parts]


def _means(steps: Sequence[dict[str, Any]], prefix: str) -> dict[str, float]:
    names = sorted({name for line in steps for name in line if name.startswith(prefix)})
    columns = {name.removeprefix(prefix): [line[name] for line in steps if name in line] for name in names}
    return {name: sum(values) / len(values) for name, values in columns.items()}
