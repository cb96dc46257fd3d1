"""Bad input, and what is said of it: each case must give one clear sentence, and lose nothing. ``make
faults`` counts them.

A case is a line of a table: what is done, and words that the sentence must hold. What was there before is
compared byte by byte.
"""

import gzip
import hashlib
import html
import json
import re
import string
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from toys import toy_model, toy_pair, toy_store

from lib import figures
from lib.activations.harvest import harvest_activations
from lib.activations.store import Store
from lib.crosscoder.codes import SplitCodes, codes
from lib.crosscoder.model import CrossCoder, check_feature
from lib.crosscoder.sharing import open_crosscoder
from lib.crosscoder.training import TrainConfig, train
from lib.distil.organism import build_tokenizer
from lib.features import explorer
from lib.features import naming as labelling
from lib.features.explorer import Columns
from lib.models.pairs import Pair, check_layer, check_vocabularies, load_pair
from lib.models.reader import LayerReader
from lib.models.registry import KINDS
from lib.runs import Run
from lib.settings import ROOT, UserError
from lib.text.chat import Trace
from lib.text.corpus import build, override
from lib.text.files import read_items
from lib.tools import compare as check
from lib.tools.cli import main
from lib.tools.notebooks import parameters_for
from lib.tools.profiles import read_profile

pytestmark = pytest.mark.fault("bad input")
settings.register_profile("same examples every time", derandomize=True, database=None)
settings.load_profile("same examples every time")


def state_of(folder: Path) -> dict[str, str]:
    """Checksums of all files below a folder."""
    return {
        p.relative_to(folder).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest()
        for p in sorted(folder.rglob("*"))
        if p.is_file() and p.suffix != ".lock"
    }


def sentence_of(error: UserError) -> str:
    """The message, after it was looked at: something a person can read, with no traceback and of bearable
    length.
    """
    text = str(error)
    assert 15 < len(text) < 700 and "Traceback" not in text and "object at 0x" not in text, text[:800]
    assert re.search(r"[a-z]{2,} [a-z]{2,}", text), f"no sentence: {text}"
    return text


# --- the command line: parameters, names, files -------------------------------------------------------------

COMMANDS = {
    "a parameter that no notebook has": (["--only", "03", "-p", "nope", "1"], "has no parameter 'nope'"),
    "text where a number belongs": (
        ["--only", "03", "-p", "feature", "abc"],
        "feature of 03_inspect_features is 'abc'",
    ),
    "a number with a point for a whole one": (
        ["--only", "02", "-p", "k", "2.5"],
        "k of 02_train_crosscoder is 2.5",
    ),
    "true for a number": (["--only", "02", "-p", "k", "True"], "k of 02_train_crosscoder is True"),
    "a list for a number": (["--only", "02", "-p", "tokens", "[1, 2]"], "tokens of 02_train_crosscoder"),
    "a list of the wrong things": (
        ["--only", "04", "-p", "strengths", "['a']"],
        "strengths of 04_ablate_and_steer",
    ),
    "a parameter for several notebooks": (["--only", "02", "03", "-p", "k", "4"], "one notebook"),
    "a parameter that is given twice": (
        ["--only", "02", "-p", "k", "4", "-p", "k", "8"],
        "-p k is given twice",
    ),
    "an option that is given twice": (["--pair", "tiny", "--pair", "smol"], "--pair is given twice"),
    "a parameter as name=value": (
        ["--only", "02", "-p", "k=4", "--pair", "tiny"],
        "-p needs a name and a value",
    ),
    "a pair that is not there": (["--pair", "nope"], "unknown pair 'nope'"),
    "a pair whose name is a path": (["--pair", "../tiny"], "unknown pair '../tiny'"),
    "a profile that is not there": (["--profile", "nope"], "unknown profile 'nope'"),
    "a profile whose name is a path": (["--profile", "../../etc/passwd"], "unknown profile"),
    "a notebook that is not there": (["--only", "99"], "99"),
    "a registry that is not there": (["--registry", "nowhere.yaml"], "nowhere.yaml does not exist"),
    "a run whose name leaves the folder": (["--only", "03", "-p", "run", "../../elsewhere"], "plain name"),
    "a file that is no notebook": (["canonical", "README.md"], "not a notebook"),
}


