"""Kinds of crosscoders compared on a planted store, and origins of features of three models by hand."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import pytest
import torch

from lib.crosscoder.codes import firing_frequency
from lib.crosscoder.model import CrossCoder
from lib.crosscoder.training import TrainConfig, train
from lib.results import Part, pooled_metric
from lib.settings import UserError
from lib.stats import wilson
from lib.study import architectures
from lib.study.architectures import (
    compare,
    describe,
    least_share,
    match_l1,
    origin_metrics,
    origins,
    plot_nrn,
    plot_origins,
    plot_shares,
)
from lib.verdicts import UNDECIDED, YES, above, below
from tests.crosscoder.test_training import MemoryStore, gaussian, planted

CONFIG = TrainConfig(n_features=40, k=3, tokens=12_000, batch_size=128, rate=3e-3, aux_k=8)


def three(lengths) -> CrossCoder:
    """A crosscoder of three models of widths 2, 2, 3 whose rows point along the first axis, of the given
    lengths [F, 3].
    """
    lengths = torch.tensor(lengths)
    crosscoder = CrossCoder((2, 2, 3), len(lengths), ("base", "style", "distilled"), k=1)
    with torch.no_grad():
        crosscoder.W_dec.zero_()
        for m, column in enumerate((0, 2, 4)):
            crosscoder.W_dec[:, column] = lengths[:, m]
    return crosscoder


CASES = [
    ([1, 1, 1], "in all"),
    ([0, 1, 1], "came with style"),
    ([0.1, 0.2, 2], "came with function"),
    ([3, 0, 0], "lost with style"),
    ([2, 2, 0.3], "lost with function"),
    ([0, 1, 0.1], "in style alone"),
    ([1, 0.2, 1], "in all but style"),
    ([0, 0, 0], "in none"),
]


def test_origins_by_hand():
    frame = origins(three([lengths for lengths, _ in CASES]))
    assert list(frame.origin) == [origin for _, origin in CASES]
    assert frame.share_base[4] == pytest.approx(2 / 4.3) and frame.share_distilled[2] == pytest.approx(
        2 / 2.3
    )
    assert frame.iloc[7][["share_base", "share_style", "share_distilled"]].isna().all()
    assert not frame.uses_style[2] and frame.uses_style[1] and not frame.uses_base[7]
    # 0.2 of 2.2 and 0.3 of 4.3 lie above a threshold of 0.05
    assert list(origins(three([lengths for lengths, _ in CASES]), threshold=0.05).origin[[4, 6]]) == [
        "in all",
        "in all",
    ]
    # in the reverse order what was lost has come
    assert list(origins(three([[2, 2, 0], [3, 0, 0]]), ("distilled", "style", "base")).origin) == [
        "came with style",
        "came with function",
    ]


def test_origins_take_the_norm_they_are_told():
    crosscoder = three([[1, 1, 1]])
    with torch.no_grad():
        crosscoder.W_dec[0, :2] = torch.tensor([3.0, 4.0])
    assert origins(crosscoder, p=1).share_base[0] == pytest.approx(7 / 9) and origins(
        crosscoder, p=2
    ).share_base[0] == pytest.approx(5 / 7)


def test_errors_of_origins():
    with pytest.raises(UserError, match="names are base, style: there must be three models"):
        origins(three([[1, 1, 1]]), ("base", "style"))
    with pytest.raises(UserError, match="unknown model 'chat'"):
        origins(three([[1, 1, 1]]), ("base", "style", "chat"))
    with pytest.raises(UserError, match="threshold is 0.5"):
        origins(three([[1, 1, 1]]), threshold=0.5)


def test_the_figure_places_every_used_feature_once():
    frame = origins(three([lengths for lengths, _ in CASES] + [[1, 1, 2]]))
    fig = plot_origins(frame)
    assert isinstance(fig, go.Figure)
    drawn = {trace.name: trace for trace in fig.data}
    assert sum(len(trace.a) for trace in fig.data) == len(CASES)  # all but the one in none
    # a corner on the left: style
    assert list(drawn["in all (2)"].text) == [0, 8] and drawn["in all (2)"].a[1] == 0.25
    assert (fig.layout.ternary.baxis.title.text, fig.layout.ternary.aaxis.title.text) == ("base", "style")
    assert drawn["lost with style (1)"].b[0] == 1


def test_kinds_are_compared_at_what_they_reached(tmp_path):
    store, _, _ = planted(n=3000)
    configs = {"batchtopk": CONFIG, "own": TrainConfig(**{**vars(CONFIG), "dedicated": 0.2})}
    made = {name: train(store, config, tmp_path / name) for name, config in configs.items()}
    table = pd.DataFrame({name: describe(c, store, n_boot=50) for name, c in made.items()}).T
    crosscoder = train(store, CONFIG, tmp_path / "batchtopk")  # loaded: it is there
    frequency = firing_frequency(crosscoder, store)
    row, own = table.loc["batchtopk"], table.loc["own"]
    assert row.l0 == pytest.approx(frequency.sum()) and row.l0_low < row.l0 < row.l0_high
    assert row.dead == pytest.approx((frequency == 0).mean())
    nrn = np.array([n for n, f in zip(crosscoder.nrn().tolist(), frequency) if f > 0])
    assert row.nrn_mean == pytest.approx(sum(nrn) / len(nrn)) and row.nrn_over_0_7 == pytest.approx(
        sum(n > 0.7 for n in nrn) / len(nrn)
    )
    assert row.nrn_under_0_3 == pytest.approx(sum(n < 0.3 for n in nrn) / len(nrn))
    ordered, mean = np.sort(nrn), sum(nrn) / len(nrn)
    assert (
        ordered[(len(nrn) - 1) // 2] <= row.nrn_q50 <= ordered[len(nrn) // 2]
        and ordered[0] < row.nrn_q05 < row.nrn_q95 < ordered[-1]
    )
    assert row.nrn_sd == pytest.approx((sum((nrn - mean) ** 2) / (len(nrn) - 1)) ** 0.5)
    assert row.dedicated_base == row.used_distilled == 0
    assert own.dedicated_base == own.dedicated_distilled == 8 and 0 < own.used_distilled <= 8
    assert own.nrn_q01 == 0 and own.nrn_q99 == 1 and row.fve_base_low < row.fve_base < row.fve_base_high <= 1


def test_unlike_widths_have_no_cosine(tmp_path):
    store = gaussian(widths=(5, 7))
    crosscoder = train(store, TrainConfig(n_features=16, k=4, tokens=1000, batch_size=64), tmp_path)
    row = describe(crosscoder, store, n_boot=20)
    assert np.isnan(row["cosine_median"]) and np.isfinite(row["nrn_mean"])


def test_lambda_is_found_between_two_tries(tmp_path, monkeypatch):
    """On a made-up law L0 = 10 / lambda^0.7, bent at the end: which lambda gives 4?"""
    tried = []

    def trained(store, config, folder):
        tried.append(config.l1)
        assert config.variant == "l1" and config.tokens == 500 and str(folder).startswith(str(tmp_path))
        return config.l1

    monkeypatch.setattr(architectures, "train", trained)
    monkeypatch.setattr(
        architectures, "firing_frequency", lambda lam, store, split: np.full(10, lam**-0.7 / (1 + 0.1 * lam))
    )
    found, tries = match_l1(None, 4, TrainConfig(n_features=40, k=4, l1=0.5), tmp_path, tokens=500)
    assert 10 * found**-0.7 / (1 + 0.1 * found) == pytest.approx(4, rel=0.05)
    assert list(tries.l1) == tried and tried[:2] == [0.5, 2.0] and len(tried) <= 5
    up, _ = match_l1(None, 30, TrainConfig(n_features=40, k=4, l1=8.0), tmp_path, tokens=500)
    assert 10 * up**-0.7 / (1 + 0.1 * up) == pytest.approx(30, rel=0.05)
    nearest, tries = match_l1(
        None, 4, TrainConfig(n_features=40, k=4, l1=0.5), tmp_path, tokens=500, tolerance=1e-9, most=3
    )
    assert len(tries) == 3 and nearest == tries.l1[(tries.l0 - 4).abs().idxmin()]


def test_an_l1_crosscoder_meets_the_l0_of_another(tmp_path):
    store, _, _ = planted(n=3000)
    lam, tries = match_l1(store, 5, CONFIG, tmp_path, tolerance=0.15)
    assert abs(tries.set_index("l1").l0[lam] / 5 - 1) <= 0.15
    again, same = match_l1(store, 5, CONFIG, tmp_path, tolerance=0.15)
    assert again == lam and same.equals(tries)


# --- several crosscoders of each kind -----------------------------------------------------------------------


def test_kinds_are_pooled_over_seeds_by_hand():
    """Four features a crosscoder; the null's limit is set by the features of both nulls together."""
    nrns = {
        "batchtopk": {
            "pair": [np.array([0.2, 0.5, 0.6, 0.9]), np.array([0.4, 0.5, 0.6, 0.65])],
            "null": [np.array([0.4, 0.5, 0.5, 0.6]), np.array([0.4, 0.5, 0.5, 0.8])],
        },
        "l1": {
            "pair": [np.array([0.1, 0.2, 0.5, 0.8]), np.array([0.5, 0.5, 0.9, 0.9])],
            "null": [np.array([0.1, 0.5, 0.5, 0.9])] * 2,
        },
    }
    limits, each = compare(nrns)
    limit = limits.set_index("architecture").loc["batchtopk"]
    # the 99% quantile lies 0.93 of the way from the last but one of eight values to the last
    assert limit.threshold == pytest.approx(0.6 + 0.93 * 0.2)
    # resampled are whole crosscoders: twice the first, or twice the second, is the least and the most
    assert (limit.low, limit.high) == (pytest.approx(0.6), pytest.approx(0.8))
    assert [own["outside_batchtopk"]["value"] for own in each] == [0.5, 0.0]
    assert [own["outside_l1"]["value"] for own in each] == [0.75, 0.5]
    assert each[0]["outside_l1"]["ci"] == pytest.approx(wilson(3, 4))
    assert [own["outside_l1_minus_batchtopk"]["value"] for own in each] == [0.25, 0.5]
    pooled = pooled_metric([own["outside_l1_minus_batchtopk"] for own in each])
    assert pooled["value"] == pytest.approx(0.375) and [seed[0] for seed in pooled["seeds"]] == [0.25, 0.5]
    # 0.9 is above the limit at both its ends; 0.65 at the lower end only
    first, second = (own["beyond_null_batchtopk"] for own in each)
    assert first["value"] == 0.25 and first["ci"] == pytest.approx(wilson(1, 4))
    assert second["value"] == 0 and second["ci"] == pytest.approx((wilson(0, 4)[0], wilson(1, 4)[1]))


