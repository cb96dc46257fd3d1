"""Crosscoders from anywhere, checked on planted data; the hub is a fake: nothing here leaves the machine."""

import json
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from lib.crosscoder import sharing
from lib.crosscoder.exchange import export_dictionary_learning, export_replication
from lib.crosscoder.model import CrossCoder
from lib.crosscoder.seeds import content
from lib.crosscoder.sharing import check_on_data, fve, model_card, open_crosscoder, pull, push
from lib.models import sources
from lib.settings import UserError

D, F, N = 24, 16, 600
NAMES, COMMIT = ("base", "distilled"), "c" * 40
SCALES = {"base": 0.2, "distilled": 1.5}


class Planted:
    """A store of tokens that a known crosscoder made: sparse codes through rows that differ between the
    models, and a little noise.
    """

    def __init__(self, turned=False, names=NAMES, layers=None):
        rng = np.random.default_rng(0)
        # [M, F, D], orthonormal in each model
        rows = np.stack([np.linalg.qr(rng.normal(size=(D, D)))[0][:F] for _ in names])
        self.rows_mfd, self.bias = rows, rng.normal(size=(len(names), D))
        f = rng.exponential(size=(N, F)) * (rng.random((N, F)) < 0.2) + 0.5 * (rng.random((N, F)) < 0.1)
        self.models, self.widths, self.scales = (
            tuple(names),
            dict.fromkeys(names, D),
            {n: SCALES[n] for n in names},
        )
        self.layers = layers or dict.fromkeys(names, 3)
        other = np.linalg.qr(rng.normal(size=(D, D)))[0] if turned else np.eye(D)  # stands for another layer
        self.acts = [
            torch.tensor(
                (f @ r + b + 0.05 * rng.normal(size=(N, D))) @ other / SCALES[n], dtype=torch.float32
            )
            for r, b, n in zip(rows, self.bias, names)
        ]
        self.means = {n: a.mean(0).double() for n, a in zip(names, self.acts)}

    def rows(self, split):
        return np.arange(N)

    def activations(self, rows):
        return [a[rows] for a in self.acts]

    def crosscoder(self, variant="l1", **scales):
        """The one that fits: it subtracts the bias, reads codes from both models, shrinks them by 0.05."""
        made = CrossCoder([D, D], F, self.models, variant, 4, [(SCALES | scales)[n] for n in self.models])
        with torch.no_grad():
            joined = torch.tensor(np.concatenate(list(self.rows_mfd), axis=1), dtype=torch.float32)
            made.W_dec.copy_(joined)
            made.W_enc.copy_(joined / 2)
            made.b_dec.copy_(torch.tensor(self.bias.ravel()))
            made.b_enc.copy_(-(made.W_enc @ made.b_dec) - 0.05)
            made.threshold.fill_(0.2)
        return made.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def store():
    return Planted()


# --- does it fit? -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", ["l1", "batchtopk"])
def test_what_fits_passes_with_its_fve(store, variant):
    found = check_on_data(store.crosscoder(variant), store)
    assert found.keys() == set(NAMES) and all(0.8 < value < 1 for value in found.values())


def test_fve_is_that_of_the_formula(store):
    crosscoder = store.crosscoder()
    for name, x, x_hat in zip(NAMES, store.acts, crosscoder.decode(crosscoder.encode(store.acts))):
        x, x_hat = x.double().numpy(), x_hat.double().numpy()
        assert fve(crosscoder, store.acts)[name] == pytest.approx(
            1 - ((x - x_hat) ** 2).sum() / ((x - x.mean(0)) ** 2).sum()
        )


def test_a_wrong_scale_is_named(store):
    for scales in (dict(base=0.05, distilled=0.375), dict(base=2.0, distilled=15.0), dict(distilled=6.0)):
        with pytest.raises(
            UserError,
            match=(
                r"as given, but 0.9\d, 0.9\d with the store's own scales \(0.2, 1.5\): the scales are wrong"
            ),
        ):
            check_on_data(store.crosscoder(**scales), store)


def test_a_wrong_scale_is_named_where_the_store_has_another_one_too(store):
    other = Planted()
    other.scales = {"base": 0.05, "distilled": 4.0}  # its tokens were others than those of the training
    check_on_data(store.crosscoder(), other)
    with pytest.raises(UserError, match="with 0.25 times the scale: the scale is wrong"):
        check_on_data(store.crosscoder(base=0.8, distilled=6.0), other)
    with pytest.raises(UserError, match="with 0.125 times the scale of distilled: that scale is wrong"):
        check_on_data(store.crosscoder(distilled=12.0), other)


