"""What a load's results say."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from deploy.loadtest.load import Result

PERCENTILES = (50, 90, 95, 99, 99.9)


def summarise(
    results: Sequence[Result], deadline_seconds: float, load_seconds: float | None
) -> dict[str, Any]:
    """Rates, goodput, effective accuracy, percentiles, exits and reasons.

    Rates are over the length of the load, whenever its last answer came: a single late one would
    make all of them small. They count the answers that came within it, since a server that still
    works off a backlog afterwards does so without being loaded. Shares and counts are of all
    requests, latencies of the answers: of two servers that answer unequally many, compare goodput.

    Args:
        results: of one load against one server.
        deadline_seconds: what counts as in time.
        load_seconds: length of the load; None where it has none, and so no rates.
    """
    if not results:
        return {"offered": 0}
    answered = [r for r in results if r.status == 200]
    in_time = [r for r in answered if r.seconds <= deadline_seconds]
    labelled = [r for r in results if r.right is not None]
    return {
        "offered": len(results),
        "offered_per_second": len(results) / load_seconds if load_seconds else None,
        "answered_per_second": _rate(answered, load_seconds),
        "goodput_per_second": _rate(in_time, load_seconds),
        "in_time_share": len(in_time) / len(results),
        "accuracy_of_answers": _share(r.right for r in answered if r.right is not None),
        "effective_accuracy": _share(
            bool(r.right) and r.seconds <= deadline_seconds for r in labelled
        ),
        "latency_ms": _percentiles([1e3 * r.seconds for r in answered]),
        "status": _counts(str(r.status) for r in results),
        "exits": _counts(str(r.exit) for r in answered if r.exit),
        "reasons": _counts(r.reason for r in answered if r.reason),
        "sender_lag_ms": _percentiles([1e3 * (r.sent - r.intended) for r in results]),
    }


def _rate(results: Sequence[Result], load_seconds: float | None) -> float | None:
    if not load_seconds:
        return None
    return sum(r.finished <= load_seconds for r in results) / load_seconds


def _share(values: Any) -> float | None:
    known = list(values)
    return sum(known) / len(known) if known else None


def _percentiles(values: Sequence[float]) -> dict[str, float]:
    if not values:
        return {}
    return {f"p{p:g}": float(np.percentile(values, p)) for p in PERCENTILES}


def _counts(values: Any) -> dict[str, int]:
    return dict(sorted(Counter(values).items()))