@pytest.mark.parametrize("name", COMMANDS)
def test_the_driver_refuses_before_anything_runs(name, capsys):
    arguments, words = COMMANDS[name]
    before = state_of(ROOT / "notebooks")
    assert main(arguments if arguments[0] == "canonical" else ["figures", *arguments]) == 2
    said = capsys.readouterr()
    assert words in said.err and said.err.startswith("error: ") and "Traceback" not in said.err
    assert state_of(ROOT / "notebooks") == before


OTHER_COMMANDS = {
    "a part of the study that is not there": (["study", "--only", "nope"], "unknown"),
    "the study of a pair that is not there": (["study", "--pair", "nope"], "unknown pair"),
    "the explorer of a run that is not there": (["explore", "--profile", "nope"], "run notebook 03"),
    "the explorer of a run whose name is a path": (["explore", "--profile", "../x"], "plain name"),
    "a report over somebody's folder": (["report", "--out", str(ROOT / "lib")], "not a report"),
    "a file of labels that is not there": (
        ["agreement", "sentences", "nowhere.csv"],
        "the file sentences does not exist",
    ),
    "a command that is not there": (["harvset"], "No such command 'harvset'"),
    "an option that is not there": (["figures", "--piar", "tiny"], "No such option: --piar"),
    "an option without its value": (["figures", "--pair"], "requires an argument"),
    "a parameter without its value": (["figures", "-p", "k"], "-p needs a name and a value"),
    "text for a number": (["figures", "--timeout", "long"], "Invalid value for '--timeout'"),
    "a harvest of a part that is no part": (["harvest", "--part", "8/8"], "part"),
    "a recipe that is not there": (["distil", "nowhere/huge"], "there is no recipe for 'huge'"),
    "a stage that is not there": (["distil", "data/pairs/tiny", "--stages", "nope"], "stage is 'nope'"),
    "a field that no training has": (
        ["train", "--store", "a", "--folder", "b", "--n-fetures", "8"],
        "TrainConfig has no parameter 'n_fetures'",
    ),
}


@pytest.mark.parametrize("name", OTHER_COMMANDS)
def test_other_commands_say_what_is_wrong(name, capsys):
    arguments, words = OTHER_COMMANDS[name]
    assert main(arguments) == 2
    said = capsys.readouterr().err
    assert words in said and said.startswith("error: ") and said.count("\n") == 1


# --- registries of pairs ------------------------------------------------------------------------------------

