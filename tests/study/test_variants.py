"""The study's results: kept whole, read back, refused when they were made from something else."""

import json
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest

from lib.results import read_part
from lib.runs import Run
from lib.settings import UserError
from lib.study import variants as study
from lib.tools.cli import main
from lib.tools.study import open_study


@pytest.fixture
def made(tmp_path, monkeypatch):
    """A study of the embedded pair below ``tmp_path``, with one part that computes nothing but counts its
    calls.
    """
    calls = []

    def compute(s):
        calls.append(s.pair.name)
        return {"share": study.metric(0.25, (0.1, 0.4), 8)}, {
            "rows": pd.DataFrame({"word": ["null", ""], "x": [1.5, None]})
        }

    monkeypatch.setattr(study, "PARTS", {"easy": study._Kind(compute, 1)})
    monkeypatch.setattr(study.Study, "store", type("S", (), {"fingerprint": "store-1"})())
    monkeypatch.setattr(study.Study, "_opened", (None, "crosscoder-1"))
    return open_study("tiny", "default", root=tmp_path), calls, Run("tiny", "default", tmp_path)


def test_a_part_is_computed_once_and_read_back_with_its_words_and_gaps(made):
    s, calls, run = made
    assert s.make("easy") and not s.make("easy") and calls == ["tiny"]
    part = read_part(run, "easy", store="store-1", crosscoder="crosscoder-1")
    assert part and part.metrics["share"] == {"value": 0.25, "ci": [0.1, 0.4], "n": 8}
    assert part.tables["rows"].word[0] == "null" and pd.isna(part.tables["rows"].x[1])
    assert part.note.startswith("Read, not computed here") and "make study ONLY=easy" in part.note


def test_what_is_missing_is_empty_and_says_how_to_make_it(made):
    part = read_part(made[2], "easy")
    assert (
        not part
        and part.metrics == {}
        and "Not computed for this run" in part.note
        and "make study ONLY=easy" in part.note
    )


def test_results_of_other_code_weights_or_artefacts_are_refused(made, monkeypatch):
    s, _, run = made
    s.make("easy")
    assert (
        "another crosscoder than this notebook has" in read_part(run, "easy", crosscoder="crosscoder-2").note
    )
    assert not read_part(run, "easy", crosscoder="crosscoder-2")
    monkeypatch.setitem(study.PARTS, "easy", study._Kind(study.PARTS["easy"].compute, 2))
    part = read_part(run, "easy")
    assert not part and part.note.startswith("Refused")
    assert s.make("easy"), "a part made by other code is made again"


def test_the_fingerprint_knows_weights_parameters_and_budget(made, monkeypatch):
    s, _, run = made
    before = s.fingerprint("easy")
    monkeypatch.setitem(s.parameters["02_train_crosscoder"], "n_features", 7)
    assert s.fingerprint("easy") != before
    monkeypatch.undo()
    assert "study" not in json.dumps(s.parameters)


def test_nulls_read_the_text_that_the_store_was_harvested_from(made, monkeypatch, tmp_path):
    """The profile's, which need not be the pair's; and nothing where the store holds another one."""
    s, _, _ = made
    # as in results from before there was a choice
    assert not set(study.TEXTS) & set(s.parameters["01_harvest_activations"])
    before = s.fingerprint("easy")
    for name in ("traces", "general"):
        (tmp_path / f"{name}.txt").write_text("so 9 * 4 = 13 .\n")
        s.parameters["01_harvest_activations"][name] = str(tmp_path / f"{name}.txt")
    assert s.fingerprint("easy") != before
    monkeypatch.setattr(study, "harvest", lambda pair, documents, *args, **options: documents)
    mine = {name: s.parameters["01_harvest_activations"][name] for name in ("traces", "general")}
    p = s.parameters["01_harvest_activations"]
    text = study.build(
        study.override(s.pair, **mine), p["tokens"], trace_share=p["trace_share"], seed=p["seed"]
    ).fingerprint
    s.store.manifest = {"corpus": {"fingerprint": text}}
    pair, documents = s.harvested("base", "null_a")
    assert list(pair.models) == ["base", "null_a"] and {kind for _, kind in documents.pair.corpus} == {
        "trace",
        "general",
    }
    s.store.manifest = {"corpus": {"fingerprint": "another"}}
    with pytest.raises(UserError, match="harvested from another text than its profile says"):
        s.harvested("base", "null_a")


