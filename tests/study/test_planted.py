"""Planted data hold what was planted; methods and judgement against values by hand; a study that resumes."""

from dataclasses import asdict, replace

import numpy as np
import pandas as pd
import pytest
import torch

from lib.crosscoder.model import CrossCoder
from lib.crosscoder.training import TrainConfig
from lib.settings import UserError
from lib.study import judging
from lib.study.judging import (
    METHODS,
    OURS,
    SETTINGS,
    Cell,
    Setting,
    called,
    cells,
    evaluate,
    judge,
    null_thresholds,
    plot,
    precision_recall,
    recommend,
    recurrence,
    scores,
    summary,
)
from lib.study.planted import (
    KINDS,
    QUANTILES,
    Planted,
    PlantedStore,
    Regime,
    frequencies,
    from_regime,
    regime,
)

SMALL = Planted(
    width=16,
    shared=12,
    rotated=6,
    rescaled=4,
    base_only=4,
    distilled_only=4,
    l0=2.5,
    exponent=0.5,
    tokens=6000,
    document=30,
    correlation=0.0,
    noise=0.01,
)


def rows_of(store: PlantedStore, kind: str) -> tuple[np.ndarray, np.ndarray]:
    chosen = store.kinds == KINDS.index(kind)
    return store.directions["base"][chosen], store.directions["distilled"][chosen]


def oracle(store: PlantedStore, shrink: dict[int, float] | None = None) -> CrossCoder:
    """A crosscoder with the planted rows as its dictionary (``shrink`` {feature: factor of its base row}),
    encoder from least squares.
    """
    crosscoder = CrossCoder(
        [16, 16], store.planted.features, store.models, "l1", scales=list(store.scales.values())
    )
    rows = {
        name: torch.as_tensor(store.directions[name] * store.scales[name], dtype=torch.float32)
        for name in store.models
    }
    for feature, factor in (shrink or {}).items():
        rows["base"][feature] *= factor
    joined = torch.cat([rows[name] for name in store.models], dim=1)
    with torch.no_grad():
        crosscoder.W_dec.copy_(joined)
        x = crosscoder.scaled(store.activations(np.arange(len(store))))
        codes = torch.from_numpy(store.codes.toarray())
        design = torch.cat([x, torch.ones(len(x), 1)], dim=1)
        fit = torch.linalg.lstsq(design, codes).solution
        crosscoder.W_enc.copy_(fit[:-1].T)
        crosscoder.b_enc.copy_(fit[-1] - 0.05)
        crosscoder.b_dec.copy_((x - codes @ joined).mean(0))
    return crosscoder.requires_grad_(False)


# --- generator ----------------------------------------------------------------------------------------------


def test_each_kind_has_the_rows_that_its_name_says():
    store = PlantedStore(replace(SMALL, angle=50.0, factor=4.0))
    base, distilled = rows_of(store, "shared")
    assert np.allclose(base, distilled) and np.allclose(np.linalg.norm(base, axis=1), 1)
    base, distilled = rows_of(store, "rotated")
    assert np.allclose((base * distilled).sum(1), np.cos(np.radians(50))) and np.allclose(
        np.linalg.norm(distilled, axis=1), 1
    )
    base, distilled = rows_of(store, "rescaled")
    ratios = np.linalg.norm(distilled, axis=1) / np.linalg.norm(base, axis=1)
    assert np.allclose(sorted(ratios), [0.25, 0.25, 4, 4])
    assert np.allclose(
        (base * distilled).sum(1), np.linalg.norm(base, axis=1) * np.linalg.norm(distilled, axis=1)
    )
    assert not rows_of(store, "base_only")[1].any() and not rows_of(store, "distilled_only")[0].any()
    assert np.bincount(store.kinds).tolist() == [12, 6, 4, 4, 4]


def test_activations_have_the_statistics_that_were_asked_for():
    asked = replace(SMALL, tokens=30_000, noise=0.1, mean_share=(0.3, 0.0), norm_ratio=3.0, cv=0.4, l0=3.0)
    store = PlantedStore(asked)
    assert np.diff(store.codes.indptr).mean() == pytest.approx(3.0, rel=0.03)
    base, distilled = (a.double().numpy() for a in store.activations(np.arange(len(store))))
    for x, name, share in ((base, "base", 0.3), (distilled, "distilled", 0.0)):
        assert np.square(x.mean(0)).sum() / np.square(x).sum(1).mean() == pytest.approx(share, abs=0.01)
        explained = (store.codes @ store.directions[name]).var(0).sum() / x.var(0).sum()
        assert explained == pytest.approx(0.9, abs=0.01)
    raw = [np.linalg.norm(store.directions[m], axis=1)[0] for m in store.models]
    assert raw[1] / raw[0] == pytest.approx(3.0)
    # scaling: mean norm sqrt(d), on the training tokens
    for name, x in (("base", base), ("distilled", distilled)):
        assert np.linalg.norm(x[store.rows("train")], axis=1).mean() * store.scales[name] == pytest.approx(
            4.0, rel=1e-4
        )
    first = store.codes[:, int(store.frequencies.argmax())]
    assert first.data.std() / first.data.mean() == pytest.approx(0.4, abs=0.03)


