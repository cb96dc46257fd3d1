"""Traps that published code falls into when two real models are compared; each is shown to be live, and then
to be avoided.

The vocabularies have the layout of Qwen2.5-Math and R1-Distill-Qwen: the same byte-level BPE, behind which 22
ids follow, seven of which mean other things in the two. One is trained here and always tested. The other is
Qwen's own, from a package that has it (minutes); for it:

    pip download --no-deps dashscope==2.0.2
    # unzip it, and give the file as QWEN_TIKTOKEN=.../dashscope/resources/qwen.tiktoken
"""

import base64
import importlib.util
import json
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import (
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from lib.activations.harvest import harvest_activations
from lib.models.pairs import Pair, check_vocabularies
from lib.models.reader import masks
from lib.settings import UserError
from lib.text.chat import Trace
from lib.text.corpus import build, chat_markers, plain

SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN = [
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|object_ref_start|>",
    "<|object_ref_end|>",
    "<|box_start|>",
    "<|box_end|>",
]
R1 = [
    "<｜end▁of▁sentence｜>",
    "<｜User｜>",
    "<｜Assistant｜>",
    "<｜begin▁of▁sentence｜>",
    "<|EOT|>",
    "<think>",
    "</think>",
]
SHARED = [
    "<|quad_start|>",
    "<|quad_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
    "<tool_call>",
    "</tool_call>",
    "<|fim_prefix|>",
    "<|fim_middle|>",
    "<|fim_suffix|>",
    "<|fim_pad|>",
    "<|repo_name|>",
    "<|file_sep|>",
]
TEXT = [
    "She asked whether the train had left, and he said that it had not.",
    "First, add 17 and 25. That is 42. Wait, let me check: 17 + 25 = 42.",
    "The think tank published <notes> on the box-office; everyone thinks about thinking.",
    "Therefore the answer is 42, but is it?",
]
TRACE = Trace(
    "What is 17 + 25?", "First, 17 + 20 = 37. Wait, that is not all: 37 + 5 = 42.", "The answer is 42."
)
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}{{ '<｜User｜>' + m['content'] }}{%"
    " else %}{{ '<｜Assistant｜>' + m['content'].split('</think>')[-1] + eos_token }}{% endif %}{% endfor %}"
)


def small():
    """A byte-level BPE of a few hundred tokens, split into words as Qwen's is."""
    tokenizer = bare(models.BPE())
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        TEXT, trainers.BpeTrainer(vocab_size=330, initial_alphabet=alphabet, show_progress=False)
    )
    return tokenizer


def bare(model):
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.NFC()
    by_words = pre_tokenizers.Split(Regex(SPLIT), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [by_words, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def qwen(file):
    """Qwen's BPE from its tiktoken file: a token of rank r is made by merging any two tokens that spell it,
    if both came before it.
    """
    ranks = {
        base64.b64decode(token): int(rank)
        for token, rank in (line.split() for line in file.read_bytes().splitlines() if line)
    }
    printable = dict(zip(sorted(range(256), key=order), sorted(pre_tokenizers.ByteLevel.alphabet(), key=ord)))
    spelled = {token: "".join(printable[byte] for byte in token) for token in ranks}
    merges = []
    for token, rank in ranks.items():
        pairs = [
            (ranks[token[:i]], ranks[token[i:]], i)
            for i in range(1, len(token))
            if token[:i] in ranks and token[i:] in ranks
        ]
        merges += [(rank, *pair, (spelled[token[: pair[2]]], spelled[token[pair[2] :]])) for pair in pairs]
    merges.sort()
    return bare(
        models.BPE(
            vocab={spelled[token]: rank for token, rank in ranks.items()},
            merges=[merge[-1] for merge in merges],
        )
    )


def order(byte):
    """Byte-level BPE writes printable Latin-1 bytes as themselves and the others, in order, as characters
    from 256 on.
    """
    itself = 33 <= byte <= 126 or 161 <= byte <= 172 or 174 <= byte <= 255
    return (not itself, byte)


def tiktoken_file():
    if given := os.environ.get("QWEN_TIKTOKEN"):
        return Path(given)
    spec = importlib.util.find_spec("dashscope")  # the package is not imported
    return Path(spec.submodule_search_locations[0]) / "resources" / "qwen.tiktoken" if spec else None


def dressed(bpe, tags, special, bos=None, eos=None, template=None):
    """A tokenizer with tags behind its vocabulary; with ``bos`` it is put in front of every text, as in
    R1-Distill's.
    """
    tokenizer = Tokenizer.from_str(bpe.to_str())
    tokenizer.add_tokens([AddedToken(t, normalized=False, special=t in special) for t in [*tags, *SHARED]])
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, tokenizer.token_to_id(bos))]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=bos, eos_token=eos, pad_token=eos, chat_template=template
    )


