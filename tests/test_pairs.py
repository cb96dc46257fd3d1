"""The registry, loading, layers, vocabularies."""

import pytest
import torch
from toys import toy_model, toy_pair
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from lib.distill import build_tokenizer
from lib.pairs import check_layer, check_vocabularies, decoder_layers, half_depth, load_pair
from lib.results import UserError


def test_every_entry_of_the_registry_is_valid():
    for name in ("tiny", "tiny_null_a", "tiny_null_b"):
        pair = load_pair(name)
        assert list(pair.models) == ["base", "distilled"] and pair.dictionary > 0
    assert load_pair("tiny_null_a").distilled == load_pair("tiny").others["null_a"]
    assert load_pair("tiny_null_a").base == load_pair("tiny").base


def test_unknown_pair_lists_the_known_ones():
    with pytest.raises(UserError, match="unknown pair 'tinny': pairs.yaml has tiny,"):
        load_pair("tinny")


@pytest.mark.parametrize(("text", "message"), [
    ("mine: {base: a/b}", "lacks distilled"),
    ("mine: {base: a/b, distilled: a/c, depth: 3}", "unknown key 'depth'"),
    ("mine: {base: a/b, distilled: a/c, dtype: float8}", "dtype of pair 'mine'"),
    ("mine: {base: a/b, distilled: a/c, layer: -1}", "layer of pair 'mine'"),
    ("mine: {base: a/b, distilled: a/c, corpus: [some.txt]}", "corpus of pair 'mine'"),
    ("mine: {like: yours}", "like 'yours'"),
    ("mine: [", "not valid YAML"),
])
def test_a_wrong_entry_gets_one_sentence(tmp_path, text, message):
    (tmp_path / "own.yaml").write_text(text)
    with pytest.raises(UserError, match=message):
        load_pair("mine", tmp_path / "own.yaml")


def test_own_registry_resolves_folders_beside_it(tmp_path):
    toy_pair(tmp_path)
    (tmp_path / "own.yaml").write_text("mine: {base: base, distilled: distilled, tokenizer: tokenizer, others: {again: base}}")
    pair = load_pair("mine", tmp_path / "own.yaml")
    model = pair.load("distilled")
    assert not model.training and next(model.parameters()).dtype == torch.float32 and not next(model.parameters()).requires_grad
    assert pair.fingerprint("again") == pair.fingerprint("base") != pair.fingerprint("distilled")
    with pytest.raises(UserError, match="no model 'control': it has base, distilled, again"):
        pair.load("control")
    assert list(pair.between("again", "base").models) == ["again", "base"]


def test_missing_models_and_pickles_are_refused(tmp_path):
    pair = toy_pair(tmp_path)
    (tmp_path / "base" / "model.safetensors").unlink()
    torch.save(toy_model(16, 0).state_dict(), tmp_path / "base" / "pytorch_model.bin")  # never unpickled
    with pytest.raises(UserError, match="model 'base' of pair 'toy'"):
        pair.load("base")
    with pytest.raises(UserError, match="does not exist"):
        load_pair("nothing", tmp_path / "nowhere.yaml")


def test_half_depth_of_qwen_and_llama():
    llama = LlamaForCausalLM(LlamaConfig(vocab_size=32, hidden_size=8, num_hidden_layers=7, num_attention_heads=2, intermediate_size=8))
    assert half_depth(toy_model(16, 0, layers=6)) == 2 and half_depth(llama) == 2 and len(decoder_layers(llama)) == 7
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
    with pytest.raises(UserError, match=f"differ in 1 ids \\(id {differing} is 'wait' in base and 'wait!' in distilled"):
        check_vocabularies({"base": ours, "distilled": theirs})
    assert check_vocabularies({"base": ours, "distilled": theirs}, [differing]) == (differing,)
