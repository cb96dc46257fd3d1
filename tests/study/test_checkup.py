"""The check-up names every planted fault, and calls the sound crosscoder sound."""

import copy
import json
from dataclasses import replace
from functools import partial

import pytest
import torch
from toys import toy_pair

from lib.crosscoder import model
from lib.crosscoder.claims import Claims, claims_of
from lib.crosscoder.exchange import export_replication
from lib.crosscoder.model import CrossCoder
from lib.crosscoder.sharing import Foreign
from lib.crosscoder.training import TrainConfig, train
from lib.features.uniqueness import score_table
from lib.runs import Run
from lib.settings import ROOT, UserError
from lib.study import checkup
from lib.study.checkup import examine, page_of
from lib.study.nulls import thresholds
from lib.study.planted import Planted, PlantedStore
from lib.text.tables import table
from lib.tools import cli

F, DRAWN = 32, model.INITIAL_NORM / 2**0.5
PLANTED = Planted(
    width=16,
    shared=10,
    rotated=6,
    rescaled=0,
    base_only=3,
    distilled_only=3,
    l0=3.0,
    tokens=8_000,
    noise=0.02,
)


def planted(seed=0, layer=3):
    store = PlantedStore(replace(PLANTED, seed=seed))
    store.layers = dict.fromkeys(store.models, layer)
    return store