FINE = {
    "base": "data/pairs/tiny/base",
    "distilled": "data/pairs/tiny/distilled",
    "tokenizer": "data/pairs/tiny/tokenizer",
}
REGISTRIES = {
    "an empty file": (b"", "holds no pairs"),
    "a list": (b"- mine\n", "holds a list: it must hold name: value entries"),
    "a word": (b"mine", "holds a str"),
    "UTF-16, as PowerShell writes it": ("mine: {base: a/b, distilled: a/c}".encode("utf-16"), "not UTF-8"),
    "a pair that is called 7": (b"7: {base: a/b, distilled: a/c}\n", "has the name 7, which is no text"),
    "a pair that is called no": (
        b"no: {base: a/b, distilled: a/c}\n",
        "has the name False, which is no text",
    ),
    "a tab": (b"mine:\n\tbase: x\n", "not valid YAML"),
    "a quote that is not closed": (b'mine: {base: "x}', "not valid YAML"),
    "bytes that are no text": (b"\xff\xfe\x00mine: 1", "not UTF-8"),
    "an object that python would build": (
        b"mine: !!python/object/apply:os.system ['true']",
        "not valid YAML",
    ),
    "a pair that stands there twice": (
        b"mine: {base: a/b, distilled: a/c}\nmine: {base: a/d, distilled: a/c}\n",
        "'mine' stands there twice",
    ),
    "a key that stands there twice": (
        b"mine: {base: a/b, base: a/d, distilled: a/c}\n",
        "'base' stands there twice",
    ),
    "an anchor that is not there": (b"mine: *other\n", "not valid YAML"),
    "a base that is empty": (b"mine: {base: , distilled: a/b}\n", "base of pair 'mine'"),
    "like a list": (b"mine: {like: [q]}\n", "which must be an entry"),
    "ids that are one word": (
        b"mine: {base: a/b, distilled: a/c, differing_ids: abc}\n",
        "differing_ids of pair 'mine'",
    ),
    "a corpus whose path is a number": (
        b"mine: {base: a/b, distilled: a/c, corpus: [{path: 3, kind: trace}]}\n",
        "corpus of pair 'mine'",
    ),
    "an entry that is a word": (yaml.safe_dump({"mine": "tiny"}).encode(), "pair 'mine'"),
    "an entry that is a list": (yaml.safe_dump({"mine": ["base"]}).encode(), "pair 'mine'"),
    "an entry that is empty": (b"mine:\n", "pair 'mine'"),
    "an unknown key": (
        yaml.safe_dump({"mine": {**FINE, "temperature": 1}}).encode(),
        "unknown key 'temperature'",
    ),
    "no base": (yaml.safe_dump({"mine": {"distilled": "x"}}).encode(), "lacks base"),
    "a precision that is none": (
        yaml.safe_dump({"mine": {**FINE, "dtype": "float8"}}).encode(),
        "dtype of pair 'mine'",
    ),
    "a layer below zero": (yaml.safe_dump({"mine": {**FINE, "layer": -3}}).encode(), "layer of pair 'mine'"),
    "a layer in words": (
        yaml.safe_dump({"mine": {**FINE, "layer": "middle"}}).encode(),
        "layer of pair 'mine'",
    ),
    "a dictionary of nothing": (
        yaml.safe_dump({"mine": {**FINE, "dictionary": 0}}).encode(),
        "dictionary of pair 'mine'",
    ),
    "tokens in words": (
        yaml.safe_dump({"mine": {**FINE, "tokens": "many"}}).encode(),
        "tokens of pair 'mine'",
    ),
    "a corpus that is a word": (
        yaml.safe_dump({"mine": {**FINE, "corpus": "web"}}).encode(),
        "corpus of pair 'mine'",
    ),
    "a corpus of an unknown kind": (
        yaml.safe_dump({"mine": {**FINE, "corpus": [{"path": "a.txt", "kind": "poem"}]}}).encode(),
        "corpus of pair 'mine'",
    ),
    "remote on another planet": (
        yaml.safe_dump({"mine": {**FINE, "remote": "mars"}}).encode(),
        "remote of pair 'mine'",
    ),
    "like a pair that is not there": (yaml.safe_dump({"mine": {"like": "nobody"}}).encode(), "like 'nobody'"),
    "others called base": (
        yaml.safe_dump({"mine": {**FINE, "others": {"base": "a/b"}}}).encode(),
        "others called 'base'",
    ),
    "others whose name is a path": (
        yaml.safe_dump({"mine": {**FINE, "others": {"../x": "a/b"}}}).encode(),
        "give each a plain name of its own",
    ),
    "a base of spaces": (yaml.safe_dump({"mine": {**FINE, "base": " "}}).encode(), "pairs.yaml is empty"),
    "a number with a leading zero": (
        b"mine: {base: a/b, distilled: a/c, tokens: 0100}\n",
        "'0100' is no decimal number",
    ),
    "a number with a colon": (b"mine: {base: a/b, distilled: a/c, tokens: 1:30}\n", "'1:30' is no decimal"),
    "an id below zero": (
        yaml.safe_dump({"mine": {**FINE, "differing_ids": [-1]}}).encode(),
        "differing_ids of pair 'mine'",
    ),
    "yes for a number": (b"mine: {base: a/b, distilled: a/c, layer: yes}\n", "layer of pair 'mine' is True"),
    "a date for a folder": (b"mine: {base: 2024-01-01, distilled: a/c}\n", "base of pair 'mine'"),
    "two documents": (b"mine: {base: a/b}\n---\nmine: {base: a/d}\n", "not valid YAML"),
    "others that are a list": (
        yaml.safe_dump({"mine": {**FINE, "others": ["a"]}}).encode(),
        "others of pair 'mine'",
    ),
    "ids that are a number": (
        yaml.safe_dump({"mine": {**FINE, "differing_ids": 7}}).encode(),
        "differing_ids of pair 'mine'",
    ),
    "ids that are words": (
        yaml.safe_dump({"mine": {**FINE, "differing_ids": ["a"]}}).encode(),
        "differing_ids of pair 'mine'",
    ),
}


@pytest.mark.parametrize("name", REGISTRIES)
def test_a_registry_is_read_or_refused(name, tmp_path):
    content, words = REGISTRIES[name]
    (tmp_path / "pairs.yaml").write_bytes(content)
    with pytest.raises(UserError) as error:
        load_pair("mine", tmp_path / "pairs.yaml")
    assert words in sentence_of(error.value)
    assert state_of(tmp_path) == {"pairs.yaml": hashlib.sha256(content).hexdigest()}


