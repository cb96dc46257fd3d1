"""Latent scaling against its definition: least squares per feature, values by hand, planted shrunk and
decoupled features, NaN.
"""

import numpy as np
import pytest
import torch
from scipy import sparse

from lib.crosscoder.model import CrossCoder
from lib.features import latent_scaling as scaling
from lib.features.latent_scaling import latent_scaling
from lib.settings import UserError

MODELS = ("base", "distilled")


def latent_scaling_of(
    codes, x, directions, biases=None, documents=None, model="distilled", reference="base", n_boot=200, seed=0
):
    """``latent_scaling`` of plain matrices, ``scaling.CHUNK`` tokens at a time."""
    n, codes = codes.shape[0], sparse.csr_matrix(codes)
    rows = {name: np.asarray(directions[name], dtype=np.float64) for name in (reference, model)}
    decoders = {m: (d, np.zeros(d.shape[1]) if biases is None else biases[m]) for m, d in rows.items()}
    documents = np.arange(n) if documents is None else documents
    parts = [slice(start, start + scaling.CHUNK) for start in range(0, n, scaling.CHUNK)]
    chunks = [(codes[p], {m: np.asarray(x[m])[p] for m in rows}, documents[p]) for p in parts]
    return scaling.scaling(chunks, decoders, n_boot, seed)


class Held:
    """The part of a store that latent scaling reads."""

    def __init__(self, arrays, documents, names=MODELS):
        self.arrays, self.documents, self.models = (
            [torch.as_tensor(a, dtype=torch.float32) for a in arrays],
            documents,
            names,
        )

    def activations(self, rows):
        return [a[torch.as_tensor(rows)] for a in self.arrays]


def random_crosscoder(widths=(7, 7), n_features=12, seed=0, names=MODELS) -> CrossCoder:
    """A gate that lets about three features through, unlike scales, biases and rows."""
    torch.manual_seed(seed)
    crosscoder = CrossCoder(
        widths, n_features, names, k=3, scales=[0.5 + i for i in range(len(widths))], seed=seed
    )
    with torch.no_grad():
        for parameter in crosscoder.parameters():
            parameter.copy_(torch.randn_like(parameter))
        crosscoder.W_dec.copy_(0.1 * crosscoder.W_enc + 0.1 * crosscoder.W_dec)
        crosscoder.threshold.fill_(2.0)
    return crosscoder.requires_grad_(False)


def held(widths=(7, 7), n=400, documents=20, seed=1, names=MODELS) -> Held:
    rng = np.random.default_rng(seed)
    return Held(
        [rng.standard_normal((n, w)) for w in widths], np.sort(rng.integers(documents, size=n)) * 3 + 5, names
    )


def naive(crosscoder, store, rows, of="distilled", against="base"):
    """nu_eps and nu_r, feature by feature, by least squares on the whole Y."""
    f = crosscoder.encode(store.activations(rows)).double().numpy()
    x = dict(
        zip(
            crosscoder.names,
            (p.double().numpy() for p in crosscoder.split(crosscoder.scaled(store.activations(rows)))),
        )
    )
    d = {name: crosscoder.rows(name).double().numpy() for name in crosscoder.names}
    x_hat = {name: f @ d[name] + crosscoder.bias(name).double().numpy() for name in crosscoder.names}
    found = {"eps": [], "r": []}
    for j in range(f.shape[1]):
        own, other = (
            (of, against) if np.linalg.norm(d[of][j]) > np.linalg.norm(d[against][j]) else (against, of)
        )
        regressor = np.outer(f[:, j], d[own][j]).reshape(-1, 1)
        for form in found:
            betas = {}
            for name in (own, other):
                y = x_hat[name] if form == "r" else x[name] - x_hat[name] + np.outer(f[:, j], d[name][j])
                betas[name] = np.linalg.lstsq(regressor, y.ravel(), rcond=None)[0][0]
            found[form].append(betas[other] / betas[own] if betas[own] > 0 else np.nan)
    return found


@pytest.mark.parametrize("names", [MODELS, ("style", "distilled", "base")])
def test_equals_least_squares_feature_by_feature(names, monkeypatch):
    monkeypatch.setattr(scaling, "CHUNK", 64)  # chunks cut through documents
    widths = (7,) * len(names)
    crosscoder, store = random_crosscoder(widths, names=names), held(widths, names=names)
    rows = np.arange(30, 371)
    table, expected = latent_scaling(crosscoder, store, rows, n_boot=0), naive(crosscoder, store, rows)
    # NaN in some: that is compared too
    assert table["feature"].tolist() == list(range(12)) and table["nu_eps"].notna().sum() >= 6
    for form in ("eps", "r"):
        np.testing.assert_allclose(table[f"nu_{form}"], expected[form], rtol=2e-4, atol=2e-5)
    longer = crosscoder.rows("distilled").norm(dim=1) > crosscoder.rows("base").norm(dim=1)
    assert (table["side"] == np.where(longer, "distilled", "base")).all()
    assert table["nu_eps_low"].isna().all()