def test_a_scale_that_is_in_the_weights_already_is_named(store):
    crosscoder = store.crosscoder()
    for name in NAMES:
        columns = crosscoder.columns(name)
        crosscoder.W_enc[:, columns] *= SCALES[name]
        crosscoder.W_dec[:, columns] /= SCALES[name]
        crosscoder.b_dec[columns] /= SCALES[name]
    with pytest.raises(UserError, match="with scales of 1: the weights contain the scale already"):
        check_on_data(crosscoder, store)
    crosscoder.scales.fill_(1.0)
    assert min(check_on_data(crosscoder, store).values()) > 0.8


def exchanged(store, scales_too):
    crosscoder = store.crosscoder()
    for t in (crosscoder.W_enc, crosscoder.W_dec):
        t.copy_(torch.cat([t[:, D:], t[:, :D]], dim=1))
    crosscoder.b_dec.copy_(crosscoder.b_dec.roll(D))
    if scales_too:
        crosscoder.scales.copy_(crosscoder.scales.flip(0))
    return crosscoder


@pytest.mark.parametrize("scales_too", [False, True])
def test_exchanged_models_are_named(store, scales_too):
    with pytest.raises(UserError, match="with the models in the order distilled, base: their order is wrong"):
        check_on_data(exchanged(store, scales_too), store)


def test_exchanged_models_are_named_even_where_fve_is_not_low(store):
    """Models that are much alike, as a base and its fine-tuned copy: exchanged, FVE is fine, and every NRN
    the wrong way round.
    """
    alike = Planted()
    mixed = 0.9 * alike.rows_mfd[0] + 0.1 * alike.rows_mfd[1]
    alike.rows_mfd[1], alike.bias[1] = mixed, alike.bias[0]
    rng = np.random.default_rng(1)
    f = rng.exponential(size=(N, F)) * (rng.random((N, F)) < 0.2)
    alike.acts = [
        torch.tensor((f @ r + b + 0.05 * rng.normal(size=(N, D))) / SCALES[n], dtype=torch.float32)
        for r, b, n in zip(alike.rows_mfd, alike.bias, NAMES)
    ]
    check_on_data(alike.crosscoder(), alike)
    wrong = exchanged(alike, scales_too=False)
    assert min(fve(wrong, alike.acts).values()) > 0.5
    with pytest.raises(UserError, match="their order is wrong"):
        check_on_data(wrong, alike)


def test_another_layer_is_all_that_is_left(store):
    with pytest.raises(
        UserError,
        match=(
            "below 0.50 in base, 0.50 in distilled, and no other scale or order makes it good.*another layer"
        ),
    ):
        check_on_data(store.crosscoder(), Planted(turned=True))


def test_what_the_card_says_is_expected(store, fake, tmp_path):
    """On tokens that a crosscoder half fits, 0.5 is no bar: the card's FVE is."""
    described(store, tmp_path / "mine")
    blurred = Planted()
    rng = np.random.default_rng(2)
    blurred.acts = [
        a + a.std() * 0.5 * torch.tensor(rng.normal(size=a.shape), dtype=torch.float32) for a in blurred.acts
    ]
    open_crosscoder(tmp_path / "mine", NAMES, store)
    assert min(check_on_data(store.crosscoder("batchtopk"), blurred, 0.4).values()) > 0.4
    # 1 - 2 (1 - 0.871), 1 - 2 (1 - 0.913)
    with pytest.raises(UserError, match="below 0.74 in base, 0.83 in distilled"):
        open_crosscoder(tmp_path / "mine", NAMES, blurred)
    open_crosscoder(tmp_path / "mine", NAMES, blurred, least=0.4)


def test_two_models_that_are_one_are_not_said_to_be_exchanged():
    """Where models are alike to the last number their order cannot be told, and is not complained of."""
    alike = Planted()
    alike.rows_mfd[1], alike.bias[1] = alike.rows_mfd[0], alike.bias[0]
    alike.acts[1] = alike.acts[0] * SCALES["base"] / SCALES["distilled"]
    check_on_data(alike.crosscoder(), alike)