# --- text ---------------------------------------------------------------------------------------------------

TEXTS = {
    "bytes that are no text": ("a.txt", b"\x89PNG\r\n\x1a\n\xff\xff", "not UTF-8"),
    "zeros": ("a.txt", b"\0" * 5000, "is not text"),
    "a gzip file with damage inside": (
        "a.txt.gz",
        gzip.compress(b"a b c" * 50)[:10] + b"\xff" * 60,
        "not a whole gzip file",
    ),
    "turns that are words": ("a.jsonl", b'{"conversations": ["hello"]}\n', "line 1 of a.jsonl"),
    "turns that are numbers": (
        "a.jsonl",
        b'{"conversations": [{"from": "user", "value": 3}]}\n',
        "line 1 of a.jsonl",
    ),
    "latin-1": ("a.txt", "café\n".encode("latin-1"), "not UTF-8"),
    "a gzip file that breaks off": ("a.txt.gz", gzip.compress(b"text " * 500)[:40], "not a whole gzip file"),
    "text that is called gzip": ("a.jsonl.gz", b'{"text": "a"}\n', "not a whole gzip file"),
    "a line that is no JSON": ("a.jsonl", b'{"text": "a"}\nhello\n', "line 2 of a.jsonl"),
    "a line that is a number": ("a.jsonl", b"7\n", "line 1 of a.jsonl"),
    "a line without text": ("a.jsonl", b'{"words": "a"}\n', "line 1 of a.jsonl"),
    "text that is a number": ("a.jsonl", b'{"text": 5}\n', "line 1 of a.jsonl"),
    "a trace without an answer": ("a.jsonl", b'{"question": "a", "thinking": "b"}\n', "line 1 of a.jsonl"),
    "a conversation without a thought": (
        "a.jsonl",
        b'{"conversations": [{"from": "user", "value": "a"}]}\n',
        "line 1 of a.jsonl",
    ),
}


@pytest.mark.parametrize("name", TEXTS)
def test_a_text_is_read_or_refused(name, tmp_path):
    file, content, words = TEXTS[name]
    (tmp_path / file).write_bytes(content)
    with pytest.raises(UserError) as error:
        list(read_items(tmp_path / file))
    assert words in sentence_of(error.value)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(content=st.binary(max_size=200))
def test_any_bytes_are_texts_or_a_sentence(tmp_path, content):
    for name in ("a.txt", "a.jsonl", "a.jsonl.gz"):
        (tmp_path / name).write_bytes(content)
        try:
            assert all(isinstance(item, str | Trace) for item in read_items(tmp_path / name))
        except UserError as error:
            sentence_of(error)


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    return toy_pair(tmp_path_factory.mktemp("pair"))


def corpus_of(pair, folder, content: bytes):
    (folder / "text.txt").write_bytes(content)
    return override(pair, str(folder / "text.txt"), str(folder / "text.txt"))


def test_a_corpus_without_text_is_refused(pair, tmp_path):
    with pytest.raises(UserError) as error:
        harvest_activations(
            corpus_of(pair, tmp_path, b"\n\n"),
            build(corpus_of(pair, tmp_path, b"\n\n"), 500),
            tmp_path / "store",
        )
    assert "text" in sentence_of(error.value) or "documents" in str(error.value)
    assert not (tmp_path / "store" / "manifest.json").exists()


def test_one_line_of_two_million_characters_becomes_windows(pair, tmp_path):
    (tmp_path / "long.txt").write_bytes((b"anna is late " + b"o" * 580 + b" . ") * 3_400)
    (tmp_path / "short.txt").write_bytes(b"anna is late . " * 2000)
    mine = override(pair, traces=str(tmp_path / "long.txt"), general=str(tmp_path / "short.txt"))
    (line,) = read_items(tmp_path / "long.txt")
    assert len(line) >= 2_000_000
    documents = [d for _, d in zip(range(20), build(mine, 2000, max_length=128))]
    assert max(len(d.tokens) for d in documents) <= 128
    assert all(
        sum(len(d.tokens) for d in documents if d.kind == kind) >= 900 for kind in ("trace", "general")
    )


def test_a_beginning_written_out_in_a_text_is_no_beginning(pair, tmp_path):
    mine = corpus_of(pair, tmp_path, b"anna is <eos> late <bos> . <pad> <unk>\n\nanna is here .\n")
    tokenizer = mine.tokenizer()
    special = {i for name, i in tokenizer.get_vocab().items() if name == "<bos>"}
    assert special
    for document in zip(range(2), build(mine, 20)):
        assert not special & set(document[1].tokens[1:]), "only the first token opens a text"