def family(bpe):
    """{"base", "distilled"}, their common BPE, and the first of the ids behind it."""
    return {
        "base": dressed(bpe, QWEN, QWEN, eos="<|endoftext|>"),
        "first": bpe.get_vocab_size(),
        "bpe": bpe,
        "distilled": dressed(bpe, R1, [R1[0], R1[3]], bos=R1[3], eos=R1[0], template=TEMPLATE),
    }


@pytest.fixture(scope="module")
def tokenizers():
    return family(small())


@pytest.fixture(scope="module", params=["small", "qwen"])
def either(request, tokenizers):
    """The small vocabulary, and Qwen's own where it is there."""
    if request.param == "small":
        return tokenizers
    file = tiktoken_file()
    if file is None or not file.is_file():
        pytest.skip(
            "no qwen.tiktoken: install dashscope==2.0.2 with --no-deps, or set QWEN_TIKTOKEN to the file"
        )
    return family(qwen(file))


def pair_of(folder, tokenizers, names=("base", "distilled"), lines=None, **options):
    """A pair whose models are their tokenizers alone, with traces in one file and text in another."""
    folder.mkdir(exist_ok=True)
    traces = lines or [vars(TRACE) | {"question": f"{TRACE.question} ({i})"} for i in range(8)]
    (folder / "traces.jsonl").write_text("".join(json.dumps(line) + "\n" for line in traces))
    (folder / "text.txt").write_text("\n\n".join(f"{text} {i}" for i in range(4) for text in TEXT))
    corpus = ((str(folder / "traces.jsonl"), "trace"), (str(folder / "text.txt"), "general"))
    pair = Pair("mine", {name: folder / name for name in names}, corpus=corpus, **options)
    # none are saved and loaded: Qwen's take seconds
    object.__setattr__(pair, "tokenizer", lambda name=None: tokenizers[name or names[0]])
    return pair


def differing(tokenizers):
    return tuple(range(tokenizers["first"], tokenizers["first"] + 7))


def ids_of(pair, tokens=100, **options):
    return [d.tokens for d in build(pair, tokens, **options)]


# --- the vocabularies ---------------------------------------------------------------------------------------


def test_qwens_own_vocabulary_is_read_as_qwen_reads_it(either):
    if either["first"] == 151643:  # ids that are widely published
        assert either["base"]("Hello world")["input_ids"] == [9707, 1879]
        assert either["base"].convert_ids_to_tokens([151643, 151648, 151657]) == [
            "<|endoftext|>",
            "<|box_start|>",
            "<tool_call>",
        ]
    for text in (*TEXT, "naïve 東京 \U0001f40d 3.14\n\n  x"):
        assert either["base"].decode(either["base"](text)["input_ids"]) == text


def test_seven_ids_differ_and_are_refused_unless_they_are_known(either):
    two = {name: either[name] for name in ("base", "distilled")}
    known = differing(either)
    assert check_vocabularies(two, known) == known
    with pytest.raises(
        UserError,
        match=(
            r"differ in 7 ids \(id \d+ is '<\|endoftext\|>' in base and '<｜end▁of▁sentence｜>' in distilled"
        ),
    ):
        check_vocabularies(two)
    with pytest.raises(UserError, match="differ in 1 ids"):
        check_vocabularies(two, known[:-1])


def test_unlike_vocabularies_are_refused_with_the_reason(tokenizers, tmp_path):
    """Same size, other tokens: every forward pass would run, every comparison would be of unlike texts."""
    state = json.loads(tokenizers["bpe"].to_str())
    ids = list(state["model"]["vocab"].values())
    state["model"]["vocab"] = {token: i for token, i in zip(state["model"]["vocab"], [*ids[1:], ids[0]])}
    other = dressed(Tokenizer.from_str(json.dumps(state)), QWEN, QWEN)
    assert len(other) == len(tokenizers["base"])
    pair = pair_of(tmp_path, {"base": tokenizers["base"], "distilled": other})
    with pytest.raises(
        UserError,
        match=(
            f"vocabularies differ in {tokenizers['first']} ids .id 0 is .*only be compared on the same tokens"
        ),
    ):
        build(pair, 100)


# --- BOS ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("names", [("base", "distilled"), ("distilled", "base")])
def test_bos_in_one_of_the_two_does_not_shift_the_pair(either, tmp_path, names):
    text = TEXT[0]
    # the trap: slipped by one
    assert either["distilled"](text)["input_ids"][1:] == either["base"](text)["input_ids"]
    pair = pair_of(tmp_path / names[0], either, names, differing_ids=differing(either))
    found = ids_of(pair)
    assert not {t for tokens in found for t in tokens} & set(differing(either))
    decoded = [either["base"].decode(tokens) for tokens in found]
    assert f"{text} 0" in decoded and decoded == [either["distilled"].decode(tokens) for tokens in found]


