"""What interventions on whole thoughts did (``experiments.run``): changes against untouched (``summarise``),
shares of a gap (``gap_shares``), places (``extra_placed``), and the numbers of notebook 13 (``metrics``).

All intervals are 95%, of a bootstrap over puzzles with the same resamples for all conditions, so that
differences are paired; a rate is a ratio of sums over puzzles. What has no denominator (P(reflection | error)
without errors) is NaN. In the tables the model that writes is called ``speaker``, the other one ``listener``.
"""

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd

from ..labels import CATEGORIES, REDUNDANT
from ..stats import group_weights, interval, wilson

OTHER = {"distilled": "base", "base": "distilled"}
METHODS = ("feature", "amplify", "mean difference", "logit bias", "random")  # of adding more of a category
CONTROLS = {"random": "features, random", "matched": "features, matched"}  # pooled over the categories
ONE = "one"  # a denominator: per puzzle
MEASURES = {  # name: (sum over puzzles, sum that it is divided by)
    "thinking": ("thinking", ONE),
    "opens": ("thinks", ONE),
    "answers": ("answers", ONE),
    "accuracy": ("correct", ONE),
    "chain": ("chain_correct", ONE),
    "length": ("length", ONE),
    "runaway": ("runaway", ONE),
    "steps": ("steps", ONE),
    "error_rate": ("errors", "steps"),
    "p_reflection_error": ("errors_reflected", "errors"),
    "p_reflection_correct": ("correct_steps_reflected", "correct_steps"),
    **{f"rate_{c}": (f"n_{c}", ONE) for c in (*CATEGORIES, REDUNDANT)},
    **{f"met_{c}": (f"met_{c}", f"calls_{c}") for c in CATEGORIES},
    **{f"strays_{c}": (f"strays_{c}", f"rest_{c}") for c in CATEGORIES},
}
HEAD = ["condition", "family", "kind", "target", "speaker", "mode", "strength"]
SWAPS = {  # end of a metric's name: kind and target
    "": ("swap", "all"),
    "_joint": ("joint", "all"),
    "_unique": ("swap", "unique"),
    "_random": ("random", "all"),
    "_transplant": ("transplant", "all"),
}
USES = {
    "_unique": ("gain", "unique"),
    "_shared": ("gain", "reweighted"),
    "_both": ("gain", "both"),
    "_random": ("matched", "both"),
}


def _where(table: pd.DataFrame, **wanted) -> pd.DataFrame:
    """The rows whose columns have the wanted values."""
    return table[(table[list(wanted)] == list(wanted.values())).all(axis=1)]


def _ratio(above: np.ndarray, below: np.ndarray, defined: np.ndarray) -> np.ndarray:
    return np.divide(above, below, out=np.full(len(above), np.nan), where=defined) + 0.0  # no -0


class _Resampled:
    """Every measure of every condition, in the data (entry 0) and in resamples of the puzzles, the same for
    all conditions."""

    def __init__(self, rows: pd.DataFrame, n_boot: int, seed: int):
        self.n = rows["task"].nunique()
        weights = np.concatenate([np.ones((1, self.n)), group_weights(self.n, n_boot, seed)])
        columns = sorted({name for pair in MEASURES.values() for name in pair})
        self.size, self.heads, self.sums = n_boot + 1, {}, {}
        for name, group in rows.assign(**{ONE: 1.0}).groupby("condition", sort=False):
            self.heads[name] = group.iloc[0][HEAD].to_dict()
            sums = weights @ group.sort_values("task")[columns].to_numpy(float)
            self.sums[name] = dict(zip(columns, sums.T))

    def draws(self, condition: str | None, measure: str) -> np.ndarray:
        """NaN of a condition that there is none of."""
        if condition is None:
            return np.full(self.size, np.nan)
        above, below = (self.sums[condition][name] for name in MEASURES[measure])
        return _ratio(above, below, below > 0)

    def find(self, **wanted) -> str | None:
        """The name of the first condition whose head has these values."""
        return next((name for name, head in self.heads.items() if wanted.items() <= head.items()), None)

    def change(self, condition: str | None, measure: str) -> np.ndarray:
        """Against the same writer and mode, untouched."""
        before = condition and self.untouched(self.heads[condition])
        return self.draws(condition, measure) - self.draws(before, measure)

    def gap(self, condition: str, measure: str) -> tuple[np.ndarray, np.ndarray]:
        """Both models untouched, in the mode of the condition: who writes in it, and the other one."""
        head = self.heads[condition]
        names = self.untouched(head), self.untouched(head, OTHER[head["speaker"]])
        return self.draws(names[0], measure), self.draws(names[1], measure)

    def share(self, condition: str | None, measure: str) -> np.ndarray:
        """Of the gap between the untouched models; NaN where its interval contains 0."""
        if condition is None:
            return self.draws(None, measure)
        writer, other = self.gap(condition, measure)
        gap = _bounds(other - writer, "gap")
        known = gap["gap_low"] > 0 or gap["gap_high"] < 0
        return _ratio(self.draws(condition, measure) - writer, other - writer, known & (other != writer))

    def untouched(self, head: Mapping, writer: str | None = None) -> str | None:
        """The name of the untouched condition beside this one; of another writer, if one is given."""
        return self.find(family="untouched", speaker=writer or head["speaker"], mode=head["mode"])