def test_frequencies_follow_the_power_law_and_are_cut():
    found = frequencies(replace(SMALL, l0=0.9, exponent=1.0))
    assert found.sum() == pytest.approx(0.9) and np.allclose(found * np.arange(1, 31), found[0])
    cut = frequencies(replace(SMALL, l0=6.0, exponent=2.0))
    assert cut.sum() == pytest.approx(6.0) and cut[0] == 0.6 and (np.diff(cut) <= 1e-12).all()


def test_features_of_a_group_fire_together_and_others_do_not():
    store = PlantedStore(replace(SMALL, correlation=0.9, group=3, tokens=20_000, exponent=0.0))
    phi = np.corrcoef((store.codes > 0).toarray().T.astype(float))
    together = (phi > 0.4).sum(1)
    assert (together == 3).all()  # itself and two others
    assert abs(phi[phi < 0.4].mean()) < 0.02
    independent = np.corrcoef((PlantedStore(SMALL).codes > 0).toarray().T.astype(float))
    assert np.abs(independent - np.eye(30)).max() < 0.1


def test_dead_directions_carry_noise_alone_and_a_null_has_no_unique_feature():
    x = PlantedStore(replace(SMALL, dead_directions=0.5)).activations(np.arange(6000))[0].double().numpy()
    spectrum = np.linalg.eigvalsh(np.cov(x.T))
    assert spectrum[:8].max() < 0.01 * spectrum[8:].mean() * 3 < spectrum[8:].min()
    null = SMALL.null()
    assert (
        null.features == SMALL.features and null.base_only == null.distilled_only == 0 and null.shared == 20
    )


def test_documents_splits_and_batches():
    store = PlantedStore(SMALL)
    rows = [store.rows(split) for split in ("train", "choose", "report")]
    assert np.array_equal(np.sort(np.concatenate(rows)), np.arange(6000)) and [len(r) for r in rows] == [
        4800,
        600,
        600,
    ]
    assert all(not set(store.documents[a]) & set(store.documents[b]) for a, b in zip(rows, rows[1:]))
    batches = list(store.reader("train", 700, seed=1))
    assert np.array_equal(np.sort(np.concatenate([r for r, _ in batches])), rows[0])
    resumed = list(store.reader("train", 700, seed=1, start=5))
    assert np.array_equal(resumed[0][0], batches[5][0]) and torch.equal(resumed[0][1][1], batches[5][1][1])
    again = PlantedStore(SMALL)
    assert (
        torch.equal(again.activations([3])[0], store.activations([3])[0])
        and again.fingerprint == store.fingerprint
    )
    assert not torch.equal(
        PlantedStore(replace(SMALL, seed=1)).activations([3])[0], store.activations([3])[0]
    )


@pytest.mark.parametrize(
    "change, word",
    [
        ({"angle": 200.0}, "angle"),
        ({"l0": 99.0}, "l0"),
        ({"noise": 1.5}, "noise"),
        ({"shared": -1}, "shared"),
    ],
)
def test_impossible_parameters_are_named(change, word):
    with pytest.raises(UserError, match=word):
        replace(SMALL, **change)


# --- regime -------------------------------------------------------------------------------------------------


def test_the_regime_of_planted_data_is_what_was_planted():
    asked = replace(
        SMALL, tokens=16_000, noise=0.0, cv=0.5, spread=0.3, mean_share=(0.2, 0.1), norm_ratio=2.0, angle=90.0
    )
    store = PlantedStore(asked)
    crosscoder = oracle(store)
    crosscoder.encode = lambda acts: torch.from_numpy(store.codes.toarray())  # the truth for a code
    found = regime(crosscoder, store, np.arange(16_000))
    assert found.l0 == pytest.approx(2.5, rel=0.03) and found.exponent == pytest.approx(0.5, abs=0.06)
    assert found.cv == pytest.approx(0.5, abs=0.04) and found.alive == 30 and found.dead_features == 0
    assert found.mean_share == pytest.approx((0.2, 0.1), abs=0.01) and found.norm_ratio == pytest.approx(
        2.0, abs=0.3
    )
    assert max(found.unexplained) < 0.01 and found.cofiring_largest < 0.05
    assert found.row_cosine[0] == pytest.approx(0, abs=1e-3) and found.row_cosine[-1] == pytest.approx(
        1, abs=1e-3
    )
    centred = [a - a.mean(0) for a in store.activations(np.arange(16_000))]
    agreement = (centred[0] * centred[1]).sum() / (
        centred[0].square().sum() * centred[1].square().sum()
    ).sqrt()
    assert found.agreement == pytest.approx(float(agreement), abs=2e-3)