def test_a_planted_difference_between_kinds_is_found_for_all_seeds_and_none_where_they_are_alike():
    rng = np.random.default_rng(0)

    def drawn(share, n=256):
        """NRN of which ``share`` are one-sided, half of them on either side."""
        one_sided = np.where(rng.random(n) < 0.5, 0.05, 0.95)
        return np.sort(np.where(rng.random(n) < share, one_sided, rng.normal(0.5, 0.05, n)))

    nrns = {
        kind: {pair: [drawn(share) for _ in range(5)] for pair, share in shares.items()}
        for kind, shares in {
            "batchtopk": {"pair": 0.1, "null": 0.0},
            "l1": {"pair": 0.3, "null": 0.0},
        }.items()
    }
    _, each = compare(nrns)
    pooled = {name: pooled_metric([own[name] for own in each]) for name in each[0]}
    assert above("", 0).verdict(pooled["outside_l1_minus_batchtopk"]) == (YES, 1.0)
    assert pooled["outside_l1_minus_batchtopk"]["ci"][0] < 0.2 < pooled["outside_l1_minus_batchtopk"]["ci"][1]
    assert above("", 0).verdict(pooled["outside_null_l1_minus_batchtopk"])[0] == UNDECIDED
    # half of what was planted lies on the distilled side
    for kind, share in (("batchtopk", 0.05), ("l1", 0.15)):
        assert above("", 0.02).verdict(pooled[f"beyond_null_{kind}"]) == (YES, 1.0)
        assert pooled[f"beyond_null_{kind}"]["ci"][0] < share + 0.01 < pooled[f"beyond_null_{kind}"]["ci"][1]