def test_a_corpus_that_is_not_there(pair):
    for name in ("nowhere.txt", "./nowhere", "~/nowhere.jsonl"):
        with pytest.raises(UserError) as error:
            override(pair, traces=name)
        assert "nowhere" in sentence_of(error.value)


# --- models, vocabularies, layers ---------------------------------------------------------------------------


def test_weights_that_are_pickles_are_refused(tmp_path):
    pair = toy_pair(tmp_path)
    file = next((tmp_path / "base").glob("*.safetensors"))
    torch.save({"weights": torch.zeros(2)}, tmp_path / "base" / "pytorch_model.bin")
    file.unlink()
    with pytest.raises(UserError) as error:
        pair.load("base")
    assert "safetensors" in sentence_of(error.value)


def test_a_crosscoder_that_is_a_pickle_of_objects_is_refused(tmp_path):
    class Payload:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "was_run",))

    torch.save({"W_enc": Payload()}, tmp_path / "cc_weights.pt")
    (tmp_path / "cfg.json").write_text("{}")
    with pytest.raises(UserError) as error:
        open_crosscoder(tmp_path, ("base", "distilled"))
    sentence_of(error.value)
    assert not (tmp_path / "was_run").exists(), "code of the file was run"


def test_a_safetensors_file_that_breaks_off(tmp_path):
    pair = toy_pair(tmp_path)
    file = next((tmp_path / "base").glob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:-200])
    with pytest.raises(UserError) as error:
        pair.load("base")
    assert "base" in sentence_of(error.value)


@pytest.mark.parametrize(
    "wrong, words", (({"a": torch.zeros(2)}, "crosscoder"), ({"W_enc": torch.zeros(2, 3)}, "W_enc"))
)
def test_tensors_that_are_no_crosscoder(tmp_path, wrong, words):
    save_file(wrong, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError) as error:
        open_crosscoder(tmp_path, ("base", "distilled"))
    sentence_of(error.value)


@pytest.mark.parametrize("layer", (-1, 4, 99, 1.5, "2", True))
def test_a_layer_that_the_model_does_not_have(layer):
    with pytest.raises(UserError) as error:
        check_layer(toy_model(16, 0), layer)
    assert "layer" in sentence_of(error.value)


def test_vocabularies_that_differ_are_refused_with_an_example(tokenizer):
    class Shifted:
        def get_vocab(self):
            return {token: i + 1 for token, i in tokenizer.get_vocab().items()}

    with pytest.raises(UserError) as error:
        check_vocabularies({"base": tokenizer, "distilled": Shifted()})
    assert "id 0 is" in sentence_of(error.value)


# --- activations, training, features ------------------------------------------------------------------------


@pytest.mark.parametrize("value", (float("nan"), float("inf"), 1e6))
def test_activations_that_are_not_finite_are_not_stored(tmp_path, value):
    pair = toy_pair(tmp_path)
    model = pair.load("base")
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight.fill_(value)
    with pytest.raises(UserError) as error:
        harvest_activations(
            pair,
            build(pair, 300),
            tmp_path / "store",
            models={"base": model, "distilled": pair.load("distilled")},
        )
    assert "base" in sentence_of(error.value) and not (tmp_path / "store" / "manifest.json").exists()