def test_the_generator_takes_the_regime_to_another_width():
    law = frequencies(Planted(exponent=0.8))
    measured = Regime(
        tokens=1000,
        width=96,
        l0=24.0,
        frequency_quantiles=tuple(np.quantile(law, QUANTILES)),
        exponent=1.4,
        cv=0.7,
        spread=0.4,
        cofiring_mean=0.0,
        cofiring_largest=0.3,
        norm_ratio=0.9,
        spread_ratio=1.0,
        mean_share=(0.1, 0.2),
        alive=1024,
        unexplained=(0.01, 0.03),
        dead_features=0.0,
        dead_directions=(0.0, 0.1),
        dimension=(0.2, 0.2),
        agreement=0.67,
        row_cosine=(0.0,) * 5,
        nrn_quantiles=(0.5,) * 5,
    )
    ours = from_regime(measured, width=48, seed=7)
    assert (
        ours.features == 512
        and ours.l0 == 12
        and ours.seed == 7
        and ours.exponent == pytest.approx(0.8, abs=0.03)
    )
    assert (ours.cv, ours.mean_share, ours.noise, ours.base_only) == (0.7, (0.1, 0.2), 0.02, 64)
    # the copula's correlation gives the phi that was asked for, and the angle the agreement
    flat = replace(
        ours, exponent=0.0, l0=512 * measured.frequency_quantiles[2], tokens=16_000, noise=0.0, spread=0.0
    )
    store = PlantedStore(flat)
    fires = (store.codes[:, :] > 0).toarray().astype(np.float32)
    largest = np.sort(np.corrcoef(fires.T) - np.eye(512), axis=1)[:, -3:]
    assert largest.mean() == pytest.approx(0.3, abs=0.04)
    a, b = (x - x.mean(0) for x in store.activations(np.arange(16_000)))
    assert float((a * b).sum() / (a.square().sum() * b.square().sum()).sqrt()) == pytest.approx(
        0.67, abs=0.06
    )


# --- methods and judgement ----------------------------------------------------------------------------------


def hand_made() -> tuple[pd.DataFrame, Planted]:
    """Five learned features; planted: 0 shared, 1 base-only, 2 and 3 distilled-only."""
    planted = Planted(shared=1, rotated=0, rescaled=0, base_only=1, distilled_only=2, l0=1.0)
    base = dict(alive=True, nu_r=0.1)
    table = pd.DataFrame(
        [
            dict(
                feature=0,
                nrn_p2=0.99,
                nu_eps=0.05,
                nearest=2,
                cosine=0.9,
                kind="distilled_only",
                hits="2",
                matched=2,
                matched_cosine=0.9,
            ),
            # shrunk
            dict(
                feature=1,
                nrn_p2=0.95,
                nu_eps=0.80,
                nearest=0,
                cosine=0.7,
                kind="shared",
                hits="",
                matched=-1,
                matched_cosine=-1,
            ),
            dict(
                feature=2,
                nrn_p2=0.98,
                nu_eps=0.10,
                nearest=2,
                cosine=0.8,
                kind="distilled_only",
                hits="2",
                matched=-1,
                matched_cosine=-1,
            ),
            dict(
                feature=3,
                nrn_p2=0.60,
                nu_eps=np.nan,
                nearest=3,
                cosine=0.8,
                kind="distilled_only",
                hits="3",
                matched=3,
                matched_cosine=0.8,
            ),
            dict(
                feature=4,
                nrn_p2=0.99,
                nu_eps=0.00,
                nearest=3,
                cosine=0.9,
                kind="distilled_only",
                hits="3",
                matched=-1,
                matched_cosine=-1,
            ),
        ]
    )
    table = table.assign(**base, nrn_p1=table["nrn_p2"], side="distilled")
    table.loc[4, "alive"] = False
    mirrored = table.assign(side="base", nrn_p1=0.1, nrn_p2=0.1, nu_eps=np.nan, nu_r=np.nan, hits="")
    return pd.concat([table, mirrored], ignore_index=True), planted


