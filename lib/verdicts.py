"""What several crosscoders together say of a prediction.

    predictions = {"shared": [above("nrn_median", 0.4), below("nrn_median", 0.6)]}
    judge(here, predictions)       # one row per prediction: what was observed, the verdict, how many agree

A prediction is a list of conditions, each of a metric of the notebook and a limit. A metric that was measured
with several crosscoders (``Results.pool``) meets its condition if its interval, over crosscoders *and*
documents, lies on that side of the limit, and if at least SHARE of the crosscoders do::

    yes                         every condition is met
    no                          one of them is met on the other side
    depends on the crosscoder   crosscoders contradict each other, or one of them alone would have had an
                                answer, and all together have none
    undecided                   the interval contains the limit, for each of them too
    not testable, because ...   in the notebook's words

A metric without crosscoders in it is judged by its interval alone, or by its value if it has none."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd

from .results import Results

YES, NO, UNDECIDED, DEPENDS = "yes", "no", "undecided", "depends on the crosscoder"
SHARE = 0.8  # of the crosscoders that must agree: 4 of 5


class Condition(NamedTuple):
    """``side`` 1: the metric lies above the limit; -1: below it."""

    metric: str
    side: int
    limit: float

    def verdict(self, metric: Mapping) -> tuple[str, float]:
        """(verdict, share of the crosscoders on the side of the limit where the mean is; NaN without)."""
        value, limit = metric["value"], self.limit
        if value is None:
            return UNDECIDED, np.nan
        seeds = np.array(metric.get("seeds") or [[value] * 3], dtype=float)
        alone = seeds[~np.isnan(seeds[:, 0])]
        agree = float(((alone[:, 0] > limit) == (value > limit)).mean()) if "seeds" in metric else np.nan
        low, high = metric["ci"] if metric["ci"] and None not in metric["ci"] else (value, value)
        if agree < SHARE or low <= limit <= high:
            clear = "seeds" in metric and ((alone[:, 1] > limit) | (alone[:, 2] < limit)).any()
            return (DEPENDS if clear else UNDECIDED), agree
        return (YES if (value > limit) == (self.side > 0) else NO), agree


def above(metric: str, limit: float = 0.0) -> Condition:
    return Condition(metric, 1, limit)


def below(metric: str, limit: float = 0.0) -> Condition:
    return Condition(metric, -1, limit)


def judge(
    results: Results,
    meanings: Mapping[str, str],
    predictions: Mapping[str, Sequence[Condition] | str],
    observed: Mapping[str, str] | None = None,
) -> pd.DataFrame:
    """The scoreboard, a row per prediction of ``meanings`` {name: sentence}, also put into ``results``:
    prediction, observed, held (the verdict), agree (the smallest share of crosscoders that agree with the
    means; NaN where no crosscoder is in it).

    ``predictions`` {name: conditions}, or why it cannot be tested. ``observed`` {name: text} in place of the
    metrics' names and numbers."""
    rows = []
    for name, meaning in meanings.items():
        conditions = predictions[name]
        if isinstance(conditions, str):
            rows.append((meaning, "", f"not testable, because {conditions}", np.nan))
            continue
        found = [c.verdict(results.metrics[c.metric]) for c in conditions]
        words, shares = {word for word, _ in found}, [share for _, share in found]
        held = next((word for word in (NO, DEPENDS, UNDECIDED) if word in words), YES)
        metrics = dict.fromkeys(c.metric for c in conditions)
        seen = "; ".join(f"{metric} {results.text(metric)}" for metric in metrics)
        rows.append((meaning, (observed or {}).get(name, seen), held, pd.Series(shares).min()))
    columns = ["prediction", "observed", "held", "agree"]
    return results.table("scoreboard", pd.DataFrame(rows, columns=columns))


def least_agreement(board: pd.DataFrame) -> float:
    """The smallest share of crosscoders that agree with a prediction that is said to hold; NaN if none is."""
    return float(board.loc[board["held"] == YES, "agree"].min())