CONFIGS = {
    "more features per token than there are": (dict(n_features=8, k=9), "k"),
    "no features": (dict(n_features=0), "n_features"),
    "features in words": (dict(n_features="many"), "n_features"),
    "an unknown sparsity": (dict(variant="l3"), "variant"),
    "no tokens": (dict(tokens=0), "tokens"),
    "a batch of nothing": (dict(batch_size=0), "batch_size"),
    "a learning rate below zero": (dict(rate=-1.0), "rate"),
    "a learning rate that is no number": (dict(rate=float("nan")), "rate"),
    "an unknown precision": (dict(precision="int4"), "precision"),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_a_crosscoder_that_cannot_be_trained(name):
    changes, words = CONFIGS[name]
    with pytest.raises(UserError) as error:
        TrainConfig(**{"n_features": 16, "k": 4, "tokens": 1000, **changes})
    assert words in sentence_of(error.value)


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return toy_store(tmp_path_factory.mktemp("store"), tokens=1500)


class Edited:
    """A store whose activations are changed on their way."""

    def __init__(self, store, change):
        self._store, self._change = store, change

    def __getattr__(self, name):
        return getattr(self._store, name)

    def __len__(self):
        return len(self._store)

    def activations(self, rows):
        return [self._change(acts) for acts in self._store.activations(rows)]


def test_activations_that_do_not_vary_give_numbers_or_a_sentence(store, tmp_path):
    crosscoder = CrossCoder(list(store.widths.values()), 8, variant="l1", names=list(store.models))
    constant = Edited(store, torch.ones_like)
    try:
        found = codes(crosscoder, constant, "report")
        assert np.isfinite(found.codes.data).all()
    except UserError as error:
        sentence_of(error)
    broken = Edited(store, lambda acts: torch.full_like(acts, float("nan")))
    with pytest.raises(UserError) as error:
        codes(crosscoder, broken, "report")
    assert "not finite" in sentence_of(error.value)


@pytest.mark.parametrize("feature", (-1, 8, 10**9, 1.0, float("nan"), "3", True, None))
def test_a_feature_that_does_not_exist(feature):
    with pytest.raises(UserError) as error:
        check_feature(CrossCoder([4, 4], 8, variant="l1"), feature)
    assert "does not exist" in sentence_of(error.value)


def test_a_crosscoder_of_other_models_is_refused(store):
    with pytest.raises(UserError) as error:
        codes(CrossCoder([16, 24], 8, variant="l1", names=("a", "b")), store, "report")
    assert "must be the same models" in sentence_of(error.value)


def test_a_store_without_a_split(store, tmp_path):
    with pytest.raises(UserError) as error:
        codes(CrossCoder([16, 24], 8, variant="l1"), store, "holidays")
    assert "holidays" in sentence_of(error.value)


# --- paths that leave their folder --------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ("../x", "/etc", "a/b", "a\\b", "", ".", "..", ".hidden", "a b", "a\nb", 7, None)
)
def test_names_of_runs_stay_in_their_folder(name, tmp_path):
    for make in (lambda: Run("tiny", name, tmp_path), lambda: Run(name, "default", tmp_path)):
        with pytest.raises(UserError) as error:
            make()
        assert "plain name" in sentence_of(error.value)
    assert not list(tmp_path.iterdir())


@settings(max_examples=200, deadline=None)
@given(name=st.text(alphabet=string.printable, max_size=20))
def test_any_name_of_a_run_is_a_folder_of_its_own_or_refused(name):
    try:
        folder = Run("tiny", name, Path("/nowhere")).path("store")
    except UserError as error:
        sentence_of(error)
    else:
        assert folder.parent.parent.as_posix() == "/nowhere/data/runs/tiny" and ".." not in folder.parts


@pytest.mark.parametrize("place", ("../outside.safetensors", "/etc/passwd"))
def test_a_manifest_cannot_name_files_elsewhere(tmp_path, place):
    store = toy_store(tmp_path, tokens=1500)
    file = store.path / "manifest.json"
    manifest = json.loads(file.read_text())
    name, facts = next(iter(manifest["shards"].items()))
    target = store.path / place
    if not target.exists():
        target.write_bytes((store.path / name).read_bytes())
    manifest["shards"] = {place: facts, **{n: f for n, f in manifest["shards"].items() if n != name}}
    file.write_text(json.dumps(manifest))
    with pytest.raises(UserError) as error:
        Store.open(store.path)
    sentence_of(error.value)


# --- the endpoint that names features -----------------------------------------------------------------------


@pytest.mark.parametrize(
    "url", ("nonsense", "ftp://host/v1", "http://", "localhost:8000", "http://127.0.0.1:1/v1")
)
def test_an_endpoint_that_is_none(url, monkeypatch, tmp_path):
    monkeypatch.setenv("LABEL_URL", url)
    monkeypatch.setenv("LABEL_MODEL", "m")
    monkeypatch.setattr(labelling.time, "sleep", lambda seconds: None)
    texts = pd.DataFrame(
        {"feature": [1], "rank": [1], "context": ["a «b» c"], "text": ["a «b» c"], "activation": [1.0]}
    )
    with pytest.raises(UserError) as error:
        labelling.label_features(texts, [1], tmp_path, labelling.endpoint_from_environment())
    assert url.removeprefix("http://")[:9] in sentence_of(error.value)