def _bounds(draws: np.ndarray, value: str, low: str = "", high: str = "") -> dict[str, float]:
    """Value and interval under these names; NaN where undefined in the data, or in most resamples."""
    defined, ends = draws[1:][~np.isnan(draws[1:])], (np.nan, np.nan)
    if not np.isnan(draws[0]) and len(defined) > len(draws) / 2:
        ends = interval(defined)
    return {value: float(draws[0]), low or f"{value}_low": ends[0], high or f"{value}_high": ends[1]}


def pooled(rows: pd.DataFrame, kind: str) -> pd.DataFrame:
    """The ablations of a kind, over all targets, as one more condition: each puzzle's means over them, so
    that rates are pooled ("all")."""
    chosen = _where(rows, family="ablate", kind=kind)
    numbers = [c for c in chosen.columns if c not in (*HEAD, "task", "answer")]
    keys = ["family", "kind", "speaker", "mode", "task"]
    frame = chosen.astype(dict.fromkeys(numbers, float)).groupby(keys, sort=False)[numbers].mean()
    frame = frame.reset_index()
    name = f"ablate / {kind} / pooled / " + frame["speaker"] + " / " + frame["mode"]
    return frame.assign(condition=name, target="pooled", strength=np.nan)


def summarise(rows: pd.DataFrame, n_boot: int = 1000, seed: int = 0) -> pd.DataFrame:
    """One row per condition and measure (MEASURES), with 95% intervals of a paired bootstrap over puzzles.

    Columns HEAD, measure, value, low, high, change (against the same writer and mode,
    untouched), change_low, change_high, n. ``met_c``: P(c follows | the sentence end calls for c);
    ``strays_c``: P(c follows | it does not); ``rate_c``: sentences per puzzle."""
    sample, found = _Resampled(rows, n_boot, seed), []
    for name, head in sample.heads.items():
        before = sample.untouched(head)
        for measure in MEASURES:
            after = sample.draws(name, measure)
            change = after - sample.draws(before, measure) if before else np.full(len(after), np.nan)
            bounds = _bounds(after, "value", "low", "high") | _bounds(change, "change")
            found.append({**head, "measure": measure, **bounds, "n": sample.n})
    return pd.DataFrame(found)


def changes(rows: pd.DataFrame, measures: Sequence[str], seed: int = 0) -> dict[tuple, tuple[float, tuple]]:
    """{(family, kind, measure): (change against the same writer and mode, untouched, its interval)}."""
    sample, found = _Resampled(rows, 1000, seed), {}
    for name, head in sample.heads.items():
        for measure in measures:
            value, low, high = _bounds(sample.change(name, measure), "change").values()
            found[head["family"], head["kind"], measure] = value, (low, high)
    return found


def difference(
    rows: pd.DataFrame, one: tuple[str, str], other: tuple[str, str], measure: str, seed: int = 0
) -> tuple[float, tuple[float, float]]:
    """A measure under the condition with the (family, kind) ``one``, minus that under ``other``, and its
    interval; 0 where there are none."""
    sample = _Resampled(rows, 1000, seed)
    names = [sample.find(family=family, kind=kind) for family, kind in (one, other)]
    if None in names:
        return 0.0, (0.0, 0.0)
    a, b = (sample.draws(name, measure) for name in names)
    value, low, high = _bounds(a - b, "difference").values()
    return value, (low, high)


