"""Steering over several crosscoders and layers: which direction is tried, which is chosen, what it does.

    found = search(opened, "half", puzzles, ...)              # chosen on validation puzzles
    thoughts, curves = report(found, "incisive", others, 3)   # measured on test puzzles

For each layer there is a *reference* that needs no crosscoder: the direction along which the next sentence's
probability rises most (``steer.influence``). With it the place is chosen for each aim: all tokens of the
thought, or its full stops only. Then a few features of every crosscoder are tried there, and for each aim the
best condition is kept, crosscoder by crosscoder. Where the text says which thoughts are careful, so are its
direction, as a second reference, and each crosscoder's feature for it (``facts.mode_directions``)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd

from ..results import Results
from ..settings import UserError
from ..stats import group_weights, interval
from . import outcomes, steer
from .artefacts import RunArtefacts
from .facts import mode_directions
from .steer import Direction, Steering
from .tasks import PUZZLES

# aim: (which way, {label: sign with which its features are tried})
AIMS = {
    "overthink": ("longer", {"reflection": 1, "verification": 1}),
    "incisive": ("shorter", {"deduction": 1, "reflection": -1, "verification": -1}),
}
PLACES = {"thinking": "all tokens of the thought", "ends": "full stops"}
REFERENCE = -1  # in place of a crosscoder's number: the gradient's direction
RANDOM = -2
MODE = -3  # the mean difference between careful and quick thoughts
REFERENCES = {REFERENCE: "gradient", MODE: "mode"}  # as metrics name them
KEYS = ["direction", "strength"]


@dataclass(frozen=True)
class Limits:
    """Shares that steering may cost: of accuracy and right chains, by aim; and of thoughts that never end."""

    overthink: float
    incisive: float
    runaway: float

    def choose(self, table: pd.DataFrame, aim: str) -> pd.Series:
        """``outcomes.choose`` for an aim."""
        way, signs = AIMS[aim]
        runaway = self.runaway if aim == "overthink" else 1.0
        return outcomes.choose(table, way, signs, getattr(self, aim), runaway)


@dataclass(frozen=True)
class Found:
    """What a search at one layer found. ``steerings`` by place; ``place`` {aim: where it is steered};
    ``directions`` by name; ``table``: ``outcomes.compare`` of all that was tried, with columns layer, aim,
    place, crosscoder (or one of REFERENCES); ``chosen``: its row for every crosscoder and aim, with
    within_limits; ``tried``: the candidates."""

    layer: str
    opened: RunArtefacts
    steerings: dict[str, Steering]
    place: dict[str, str]
    directions: dict[str, Direction]
    table: pd.DataFrame
    chosen: pd.DataFrame
    tried: pd.DataFrame

    def choice(self, crosscoder: int, aim: str) -> pd.Series:
        rows = self.chosen
        return rows[(rows["crosscoder"] == crosscoder) & (rows["aim"] == aim)].iloc[0]

    @property
    def references(self) -> list[int]:
        """Those of REFERENCES that there are."""
        return [number for number in REFERENCES if (self.chosen["crosscoder"] == number).any()]

    def steering(self, aim: str) -> Steering:
        """The model under steering at the place of this aim."""
        return self.steerings[self.place[aim]]

    def folder(self, aim: str, split: str) -> str:
        """Where transcripts of this aim are kept (``Steering.transcripts``)."""
        return f"{self.layer}/{self.place[aim]}/{split}"

    def conditions(self, aim: str, crosscoders: Sequence[int]) -> list[tuple[Direction, float]]:
        """The chosen conditions of some crosscoders, each once."""
        rows = [self.choice(number, aim) for number in crosscoders]
        pairs = dict.fromkeys((row["direction"], float(row["strength"])) for row in rows)
        return [(self.directions[name], strength) for name, strength in pairs]

    def score(self, aim: str) -> float:
        """Mean over crosscoders of the chosen length ratio; one outside the limits counts as no effect."""
        rows = self.chosen[(self.chosen["aim"] == aim) & (self.chosen["crosscoder"] >= 0)]
        return float(rows["length_ratio"].where(rows["within_limits"].astype(bool), 1.0).mean())


def search(
    opened: RunArtefacts,
    layer: str,
    tasks: Sequence,
    strengths: Sequence[float],
    candidates: int,
    limits: Limits,
    max_new_tokens: int = 250,
    temperature: float = 1.0,
    seed: int = 0,
) -> Found:
    """The search at the layer that ``opened`` reads, on ``tasks`` for choosing. Each label is tried with the
    signs that an aim has for it, at all ``strengths``."""
    norm, medium = opened.store.mean_norms["distilled"], opened.medium
    slopes = steer.influence(opened, medium.behaviours, seed=seed)
    gradient = [Direction(f"{c}, gradient", c, g * (norm / g.norm())) for c, g in slopes.items()]
    places = tuple(PLACES) if medium is PUZZLES else ("thinking",)
    steerings = {place: opened.steering(max_new_tokens, temperature, seed, place) for place in places}
    found = Found(layer, opened, steerings, {}, {d.name: d for d in gradient}, *[pd.DataFrame()] * 3)
    owners, tried = dict.fromkeys(found.directions, REFERENCE), []
    for one in opened.each:
        frame = steer.candidates(one.table, one.crosscoder, slopes, norm, candidates)
        tried.append(frame.assign(crosscoder=one.number))
        for label, feature in zip(frame["label"], frame["feature"]):
            direction = direction_of(one, int(feature), label, norm)
            found.directions[direction.name], owners[direction.name] = direction, one.number
    mode, of_features = mode_directions(opened, norm) if medium is PUZZLES else ([], [])
    for number, direction in [*((MODE, d) for d in mode), *of_features]:
        found.directions[direction.name], owners[direction.name] = direction, number
    own, tables, chosen = [d for d in found.directions.values() if owners[d.name] != REFERENCE], [], []
    for aim, (way, _) in AIMS.items():
        sign, best = 1 if way == "longer" else -1, None
        for place in places:
            found.place[aim] = place
            table = _tried(found, aim, tasks, signed(gradient, strengths, aim), seed)
            row = limits.choose(table, aim)
            merit = sign * row["length_ratio"] if row["within_limits"] else sign
            if best is None or merit > best[0]:
                best = merit, place, table
        found.place[aim] = best[1]
        table = pd.concat([best[2], _tried(found, aim, tasks, signed(own, strengths, aim), seed)])
        table["crosscoder"] = table["direction"].map(owners)
        for _, group in table.groupby("crosscoder"):
            chosen.append(limits.choose(group, aim).to_frame().T.infer_objects())
        tables.append(table)
    return replace(
        found,
        table=pd.concat(tables, ignore_index=True),
        chosen=pd.concat(chosen, ignore_index=True),
        tried=pd.concat(tried, ignore_index=True),
    )


def direction_of(one: RunArtefacts, feature: int, label: str, norm: float) -> Direction:
    """``steer.feature_direction``, named after its crosscoder too, but for the first."""
    direction = steer.feature_direction(one.crosscoder, feature, norm, label)
    return replace(direction, name=f"{direction.name} of {one.number}") if one.number else direction


def signed(
    directions: Sequence[Direction], strengths: Sequence[float], aim: str
) -> list[tuple[Direction, float]]:
    """Conditions: the directions whose label the aim tries, with its sign, at all strengths."""
    signs = AIMS[aim][1]
    return [(d, signs[d.label] * abs(s)) for d in directions if d.label in signs for s in strengths]


def _tried(found: Found, aim: str, tasks: Sequence, conditions: Sequence, seed: int) -> pd.DataFrame:
    rows = found.steering(aim).run(found.folder(aim, "choose"), tasks, conditions)
    table = outcomes.compare(rows, seed=seed).assign(layer=found.layer, aim=aim, place=found.place[aim])
    return table[table["direction"] != outcomes.NO_STEERING]


def report(
    found: Found, aim: str, tasks: Sequence, random_directions: int, seed: int = 0
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """(thoughts, curves): the conditions chosen for an aim, of all crosscoders and of the reference, on
    ``tasks`` for reporting, with random directions at the chosen strengths; and ``outcomes.compare`` of them,
    with columns layer, aim, place and crosscoder (REFERENCES, RANDOM). First row: unsteered."""
    store, numbers = found.opened.store, (*found.references, *(one.number for one in found.opened.each))
    width, norm = store.widths["distilled"], store.mean_norms["distilled"]
    controls = steer.random_directions(random_directions, width, norm, seed)
    conditions = found.conditions(aim, numbers)
    owners = {d.name: RANDOM for d in controls}
    owners |= {found.choice(number, aim)["direction"]: number for number in numbers}
    conditions += [(d, s) for d in controls for s in sorted({abs(s) for _, s in conditions})]
    thoughts = found.steering(aim).run(found.folder(aim, "report"), tasks, conditions)
    curves = outcomes.compare(thoughts, seed=seed).assign(layer=found.layer, aim=aim, place=found.place[aim])
    curves["crosscoder"] = curves["direction"].map(owners)
    return thoughts, curves


def gallery(
    found: Found, aim: str, tasks: Sequence, thoughts: pd.DataFrame, seed: int = 0
) -> dict[int, dict[str, list[str]]]:
    """{task: {condition: transcript}}: unsteered, with the first crosscoder's choice for an aim, and with a
    random direction as long. Of ``tasks`` those whose thoughts the choice shortened most, changed by the
    median, and lengthened most: nobody picked them. ``thoughts``: of ``report``."""
    ((direction, strength),) = found.conditions(aim, [0])
    lengths = thoughts.set_index([*KEYS, "task"])["length"].sort_index()
    change = lengths.loc[direction.name, strength] - lengths.loc[outcomes.NO_STEERING, 0.0]
    order = change.sort_values(kind="stable").index
    (noise,) = steer.random_directions(1, len(direction.vector), float(direction.vector.norm()), seed)
    conditions = {
        "unsteered": (None, 0.0),
        f"{direction.name}, strength {strength:g}": (direction, strength),
        f"{noise.name}, strength {abs(strength):g}": (noise, abs(strength)),
    }
    steering, folder = found.steering(aim), found.folder(aim, "report")
    written = {name: steering.transcripts(folder, tasks, *pair) for name, pair in conditions.items()}
    chosen = dict.fromkeys(order[[0, len(order) // 2, -1]])
    return {int(task): {name: texts[task] for name, texts in written.items()} for task in chosen}


def best_layer(found: Mapping[str, Found], aim: str) -> str:
    """The layer at which an aim was reached best on the puzzles for choosing, by ``Found.score``."""
    sign = 1 if AIMS[aim][0] == "longer" else -1
    return max(found, key=lambda layer: sign * found[layer].score(aim))


def length_difference(
    thoughts: pd.DataFrame, a: Mapping, b: Mapping, n_boot: int = 1000, seed: int = 0
) -> tuple[float, float, float]:
    """Length ratio under the condition a minus that under b, on the same tasks: (value, low, high), paired
    bootstrap over tasks."""
    lengths = thoughts.set_index([*KEYS, "task"])["length"].sort_index()
    unsteered = lengths.loc[outcomes.NO_STEERING, 0.0].sort_index().to_numpy()
    one, other = (lengths.loc[c["direction"], c["strength"]].sort_index().to_numpy() for c in (a, b))
    weights = np.concatenate([np.ones((1, len(one))), group_weights(len(one), n_boot, seed)])
    draws = weights @ (one - other) / (weights @ unsteered)
    return (float(draws[0]), *interval(draws[1:]))


def specificity(found: Found, tasks: Sequence, strength: float, seed: int = 0) -> list[pd.DataFrame]:
    """For each crosscoder: rates of sentences with the feature of each category added, over the unsteered
    ones; rows are categories, columns those that occur."""
    norm, rows = found.opened.store.mean_norms["distilled"], []
    for one in found.opened.each:
        rows += [(one.number, direction_of(one, f, c, norm)) for c, f in one.chosen.items()]
    if not rows:
        raise UserError("no category has a feature of its own: run notebook 03 first")
    conditions = [(d, strength) for _, d in rows]
    thoughts = found.steerings["thinking"].run(f"{found.layer}/thinking/specific", tasks, conditions)
    curves = outcomes.compare(thoughts, n_boot=2, seed=seed)
    unsteered, by_name, grids = curves.iloc[0], curves.set_index("direction"), []
    rates = {c: unsteered[f"rate_{c}"] for c in outcomes.RATES if unsteered[f"rate_{c}"] > 0}
    for one in found.opened.each:
        own = {d.label: by_name.loc[d.name] for number, d in rows if number == one.number}
        grid = pd.DataFrame({c: row[[f"rate_{x}" for x in rates]].to_numpy() for c, row in own.items()})
        grid = grid.set_axis(list(rates)).T.astype(float) / list(rates.values())
        grids.append(grid.rename_axis("feature"))
    return grids


def record(
    results: Results, found: Found, thoughts: pd.DataFrame, curves: pd.DataFrame, crosscoder: int, aim: str,
    suffix: str = "", seed: int = 0,
) -> None:  # fmt: skip
    """Put into ``results`` what the chosen condition of one crosscoder does: <aim>_<value> for STEERED;
    random_<value> (random_incisive_<value>), the mean over random directions of the same strength, from the
    lowest lower end to the highest upper end; <aim>_rivals, how many of these do as well; and
    <aim>_over_gradient, its length ratio minus that of the reference. Names end with ``suffix``."""
    condition = found.choice(crosscoder, aim)
    row, prefix = outcomes.at(curves, condition), "random" if aim == "overthink" else "random_incisive"
    for value in outcomes.STEERED:
        results.add(f"{aim}_{value}{suffix}", *outcomes.estimate(row, value), row["n"])
    noise = curves[(curves["crosscoder"] == RANDOM) & (curves["strength"] == abs(condition["strength"]))]
    for value in outcomes.STEERED[:2]:
        ends = noise[f"{value}_low"].min(), noise[f"{value}_high"].max()
        results.add(f"{prefix}_{value}{suffix}", noise[value].mean(), ends, row["n"] * len(noise))
    results.add(f"{aim}_rivals{suffix}", outcomes.rivals(curves, row, AIMS[aim][0]), n=len(noise))
    value, *ends = length_difference(thoughts, condition, found.choice(REFERENCE, aim), seed=seed)
    results.add(f"{aim}_over_gradient{suffix}", value, ends, row["n"])


def record_references(results: Results, found: Found, curves: pd.DataFrame, aim: str, suffix: str) -> None:
    """gradient_<aim>_<value>, mode_<aim>_<value>: what the references' chosen directions do."""
    for number in found.references:
        row = outcomes.at(curves, found.choice(number, aim))
        for value in outcomes.STEERED[:2]:
            name = f"{REFERENCES[number]}_{aim}_{value}{suffix}"
            results.add(name, *outcomes.estimate(row, value), row["n"])
