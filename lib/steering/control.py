"""The positive control: is a planted behaviour lost without the features that were found, and there when they
are added? For pairs with ``planted`` (``lib.features.control``), whose distilled model reflects after errors
because of what it writes there."""

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
import torch

from ..activations.positions import positions
from ..crosscoder.codes import codes
from ..labels import LABELS
from ..results import Part, Results
from ..runs import fingerprint
from . import effects, experiments
from .artefacts import RunArtefacts
from .experiments import Condition
from .generate import Treatment
from .interventions import AddVector, RandomLike, Scale

PLANTED = "reflection"
PLACES = ("before", "value")  # of a sentence that has ended: its full stop, and the token before
NAMES = {  # metric: (what is done, the measure that should change, in which direction)
    "control_ablation": ("removed", "p_reflection_error", -1),
    "control_imposition": ("added", "p_reflection_correct", 1),
}


def trigger(one: RunArtefacts, found: Sequence[int]) -> torch.Tensor:
    """What the features ``found`` write before a reflection more than at other sentence ends, on the split
    "choose": [d], raw; at the place where that is longest."""
    chosen, vectors = codes(one.crosscoder, one.store, "choose"), []
    rows = one.crosscoder.rows("distilled", raw=True)[list(found)].double()
    for place in PLACES:
        index, following = positions(one.store, chosen.rows, place)
        f, before = chosen.codes[index][:, list(found)], following == LABELS.index(PLANTED)
        difference = np.asarray(f[before].mean(0) - f[~before].mean(0)).ravel()
        vectors.append(torch.from_numpy(difference).double() @ rows)
    return max(vectors, key=lambda v: float(v.norm()))


def thoughts(
    one: RunArtefacts, models: Mapping, tasks: Sequence, conditions: Sequence[Condition], name: str,
    max_new_tokens: int, seed: int,
) -> pd.DataFrame:  # fmt: skip
    """``experiments.run`` with one crosscoder; transcripts are kept in the run's folder under ``name``."""
    folder = one.run.path("steering") / f"{name}_{one.number}"
    key = fingerprint(*(one.pair.fingerprint(model) for model in models), one.fingerprint)
    with_these = (one.pair, models, one.crosscoder, one.store, tasks, conditions, folder, key)
    return experiments.run(*with_these, max_new_tokens, seed)


def record(
    results: Results,
    opened: RunArtefacts,
    null: Part,
    tasks: Sequence,
    max_new_tokens: int = 250,
    seed: int = 0,
) -> None:
    """Thoughts of the distilled model without the features that were found (recurrent, beyond the null), and
    with what they write before reflections added at every full stop; with each crosscoder.

    Metrics: control_ablation, the change of P(reflection | error); control_imposition, that of P(reflection |
    right step); control_<...>_random, the same of random directions of equal norm; ..._worst, of the
    crosscoder in which it is least (0 if it found nothing)."""
    models = {name: opened.pair.load(name) for name in opened.crosscoder.names}
    for own, one in results.over(opened.each):
        found = tuple(one.unique(null).tolist())
        if not found:
            for name in NAMES:
                own.add(name, 0.0, n=len(tasks))
            continue
        vector, removed = trigger(one, found), Scale(found)
        noise = torch.randn(len(vector), generator=torch.Generator().manual_seed(seed))
        what = {("removed", "features"): removed, ("removed", "random"): RandomLike(removed, seed)}
        for kind, added in (("features", vector), ("random", noise)):
            what["added", kind] = AddVector(tuple(added.tolist()), float(vector.norm()))
        conditions, place = [experiments.untouched("distilled")], {"removed": "thinking", "added": "ends"}
        for (done, kind), x in what.items():
            conditions.append(Condition(done, kind, PLANTED, Treatment("distilled", x, place[done])))
        rows = thoughts(one, models, tasks, conditions, "control", max_new_tokens, seed)
        changes = effects.changes(rows, [measure for _, measure, _ in NAMES.values()], seed=seed)
        for name, (done, measure, _) in NAMES.items():
            for kind, end in (("features", ""), ("random", "_random")):
                own.add(name + end, *changes[done, kind, measure], n=len(tasks))
    for name, (*_, direction) in NAMES.items():
        results.worst(name, direction)


def shows(results: Results) -> str:
    """In words."""
    text, value = results.text, results.values
    return (
        "**The planted behaviour.** Without the features that were found the probability of a reflection"
        f" after an error changes by {text('control_ablation')} (least {value['control_ablation_worst']:.2f};"
        f" random directions {text('control_ablation_random')}); with what they write added at every full"
        f" stop, that after a right step by {text('control_imposition')} (least"
        f" {value['control_imposition_worst']:.2f}; random {text('control_imposition_random')})."
    )