def gap_shares(
    rows: pd.DataFrame,
    measures: Sequence[str] = ("thinking", "opens", "answers", "length", "p_reflection_error", "accuracy"),
    n_boot: int = 1000,
    seed: int = 0,
) -> pd.DataFrame:
    """Share of the gap between the untouched models that a swap or an imposed use closes: one row per
    condition and measure.

    Columns HEAD, measure, value (of the writer under the condition), speaker_value, listener_value, share,
    low, high, n. NaN where the gap's interval contains 0 or a rate has no denominator."""
    sample, found = _Resampled(rows, n_boot, seed), []
    for name, head in sample.heads.items():
        if head["family"] not in ("swap", "impose"):
            continue
        for measure in measures:
            own, other = sample.gap(name, measure)
            values = {"measure": measure, "value": sample.draws(name, measure)[0]}
            values |= {"speaker_value": own[0], "listener_value": other[0]}
            values |= _bounds(sample.share(name, measure), "share", "low", "high")
            found.append({**head, **values, "n": sample.n})
    return pd.DataFrame(found)


def by_layers(rows: pd.DataFrame, measures: Sequence[str] = ("thinking", "answers", "chain")) -> pd.DataFrame:
    """Untouched thoughts of ``experiments.transplanted``, ``kind`` being the number of layers that are the
    other model's: one row per model above, mode, number and measure (a share of the puzzles).

    Columns upper, mode, layers, measure, value, low, high (Wilson's), share (of the gap to the other model,
    that is closed), share_low, share_high (those of the value: the gap counts as known), n. The share is NaN
    where the models do not differ."""
    counts = rows.groupby(["speaker", "mode", "kind"], sort=False)[[MEASURES[m][0] for m in measures]].sum()
    n, found = rows["task"].nunique(), []
    for (upper, mode, layers), row in counts.sort_index(level="kind", sort_remaining=False).iterrows():
        for measure in measures:
            column = MEASURES[measure][0]
            own, other = (counts.loc[(model, mode, 0), column] / n for model in (upper, OTHER[upper]))
            value, ends = row[column] / n, wilson(int(row[column]), n)
            shares = [(x - own) / (other - own) + 0.0 if other != own else np.nan for x in (value, *ends)]
            head = {"upper": upper, "mode": mode, "layers": layers, "measure": measure}
            head |= dict(zip(("value", "low", "high"), (value, *ends)))
            head |= dict(zip(("share", "share_low", "share_high"), (shares[0], *sorted(shares[1:]))))
            found.append(head | {"n": n})
    return pd.DataFrame(found)


def extra_placed(rows: pd.DataFrame, n_boot: int = 1000, seed: int = 0) -> pd.DataFrame:
    """More of a category, at what places? One row per condition of "place".

    Columns HEAD, rate (sentences of the category per puzzle), met, strays (see ``summarise``), advantage =
    met - strays, each with _low and _high; extra (additional sentences per puzzle) and extra_placed: the
    share of them that stand where they belong (NaN unless there are more; it may leave 0 to 1 where sentences
    move). ``chance``: the share of sentence ends that call for it, untouched."""
    sample, found = _Resampled(rows, n_boot, seed), []
    for name, head in sample.heads.items():
        if (head["mode"], head["speaker"]) != ("think", "distilled"):
            continue
        targets = {"untouched": CATEGORIES, "place": (head["target"],)}.get(head["family"], ())
        for c in targets:
            after, plain = sample.sums[name], sample.sums[sample.untouched(head)]
            placed, elsewhere = (after[f"{key}_{c}"] - plain[f"{key}_{c}"] for key in ("met", "strays"))
            extra = placed + elsewhere
            drawn = {key: sample.draws(name, f"{key}_{c}") for key in ("rate", "met", "strays")}
            drawn |= {"extra": extra / sample.n, "extra_placed": _ratio(placed, extra, extra > 0)}
            drawn["advantage"] = drawn["met"] - drawn["strays"]
            row = {**head, "target": c}
            for key, draws in drawn.items():
                row |= _bounds(draws, key)
            calls, rest = plain[f"calls_{c}"][0], plain[f"rest_{c}"][0]
            found.append({**row, "chance": float(calls / (calls + rest))})
    return pd.DataFrame(found)