def exchanged_by(share):
    """(crosscoder, store) of models that differ by a constant, with 1 - FVE = ``share`` in each as given and
    0, but for rounding, with the models exchanged.
    """
    rng = np.random.default_rng(3)
    x = torch.tensor(rng.normal(size=(N, D)), dtype=torch.float32)
    x -= x.mean(0)
    offset = torch.tensor(rng.normal(size=D), dtype=torch.float32)
    offset *= (share * x.square().sum(-1).mean()).sqrt() / offset.norm()
    store = SimpleNamespace(
        models=NAMES,
        scales=dict.fromkeys(NAMES, 1.0),
        rows=lambda split: np.arange(N),
        activations=lambda rows: [x[rows], (x + offset)[rows]],
    )
    basis = torch.tensor(np.linalg.qr(rng.normal(size=(D, D)))[0], dtype=torch.float32)
    crosscoder = CrossCoder([D, D], 2 * D, NAMES, "l1").requires_grad_(False)
    crosscoder.W_dec.copy_(torch.cat([basis, -basis]).repeat(1, 2))
    crosscoder.W_enc.copy_(crosscoder.W_dec / 2)
    crosscoder.b_dec[:D].copy_(offset)
    crosscoder.b_enc.copy_(-crosscoder.W_enc @ crosscoder.b_dec)
    return crosscoder, store


@pytest.mark.parametrize("share", [0.0, 1e-10, 1e-6, 5e-5])
def test_an_order_is_not_told_from_remainders_of_rounding_size(share):
    crosscoder, store = exchanged_by(share)
    found = check_on_data(crosscoder, store, least=1.0)  # and FVEs so near to 1 are as good as 1
    assert min(found.values()) > 0.9999
    assert found["base"] == pytest.approx(1 - share, abs=1e-7)


def test_an_order_is_told_from_remainders_above_rounding():
    crosscoder, store = exchanged_by(1e-3)
    with pytest.raises(
        UserError, match="FVE is 0.99900 .*, but 1.00000, 1.00000 with the models in the order"
    ):
        check_on_data(crosscoder, store)
    with pytest.raises(UserError, match="their order is wrong"):
        check_on_data(crosscoder, store, least=1.0)


@pytest.mark.parametrize("remainders", [(3e-13, 1e-15), (9e-5, 1e-9), (1.05e-4, 9e-5)])
def test_no_alternative_is_better_below_the_floor(store, monkeypatch, remainders):
    """Whatever the processor rounds to: remainders as they may come out, as given and in all other ways."""
    given, other = remainders
    values = iter([given])
    monkeypatch.setattr(sharing, "fve", lambda *_: dict.fromkeys(NAMES, 1 - next(values, other)))
    assert check_on_data(store.crosscoder(), store) == dict.fromkeys(NAMES, 1 - given)


def test_a_card_that_promises_everything_is_met_up_to_rounding(store, monkeypatch, fake, tmp_path):
    described(store, tmp_path / "mine")
    origin = json.loads((tmp_path / "mine" / "origin.json").read_text())
    (tmp_path / "mine" / "origin.json").write_text(json.dumps({**origin, "fve": dict.fromkeys(NAMES, 1.0)}))
    monkeypatch.setattr(sharing, "fve", lambda *_: dict.fromkeys(NAMES, 1 - 1e-9))
    open_crosscoder(tmp_path / "mine", NAMES, store)
    monkeypatch.setattr(sharing, "fve", lambda *_: dict.fromkeys(NAMES, 1 - 1e-3))
    with pytest.raises(UserError, match="FVE is 0.99900 .* below 1.00"):
        open_crosscoder(tmp_path / "mine", NAMES, store)


def test_a_reconstruction_that_is_not_finite_is_no_pass(store):
    crosscoder = store.crosscoder()
    crosscoder.b_dec[0] = torch.nan
    with pytest.raises(UserError, match="FVE is nan"):
        check_on_data(crosscoder, store)


# --- from anywhere ------------------------------------------------------------------------------------------


