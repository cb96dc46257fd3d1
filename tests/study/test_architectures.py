"""Kinds of crosscoders compared on a planted store, and origins of features of three models by hand."""

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import pytest
import torch

from lib.crosscoder.codes import firing_frequency
from lib.crosscoder.model import CrossCoder
from lib.crosscoder.training import TrainConfig, train
from lib.settings import UserError
from lib.study import architectures
from lib.study.architectures import describe, match_l1, origins, plot_origins
from tests.crosscoder.test_training import gaussian, planted

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