def test_bos_that_only_one_uses_is_not_fed_even_if_both_know_it(tokenizers, tmp_path):
    """The vocabularies are the same to the id; one tokenizer puts <|endoftext|> in front, one nothing."""
    bpe = tokenizers["bpe"]
    two = {"base": dressed(bpe, QWEN, QWEN, bos=QWEN[0]), "distilled": dressed(bpe, QWEN, QWEN)}
    assert check_vocabularies(two) == ()
    for names in (("base", "distilled"), ("distilled", "base")):
        corpus = build(pair_of(tmp_path / names[0], two, names), 100)
        assert corpus.excluded == (tokenizers["first"],)
        assert tokenizers["first"] not in {t for d in corpus for t in d.tokens}


def test_bos_is_there_once_though_template_and_tokenizer_both_write_it(tokenizers, tmp_path):
    ours = dressed(tokenizers["bpe"], R1, [R1[0], R1[3]], bos=R1[3], eos=R1[0], template=TEMPLATE)
    turns = [{"role": "user", "content": "What is 2 + 2?"}, {"role": "assistant", "content": "4"}]
    rendered = ours.apply_chat_template(turns, tokenize=False)
    bos = ours.bos_token_id
    assert ours(rendered)["input_ids"].count(bos) == 2  # the trap
    lines = [{"text": f"{rendered} {i}"} for i in range(8)] + [{"text": R1[3] * 2 + "Two already."}]
    found = ids_of(pair_of(tmp_path, {"base": ours, "distilled": ours}, lines=lines), trace_share=1.0)
    assert all(tokens[0] == bos and bos not in tokens[1:] for tokens in found)
    assert ours.convert_ids_to_tokens(found[0][1]) == "<｜User｜>"  # shared, so the marker of a turn stays


def test_a_template_bos_that_is_not_shared_is_left_out_not_spelled(tokenizers, tmp_path):
    lines = [{"text": f"{R1[3]}{TEXT[0]} {i}"} for i in range(8)]
    pair = pair_of(tmp_path, tokenizers, lines=lines, differing_ids=differing(tokenizers))
    assert tokenizers["base"].decode(ids_of(pair, 60, trace_share=1.0)[0]) == f"{TEXT[0]} 0"


def test_where_bos_marks_a_turn_it_stays_in_the_chat_and_stands_once_in_front(tokenizers, tmp_path):
    """SmolLM2's BOS is <|im_start|>."""
    chat = dressed(tokenizers["bpe"], QWEN, QWEN, bos="<|im_start|>", eos="<|im_end|>")
    tokens = ids_of(pair_of(tmp_path, {"base": chat, "distilled": chat}), trace_share=1.0)[0]
    assert chat_markers(chat) and tokens.count(chat.bos_token_id) == 2 and tokens[1] != chat.bos_token_id
    assert chat.decode(tokens).startswith(
        f"<|im_start|>user\n{TRACE.question} (0)<|im_end|>\n<|im_start|>assistant\n<think>\n"
    )


# --- thoughts -----------------------------------------------------------------------------------------------


def test_think_tags_are_spelled_in_ordinary_tokens(either, tmp_path):
    first = either["first"]
    wrong = either["distilled"]("<think>")["input_ids"][-1]
    assert wrong == first + 5 and either["base"].convert_ids_to_tokens(wrong) == "<|box_start|>"  # the trap
    for names in (("base", "distilled"), ("distilled", "base")):  # whoever's tokenizer is used
        corpus = build(pair_of(tmp_path / names[0], either, names, differing_ids=differing(either)), 100)
        spelled = corpus.encoded("<think>")[1]
        assert spelled == either["bpe"].encode("<think>").ids and len(spelled) > 1
        assert either["base"].decode(spelled) == either["distilled"].decode(spelled) == "<think>"
        assert corpus.encoded("<tool_call>")[1] == [first + 14]  # a token that both have stays one
        if first == 151643:
            assert spelled == [13708, 766, 29]


def test_the_template_deletes_thoughts_and_our_traces_keep_them(either, tmp_path):
    turns = [
        {"role": "user", "content": TRACE.question},
        {"role": "assistant", "content": TRACE.response},
        {"role": "user", "content": "Sure?"},
    ]
    assert TRACE.thinking not in either["distilled"].apply_chat_template(turns, tokenize=False)  # the trap
    pair = pair_of(tmp_path, either, lines=[vars(TRACE)], differing_ids=differing(either))
    corpus = build(pair, 10, trace_share=1.0)
    assert not chat_markers(corpus.tokenizer, corpus.excluded)
    for tokenizer in (either["base"], either["distilled"]):
        (tokens,) = [d.tokens for d in corpus]
        assert tokenizer.decode(tokens) == plain(TRACE)
        assert f"<think>\n{TRACE.thinking}\n</think>\n\n{TRACE.answer}" in tokenizer.decode(tokens)


