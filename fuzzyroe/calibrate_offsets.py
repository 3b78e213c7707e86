"""A table of budgets for linear routers: which number, added to the logits of skipping, gives which mean skip rate."""

from __future__ import annotations

from collections.abc import Callable

LOWEST_RATE = 0.01
"""A rate at or below this counts as the lower end of a table."""

MAX_DOUBLINGS = 12


def search_offsets(
    rate_at: Callable[[float], float], max_rate: float, num_measured: int = 14
) -> list[tuple[float, float]]:
    """Measure mean skip rates at numbers chosen so that the rates lie close to each other up to a largest one.

    From 0 the search doubles its steps until it has passed both ends, then halves the widest gap between two rates.
    Later layers see what earlier ones left out, so a larger number may skip less by chance; such points are left out.

    Args:
        rate_at: Mean skip rate in [0, 1] that is observed with a number; measures it.
        max_rate: Rate that the table reaches at least, in (0, 1).
        num_measured: Numbers that are tried; a search that has not passed both ends by then goes on until it has.

    Returns:
        Pairs of rate and number, both increasing; what ``LinearRouter.set_budgets`` takes.

    Raises:
        ValueError: If ``max_rate`` lies outside (0, 1), or no number reaches it.
    """
    if not 0 < max_rate < 1:
        raise ValueError(f"max_rate is {max_rate}; a rate in (0, 1) is allowed, 0.5 is usual.")
    found = {0.0: rate_at(0.0)}
    for sign, has_passed in ((1.0, lambda rate: rate >= max_rate), (-1.0, lambda rate: rate <= LOWEST_RATE)):
        offset = 0.0
        for doubling in range(MAX_DOUBLINGS):
            if has_passed(found[offset]):
                break
            offset = sign * 0.25 * 2**doubling
            found[offset] = rate_at(offset)
    while len(found) < num_measured:
        offsets = sorted(offset for offset in found)
        gaps = [
            (min(found[above], max_rate) - min(found[below], max_rate), (below + above) / 2)
            for below, above in zip(offsets[:-1], offsets[1:], strict=True)
        ]
        if not gaps or max(gaps)[0] <= 0:
            break
        middle = max(gaps)[1]
        found[middle] = rate_at(middle)
    table: list[tuple[float, float]] = []
    for offset in sorted(found):
        if not table or found[offset] > table[-1][0]:
            table.append((found[offset], offset))
    if table[-1][0] < max_rate:
        raise ValueError(
            f"Added to the logits of skipping, {table[-1][1]} skips {table[-1][0]:.3f} of the layers, {max_rate} is "
            "wanted; ask for a smaller largest rate."
        )
    return table