def test_the_format_is_told_by_what_is_there(store, tmp_path):
    crosscoder = store.crosscoder()
    crosscoder.means.copy_(crosscoder.scaled([m.float() for m in store.means.values()]))
    crosscoder.save(tmp_path / "ours")
    # a folder in a folder, as it is published
    export_replication(crosscoder, tmp_path / "hub" / "blocks.3.hook_resid_post", 3)
    export_dictionary_learning(crosscoder, tmp_path / "dl", 3)
    f = crosscoder.encode(store.acts)
    for source, layer in (
        ("ours", 3),
        ("hub", None),
        ("hub/blocks.3.hook_resid_post/cc_weights.pt", None),
        ("dl", None),
    ):
        found = open_crosscoder(tmp_path / source, NAMES, store, layer=layer)
        torch.testing.assert_close(found.encode(store.acts), f, rtol=1e-4, atol=1e-4)
        # from the file, or else from the store
        torch.testing.assert_close(found.means, crosscoder.means, rtol=1e-4, atol=1e-4)
    with pytest.raises(UserError, match="there is no"):
        open_crosscoder(tmp_path / "nowhere at all", NAMES)


def test_it_must_be_of_this_store(store, tmp_path):
    export_replication(store.crosscoder(), tmp_path, 3)
    with pytest.raises(UserError, match="output of layer .*3.* the store holds that of .*5"):
        open_crosscoder(tmp_path, NAMES, Planted(layers=dict.fromkeys(NAMES, 5)))
    with pytest.raises(UserError, match="models base, third are wanted: this crosscoder has base, distilled"):
        open_crosscoder(tmp_path, ("base", "third"), store)
    wider = Planted()
    wider.widths = {"base": D, "distilled": D + 1}
    with pytest.raises(
        UserError, match=r"distilled \(24\), and the store holds base \(24\), distilled \(25\)"
    ):
        open_crosscoder(tmp_path, NAMES, wider)


def test_the_order_wanted_is_the_order_given_out(store, tmp_path):
    export_replication(store.crosscoder(), tmp_path, 3)
    turned = open_crosscoder(tmp_path, NAMES[::-1])
    assert turned.names == NAMES[::-1]
    torch.testing.assert_close(
        turned.encode(store.acts[::-1]), store.crosscoder().encode(store.acts), rtol=1e-5, atol=1e-5
    )
    torch.testing.assert_close(turned.nrn(), store.crosscoder().nrn())


def test_a_mark_is_that_of_the_weights(store):
    one, other = store.crosscoder(), store.crosscoder()
    assert content(one) == content(other)
    other.W_dec[3, 5] += 1e-3
    assert content(one) != content(other) and content(one) != content(store.crosscoder(base=0.21))


# --- the hub ------------------------------------------------------------------------------------------------


class Fake:
    """A hub that holds folders: what was pushed comes back when it is pulled."""

    def __init__(self, root):
        self.root, self.asked, self.made, self.error = root, [], {}, None

    def __call__(self):
        return self

    def model_info(self, repo, revision=None, **_):
        return SimpleNamespace(sha=COMMIT)

    def create_repo(self, repo_id, private, exist_ok):
        if self.error:
            raise self.error
        self.made[repo_id] = private

    def upload_folder(self, repo_id, folder_path, allow_patterns, commit_message):
        (self.root / repo_id).mkdir(parents=True)
        for name in allow_patterns:
            shutil.copy(folder_path / name, self.root / repo_id / name)
        return SimpleNamespace(oid=COMMIT)

    def snapshot_download(self, repo_id, revision, allow_patterns):
        self.asked.append((repo_id, revision, allow_patterns))
        if self.error:
            raise self.error
        return str(self.root / repo_id)


@pytest.fixture
def fake(monkeypatch, tmp_path):
    fake = Fake(tmp_path / "hub")
    monkeypatch.setattr(sources, "REVISIONS", tmp_path / "revisions.json")
    monkeypatch.setattr(sources, "HfApi", fake)
    monkeypatch.setattr(sharing, "HfApi", fake)
    monkeypatch.setattr(sharing, "snapshot_download", fake.snapshot_download)
    return fake


HEALTH = {
    "fve_base": {"value": 0.871, "ci": (0.86, 0.88), "n": 9},
    "fve_distilled": {"value": 0.913, "ci": None, "n": 9},
    "l0": {"value": 31.75, "ci": (31.0, 32.5), "n": 9},
}


def described(store, folder):
    crosscoder = store.crosscoder("batchtopk")
    crosscoder.seen.copy_(torch.tensor([3_000_000, 880_123]))
    crosscoder.save(folder)
    model_card(
        folder,
        "mine",
        dict.fromkeys(NAMES, 3),
        {"base": "org/base", "distilled": "a folder"},
        HEALTH,
        "questions and thoughts.",
        "mit",
    )
    return crosscoder


