"""Skip rates of single tasks of an evaluation, beside the rate of all others."""

from __future__ import annotations

from collections.abc import Collection

DENSE = "off"
"""The rate of the dense model, in words."""


def read_skip_rate(skip_rate: float | str | None) -> float | None:
    """Read one rate; None for "off". lmms-eval turns numbers in ``--model_args`` into numbers before they get here.

    Raises:
        ValueError: If it is neither a number nor "off".
    """
    if skip_rate is None or skip_rate == DENSE:
        return None
    try:
        return float(skip_rate)
    except ValueError:
        raise ValueError(
            f"skip_rate is {skip_rate!r}; allowed are a number in [0, 1) and '{DENSE}' for the dense model. Leave it "
            "out to use the checkpoint's own."
        ) from None


def read_task_rates(text: str | None) -> dict[str, float | None]:
    """Read ``TASK:RATE`` pairs joined by "/", such as ``pope:0.4/mme:off``; no pair for None.

    Raises:
        ValueError: If a pair cannot be read, or a task stands there twice.
    """
    rates: dict[str, float | None] = {}
    for pair in [] if text is None else str(text).split("/"):
        task, _, rate = pair.strip().rpartition(":")
        if not task or task in rates:
            raise ValueError(
                f"task_skip_rates is {text!r}, where {pair!r} is {'there twice' if task else 'no TASK:RATE'}; allowed "
                "are pairs joined by '/', one per task, such as pope:0.4/mme:0.2. Correct it."
            )
        try:
            rates[task] = read_skip_rate(rate)
        except ValueError as error:
            raise ValueError(f"task_skip_rates, {task}: {error}") from None
    return rates


def check_tasks(rates: Collection[str], tasks: Collection[str]) -> None:
    """Refuse rates of tasks that are not run.

    Raises:
        ValueError: Naming them.
    """
    unknown = sorted(set(rates) - set(tasks))
    if unknown:
        raise ValueError(
            f"task_skip_rates names {', '.join(unknown)}, but this run has the tasks {', '.join(sorted(tasks))}; name "
            "one of these (of a group, its single tasks), or leave it out."
        )
