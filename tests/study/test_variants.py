"""Parts of the study: computed once, kept whole, read back, refused when made from something else."""

import json

import pandas as pd
import pytest

from lib.results import read_part
from lib.runs import Run
from lib.settings import ROOT, UserError
from lib.study import architectures, judging, nulls, texts, thoughts, variants, verdicts
from lib.study.variants import HARVEST, TRAINING, Variant, metric, open_variant

COMMITTED = Run("tiny")
PARAMETERS = open_variant(COMMITTED).parameters


@pytest.fixture
def variant(tmp_path, monkeypatch):
    """The embedded pair below ``tmp_path``, with a store and two crosscoders that are names only."""
    monkeypatch.setattr(Variant, "store", type("S", (), {"fingerprint": "store-1"})())
    monkeypatch.setattr(Variant, "_opened", [("first", "weights-1"), ("second", "weights-2")])
    return Variant(Run("tiny", "default", tmp_path), json.loads(json.dumps(PARAMETERS)))


def easy(variant, version=1, calls=None, **budget):
    """A part that computes nothing but counts its calls."""

    def compute():
        if calls is not None:
            calls.append(version)
        frame = pd.DataFrame({"word": ["null", ""], "x": [1.5, None]})
        return {"share": metric(0.25, (0.1, 0.4), 8)}, {"rows": frame}

    return variant.part("easy", version, budget, compute)


# --- the committed parts ------------------------------------------------------------------------------------

PARTS = {
    "nulls": nulls.compute_nulls,
    "seeds": nulls.compute_seeds,
    "architectures": architectures.compute_architectures,
    "planted": judging.compute_planted,
    "causal": thoughts.compute_thoughts,
    "verdicts": verdicts.compute_verdicts,
}
FIRST = Run("tiny_medium")  # the pair with which the study began: notebook 18 is about it


@pytest.mark.parametrize("part", PARTS)
def test_what_took_hours_is_read_and_needs_no_artefact(part, monkeypatch):
    """The fingerprint of every committed part comes out of the committed results of notebooks 01 to 03."""
    nothing = property(lambda self: pytest.fail("an artefact was opened"))
    for name in ("store", "_opened"):
        monkeypatch.setattr(Variant, name, nothing)
    run = FIRST if part == "verdicts" else COMMITTED
    kept = json.loads((ROOT / "figures" / run.pair / "study" / part / "manifest.json").read_text())
    monkeypatch.setattr(Run, "path", lambda self, name: ROOT / "nothing" / name)  # as in a fresh clone
    found = PARTS[part](open_variant(run))
    assert found.metrics == kept["metrics"] and sorted(found.tables) == kept["tables"]


def test_another_budget_is_another_part(monkeypatch):
    monkeypatch.setattr(Variant, "harvested", lambda *args: (_ for _ in ()).throw(RuntimeError("computed")))
    with pytest.raises(RuntimeError, match="computed"):
        nulls.compute_nulls(open_variant(COMMITTED), boots=301)
    monkeypatch.setattr(Run, "path", lambda self, name: ROOT / "nothing" / name)
    assert verdicts.compute_verdicts(open_variant(FIRST), targets=200)  # as many as always
    with pytest.raises(UserError, match="nothing/store is missing"):
        verdicts.compute_verdicts(open_variant(FIRST), targets=30)


def test_longer_training_and_other_text_are_read_and_half_a_text_is_refused():
    smol = open_variant(Run("smol"))
    assert len(texts.compute_training(smol).tables["training"]) == 6
    assert set(texts.compute_texts(smol).tables["crosscoders"].text) == {"own", "other"}
    assert not texts.compute_training(smol, tokens=1000), "of another number of tokens"
    with pytest.raises(UserError, match="both traces and general"):
        texts.compute_texts(smol, traces="t.jsonl")


# --- the mechanism ------------------------------------------------------------------------------------------


def test_a_part_is_computed_once_and_read_back_with_its_words_and_gaps(variant):
    calls = []
    for _ in range(2):
        part = easy(variant, calls=calls)
    assert calls == [1] and part.metrics["share"] == {"value": 0.25, "ci": [0.1, 0.4], "n": 8}
    assert part.tables["rows"].word[0] == "null" and pd.isna(part.tables["rows"].x[1])
    manifest = json.loads((variant.run.figures / "study" / "easy" / "manifest.json").read_text())
    assert manifest["inputs"] == {
        "store": "store-1",
        "crosscoder": "weights-1",
        "crosscoders": ["weights-1", "weights-2"],
    }


def test_a_part_of_other_code_or_another_budget_is_made_again(variant):
    calls = []
    easy(variant, calls=calls)
    easy(variant, version=2, calls=calls)
    easy(variant, version=2, calls=calls, boots=10)
    assert calls == [1, 2, 2]


@pytest.mark.parametrize(
    "others",
    [[(None, "weights-1"), (None, "weights-3")], [(None, "weights-1")]],
    ids=["another", "one fewer"],
)
def test_a_part_of_other_crosscoders_than_the_run_has_is_made_again(variant, monkeypatch, others):
    calls = []
    easy(variant, calls=calls)
    monkeypatch.setattr(Variant, "_opened", others)
    easy(variant, calls=calls)
    assert calls == [1], "the run has none: what is committed is read"
    variant.run.path("crosscoder").mkdir(parents=True)
    for _ in range(2):
        easy(variant, calls=calls)
    assert calls == [1, 1], "made again, once"
    assert read_part(variant.run, "easy", crosscoders=[weights for _, weights in others])