# --- texts that would be more than text ---------------------------------------------------------------------

HOSTILE = (
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "</div><iframe src=javascript:alert(1)>",
    "&lt;script&gt;",
    "<svg/onload=alert(1)>",
)


@settings(max_examples=100, deadline=None)
@given(words=st.lists(st.one_of(st.sampled_from(HOSTILE), st.text(max_size=12)), min_size=1, max_size=6))
def test_words_are_shown_and_not_interpreted(words):
    shown = figures.shaded_tokens(words, np.ones(len(words)), label=words[0]).data
    inside = re.sub(r'<(/?)(div|span|b)( (style|title)="[^"<>]*")*>', "", shown)
    assert "<" not in inside and all(html.escape(word) in shown for word in words)
    lines = figures.labelled_lines(
        [(words[0] if words[0] in figures.COLOURS else "reflection", words, False)]
    ).data
    assert "<script" not in lines and "<img" not in lines and "<iframe" not in lines


def test_contexts_and_explorer_escape_words_and_labels(store):
    class Tokenizer:
        def convert_ids_to_tokens(self, ids):
            return [HOSTILE[i % len(HOSTILE)] for i in ids]

    crosscoder = CrossCoder(list(store.widths.values()), 8, variant="l1", names=list(store.models))
    coded: SplitCodes = codes(crosscoder, store, "report")
    feature = int(np.asarray((coded.codes > 0).sum(axis=0)).argmax())
    table = pd.DataFrame(
        {
            "feature": range(8),
            "alive": True,
            "nrn": 0.5,
            "frequency": 0.1,
            "label": HOSTILE[1],
            "top_token": HOSTILE[2],
        }
    )
    columns = Columns.build(coded, store.path.parent / "columns", "bad input")
    named = pd.DataFrame([{"feature": feature, "label": HOSTILE[4]}])
    text = (
        explorer.Explorer(crosscoder, store, table, columns, Tokenizer(), named=named).view(feature)[1].data
    )
    assert "<script" not in text and "<img" not in text and "<iframe" not in text and "<svg" not in text


# --- results ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("content", ("", "{", "[]", '{"metrics": 3}', '{"metrics": {"a": {"value": 1}}}'))
def test_results_that_cannot_be_compared(content, tmp_path, monkeypatch):
    folder = tmp_path / "figures" / "tiny" / "results"
    folder.mkdir(parents=True)
    (folder / "02.json").write_text(content)
    fine = {"metrics": {"a": {"value": 1.0, "ci": None, "n": 1}}, "tables": {}}
    monkeypatch.setattr(
        check, "committed", lambda path: json.dumps(fine) if path.endswith("02.json") else None
    )
    with pytest.raises(UserError) as error:
        check.check_folder(tmp_path)
    assert "02.json" in sentence_of(error.value)


def test_training_on_a_store_that_was_changed_loses_nothing(store, tmp_path):
    config = TrainConfig(n_features=16, k=4, tokens=600, batch_size=64)
    train(store, config, tmp_path / "crosscoder")
    before = state_of(tmp_path)
    with pytest.raises(UserError) as error:
        train(
            Edited(store, lambda acts: torch.full_like(acts, float("nan"))),
            TrainConfig(n_features=0, k=4, tokens=600),
            tmp_path / "crosscoder",
        )
    sentence_of(error.value)
    assert state_of(tmp_path) == before


# --- one line a case: what is wrong, what is called, words of the sentence ----------------------------------


def _damaged(name, change):
    def call(folder):
        CrossCoder((4, 4), 8, k=2).save(folder)
        (folder / name).write_bytes(change((folder / name).read_bytes()))
        CrossCoder.load(folder)

    return call


def _cut_model(folder):
    toy_model(16, 0).save_pretrained(folder)
    (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:-1000])
    Pair("p", {"base": folder}).load("base")


def _zeros(folder):
    pair, model = toy_pair(folder), toy_model(16, 0)
    with torch.no_grad():
        [p.zero_() for p in model.parameters()]
    model.save_pretrained(folder / "base")
    harvest_activations(pair, build(pair, 1000), folder / "store")


def _profile(text):
    def call(folder):
        (folder / "mine.yaml").write_text(text)
        parameters_for("02_train_crosscoder", "tiny", str(folder / "mine.yaml"))

    return call


