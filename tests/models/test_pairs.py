"""The registry, loading, layers, vocabularies."""

import pytest
import torch
from toys import toy_model, toy_pair
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from lib import settings
from lib.distil.organism import build_tokenizer
from lib.models.pairs import check_layer, check_vocabularies, decoder_layers, half_depth, load_pair
from lib.models.registry import REGISTRY
from lib.settings import ROOT, UserError
from lib.text.corpus import override
from lib.tools import notebooks as driver
from lib.tools import profiles


def test_every_entry_of_the_registry_is_valid():
    for name in ("tiny", "tiny_null_a", "tiny_null_b"):
        pair = load_pair(name)
        assert list(pair.models) == ["base", "distilled"] and pair.dictionary > 0
    assert load_pair("tiny_null_a").models["distilled"] == load_pair("tiny").others["null_a"]
    assert load_pair("tiny_null_a").models["base"] == load_pair("tiny").models["base"]


def test_unknown_pair_lists_the_known_ones():
    with pytest.raises(UserError, match="unknown pair 'tinny': pairs.yaml has tiny,"):
        load_pair("tinny")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("mine: {base: a/b}", "lacks distilled"),
        ("mine: {base: a/b, distilled: a/c, depth: 3}", "unknown key 'depth'"),
        ("mine: {base: a/b, distilled: a/c, dtype: float8}", "dtype of pair 'mine'"),
        ("mine: {base: a/b, distilled: a/c, layer: -1}", "layer of pair 'mine'"),
        (
            "mine: {base: a/b, distilled: a/c, remote: yonder}",
            "remote of pair 'mine' is 'yonder': it must be one of True, False, local",
        ),
        ("mine: {base: a/b, distilled: a/c, corpus: [some.txt]}", "corpus of pair 'mine'"),
        ("mine: {like: yours}", "like 'yours'"),
        ("mine: [", "not valid YAML"),
    ],
)
def test_a_wrong_entry_gets_one_sentence(tmp_path, text, message):
    (tmp_path / "own.yaml").write_text(text)
    with pytest.raises(UserError, match=message):
        load_pair("mine", tmp_path / "own.yaml")


def test_own_registry_resolves_folders_beside_it(tmp_path):
    toy_pair(tmp_path)
    (tmp_path / "own.yaml").write_text(
        "mine: {base: base, distilled: distilled, tokenizer: tokenizer, others: {again: base}}"
    )
    pair = load_pair("mine", tmp_path / "own.yaml")
    model = pair.load("distilled")
    assert (
        not model.training
        and next(model.parameters()).dtype == torch.float32
        and not next(model.parameters()).requires_grad
    )
    assert pair.fingerprint("again") == pair.fingerprint("base") != pair.fingerprint("distilled")
    with pytest.raises(UserError, match="no model 'control': it has base, distilled, again"):
        pair.load("control")
    assert list(pair.between("again", "base").models) == ["again", "base"]


def test_folders_below_the_home_and_named_by_variables(tmp_path, monkeypatch):
    toy_pair(tmp_path / "models", (16, 16))
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("MODELS", str(tmp_path / "models"))
    (tmp_path / "models" / "text.txt").write_text("anna is late .")
    (tmp_path / "own.yaml").write_text(
        "mine: {base: ~/models/base, distilled: $MODELS/distilled, tokenizer: '${MODELS}/tokenizer',"
        " corpus: [{path: ~/models/text.txt, kind: trace}]}"
    )
    pair = load_pair("mine", "~/own.yaml")
    assert (
        pair.models["base"] == tmp_path / "models" / "base"
        and pair.models["distilled"].is_dir()
        and pair.tokenizer_source.is_dir()
    )
    assert pair.corpus == ((str(tmp_path / "models" / "text.txt"), "trace"),)
    assert override(pair, general="~/models/text.txt").corpus[0] == (pair.corpus[0][0], "general")
    monkeypatch.setenv("PAIRS_REGISTRY", "$HOME/own.yaml")
    assert load_pair("mine") == pair


def test_a_folder_that_is_missing_is_no_hub_id_where_its_neighbours_are(tmp_path):
    toy_pair(tmp_path / "models", (16, 16))
    (tmp_path / "own.yaml").write_text(
        "mine: {base: models/base, distilled: models/distilled, tokenizer: models/tokenizer, others: {null_a:"
        " models/nope}}\nhub: {base: models/of_the_hub@main, distilled: org/name}"
    )
    pair = load_pair("mine", tmp_path / "own.yaml")
    with pytest.raises(
        UserError, match="model 'null_a' of pair 'mine' is missing: .*models/nope does not exist"
    ):
        pair.check_folders()
    assert load_pair("hub", tmp_path / "own.yaml").models == {
        "base": "models/of_the_hub@main",
        "distilled": "org/name",
    }


def test_a_registry_is_named_for_a_whole_process(tmp_path, monkeypatch):
    toy_pair(tmp_path)
    (tmp_path / "own.yaml").write_text(
        "tiny: {base: base, distilled: distilled, tokenizer: tokenizer, dictionary: 77, remote: true}"
    )
    monkeypatch.setenv("PAIRS_REGISTRY", str(tmp_path / "own.yaml"))
    assert load_pair("tiny").dictionary == 77 and load_pair("tiny").models["base"] == tmp_path / "base"
    assert load_pair("tiny").remote is True and load_pair("tiny", REGISTRY).remote is False
    assert load_pair("tiny", REGISTRY).dictionary == 256  # what is given goes before it
    with pytest.raises(UserError, match="unknown pair 'smol': own.yaml has tiny"):
        load_pair("smol")