def test_the_card_says_what_a_stranger_needs(store, tmp_path):
    import yaml

    described(store, tmp_path)
    text = (tmp_path / "README.md").read_text()
    front = yaml.safe_load(text.split("---")[1])
    assert front["license"] == "mit" and front["base_model"] == ["org/base"] and "crosscoder" in front["tags"]
    for said in (
        "pair mine",
        "16 features",
        "decoder layer 3",
        "| 0.2 |",
        "| 1.5 |",
        "0.871 [0.860, 0.880]",
        "0.913 |",
        "L0 31.750",
        "k = 4",
        "3,000,000 tokens, 880,123 of them distinct: questions and thoughts.",
        "open_crosscoder(",
    ):
        assert said in text, said
    assert json.loads((tmp_path / "origin.json").read_text())["layers"] == {"base": 3, "distilled": 3}
    with pytest.raises(UserError, match="lacks l0"):
        model_card(
            tmp_path,
            "mine",
            dict.fromkeys(NAMES, 3),
            dict.fromkeys(NAMES, "x"),
            {k: v for k, v in HEALTH.items() if k != "l0"},
            "",
        )
    with pytest.raises(UserError, match="layers are given for base"):
        model_card(tmp_path, "mine", {"base": 3}, dict.fromkeys(NAMES, "x"), HEALTH, "")


def test_what_is_pushed_comes_back(store, fake, tmp_path):
    crosscoder = described(store, tmp_path / "mine")
    (tmp_path / "mine" / "log.jsonl").write_text("private")
    # private, unless told otherwise
    assert push(tmp_path / "mine", "org/name") == COMMIT and fake.made == {"org/name": True}
    uploaded = sorted(p.name for p in (fake.root / "org/name").iterdir())
    assert uploaded == ["README.md", "config.json", "crosscoder.safetensors", "origin.json"]
    back = open_crosscoder("org/name", NAMES, store)
    for name, t in crosscoder.state_dict().items():
        torch.testing.assert_close(back.state_dict()[name], t, rtol=0, atol=0)
    # recorded, and from then on required
    assert json.loads(sources.REVISIONS.read_text()) == {"models": {"org/name": COMMIT}}
    assert fake.asked[0][:2] == ("org/name", COMMIT)


def test_a_revision_and_a_part_of_a_repository(store, fake):
    export_replication(store.crosscoder(), fake.root / "org/name" / "blocks.3.hook_resid_post", 3)
    export_replication(store.crosscoder(), fake.root / "org/name" / "other", 5)
    open_crosscoder("org/name@v1:blocks.3.hook_resid_post", NAMES, store)
    assert fake.asked[0][2] == [
        f"blocks.3.hook_resid_post/{k}" for k in ("*.safetensors", "*.pt", "*.json", "README.md")
    ]
    assert json.loads(sources.REVISIONS.read_text()) == {"models": {"org/name@v1": COMMIT}}
    open_crosscoder("org/name:blocks.3.hook_resid_post/cc_weights.pt", NAMES, store)
    assert fake.asked[1][2] == ["blocks.3.hook_resid_post/*.json", "blocks.3.hook_resid_post/cc_weights.pt"]
    with pytest.raises(UserError, match="several files of weights"):
        open_crosscoder("org/name", NAMES, store)


def test_the_hubs_errors_are_sentences(store, fake, tmp_path):
    store.crosscoder().save(tmp_path / "bare")
    with pytest.raises(UserError, match="has no origin.json and no README.md: write the model card first"):
        push(tmp_path / "bare", "org/name")
    described(store, tmp_path / "mine")
    fake.error = OSError("no route")
    with pytest.raises(UserError, match="the hub did not take org/name .no route."):
        push(tmp_path / "mine", "org/name")
    with pytest.raises(UserError, match="did not give org/name at cccccccc .no route."):
        pull("org/name")


def test_facts_that_papermill_made_text_of_are_refused(run):
    for source in ("", "org/name"):
        with pytest.raises(
            UserError, match="crosscoder_facts is .* must be a mapping .papermill's -p makes text"
        ):
            sharing.open_all(run, None, source, "{'layer': 1}")