def test_precision_recall_and_found_by_hand():
    table, planted = hand_made()
    lengths = precision_recall(table, called(table, "p2 > 0.9", {}), planted).set_index("side")
    # 0, 1 and 2 are flagged: two are right, and both hit planted feature 2; 3 is missed, though it was
    # learned
    found = lengths.loc["distilled", ["precision", "recall", "found", "n_flagged", "n_planted"]].tolist()
    assert found == pytest.approx([2 / 3, 0.5, 1, 3, 2])
    assert np.isnan(lengths.loc["base", "precision"]) and lengths.loc[
        "base", ["recall", "n_flagged"]
    ].tolist() == [0, 0]
    both = precision_recall(table, called(table, "p2 > 0.9 and nu_eps < 0.2", {}), planted).set_index("side")
    assert both.loc["distilled", ["precision", "recall"]].tolist() == [1, 0.5]
    with pytest.raises(UserError, match="unknown method"):
        called(table, "nu", {})


def test_null_thresholds_let_through_the_rate():
    n = 1000
    rng = np.random.default_rng(0)
    null = pd.DataFrame(
        {
            "side": "distilled",
            "alive": True,
            "nrn_p1": rng.random(n),
            "nrn_p2": rng.random(n),
            "nu_eps": np.where(rng.random(n) < 0.5, rng.random(n), np.nan),
            "nu_r": rng.random(n),
        }
    )
    thresholds = null_thresholds(null)
    for method in ("nrn_p1 beyond null", "nu_eps beyond null"):
        assert 0.008 <= called(null, method, thresholds).mean() <= 0.010
    null["alive"] = False
    assert null_thresholds(null) == {}


@pytest.mark.parametrize("shrunk", [False, True])
def test_a_perfect_dictionary_is_judged_perfect_and_a_shrunk_one_only_by_latent_scaling(shrunk):
    """All shared features' base rows taken away: row lengths call them unique, latent scaling does not."""
    store = PlantedStore(
        replace(SMALL, rotated=0, rescaled=0, shared=20, base_only=4, distilled_only=4, l0=1.5, exponent=0.0)
    )
    shared = np.flatnonzero(store.kinds == 0)[:6]
    crosscoder = oracle(store, dict.fromkeys(shared.tolist(), 0.02) if shrunk else None)
    table = scores(crosscoder, store, store.rows("report"))
    judged = {
        method: (
            precision_recall(table, called(table, method, {}), store.planted)
            .set_index("side")
            .loc["distilled"]
        )
        for method in METHODS
        if "null" not in method
    }
    for method, row in judged.items():
        assert row["recall"] == 1 and row["found"] == 1, method
    assert judged["nu_eps < 0.3"]["precision"] == 1
    assert judged["p2 > 0.9"]["precision"] == pytest.approx(4 / 10 if shrunk else 1)
    assert judged["p2 > 0.9 and nu_eps < 0.2"]["precision"] == 1


# --- the study ----------------------------------------------------------------------------------------------

TINY = replace(
    SMALL, width=8, shared=6, rotated=2, rescaled=2, base_only=2, distilled_only=2, tokens=1200, l0=1.5
)
CONFIGS = {"batch": TrainConfig(n_features=16, k=2, tokens=800, batch_size=400, aux_k=4)}
AXES = (
    OURS,
    Setting("rotation", "90 degrees", {"angle": 90.0}),
    Setting("budget", "half", {}, {"tokens": 0.5}),
)
SEEDS = {"choose": (0,), "report": (10, 11)}


def test_a_study_resumes_and_gives_one_row_per_method_and_side(tmp_path, monkeypatch):
    wanted = cells(CONFIGS, TINY, AXES, SEEDS, axis_seeds=1)
    assert len(wanted) == 4 + 2 + 2 and len({c.fingerprint for c in wanted}) == len(wanted)
    assert {c.config.tokens for c in wanted if c.setting.name == "budget"} == {400} and all(
        isinstance(c, Cell) for c in wanted
    )
    assert all(c.planted.base_only == 0 for c in wanted if c.split == "null")
    whole = evaluate(tmp_path, CONFIGS, TINY, AXES, SEEDS, axis_seeds=1)
    assert len(whole) == (3 + 1 + 1) * len(METHODS) * 2
    assert set(whole["split"]) == {"choose", "report"} and whole["recall"].between(0, 1).all()
    (tmp_path / f"{wanted[-1].fingerprint}.csv").unlink()
    made = []
    real = judging._scored
    monkeypatch.setattr(judging, "_scored", lambda *args: made.append(args) or real(*args))
    pd.testing.assert_frame_equal(evaluate(tmp_path, CONFIGS, TINY, AXES, SEEDS, axis_seeds=1), whole)
    assert len(made) == 1
    figure = plot(whole, "batch")
    assert [t.name for t in figure.data] == ["precision", "recall"] and figure.data[0].z.shape == (
        len(METHODS),
        3,
    )
    assert judge(whole, recommend(whole))["recall"]["n"] == 2