def specificity(summary: pd.DataFrame) -> pd.DataFrame:
    """Features of c removed (rows) x relative change of the rate of c' (columns), in the distilled model: -1
    is all of them gone."""
    ablated = _where(summary, family="ablate", kind="features", speaker="distilled")
    before = ablated["value"] - ablated["change"]
    relative = ablated.assign(relative=ablated["change"] / before.where(before != 0))
    table = relative.pivot_table("relative", "target", "measure", aggfunc="first")
    table = table.reindex(index=CATEGORIES, columns=[f"rate_{c}" for c in CATEGORIES])
    return table.set_axis(CATEGORIES, axis=1).rename_axis(index="removed", columns="rate of")


def metrics(rows: pd.DataFrame, n_boot: int = 1000, seed: int = 0) -> dict[str, dict]:
    """{name: {value, ci, n}} of one crosscoder; None where there is no such condition.

    ablate_accuracy_<c>, ablate_accuracy_attributed_<c>: change of accuracy without the features that predict
    c, and without those it is attributed to; with _over_random, _over_matched: minus that of the control.
    ablate_accuracy_random, _matched: the former's controls over all categories. worse_categories: in how many
    the features that predict it cost accuracy, and more than random directions, by both intervals;
    worse_categories_attributed; diagonal_categories: in how many their own sentences disappear most.
    placed_gain_<c>: met - strays with the feature added, minus that with a logit bias. swap_forward (the
    distilled model's features in the base), swap_backward, impose_<set> (the distilled model's use in the
    base), impose_back_<set>: shares of the gap in thinking rate, paired differences of them as
    <one>_over_<other>; swap_backward_answers is of ``answers``: not thinking is not yet answering."""
    every = pd.concat([rows, *(pooled(rows, kind) for kind in CONTROLS.values())], ignore_index=True)
    sample, found = _Resampled(every, n_boot, seed), {}

    def add(name: str, draws: np.ndarray) -> None:
        value, low, high = _bounds(draws, "value").values()
        ci = None if np.isnan(low) else [low, high]
        found[name] = {"value": None if np.isnan(value) else value, "ci": ci, "n": sample.n}

    def cost(kind: str, c: str) -> np.ndarray:
        return sample.change(sample.find(family="ablate", kind=kind, target=c), "accuracy")

    for kind, infix in (("features", ""), ("attributed", "attributed_")):
        for c in CATEGORIES:
            lost, name = cost(kind, c), f"ablate_accuracy_{infix}{c}"
            add(name, lost)
            for control in CONTROLS:
                add(f"{name}_over_{control}", lost - cost(f"{kind}, {control}", c))
        ends = ("", "_over_random")
        intervals = [[found[f"ablate_accuracy_{infix}{c}{e}"]["ci"] for e in ends] for c in CATEGORIES]
        worse = [all(ci is not None and ci[1] < 0 for ci in both) for both in intervals]
        found[f"worse_categories{infix and '_attributed'}"] = {"value": sum(worse), "ci": None, "n": 4}
    for control, kind in CONTROLS.items():
        add(f"ablate_accuracy_{control}", cost(kind, "pooled"))
    matrix = specificity(summarise(rows, n_boot=0)).astype(float).fillna(0)
    own = sum(matrix.loc[c, c] < matrix.loc[c].drop(c).min() for c in CATEGORIES)
    found["diagonal_categories"] = {"value": int(own), "ci": None, "n": 4}
    for c in CATEGORIES:
        names = [sample.find(family="place", kind=kind, target=c) for kind in ("feature", "logit bias")]
        advantages = [sample.draws(n, f"met_{c}") - sample.draws(n, f"strays_{c}") for n in names]
        add(f"placed_gain_{c}", advantages[0] - advantages[1])
    for prefix, writer, kinds in (
        ("swap_forward", "base", SWAPS),
        ("swap_backward", "distilled", SWAPS),
        ("impose", "base", USES),
        ("impose_back", "distilled", USES),
    ):
        shares = {}
        for end, (kind, target) in kinds.items():
            wanted = {"family": prefix.split("_")[0], "kind": kind, "target": target}
            name = sample.find(**wanted, speaker=writer, mode="free")
            shares[end] = sample.share(name, "thinking")
            add(prefix + end, shares[end])
            if prefix + end == "swap_backward":
                add("swap_backward_answers", sample.share(name, "answers"))
        if "_shared" in shares:
            for other in ("_unique", "_random"):
                add(f"{prefix}_shared_over{other}", shares["_shared"] - shares[other])
    return found