def test_a_run_has_crosscoders_of_seeds_that_count_on(variant):
    assert variant.crosscoder == "first" and variant.crosscoders == ["first", "second"]
    assert variant.crosscoder_fingerprint == "weights-1"
    seed = variant.parameters[TRAINING]["seed"]
    assert list(variant.seeds) == [seed, seed + 1]
    assert (
        variant.config().seed == seed and variant.config(9, k=3).seed == 9 and variant.config(9, k=3).k == 3
    )


def test_results_from_before_there_were_several_crosscoders_keep_their_fingerprint(variant):
    """The number of crosscoders is in the fingerprint only where the results of notebook 02 name it."""
    given = json.loads(json.dumps(PARAMETERS))
    n = given[TRAINING].pop("crosscoders")
    before = Variant(variant.run, given)
    assert (
        "crosscoders" not in before.parameters[TRAINING] and variant.parameters[TRAINING]["crosscoders"] == n
    )
    assert before.config() == variant.config()
    marks = [before.fingerprint("easy", 1, {}), variant.fingerprint("easy", 1, {})]
    variant.parameters[TRAINING]["crosscoders"] = n + 1
    assert len({*marks, variant.fingerprint("easy", 1, {})}) == 3
    del variant.parameters[TRAINING]["crosscoders"]
    assert variant.fingerprint("easy", 1, {}) == marks[0]


def test_the_thresholds_of_the_first_crosscoder_are_its_own(variant):
    limits = pd.DataFrame({"threshold": [0.7, 0.8], "seed": [variant.seed, variant.seed + 1]})
    variants.write_part(variant.run, "nulls", "mark", {}, {"thresholds": limits}, variant._inputs())
    assert variant.null_limits()["threshold"].tolist() == [0.7]


def test_what_is_missing_or_of_other_artefacts_is_empty_and_says_why(variant):
    part = read_part(variant.run, "nulls")
    assert not part and part.metrics == {} and "make study ONLY=10" in part.note
    easy(variant)
    refused = read_part(variant.run, "easy", crosscoder="weights-3")
    assert not refused and "another crosscoder than this notebook has" in refused.note
    with pytest.raises(UserError, match="builds on the part 'nulls', which comes first"):
        variant.needed("nulls")


def test_the_fingerprint_knows_weights_parameters_and_budget(variant, monkeypatch):
    before = variant.fingerprint("easy", 1, {})
    monkeypatch.setitem(variant.parameters[TRAINING], "n_features", 7)
    assert variant.fingerprint("easy", 1, {}) != before
    monkeypatch.undo()
    assert variant.fingerprint("easy", 1, {"boots": 1}) != before != variant.fingerprint("other", 1, {})
    monkeypatch.setattr(type(variant.pair), "fingerprint", lambda self, name: name)
    assert variant.fingerprint("easy", 1, {}) != before


def test_an_interrupted_part_leaves_nothing_that_could_be_read(variant, monkeypatch):
    easy(variant)

    def killed(folder, *args, **info):
        raise KeyboardInterrupt

    monkeypatch.setattr(variants, "write_manifest", killed)
    with pytest.raises(KeyboardInterrupt):
        easy(variant, version=2)
    assert not read_part(variant.run, "easy")


def test_a_run_without_its_notebooks_is_told_which_to_run(tmp_path):
    with pytest.raises(UserError, match="run notebook 01 first"):
        open_variant(Run("tiny", "default", tmp_path))


def test_nulls_read_the_text_that_the_store_was_harvested_from(variant, monkeypatch, tmp_path):
    """The run's, which need not be the pair's; and nothing where the store holds another one."""
    # as in results from before there was a choice
    assert not set(variants.TEXTS) & set(variant.parameters[HARVEST])
    before = variant.fingerprint("easy", 1, {})
    for name in ("traces", "general"):
        (tmp_path / f"{name}.txt").write_text("so 9 * 4 = 13 .\n")
        variant.parameters[HARVEST][name] = str(tmp_path / f"{name}.txt")
    assert variant.fingerprint("easy", 1, {}) != before
    monkeypatch.setattr(variants, "harvest_activations", lambda pair, documents, *args, **options: documents)
    p = variant.parameters[HARVEST]
    pair = variants.override(variant.pair, p["traces"], p["general"])
    text = variants.build(pair, p["tokens"], trace_share=p["trace_share"], seed=p["seed"]).fingerprint
    variant.store.manifest = {"corpus": {"fingerprint": text}}
    pair, documents = variant.harvested("base", "null_a")
    assert list(pair.models) == ["base", "null_a"]
    assert {kind for _, kind in documents.pair.corpus} == {"trace", "general"}
    variant.store.manifest = {"corpus": {"fingerprint": "another"}}
    with pytest.raises(UserError, match="harvested from another text"):
        variant.harvested("base", "null_a")