def test_missing_models_and_pickles_are_refused(tmp_path):
    pair = toy_pair(tmp_path)
    (tmp_path / "base" / "model.safetensors").unlink()
    torch.save(toy_model(16, 0).state_dict(), tmp_path / "base" / "pytorch_model.bin")  # never unpickled
    with pytest.raises(UserError, match="model 'base' of pair 'toy'"):
        pair.load("base")
    with pytest.raises(UserError, match="does not exist"):
        load_pair("nothing", tmp_path / "nowhere.yaml")


def test_half_depth_of_qwen_and_llama():
    llama = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=32, hidden_size=8, num_hidden_layers=7, num_attention_heads=2, intermediate_size=8
        )
    )
    assert (
        half_depth(toy_model(16, 0, layers=6)) == 2
        and half_depth(llama) == 2
        and len(decoder_layers(llama)) == 7
    )
    assert half_depth(toy_model(16, 0, layers=1)) == 0
    assert check_layer(llama, 6) == 6
    with pytest.raises(UserError, match="from 0 to 6"):
        check_layer(llama, 7)


def test_vocabularies_that_differ_are_refused_unless_known():
    ours, theirs = build_tokenizer(), build_tokenizer()
    assert check_vocabularies({"base": ours, "distilled": theirs}) == ()
    text = theirs.backend_tokenizer.to_str().replace('"wait":', '"wait!":')
    theirs = PreTrainedTokenizerFast(tokenizer_object=type(ours.backend_tokenizer).from_str(text))
    differing = ours.get_vocab()["wait"]
    with pytest.raises(
        UserError, match=f"differ in 1 ids \\(id {differing} is 'wait' in base and 'wait!' in distilled"
    ):
        check_vocabularies({"base": ours, "distilled": theirs})
    assert check_vocabularies({"base": ours, "distilled": theirs}, [differing]) == (differing,)


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ("{hub: org/texts, kind: trace}", None),
        ("{hub: org/texts@v1, files: '*.jsonl', kind: general}", None),
        ("{hub: org/texts, config: small, split: test, kind: trace}", None),
        ("{hub: org/texts, split: test, kind: trace}", None),
        ("{hub: org/texts, config: small, files: '*.jsonl', kind: trace}", "corpus of pair 'mine' must be"),
        ("{hub: org/texts, path: some.txt, kind: trace}", "corpus of pair 'mine' must be"),
        ("{path: some.txt, files: '*.jsonl', kind: trace}", "corpus of pair 'mine' must be"),
        ("{hub: org/texts, kind: thoughts}", "corpus of pair 'mine' must be"),
        ("{hub: texts, kind: trace}", "names neither a file nor a data set on the hub"),
    ],
)
def test_a_corpus_from_the_hub(tmp_path, entry, message):
    (tmp_path / "own.yaml").write_text(f"mine: {{base: a/b, distilled: a/c, corpus: [{entry}]}}")
    if message:
        with pytest.raises(UserError, match=message):
            load_pair("mine", tmp_path / "own.yaml")
    else:
        ((source, kind),) = load_pair("mine", tmp_path / "own.yaml").corpus
        assert source.startswith("hub:org/texts") and kind in ("trace", "general")


@pytest.mark.parametrize(
    "file", sorted((ROOT / "notebooks" / "profiles").glob("*.yaml")), ids=lambda file: file.stem
)
def test_a_profile_names_parameters_that_its_notebooks_have(file):
    notebooks = {path.stem: path for path in (ROOT / "notebooks").glob("[0-9][0-9]_*.ipynb")}
    profile = profiles.read_profile(file.parent, file.stem, list(notebooks))
    for stem, values in profile.items():
        if stem in notebooks:
            assert set(profiles.checked(stem, driver.parameters_of(notebooks[stem]), values or {})) == set(
                values or {}
            )


def test_the_papers_profile_has_the_papers_numbers():
    profile = settings.read_yaml(ROOT / "notebooks" / "profiles" / "paper.yaml")
    harvest, training = profile["01_harvest_activations"], profile["02_train_crosscoder"]
    assert harvest["tokens"] == training["tokens"] == 400_000_000 and training["n_features"] == 32_768
    assert (
        training["variant"],
        training["batch_size"],
        training["learning_rate"],
        training["l1_coefficient"],
    ) == ("l1", 4096, 5e-5, 2.0)


def test_the_night_on_one_gpu_is_what_its_arithmetic_says():
    """The profile's numbers, from the configuration of Qwen2.5-1.5B and the rates that it states."""
    profile = settings.read_yaml(ROOT / "notebooks" / "profiles" / "gpu24.yaml")
    width, ffn, kv, layers, vocabulary = 1536, 8960, 256, 28, 151_936
    layer = 2 * width**2 + 2 * width * kv + 3 * width * ffn
    tokens, training = profile["01_harvest_activations"]["tokens"], profile["02_train_crosscoder"]
    harvest_hours = 2 * layers // 2 * (2 * layer + 4 * width * 512) * tokens / 28e12 / 3600
    dense_hours = 10 * 2 * width * training["n_features"] * training["tokens"] / 14e12 / 3600
    assert 1.2 < harvest_hours < 1.4 and 0.9 < dense_hours < 1.1 and harvest_hours + dense_hours < 10
    assert 2 * width * 2 * tokens == pytest.approx(307e9, rel=0.01)
    assert 2 * 2 * (layers * layer + vocabulary * width) + 16 * 4 * width * training["n_features"] < 24e9