def test_values_by_hand():
    # one feature, d = (2, 0) in distilled and (0.5, 1) in base, active with 1 and 2 on the first two of three
    # tokens
    codes = sparse.csr_matrix([[1.0], [2.0], [0.0]])
    directions = {"distilled": np.array([[2.0, 0.0]]), "base": np.array([[0.5, 1.0]])}
    x = {
        "distilled": np.array([[2.0, 0.0], [4.0, 1.0], [9.0, 9.0]]),
        "base": np.array([[1.5, 0.0], [1.0, 7.0], [9.0, 9.0]]),
    }
    row = latent_scaling_of(codes, x, directions, n_boot=0).iloc[0]
    # eps, distilled: errors (0, 0), (0, 1): numerator (2, 0).(0, 2) + 5 * 4 = 20.  base: errors (1, -1), (0,
    # 5): (2, 0).(1, 9) + 5 * 1 = 7
    assert row["side"] == "distilled" and row["nu_eps"] == pytest.approx(7 / 20)
    # r, distilled: (2, 0).(10, 0) = 20.  base: f^T x_hat = 1 * (0.5, 1) + 2 * (1, 2) = (2.5, 5): 5
    assert row["nu_r"] == pytest.approx(5 / 20)
    # with a bias of (1, 0) in base, x_hat gains (1, 0) on both tokens: numerator of r + 2 * (1 + 2), of eps -
    # 6
    biases = {"distilled": np.zeros(2), "base": np.array([1.0, 0.0])}
    row = latent_scaling_of(codes, x, directions, biases, n_boot=0).iloc[0]
    assert row["nu_eps"] == pytest.approx(1 / 20) and row["nu_r"] == pytest.approx(11 / 20)


def planted(shares=(0.0, 1.0, 0.4), seed=0, n=3000, d=16, noise=0.02):
    """Features whose share in base is known, and a dictionary that has taken all their rows out of base,
    whatever the truth.
    """
    rng = np.random.default_rng(seed)
    rows = np.linalg.qr(rng.standard_normal((d, len(shares))))[0].T
    codes = (rng.random((n, len(shares))) < 0.2) * rng.uniform(1, 2, (n, len(shares)))
    x = {"distilled": codes @ rows, "base": codes @ (np.array(shares)[:, None] * rows)}
    x = {name: acts + noise * rng.standard_normal(acts.shape) for name, acts in x.items()}
    return codes, x, rows


def test_a_shrunk_feature_is_told_from_a_unique_one_and_intervals_hold_the_truth():
    codes, x, rows = planted()
    directions = {"distilled": rows, "base": 0.02 * rows}  # NRN calls all three unique
    table = latent_scaling_of(
        sparse.csr_matrix(codes), x, directions, documents=np.arange(len(codes)) // 10, n_boot=100
    )
    np.testing.assert_allclose(table["nu_eps"], [0, 1, 0.4], atol=0.02)
    assert table["shrinkage"].tolist() == [False, True, True] and not table["decoupling"].any()
    assert (table["nu_eps_low"] <= table["nu_eps"]).all() and (table["nu_eps"] <= table["nu_eps_high"]).all()
    assert ((table["nu_eps_high"] - table["nu_eps_low"]) < 0.05).all()
    mirrored = latent_scaling_of(
        sparse.csr_matrix(codes), x, directions, model="base", reference="distilled", n_boot=0
    )
    assert (mirrored["side"] == "distilled").all() and np.allclose(mirrored["nu_eps"], table["nu_eps"])


def test_a_decoupled_feature_is_told_by_the_reconstruction():
    codes, x, rows = planted(shares=(1.0, 1.0))
    # feature 0 is written in distilled alone; feature 2 always fires with it and writes the same direction in
    # base
    dictionary = {
        "distilled": np.vstack([rows, np.zeros(16)]),
        "base": np.vstack([np.zeros(16), rows[1], rows[0]]),
    }
    doubled = sparse.csr_matrix(np.column_stack([codes, codes[:, 0]]))
    table = latent_scaling_of(doubled, x, dictionary, n_boot=0)
    assert table["side"].tolist()[0] == "distilled" and table["side"].tolist()[2] == "base"
    # the error alone would call it unique
    assert abs(table["nu_eps"][0]) < 0.02 and table["nu_r"][0] == pytest.approx(1, abs=0.05)
    assert table["decoupling"].tolist() == [True, False, True] and not table["shrinkage"].any()