def drawn_apart(widths, n_features, seed):
    """First rows as the replication draws them: one by one for each model."""
    generator = torch.Generator().manual_seed(seed)
    rows = [torch.randn(n_features, width, generator=generator) for width in widths]
    return torch.cat([model.INITIAL_NORM * torch.nn.functional.normalize(r, dim=-1) for r in rows], dim=-1)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A function that trains an L1 crosscoder on a store."""

    def make(store, seed=0):
        config = TrainConfig(
            n_features=F, variant="l1", l1=1.0, tokens=80_000, batch_size=256, rate=5e-3, seed=seed
        )
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(model, "initial_rows", drawn_apart)
            return train(store, config, tmp_path_factory.mktemp("crosscoder"))

    return make


@pytest.fixture(scope="module")
def store():
    return planted()


@pytest.fixture(scope="module")
def sound(trained, store):
    return trained(store)


@pytest.fixture(scope="module")
def claims(sound, store):
    """What is true of the sound one."""
    page = examine(sound, {0: store})
    fve = {name: float(value_of(page, f"variance explained, {name}").split()[0]) for name in sound.names}
    l0 = float(value_of(page, "features per token"))
    return Claims(fve, l0, 80_000, 6_400, None, DRAWN)


@pytest.fixture
def edited(sound):
    """A copy of the sound one to plant a fault in."""
    return copy.deepcopy(sound)


def value_of(page, name):
    return page.lines.set_index("check").value[name]


def meaning(page, name):
    return page.lines.set_index("check").meaning[name]


def test_the_sound_one_is_called_sound(sound, store, claims):
    other = planted(seed=1, layer=4)
    page = examine(sound, {0: store, 1: other}, replace(claims, shown=20_000))
    assert page.named("fault") == page.named("note") == []
    assert page.named("unknown") == ["NRN against a null", "recurrence"]
    assert page.summary.startswith("Sound in all that could be checked (not known: NRN")
    text = str(page)
    for line in page.lines.itertuples():
        assert f"{line.verdict:8}{line.check}: {line.value}" in text and line.meaning in text
        assert line.meaning.endswith(".") and len(line.meaning.split()) >= 4 and "{" not in line.meaning
    html = page.html()
    assert (
        html.count('class="plotly-graph-div"') == html.count("</html>") + 1 == 2
        and "src=" not in html.split("<script")[0]
    )


def test_every_check_has_words_for_every_verdict():
    for key, words in table("checkup").items():
        assert {"check", "normal", "sound"} <= words.keys(), key
        assert {name.split(",")[0] for name in words} <= {
            "check",
            "normal",
            "sound",
            "note",
            "fault",
            "unknown",
        }


def test_a_wrong_layer_is_named(sound, store, claims):
    page = examine(sound, {0: planted(seed=1, layer=2), 1: store, -1: planted(seed=2, layer=1)}, claims)
    assert "layer" in page.named("fault") and "trained there" in meaning(page, "layer")
    assert meaning(page, "layer").startswith("At layer 3 it leaves")


def test_a_wrong_scale_is_named(edited, store, claims):
    edited.scales[1] *= 8
    page = examine(edited, {0: store}, claims)
    assert "scale and order of the models" in page.named("fault")
    assert "the scales are wrong" in meaning(page, "scale and order of the models")


def test_exchanged_models_are_named(edited, store, claims):
    for weights in (edited.W_enc, edited.W_dec, edited.b_dec[None]):
        weights.copy_(weights.roll(PLANTED.width, dims=1))
    page = examine(edited, {0: store}, claims)
    assert "the order distilled, base" in meaning(page, "scale and order of the models")


def test_rows_of_zeros_in_training_are_named(trained, store):
    half = planted()
    half.fingerprint += "zeros"
    for acts in half._acts:
        acts[half.rows("train")[::2]] = 0
    page = examine(trained(half), {0: store})
    assert page.named("fault") == ["rows of zeros"]
    # the same from a log: half of what an untrained one fires on activations
    sound_weights = examine(trained(store), {0: store}, Claims(zero_rows=0.5))
    assert sound_weights.named("fault") == ["rows of zeros"] and "50% of the first rows" in str(sound_weights)


def test_dead_features_are_named(sound, store, claims):
    larger = CrossCoder(sound.widths, 4 * F, sound.names, "l1", scales=sound.scales.tolist())
    with torch.no_grad():
        larger.b_enc.fill_(-1e6)
        for name in ("W_enc", "W_dec", "b_enc"):
            getattr(larger, name)[:F] = getattr(sound, name)
        larger.b_dec.copy_(sound.b_dec)
    page = examine(larger, {0: store}, claims)
    assert page.named("fault") == ["features alive"] and value_of(page, "features alive").startswith("25%")


def test_an_encoder_that_training_did_not_touch_is_named(trained, store, monkeypatch):
    def only_distilled(crosscoder):
        crosscoder.W_enc.grad[:, crosscoder.columns("base")] = 0

    monkeypatch.setattr(CrossCoder, "mask_gradients", only_distilled)
    page = examine(trained(store, seed=7), {0: store})
    assert "encoder of base" in page.named("fault") and "encoder of distilled" in page.named("sound")


def test_a_difference_that_is_still_as_it_was_drawn_is_named(edited, store, claims):
    base, distilled = edited.split(edited.W_enc)
    first, second = drawn_apart(edited.widths, F, 1).split(PLANTED.width, dim=1)
    half, drawn = (base + distilled) / 2, (first - second) / 2
    edited.W_enc.copy_(torch.cat([half + drawn, half - drawn], dim=1))
    page, name = examine(edited, {0: store}, claims), "encoder, determined by training"
    assert name in page.named("note")
    alive = ~torch.isclose(half.norm(dim=-1), torch.tensor(0.0))
    shares = 1 - drawn.norm(dim=-1) ** 2 / (half.norm(dim=-1) ** 2 + drawn.norm(dim=-1) ** 2)
    assert int(value_of(page, name).split()[2].rstrip("%")) == pytest.approx(
        100 * shares[alive].median(), abs=3
    )
    # where both parts were drawn alike, nothing is left over from that
    assert name in examine(edited, {0: store}, replace(claims, drawn=0.0)).named("sound")


@pytest.mark.parametrize(
    "wrong, named",
    [
        ({"fve": {"base": 0.999, "distilled": 0.5}}, ["variance explained, base"]),
        ({"l0": 900.0}, ["features per token"]),
        ({"l0": 0.5}, ["features per token"]),
        ({"shown": 400_000_000, "distinct": 65_504}, ["tokens seen"]),
    ],
)
def test_a_wrong_claim_is_named(sound, store, claims, wrong, named, monkeypatch):
    monkeypatch.setattr(checkup, "NEAR", 0.02)
    monkeypatch.setattr(checkup.sharing, "FAR", 1e3)  # so that this check alone minds
    assert examine(sound, {0: store}, replace(claims, **wrong)).named("fault") == named


def test_null_and_seeds(sound, store):
    name, scores = "NRN against a null", score_table(sound, store, n_boot=0)
    own = thresholds(scores)  # a null that is like the pair: nothing is unique
    assert name in examine(sound, {0: store}, limits=own).named("note")
    page = examine(sound, {0: store}, limits=own.assign(threshold=0.5, low=0.5, high=0.5), others=[sound])
    assert {name, "recurrence"} <= set(page.named("sound"))
    assert value_of(page, "recurrence").startswith("100% recur in 2 crosscoders; median cosine 1.00")


# --- files and logs -----------------------------------------------------------------------------------------


def published(size):
    lines = (ROOT / "data" / "published" / "training_log.csv").read_text().splitlines()
    return "\n".join([lines[0], *(line for line in lines if line.startswith(size))])


def test_logs_are_read(tmp_path):
    foreign, log = Foreign(CrossCoder([4, 4], 32_768), {}), tmp_path / "log"
    (weights := tmp_path / "w.pt").write_bytes(b"")
    log.with_suffix(".csv").write_text(published("14B"))
    claims = claims_of(foreign, weights, log.with_suffix(".csv"))
    assert claims.zero_rows == pytest.approx(1 - 2 * 8122.95 / 32_768)
    assert claims.l0 == pytest.approx((559.882 + 608.346) / 2)
    assert claims.fve == pytest.approx(
        {"base": (0.929688 + 0.925781) / 2, "distilled": (0.921875 + 0.914062) / 2}
    )
    assert claims.drawn == pytest.approx(DRAWN)
    log.write_text(
        "100%|##| 4/4\r[0.1it/s]\n{'l0_loss': 9.0, 'l1_coeff': 0.0, 'explained_variance_A': 0.1}\nRefill\n"
        "{'l0_loss': 60.0, 'l1_coeff': 2, 'explained_variance_A': 0.8, 'explained_variance_B': 0.7}\n"
    )
    claims = claims_of(foreign, weights, log, {"l0": 50, "fve": 0.9})
    assert (claims.l0, claims.fve) == (50, {"base": 0.9, "distilled": 0.9})
    log.write_text(json.dumps({"fve": 0.6, "l0": 4.0, "l0_at_threshold": 5.0, "dead": None}) + "\n")
    assert claims_of(foreign, weights, log).l0 == 5.0 and claims_of(foreign, weights, log).zero_rows is None
    log.write_text("nothing {'lr': 3}")
    with pytest.raises(UserError, match="is no training log: it has no line with one of fve"):
        claims_of(foreign, weights, log)


@pytest.fixture
def toy(tmp_path, monkeypatch):
    pair = toy_pair(tmp_path / "pair", (16, 16))
    monkeypatch.setattr(checkup, "load_pair", lambda name: pair)
    monkeypatch.setattr(checkup, "Run", partial(Run, root=tmp_path / "root"))
    return tmp_path


def test_a_file_is_examined_on_fresh_tokens_of_its_pair(toy, capsys):
    with torch.no_grad():
        crosscoder = CrossCoder([16, 16], 64, variant="l1")
        crosscoder.b_enc.fill_(-0.01)
    export_replication(crosscoder, toy / "theirs", layer=1)
    (toy / "theirs" / "origin.json").unlink()
    words = [
        "checkup",
        str(toy / "theirs"),
        "--out",
        str(toy / "page.html"),
        "--tokens",
        "3000",
        "--reach",
        "1",
    ]
    words += ["-p", "scales", "store", "-p", "order", "['base', 'distilled']", "-p", "fve", "0.9"]
    assert cli.main(words) == 1
    text = capsys.readouterr().out
    assert "output of decoder layer 1" in text and "said to be 0.9" in text and "Not sound: variance" in text
    assert (toy / "page.html").read_text().startswith("<!doctype html>")
    layers = sorted(p.name for p in (toy / "root").rglob("layer_*"))
    assert layers == ["layer_0", "layer_1", "layer_2"]
    crosscoder.save(toy / "ours")
    for number in (1, 2):
        crosscoder.save(toy / f"ours_{number}")
    page = page_of(toy / "ours", tokens=3000, reach=0)
    assert value_of(page, "recurrence").startswith("100% recur in 3 crosscoders")
    assert value_of(page, "layer") == "output of decoder layer 1"


@pytest.mark.parametrize(
    "facts, sentence",
    [
        (
            {"layers": 3},
            "unknown fact 'layers' about the crosscoder: there are order, scales, layer, fve, l0",
        ),
        ({"l0": "many"}, "l0 is 'many': it must be a number of at least 0"),
        ({"scales": 2}, "scales is 2: it must be a mapping"),
        ({"layer": 9}, "layer is 9: it must be an integer from 0 to 3"),
        ({"layer": {"base": 1, "distilled": 2}}, "a check-up reads all models at one layer"),
    ],
)
def test_bad_facts_cost_a_sentence(toy, facts, sentence):
    CrossCoder([16, 16], 8, k=4).save(toy / "ours")
    with pytest.raises(UserError, match=sentence):
        page_of(toy / "ours", facts=facts)
