"""What a folder holds and is not what it says: weights, configurations, tokenizers, architectures."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Regex, Tokenizer, pre_tokenizers
from toys import COHERE, GEMMA2, GRANITE, LINEAR, chat_tokenizer, toy_model, toy_of, toy_pair
from transformers import PreTrainedTokenizerFast

from lib.models.checks import PARAGRAPH, check_architecture, check_round_trip
from lib.models.pairs import check_vocabularies, decoder_layers
from lib.settings import UserError


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    return toy_pair(tmp_path_factory.mktemp("pair"), (16, 16))


@pytest.fixture
def pair(saved, tmp_path):
    """A copy of a toy pair, to be damaged."""
    shutil.copytree(saved.models["base"].parent, tmp_path / "copy")
    return type(saved).of(
        *(tmp_path / "copy" / n for n in ("base", "distilled")), tokenizer_source=tmp_path / "copy/tokenizer"
    )


def change_weights(pair, change):
    file = pair.models["distilled"] / "model.safetensors"
    weights = dict(change(load_file(file)))
    save_file({k: v.clone() for k, v in weights.items()}, file, metadata={"format": "pt"})


def change_json(file, **changes):
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


# --- weights ------------------------------------------------------------------------------------------------

Q = "model.layers.1.self_attn.q_proj.weight"


@pytest.mark.fault("bad input")
@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (
            lambda w: {f"_orig_mod.{k}": x for k, x in w.items()},
            "unexpected .*_orig_mod.model.embed_tokens.weight",
        ),
        (lambda w: {f"module.{k}": x for k, x in w.items()}, "missing .*model.embed_tokens.weight"),
        (lambda w: {f"base_model.model.{k}": x for k, x in w.items()}, "wrapper"),
        (
            lambda w: {k: x for k, x in w.items() if "layers.2." not in k},
            "12 weights are missing .*layers.2.",
        ),
        (lambda w: {k: x for k, x in w.items() if k != Q}, f"1 weights are missing .{Q}"),
        (lambda w: w | {Q.replace("layers.1", "layers.9"): w[Q]}, "1 weights are unexpected .model.layers.9"),
        (
            lambda w: w | {Q: w[Q][:, :8]},
            rf"1 weights are of another shape .{Q} is \[16, 8\], by config.json \[16, 16\]",
        ),
        (lambda w: w | {"lm_head.weight": torch.zeros(512, 16)}, "a head that is not its embedding"),
        (lambda w: w | {f"module.{k}": x for k, x in w.items()}, "50 weights are unexpected"),
        (lambda w: w | {Q: w[Q] * float("nan")}, f"1 weights are not finite .{Q}"),
        (lambda w: w | {Q: w[Q].fill_(float("inf"))}, "1 weights are not finite"),
        (lambda w: w | {Q: (w[Q] * 100).to(torch.int8)}, f"{Q} as I8 in model.safetensors, and no quant"),
        (lambda w: w | {Q: w[Q].to(torch.float8_e4m3fn)}, "as F8_E4M3 .*not quantised"),
        (lambda w: w | {Q: w[Q] > 0}, "as BOOL"),
    ],
)
def test_weights_that_are_not_those_of_the_configuration_are_named(pair, change, sentence):
    change_weights(pair, change)
    with pytest.raises(UserError, match=f"model 'distilled' of pair 'pair' .*{sentence}"):
        pair.load("distilled")


def test_a_head_is_tied_where_the_configuration_says_so(pair):
    embedding = "model.embed_tokens.weight"
    right = pair.load("distilled").lm_head.weight
    change_weights(pair, lambda w: w | {"lm_head.weight": w[embedding]})  # twice the same is no contradiction
    assert torch.equal(pair.load("distilled").lm_head.weight, right)
    own = torch.randn(512, 16)
    change_weights(pair, lambda w: w | {"lm_head.weight": own})
    change_json(pair.models["distilled"] / "config.json", tie_word_embeddings=False)
    model = pair.load("distilled")
    assert torch.equal(model.lm_head.weight, own) and torch.equal(model.model.embed_tokens.weight, right)
    change_weights(pair, lambda w: {k: x for k, x in w.items() if k != "lm_head.weight"})
    with pytest.raises(UserError, match="1 weights are missing .lm_head.weight"):
        pair.load("distilled")


def test_a_folder_with_two_sets_of_weights(pair):
    (pair.models["distilled"] / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(
        UserError, match="two sets of weights, model.safetensors and .*index.json: remove one"
    ):
        pair.load("distilled")
    with pytest.raises(UserError, match="model 'base' of pair 'pair' is a file, .*give the folder"):
        pair.of(pair.models["base"] / "model.safetensors", pair.models["distilled"]).load("base")


# --- loaders ------------------------------------------------------------------------------------------------

GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 128}


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"vocab_size": 600}, r"embed_tokens.weight is \[512, 16\], by config.json \[600, 16\]"),
        ({"quantization_config": GPTQ}, "GPTQ.*not quantised"),
        ({"quantization_config": {"quant_method": "awq"}}, "not quantised"),
        ({"rope_scaling": {"rope_type": "tomorrow", "factor": 2.0}}, "tomorrow"),
        ({"model_type": "tomorrow"}, "tomorrow"),
        ({"hidden_size": "sixteen"}, "cannot be loaded"),
        ({"num_attention_heads": 3}, "weights are of another shape|cannot be loaded|cannot work"),
    ],
)
def test_a_configuration_that_cannot_be_read_is_one_sentence(pair, changes, sentence):
    change_json(pair.models["distilled"] / "config.json", **changes)
    with pytest.raises(UserError, match=f"(?s)model 'distilled' of pair 'pair'.*({sentence})") as caught:
        pair.load("distilled")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["", "{", "[]", "null"])
def test_files_that_are_no_json_are_one_sentence(pair, text):
    (pair.models["distilled"] / "config.json").write_text(text)
    with pytest.raises(UserError, match="model 'distilled' of pair 'pair' cannot be loaded from"):
        pair.load("distilled")
    (pair.tokenizer_source / "tokenizer.json").write_text(text)
    with pytest.raises(UserError, match="tokenizer of pair 'pair' cannot be loaded from"):
        pair.tokenizer()


def test_a_tokenizer_of_a_newer_library_is_one_sentence(pair):
    file = pair.tokenizer_source / "tokenizer.json"
    content = json.loads(file.read_text())
    change_json(file, model=content["model"] | {"type": "TomorrowsBPE"})
    with pytest.raises(UserError, match="tokenizer of pair 'pair' .*did not match any variant.*installed"):
        pair.tokenizer()


# --- tokenizers ---------------------------------------------------------------------------------------------


def split_otherwise(tokenizer, pattern):
    content = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    content.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(pattern), "isolated"), content.pre_tokenizer]
    )
    return PreTrainedTokenizerFast(tokenizer_object=content)


def test_a_paragraph_comes_back_and_is_the_same_ids_in_both():
    ours = chat_tokenizer()
    assert ours.decode(ours(PARAGRAPH)["input_ids"]) == PARAGRAPH
    assert all(part in PARAGRAPH for part in ("12,345.678", r"\frac", "\n\n", "让我们"))
    assert check_vocabularies({"base": ours, "distilled": chat_tokenizer()}) == ()
    theirs = split_otherwise(ours, "he|1|9")  # "he" is a token; nothing is lost, and the ids are others
    with pytest.raises(UserError, match="tokenizers of base and distilled read one text as unlike tokens"):
        check_vocabularies({"base": ours, "distilled": theirs})
    check_round_trip({"base": ours, "distilled": theirs}, "It is 2.")
    with pytest.raises(UserError, match="read one text as unlike tokens"):  # on what is generated
        check_round_trip({"base": ours, "distilled": theirs}, "It is 2. So there are 19.")
    tagged = chat_tokenizer()
    tagged.add_tokens(["<think>", "</think>"])
    check_round_trip({"base": ours, "distilled": tagged}, "<think>It is 2.</think>So 19. e\u0301")
    lossy = split_otherwise(ours, "x")
    lossy.backend_tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()  # what spaces are is forgotten
    with pytest.raises(UserError, match="tokenizer of distilled does not give back the text"):
        check_round_trip({"base": ours, "distilled": lossy})


@pytest.mark.parametrize("name", ["LlamaTokenizerFast", "Qwen2Tokenizer", "TokenizersBackend"])
@pytest.mark.parametrize("model", ["qwen2", "llama"])
def test_what_is_read_is_what_tokenizer_json_says(pair, name, model):
    """As in parts of the R1-distilled family: a byte-level tokenizer.json in a folder that names, itself or
    by its model, a class which splits text otherwise."""
    right = chat_tokenizer()
    right.save_pretrained(pair.tokenizer_source)
    change_json(pair.tokenizer_source / "tokenizer_config.json", tokenizer_class=name)
    (pair.tokenizer_source / "config.json").write_text(json.dumps({"model_type": model}))
    found = pair.tokenizer()
    assert found(PARAGRAPH)["input_ids"] == right(PARAGRAPH)["input_ids"]
    assert (
        found.eos_token == right.eos_token and check_vocabularies({"base": right, "distilled": found}) == ()
    )


# --- architectures ------------------------------------------------------------------------------------------

LET_IN = {
    "GPT2LMHeadModel": {}, "GPTNeoXForCausalLM": {}, "Gemma2ForCausalLM": GEMMA2,
    "GraniteForCausalLM": GRANITE, "CohereForCausalLM": COHERE, "Qwen3ForCausalLM": dict(head_dim=8),
    "Qwen3NextForCausalLM": LINEAR, "MistralForCausalLM": dict(sliding_window=4),
    "Phi3ForCausalLM": {}, "OPTForCausalLM": dict(ffn_dim=32, word_embed_proj_dim=16),
}  # fmt: skip


@pytest.mark.parametrize("name", LET_IN)
def test_architectures_that_are_let_in(name):
    model = toy_of(name, **LET_IN[name])
    check_architecture(model, decoder_layers(model), "model")


@pytest.mark.parametrize(
    ("name", "changes"),
    [("MambaForCausalLM", dict(state_size=4)), ("BloomForCausalLM", dict(n_head=2, n_layer=4))],
)
def test_architectures_that_are_not(name, changes):
    model = toy_of(name, **changes)
    with pytest.raises(UserError, match=f"the model is a {name}, with which this study cannot work: "):
        check_architecture(model, decoder_layers(model), "model")


@pytest.mark.parametrize("step", ["steering with a cache", "logits from a layer on", "capture"])
def test_what_gives_something_else_than_the_model_is_named(step):
    """A fault for each: positions without the padding, a sum of what lies below, what stands behind."""
    model = toy_model(16, 3).requires_grad_(False)
    model.config.name_or_path = step  # not the configuration that has passed
    inner, blocks = model.model.forward, decoder_layers(model)
    if step == "steering with a cache":
        model.model.forward = lambda *args, position_ids=None, **how: inner(*args, **how)
        model.model.rotary_emb.forward = lambda x, position_ids: (
            x.new_ones(1, x.shape[1], 8),
            x.new_zeros(1, x.shape[1], 8),
        )
        table = torch.randn(64, 16)
        model.model.embed_tokens.register_forward_hook(lambda module, args, out: out + table[: out.shape[1]])
    elif step == "logits from a layer on":
        below = []
        blocks[0].register_forward_hook(lambda module, args, out: below.append(out))
        blocks[3].register_forward_hook(lambda module, args, out: out + below.pop() if below else 2 * out)
    else:
        blocks[0].register_forward_hook(lambda module, args, out: out + out.mean(1, keepdim=True))
    with pytest.raises(UserError, match=step):
        check_architecture(model, blocks, "model")


def test_a_model_that_cannot_be_studied_is_refused_when_it_is_loaded(tmp_path):
    pair = toy_pair(tmp_path)
    toy_of("MambaForCausalLM", state_size=4).save_pretrained(pair.models["distilled"])
    with pytest.raises(UserError, match="model 'distilled' of pair 'toy' is a Mamba.*this study cannot work"):
        pair.load("distilled")