def test_origins_are_counted_and_their_difference_carries_the_limit():
    def table(style, function, n=200):
        names = ["came with style"] * style + ["came with function"] * function
        return pd.DataFrame({"origin": names + ["in all"] * (n - style - function)})

    found = origin_metrics([table(30, 10)] * 3)
    assert found["came_with_style"]["value"] == 0.15 and found["came_with_style"]["ci"] == pytest.approx(
        wilson(30, 200)
    )
    assert found["in_all"]["value"] == 0.8
    difference = found["function_minus_style"]
    assert difference["value"] == pytest.approx(-0.1)
    # of one sample of features: the variance of a difference of two shares of it
    half = 1.96 * ((0.15 + 0.05 - 0.1**2) / 200) ** 0.5
    assert difference["ci"] == pytest.approx((-0.1 - half, -0.1 + half), abs=0.01)
    wider = origin_metrics([table(30, 10), table(30, 30), table(40, 0)])["function_minus_style"]
    assert wider["value"] == pytest.approx(-0.1) and wider["ci"][0] < -0.2 and wider["ci"][1] > 0
    assert below("", 0).verdict(pooled_metric([difference] * 5)) == (YES, 1.0)
    assert below("", 0).verdict(pooled_metric([wider] * 5))[0] == UNDECIDED