LINES = {
    "a crosscoder that breaks off": (
        _damaged("crosscoder.safetensors", lambda b: b[:-50]),
        "is damaged: remove it",
    ),
    "a crosscoder with a configuration that breaks off": (
        _damaged("config.json", lambda b: b[:10]),
        "is damaged: remove it",
    ),
    "a crosscoder of other shapes": (
        _damaged("config.json", lambda b: b.replace(b"8", b"9")),
        "is damaged: remove it",
    ),
    "a model that breaks off": (_cut_model, "model 'base' of pair 'p' cannot be loaded"),
    "a model whose activations are all zero": (_zeros, "all activations of base are zero"),
    "a text beyond the context": (
        lambda _: LayerReader(toy_model(16, 0), build_tokenizer()).read([[3] * 600]),
        "600 tokens, and this model's context is 512",
    ),
    "a profile that is a list": (_profile("- 1\n"), "holds a list"),
    "a profile with a word for parameters": (
        _profile("01_harvest_activations: fast\n"),
        "must be a mapping of name: value",
    ),
    "a profile of another notebook": (_profile("09_more: {k: 3}\n"), "names 09_more"),
    "a profile with yes for a number": (
        _profile("02_train_crosscoder: {k: yes}\n"),
        "k of 02_train_crosscoder is True",
    ),
    "a profile with nothing for a number": (_profile("02_train_crosscoder: {k: }\n"), "is None: it must be"),
    "a profile with a number in quotes": (_profile("02_train_crosscoder: {k: '8'}\n"), "is '8': it must be"),
    "a profile with an unknown parameter": (_profile("02_train_crosscoder: {kk: 8}\n"), "no parameter 'kk'"),
    "a profile with a parameter twice": (
        _profile("02_train_crosscoder: {k: 3, k: 4}\n"),
        "'k' stands there twice",
    ),
    "a profile of another pair": (
        _profile("02_train_crosscoder: {pair: smol}\n"),
        "pair smol, by -p or in the profile",
    ),
    "a profile with an unknown limit": (_profile("speed: fast\n"), "names speed"),
    "a profile without time": (_profile("timeout: 0.5\n"), "timeout of profile 'mine'"),
    "a profile that is called like another": (
        lambda folder: [
            (folder / "smoke.yaml").touch(),
            read_profile(ROOT / "notebooks/profiles", str(folder / "smoke.yaml"), []),
        ],
        "is called like a profile",
    ),
    "a profile that is not there": (
        lambda folder: read_profile(ROOT / "notebooks/profiles", str(folder / "mine.yaml"), []),
        "unknown profile",
    ),
    "a rate that is no number": (
        lambda _: TrainConfig(rate=float("nan")),
        "rate is nan: it must be a number",
    ),
    "a batch of half a token": (
        lambda _: TrainConfig(batch_size=2.5),
        "batch_size is 2.5: it must be an integer",
    ),
    "two models of one name": (
        lambda _: CrossCoder((4, 4), 8, ("a", "a"), k=2),
        "one distinct name per model",
    ),
}


@pytest.mark.parametrize("name", LINES)
def test_one_clear_sentence(name, tmp_path):
    call, words = LINES[name]
    with pytest.raises(UserError) as error:
        call(tmp_path)
    assert words in sentence_of(error.value)


@pytest.mark.parametrize("words", [["writing", "nobody", "out"], ["adapters", "nobody"]])
def test_commands_on_a_pair_that_is_not_there(words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(words) == 2
    said = capsys.readouterr().err
    assert "unknown pair 'nobody'" in said and said.count("\n") == 1 and not list(tmp_path.iterdir())


def test_a_registry_that_is_not_there(monkeypatch):
    monkeypatch.setenv("PAIRS_REGISTRY", "/nowhere/pairs.yaml")
    with pytest.raises(UserError) as error:
        load_pair("tiny")
    assert "/nowhere/pairs.yaml does not exist: give a YAML file" in sentence_of(error.value)


ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 5) | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


@settings(
    max_examples=60,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
    derandomize=True,
    database=None,
)
@given(st.dictionaries(st.sampled_from([*sorted(KINDS), "what"]), ANYTHING, max_size=5))
def test_any_entry_is_a_pair_or_a_sentence(tmp_path, entry):
    (tmp_path / "any.yaml").write_text(yaml.safe_dump({"p": {"base": "a/b", "distilled": "a/c"} | entry}))
    try:
        assert load_pair("p", tmp_path / "any.yaml").name == "p"
    except UserError as error:
        sentence_of(error)
