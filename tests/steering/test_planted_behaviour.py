"""The positive control's interventions: what is added, by hand, and what is put into the results."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from toys import toy_pair, toy_store

from lib.crosscoder.model import CrossCoder
from lib.distil import trials
from lib.labels import LABELS
from lib.results import Results
from lib.runs import Run
from lib.steering import control


@pytest.fixture(scope="module")
def opened(tmp_path_factory):
    folder = tmp_path_factory.mktemp("control")
    store, pair = toy_store(folder, 3000, widths=(16, 16)), toy_pair(folder, widths=(16, 16))
    made = []
    for seed in (1, 2):
        crosscoder = CrossCoder(
            (16, 16), 12, store.models, k=3, scales=tuple(store.scales.values()), seed=seed
        )
        crosscoder.centre(list(store.means.values()))
        found = np.array([0, 3, 5] if seed == 1 else [], dtype=int)
        made.append(
            SimpleNamespace(
                run=Run("tiny", "toy", folder),
                pair=pair,
                store=store,
                number=len(made),
                fingerprint=str(seed),
                crosscoder=crosscoder.requires_grad_(False),
                unique=lambda null, found=found: found,
            )
        )
    made[0].each = tuple(made)
    return made[0]


def test_what_is_added_is_what_the_features_write_before_reflections(opened):
    store, crosscoder, found = opened.store, opened.crosscoder, [0, 3, 5]
    vectors = {}
    for place, back in (("before", 0), ("value", 1)):
        means = {True: [], False: []}
        for r in store.rows("choose"):
            if store.labels["kind"][r] != 1 or store.labels["ends"][r] != 1 or not store.kept[r - back]:
                continue
            f = crosscoder.encode([x.float() for x in store.activations([r - back])])[0, found]
            means[store.labels["next_label"][r] == LABELS.index("reflection")].append(f.double())
        difference = torch.stack(means[True]).mean(0) - torch.stack(means[False]).mean(0)
        vectors[place] = difference @ crosscoder.rows("distilled", raw=True)[found].double()
    longest = max(vectors.values(), key=lambda v: float(v.norm()))
    torch.testing.assert_close(control.trigger(opened, found), longest, rtol=1e-3, atol=1e-4)


def test_a_crosscoder_that_finds_nothing_changes_nothing(opened):
    results = Results("04", opened.run, {})
    control.record(results, opened, None, trials.puzzles(3, "test"), 6)
    for name in control.NAMES:
        metric = results.metrics[name]
        seeds = [s[0] or 0.0 for s in metric["seeds"]]
        assert metric["seeds"][1][0] == 0.0
        worst = max(seeds) if name == "control_ablation" else min(seeds)
        assert results.values[f"{name}_worst"] == worst
    assert "The planted behaviour" in control.shows(results)
