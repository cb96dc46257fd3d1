"""What the generated text knows of a thought and no word tells (``features.detectors.holds``): which steps
are wrong, and whether the thought is a careful one. Its features and directions, and thoughts without
them."""

from dataclasses import replace

import numpy as np
import torch

from ..activations.positions import PLACES as BOUNDARIES
from ..crosscoder.codes import codes, sample_rows
from ..features.auroc import auroc
from ..features.detectors import Places, holds
from ..results import Results
from . import effects, experiments
from .artefacts import RunArtefacts
from .control import thoughts
from .experiments import Condition
from .generate import Treatment
from .interventions import RandomLike, Scale
from .steer import Direction, feature_direction

PLACES = tuple(place for place, (boundary, *_) in BOUNDARIES.items() if boundary == "ends")
# a feature of errors: its AUROC at the better place, and at most so many of a crosscoder. Fixed beforehand.
OVER, MOST = 0.7, 5
WITHOUT = "errors"  # family of conditions
MEASURES = {"p_reflection_error": "p_reflect_given_error", "p_reflection_correct": "p_reflect_given_correct"}


def aurocs(one: RunArtefacts, fact: str) -> np.ndarray:
    """AUROC of each feature for a fact of steps, on "choose", at each of PLACES: [places, F]; NaN where the
    text does not tell it."""
    coded = codes(one.crosscoder, one.store, "choose")
    at = [Places(one.store, coded, place, "deduction") for place in PLACES]
    return np.stack([auroc(places.codes, holds(one.store, places, fact)) for places in at])


def error_features(one: RunArtefacts) -> tuple[int, ...]:
    """Features that fire at wrong steps, best first (OVER, MOST)."""
    best = aurocs(one, "error").max(0)
    order = np.argsort(-best, kind="stable")[:MOST]
    return tuple(int(f) for f in order if best[f] > OVER)


def mode_directions(opened: RunArtefacts, norm: float) -> tuple[list[Direction], list[tuple[int, Direction]]]:
    """Towards careful thoughts, brought to ``norm``: the mean difference of activations of the distilled
    model at the ends of sentences; and ([crosscoder, direction]) each crosscoder's feature that tells the
    mode best, turned round if it fires in quick thoughts. Nothing where no thought is careful."""
    store = opened.store
    if not (store.labels["mode"] == 1).any():
        return [], []
    rows = sample_rows(store, "choose", None, 0)
    rows = rows[(store.labels["ends"][rows] == 1) & (store.labels["kind"][rows] == 1)]
    acts = store.activations(rows)[store.models.index("distilled")].double()
    careful = torch.from_numpy(store.labels["mode"][rows] == 1)
    vector = (acts[careful].mean(0) - acts[~careful].mean(0)).float()
    own = []
    for one in opened.each:
        apart = aurocs(one, "mode") - 0.5
        place, feature = np.unravel_index(np.nanargmax(np.abs(apart)), apart.shape)
        direction = feature_direction(one.crosscoder, int(feature), norm, "verification")
        turned = direction.vector * float(np.sign(apart[place, feature]))
        own.append((one.number, replace(direction, name=f"mode {feature} of {one.number}", vector=turned)))
    return [Direction("mode, mean difference", "verification", vector * (norm / vector.norm()))], own


def record_errors(
    results: Results, opened: RunArtefacts, tasks, max_new_tokens: int = 250, seed: int = 0
) -> str:
    """Thoughts of the distilled model without the features of errors, with each crosscoder; pooled.

    Metrics: n_error_features; p_reflect_given_error and ..._correct, with the endings _ablated and _random
    (directions of the same norm); ablate_error_ and random_error_, with reflection_change (of P(reflection |
    error), against untouched) and accuracy_change; ablate_error_over_random (of P(reflection | error), minus
    that with random directions). Returns why nothing was measured, "" if it was."""
    if not (opened.store.labels["error"] == 1).any():
        return "the text does not say which steps are wrong"
    models = {name: opened.pair.load(name) for name in opened.crosscoder.names}
    for own, one in results.over(opened.each):
        found = error_features(one)
        own.add("n_error_features", len(found))
        conditions = [experiments.untouched("distilled")]
        if found:
            removed = Scale(found)
            conditions += [
                Condition(WITHOUT, kind, "error", Treatment("distilled", what, "thinking"))
                for kind, what in (("features", removed), ("random", RandomLike(removed, seed)))
            ]
        written = thoughts(one, models, tasks, conditions, "errors", max_new_tokens, seed)
        table = effects.summarise(written, seed=seed)
        rows = {(row.kind, row.measure): row for row in table.itertuples()}
        for measure, name in MEASURES.items():
            for kind, ending in (("features", "_ablated"), ("random", "_random")):
                row = rows.get((kind, measure), rows["untouched", measure])
                own.add(f"{name}{ending}", row.value, (row.low, row.high), row.n)
        for kind, name in (("features", "ablate"), ("random", "random")):
            for measure, ending in (("p_reflection_error", "reflection"), ("accuracy", "accuracy")):
                row = rows.get((kind, measure))  # without features of errors nothing changes
                change = (row.change, (row.change_low, row.change_high)) if row else (0.0, None)
                own.add(f"{name}_error_{ending}_change", *change, len(tasks))
        over = effects.difference(
            written, (WITHOUT, "features"), (WITHOUT, "random"), "p_reflection_error", seed
        )
        own.add("ablate_error_over_random", *over, len(tasks))
    return ""


def shows(results: Results) -> str:
    """In words."""
    text = results.text
    return (
        f"**Thoughts without the features of errors** ({text('n_error_features', 1)} of each crosscoder,"
        " chosen by AUROC on other text): the probability of a reflection after an error is"
        f" {text('p_reflect_given_error_ablated')} (a change of {text('ablate_error_reflection_change')};"
        f" with random directions of the same norm {text('random_error_reflection_change')}), accuracy"
        f" changes by {text('ablate_error_accuracy_change')} (random {text('random_error_accuracy_change')})."
    )
