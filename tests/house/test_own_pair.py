"""The walk of README's section "Your own pair" with pairs that nobody here made: notebooks 01 to 05, by the
functions that they call, on a registry of one's own.

Llamas of odd width with a byte-level tokenizer of their own, tied embeddings and no markers of a chat; in
another pair models of unlike width and depth; in a third weights in shards, and a padded vocabulary.
"""

import json
import random

import pytest
import torch
import yaml
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from lib.activations.harvest import harvest_run, open_text
from lib.crosscoder.health import health_card
from lib.crosscoder.seeds import train_all
from lib.crosscoder.training import TrainConfig
from lib.features.table import inspect_all
from lib.geometry.words import read_relations
from lib.labels import CATEGORIES
from lib.results import Results
from lib.runs import Run
from lib.settings import UserError
from lib.steering import ablation, report
from lib.steering.artefacts import open_run
from lib.tools.notebooks import parameters_for

VOCABULARY = 400
SAID = {  # a sentence of each category, for the lexicon
    "reflection": "Wait, let me check that again.",
    "deduction": "So there are {} of them.",
    "alternative": "Alternatively, I could count the {} first.",
    "contrast": "But {} is not what was asked.",
}


def llama(width, layers, rows=VOCABULARY, seed=0):
    torch.manual_seed(seed)
    sizes = dict(hidden_size=width, num_hidden_layers=layers, num_attention_heads=3, num_key_value_heads=3)
    sizes |= dict(intermediate_size=2 * width, vocab_size=rows, max_position_embeddings=512)
    return LlamaForCausalLM(LlamaConfig(**sizes, tie_word_embeddings=True, initializer_range=0.2)).eval()


PAIRS = {  # (base, distilled, options of save_pretrained)
    "odd": lambda: (llama(36, 5), llama(36, 5, seed=1), {}),
    "unlike": lambda: (llama(36, 4), llama(48, 6, seed=1), {}),
    "padded": lambda: (llama(36, 5), llama(36, 5, VOCABULARY + 48, seed=1), {"max_shard_size": "30KB"}),
}


def texts():
    rng = random.Random(0)
    for i in range(120):
        parts = [said.format(rng.randint(2, 99)) for said in SAID.values() for _ in range(2)]
        rng.shuffle(parts)
        yield {"question": f"How many are {i}?", "thinking": " ".join(parts), "answer": f"It is {i}."}


@pytest.fixture(scope="module")
def tokenizer():
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=["<|end|>"], initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator([json.dumps(entry) for entry in texts()], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<|end|>")


@pytest.mark.parametrize("name", PAIRS)
def test_notebooks_01_to_05_have_what_they_need(name, tokenizer, tmp_path, monkeypatch):
    *both, options = PAIRS[name]()
    for which, model in zip(("base", "distilled"), both):
        model.save_pretrained(tmp_path / "models" / which, **options)
        tokenizer.save_pretrained(tmp_path / "models" / which)
    (tmp_path / "traces.jsonl").write_text("\n".join(map(json.dumps, texts())) + "\n\n")
    (tmp_path / "text.txt").write_text("\n\n".join(f"Harbours and rivers, {i}.\n" for i in range(900)))
    entry = {"base": "models/base", "distilled": "models/distilled", "dictionary": 48, "tokens": 6000}
    entry["corpus"] = [{"path": "traces.jsonl", "kind": "trace"}, {"path": "text.txt", "kind": "general"}]
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump({name: entry}))
    monkeypatch.setenv("PAIRS_REGISTRY", str(tmp_path / "mine.yaml"))

    given = {
        stem[:2]: parameters_for(stem, name) for stem in ("01_harvest_activations", "02_train_crosscoder")
    }
    assert (given["01"]["tokens"], given["02"]["n_features"]) == (6000, 48)
    run = Run(name, "test", root=tmp_path)
    pair, corpus = open_text(name, given["01"]["tokens"])
    store = harvest_run(run, pair, corpus, upper=True)
    assert store.widths == {which: m.config.hidden_size for which, m in zip(pair.models, both)}
    loaded = {which: pair.load(which) for which in pair.models}
    for which, model in zip(loaded, both):
        assert all(
            torch.equal(loaded[which].state_dict()[key], value) for key, value in model.state_dict().items()
        )

    config = TrainConfig(n_features=48, k=6, tokens=20_000, batch_size=256)
    (crosscoder,) = train_all(store, config, run, 1)
    card = health_card(crosscoder, store)
    assert all(card[f"fve_{which}"]["value"] > 0 for which in pair.models)
    (inspection,) = inspect_all(run, max_tokens=2000, n_contexts=2, nrn_over=0.0)
    assert inspection.table["cosine"].isna().all() == (name == "unlike") and set(inspection.chosen) == set(
        CATEGORIES
    )

    opened = open_run(run)
    sites = ablation.sample_targets(store, 3)
    sites = sites[sites["category"] != "contrast"]  # as in a store that has none
    removals = [ablation.plan(opened.table, [20.0], 0.0, 0.5, "frequency_choose")]
    removals[0] += opened.sets(sites, 2, opened.null()[0])[0]
    results = Results("04", run, {})
    report.record_all_ablations(results, opened.ablate(sites, removals, 1)[0])
    assert results.values["ablate_deduction_attributed"] is not None
    assert results.values["ablate_contrast_attributed"] is results.values["ablate_contrast_distilled"] is None
    assert "contrast: **n/a" in report.sets_show(results, "") and report.ablation_shows(results)
    steering = opened.steering(max_new_tokens=6)
    tasks = opened.medium.tasks("report", 3, 0)
    assert opened.medium.name == "plain" and opened.medium.prompt(tasks[0]).endswith("?\n\n<think>\n")
    assert [len(words) <= 6 for words in steering.transcripts("half/report", tasks)] == [True] * 3
    assert opened.upper()[1] == (
        "" if name != "unlike" else "the run has no activations of that layer (notebook 01, upper_layer)"
    )

    words = read_relations(run, max_pairs=5)
    assert {which: v.shape[1] for which, v in words.vectors.items()} == store.widths

    with pytest.raises(
        UserError, match="unknown pair 'nobody': mine.yaml has .*another registry is named by"
    ):
        open_text("nobody", 100)