def test_three_models_have_a_feature_by_the_limit_between_two():
    # an NRN of 0.75: one row is a third of the other's; of rows 1, 1, 1/3 the last is 1/7
    assert least_share(0.75) == pytest.approx(1 / 7) and least_share(0.5) == pytest.approx(1 / 3)


@pytest.fixture
def toy_variant(tmp_path):
    """Two crosscoders on planted stores; what a part of the study asks of a ``Variant``."""
    (store, *_), (null, *_) = planted(n=1500), planted(n=1500, per_side=(32, 0, 0), seed=1)
    stores = {
        ("base", "null_a"): MemoryStore(*null.arrays, names=("base", "null_a")),
        architectures.NAMES: MemoryStore(
            store.arrays[0], store.arrays[1], store.arrays[1], names=architectures.NAMES
        ),
    }
    for name, own in stores.items():
        own.fingerprint = "_".join(name)
    config = replace(CONFIG, tokens=1500)
    return SimpleNamespace(
        seed=3,
        seeds=range(3, 5),
        store=store,
        crosscoders=[train(store, replace(config, seed=s), tmp_path / f"own_{s}") for s in (3, 4)],
        pair=SimpleNamespace(others={"style": None}),
        config=lambda seed=3, **changes: replace(config, **changes, seed=seed),
        harvested=lambda *names: (None, stores[names]),
        folder=lambda name: tmp_path / name,
        null_limits=lambda: pd.DataFrame(
            [("nrn", "distilled", 0.01, 0.7, 0.65, 0.8)],
            columns=["score", "side", "level", "threshold", "low", "high"],
        ),
    )


def test_every_kind_is_trained_with_every_seed(toy_variant, tmp_path):
    metrics, tables = architectures.compute_architectures.__wrapped__(toy_variant, boots=10, dedicated=0.1)
    table = tables["architectures"]
    kinds = ["batchtopk", "topk", "jumprelu", "dedicated", "l1"]
    assert list(zip(table.architecture, table.seed)) == [(kind, s) for kind in kinds for s in (3, 4)]
    for name, m in metrics.items():
        assert len(m["seeds"]) == 2, name
        assert m["value"] == pytest.approx(np.mean([seed[0] for seed in m["seeds"]])), name
    own = [c.nrn()[firing_frequency(c, toy_variant.store) > 0] for c in toy_variant.crosscoders]
    outside = [seed[0] for seed in metrics["outside_batchtopk"]["seeds"]]
    assert outside == pytest.approx([float(((n < 0.3) | (n > 0.7)).float().mean()) for n in own])
    # lambda is searched with the first seed; the second's crosscoder, and the nulls, take what was found
    assert len(list(tmp_path.glob("match_l1/*/manifest.json"))) == len(tables["match_l1"])
    assert not (tmp_path / "l1_pair").exists() and (tmp_path / "l1_pair_1" / "manifest.json").is_file()
    assert (tmp_path / "null_a_seed3").is_dir() and (tmp_path / "null_a_seed4").is_dir()
    origins = tables["origins"]
    assert set(origins.seed) == {3, 4} and len(origins) == 2 * 40
    alive = origins[origins.alive & (origins.seed == 4)]
    assert metrics["in_all"]["seeds"][1][0] == pytest.approx((alive.origin == "in all").mean())
    part = Part("architectures", "", metrics, tables)
    figure, shares = plot_shares(part)
    assert len(shares) == 3 * 5 * 3 and set(shares.crosscoder) == {"all", 0, 1}
    assert sum(t.marker.symbol == "diamond" for t in figure.data) == 15 + 1  # in the legend
    drawn = plot_nrn(tables["nrn"])
    assert len(drawn.data) == 10 + 20  # a mean and two single crosscoders of each kind, on pair and null