def test_the_rule_is_chosen_on_choose_and_judged_on_report():
    def row(method, split, seed, precision, recall, side="distilled"):
        return dict(
            setting=OURS.name,
            value=OURS.value,
            architecture="a",
            seed=seed,
            split=split,
            method=method,
            side=side,
            precision=precision,
            recall=recall,
            found=1.0,
            n_flagged=1,
            n_planted=1,
        )

    rows = [
        row("good", "choose", 0, 0.8, 0.9),
        row("greedy", "choose", 0, 0.2, 1.0),
        row("silent", "choose", 0, np.nan, 0.0),
    ]
    rows += [{**r, "side": "base"} for r in rows]
    rows += [
        row("good", "report", 10, 0.5, 0.4),
        row("good", "report", 11, 0.7, 0.6),
        row("greedy", "report", 10, 1.0, 1.0),
    ]
    table = pd.DataFrame(rows)
    assert recommend(table) == {"architecture": "a", "method": "good"}  # though another does better on report
    judged = judge(table, recommend(table))
    assert (judged["precision"]["value"], judged["recall"]["value"]) == pytest.approx((0.6, 0.5))
    # Student's t with one degree of freedom: 0.6 ± 1.27
    assert judged["precision"]["ci"] == pytest.approx((0.0, 1.0))
    means = summary(table)
    assert means.set_index(["method", "split", "side"]).loc[("silent", "choose", "base"), "silent"] == 1
    with pytest.raises(UserError, match="no seeds to choose on"):
        recommend(table[table["split"] == "report"])
    with pytest.raises(UserError, match="without a seed in both"):
        cells(CONFIGS, TINY, AXES, {"choose": (0,), "report": (0,)})


def test_every_setting_can_be_planted_and_changes_our_regime():
    ours = Planted()
    reports = [
        c
        for c in cells(CONFIGS, ours)
        if c.split == "report" and c.architecture == "batch" and c.planted.seed == 10
    ]
    assert [c.setting for c in reports] == list(SETTINGS)
    changed = [(c.planted, c.config) for c in reports]
    assert changed.count(changed[0]) == 1 and reports[0].planted == replace(ours, seed=10)
    crowding, easy = (next(c for c in reports if c.setting.name == name) for name in ("crowding", "easy"))
    assert crowding.planted.base_only == 4 * ours.base_only and crowding.planted.l0 == 3 * ours.l0
    assert (crowding.config.n_features, crowding.config.k) == (64, 6)
    assert (easy.planted.shared, easy.planted.l0, easy.config.n_features, easy.config.k) == (88, 6, 8, 1)
    assert Planted(**asdict(ours)) == ours  # plain data: it can be written down and read back


def test_features_recur_with_the_planted_k_and_not_with_one_that_is_too_large(tmp_path):
    """What tells a regime from its over-complete reading: eight features are planted, one is active."""
    easy = replace(
        SMALL, shared=8, rotated=0, rescaled=0, base_only=0, distilled_only=0, l0=1.0, exponent=0.0
    )
    store = PlantedStore(replace(easy, noise=0.05, spread=0.0))
    config = TrainConfig(n_features=24, tokens=60_000, batch_size=256, aux_k=4, rate=1e-2)
    table, first = recurrence(store, config, tmp_path, ks=(1, 6))
    assert table["k"].tolist() == [1, 6] and [c.k for c in first] == [1, 6]
    true, large = table["recurrence"]
    assert true > 0.9 > large + 0.1 and table["fve"][1] > table["fve"][0] > 0.7
    assert (table["chance"] < table["recurrence"]).all() and table["alive"][1] > table["alive"][0] >= 8
    # kept: nothing is trained a second time
    before = {f: f.stat().st_mtime_ns for f in tmp_path.rglob("*.safetensors")}
    pd.testing.assert_frame_equal(recurrence(store, config, tmp_path, ks=(1, 6))[0], table)
    assert before == {f: f.stat().st_mtime_ns for f in tmp_path.rglob("*.safetensors")}