def test_an_interrupted_part_leaves_nothing_that_could_be_read(made, monkeypatch):
    s, _, run = made
    s.make("easy")

    def broken(_):
        raise KeyboardInterrupt

    monkeypatch.setitem(study.PARTS, "easy", study._Kind(broken, 3))
    with pytest.raises(KeyboardInterrupt):
        s.make("easy")
    assert not read_part(run, "easy")


@pytest.mark.parametrize(
    "names, runs",
    [
        (("null_a", "null_b"), [("null_a", 0), ("null_b", 1), ("null_b", 0), ("null_a", 1)]),
        (("null_a",), [("null_a", 0), ("null_a", 1)]),  # one null: only the crosscoder's seed is another
    ],
)
def test_who_sets_the_thresholds_of_a_null_does_not_test_them(monkeypatch, names, runs):
    trained, rng = [], np.random.default_rng(0)

    def scores(crosscoder, store, *args, **options):
        mean = {("null_a", 0): 0.5, "own": 0.9}.get(crosscoder, 0.55)
        nrn = rng.normal(mean, 0.05, 400)
        return pd.DataFrame(
            {
                "feature": range(400),
                "alive": True,
                "frequency": 0.1,
                "nrn": nrn,
                "nrn_p2": nrn,
                "nu_eps": 1 - nrn,
                "nu_r": 1 - nrn,
                "side": np.where(nrn > 0.5, "distilled", "base"),
            }
        )

    def use_table(crosscoder, store, rows, n_boot, of):
        change = rng.normal(0, 1 if of != "distilled" else 5, 400)
        return pd.DataFrame({"feature": range(400), "alive": True, "change": change})

    class Fake:
        pair, crosscoder, store, max_tokens = (
            SimpleNamespace(name="toy", others=dict.fromkeys(names)),
            "own",
            None,
            10,
        )
        budget = SimpleNamespace(boots=10)
        config = staticmethod(lambda seed=None: SimpleNamespace(seed=0 if seed is None else seed))
        harvested = staticmethod(lambda base, name: (None, name))
        work = staticmethod(lambda name: name)

    def train(store, config, folder):
        trained.append((store, config.seed))
        return store, config.seed

    monkeypatch.setattr(study, "train", train)
    monkeypatch.setattr(study.nulls, "score_table", scores)
    monkeypatch.setattr(study.use, "use_table", use_table)
    monkeypatch.setattr(study, "sample_rows", lambda *args: None)
    metrics, tables = study.compute_nulls(Fake())
    assert trained == runs
    roles = tables["rates"].drop_duplicates(["pair", "seed"]).set_index(["pair", "seed"]).role
    assert (
        roles["base, null_a", 0] == "sets the thresholds"
        and roles[f"base, {names[-1]}", 1] == "false positives"
    )
    # the other's NRN is shifted by one deviation: 9% beyond 1%
    assert 0.02 < metrics["null_false_positive_rate"]["value"] < 0.3
    of = (
        tables["rates"]
        .query("score == 'nrn' and side == 'distilled' and level == 0.01")
        .set_index(["pair", "seed"])
        .rate
    )
    assert of["base, null_a", 0] == 0.01 and of["base, distilled", 0] == 1
    assert metrics["use_reweighted_rate"]["value"] > 0.3 > metrics["use_false_positive_rate"]["value"]


def test_a_pair_without_a_null_is_told_so():
    class Fake:
        pair = SimpleNamespace(name="toy", others={})
        config = staticmethod(lambda: SimpleNamespace(seed=0))

    with pytest.raises(UserError, match="'toy' has no null_a"):
        study.compute_nulls(Fake())


def test_profiles_may_set_the_budget_and_only_with_sense():
    assert open_study("tiny", "smoke").budget.seeds >= 2
    with pytest.raises(UserError, match="seeds of the study"):
        study.Budget(seeds=1)


def test_wrong_usage_is_one_sentence(capsys):
    assert main(["study", "--only", "nuls"]) == 2
    assert "unknown part 'nuls': there are nulls" in capsys.readouterr().err
    assert main(["study", "--pair", "tinny"]) == 2
    assert "unknown pair 'tinny'" in capsys.readouterr().err