def test_bootstrap_equals_resampling_documents_by_hand():
    codes, x, rows = planted(n=300, noise=0.5)
    directions, documents = {"distilled": rows, "base": 0.1 * rows}, np.arange(300) // 30
    table = latent_scaling_of(sparse.csr_matrix(codes), x, directions, documents=documents, n_boot=40, seed=7)
    draws = np.random.default_rng(7).multinomial(10, np.full(10, 0.1), size=40)
    found = []
    for draw in draws:
        tokens = np.concatenate(
            [np.flatnonzero(documents == d) for d, times in enumerate(draw) for _ in range(times)]
        )
        resampled = {name: acts[tokens] for name, acts in x.items()}
        found.append(
            latent_scaling_of(sparse.csr_matrix(codes[tokens]), resampled, directions, n_boot=0)["nu_eps"]
        )
    low, high = np.quantile(found, [0.025, 0.975], axis=0)
    np.testing.assert_allclose(table["nu_eps_low"], low, rtol=1e-9)
    np.testing.assert_allclose(table["nu_eps_high"], high, rtol=1e-9)


def test_nan_where_nothing_fires_or_there_is_no_row_or_the_owner_does_not_hold_the_feature():
    codes, x, rows = planted(shares=(0.0, 1.0, 0.4))
    codes[:, 0] = 0  # never fires
    directions = {"distilled": rows.copy(), "base": 0.1 * rows}
    directions["distilled"][1] = directions["base"][1] = 0  # has no row
    x["distilled"] -= 5 * codes[:, [2]] * rows[2]  # its owner holds the opposite
    table = latent_scaling_of(sparse.csr_matrix(codes), x, directions, n_boot=5)
    assert table[[c for c in table if c.startswith("nu_eps")]].isna().all(axis=None)
    assert (
        not table["shrinkage"].any()
        and not table["decoupling"].any()
        and table["nu_r"].isna().tolist() == [True, True, False]
    )


def test_unlike_widths_give_the_share_that_each_feature_explains():
    crosscoder, store = random_crosscoder((5, 9)), held((5, 9))
    rows = np.arange(400)
    table = latent_scaling(crosscoder, store, rows, n_boot=10)
    assert table.filter(like="nu_").isna().all(axis=None) and not table[["shrinkage", "decoupling"]].any(
        axis=None
    )
    f = crosscoder.encode(store.activations(rows)).double().numpy()
    parts = crosscoder.split(crosscoder.scaled(store.activations(rows)))
    for name, x in zip(MODELS, parts):
        d = crosscoder.rows(name).double().numpy()
        error = x.double().numpy() - f @ d - crosscoder.bias(name).double().numpy()
        for j in np.flatnonzero((f > 0).sum(0) > 2):
            fires = f[:, j] > 0
            y = (error + np.outer(f[:, j], d[j]))[fires]
            left = y - np.outer(f[fires, j], np.linalg.lstsq(f[fires, j : j + 1], y, rcond=None)[0][0])
            assert table[f"r2_{name}"][j] == pytest.approx(
                1 - np.square(left).sum() / np.square(y).sum(), abs=1e-4
            )


def test_mistakes_are_named():
    crosscoder, store = random_crosscoder(), held()
    with pytest.raises(UserError, match="no tokens"):
        latent_scaling(crosscoder, store, np.arange(0))
    with pytest.raises(UserError, match="unknown model 'style'"):
        latent_scaling(crosscoder, store, np.arange(9), model="style")
    with pytest.raises(UserError, match="both 'base'"):
        latent_scaling(crosscoder, store, np.arange(9), model="base")
    with pytest.raises(UserError, match="same models"):
        latent_scaling(crosscoder, held(names=("base", "style")), np.arange(9))


def test_products_at_entries_are_the_same_where_a_gpu_takes_them():
    rng = np.random.default_rng(0)
    a, d = rng.standard_normal((9, 5)), rng.standard_normal((7, 5))
    n, j = rng.integers(9, size=20), rng.integers(7, size=20).astype(np.int32)
    by_hand = np.array([a[row] @ d[feature] for row, feature in zip(n, j)])
    for device in ("cpu", "cpu:0"):  # the second is not "the CPU": torch takes it
        assert np.allclose(scaling._products(d, device)(a, n, j), by_hand)