def test_late_reasoning_is_read(tokenizers, tmp_path):
    steps = [f"Step {i}: {i} + {i} = {2 * i}." for i in range(400)]
    trace = vars(TRACE) | {"thinking": " ".join(steps)}
    pair = pair_of(tmp_path, tokenizers, lines=[trace], differing_ids=differing(tokenizers))
    length = len(build(pair, 1).encoded(Trace(**trace))[1])
    documents = list(build(pair, length, trace_share=1.0, max_length=512))
    whole = [t for d in documents for t in d.tokens]
    assert (
        len(documents) > 5
        and max(len(d.tokens) for d in documents) == 512
        and len({d.split for d in documents}) == 1
    )
    assert tokenizers["base"].decode(whole) == plain(Trace(**trace))
    assert steps[-1] in tokenizers["base"].decode(documents[-1].tokens) and steps[0] not in tokenizers[
        "base"
    ].decode(documents[-1].tokens)


# --- the harvest --------------------------------------------------------------------------------------------


def test_outliers_of_either_model_are_dropped_from_both():
    positions = np.array([0, 1, 2, 3, 4, 5, 6, 7])
    base = np.array([9000.0, 1, 1, 10, 10.1, 1, 1, 1])  # median 1: ten times the median is kept, more is not
    distilled = np.array([5.0, 2, 2, 2, 2, 2, 50, 2])  # another scale: its own median counts
    kept, dropped = masks(positions, {"base": base, "distilled": distilled})
    assert kept.tolist() == [False, True, True, True, False, True, False, True]
    assert dropped == {"first": 1, "high_norm": 2, "high_norm_base": 1, "high_norm_distilled": 1}


def test_what_was_never_fed_is_in_the_manifest_and_models_may_differ_in_all_but_their_tokens(
    tokenizers, tmp_path
):
    """A wide shallow Qwen2 and a narrow deep Llama with R1's layout: one harvest, at half depth of each."""
    pair = pair_of(tmp_path, tokenizers, differing_ids=differing(tokenizers), store_dtype="float32")
    sizes = dict(
        vocab_size=len(tokenizers["base"]),
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=2048,
    )
    torch.manual_seed(0)
    Qwen2ForCausalLM(
        Qwen2Config(hidden_size=24, intermediate_size=48, num_hidden_layers=3, **sizes)
    ).save_pretrained(tmp_path / "base")
    Llama = LlamaForCausalLM(LlamaConfig(hidden_size=16, intermediate_size=32, num_hidden_layers=6, **sizes))
    Llama.save_pretrained(tmp_path / "distilled")
    corpus = build(pair, 400)
    store = harvest_activations(pair, corpus, tmp_path / "store")
    manifest = json.loads((tmp_path / "store" / "manifest.json").read_text())
    about = json.dumps(manifest)
    assert '"excluded_ids": ' in about and all(
        f'"{i}": "{token}"' in about for i, token in zip(differing(tokenizers), QWEN)
    )
    assert store.widths == {"base": 24, "distilled": 16} and store.layers == {"base": 0, "distilled": 2}
    other = build(pair_of(tmp_path, tokenizers, differing_ids=(*differing(tokenizers), 5)), 400)
    assert other.fingerprint == corpus.fingerprint, (
        "what is allowed to differ does not matter, what differs does"
    )
    assert replace(corpus, excluded=(5,)).fingerprint != corpus.fingerprint
    # once more from transformers, on the ids as they are: what the store holds for a text is what each model
    # computes on it
    document = next(iter(corpus))
    with torch.no_grad():
        hidden = Llama(input_ids=torch.tensor([document.tokens]), output_hidden_states=True).hidden_states[3][
            0
        ]
    stored = store.activations(np.arange(len(document.tokens)))[list(store.models).index("distilled")]
    assert torch.allclose(stored.float(), hidden, atol=1e-4)


def test_a_tokenizer_that_is_saved_as_another_class_is_noticed(tokenizers, tmp_path):
    """R1-Distill-Qwen calls its tokenizer a LlamaTokenizerFast; what counts is that the ids mean the same
    after loading.
    """
    tokenizers["distilled"].save_pretrained(tmp_path / "r1")
    config = json.loads((tmp_path / "r1" / "tokenizer_config.json").read_text())
    (tmp_path / "r1" / "tokenizer_config.json").write_text(
        json.dumps(config | {"tokenizer_class": "LlamaTokenizerFast"})
    )
    loaded = AutoTokenizer.from_pretrained(tmp_path / "r1")
    assert check_vocabularies(
        {"base": tokenizers["base"], "distilled": loaded}, differing(tokenizers)
    ) == differing(tokenizers)
