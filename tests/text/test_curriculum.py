"""General text: distinct, fair to the marker words, and carrying the relations that notebook 05 measures."""

import random
from collections import Counter

from lib.text import curriculum as prose
from lib.text.puzzles import PARAPHRASES, Teacher, apply, sample_puzzle


def test_twenty_thousand_distinct_sentences():
    rng = random.Random(0)
    assert len({s.words for _ in range(5000) for s in prose.prose(rng)}) >= 20_000


def test_marker_words_are_about_as_frequent_as_in_traces():
    """Within a factor of five for each telltale word, so that "unique" means a new use and not a new word."""
    rng = random.Random(1)
    general = Counter(w for _ in range(3000) for s in prose.prose(rng) for w in s.words)
    traces = Counter(w for _ in range(3000) for s in Teacher(rng).solve(sample_puzzle(rng)) for w in s.words)
    for label in PARAPHRASES:
        for template in PARAPHRASES[label]:
            word = template.split()[0]
            if not word.startswith("{"):
                ratio = (general[word] / general.total()) / (traces[word] / traces.total())
                assert 0.2 < ratio < 5, (word, ratio)


def test_relations_have_enough_distinct_words_and_all_occur():
    rng = random.Random(2)
    seen = {w for _ in range(3000) for s in prose.prose(rng) for w in s.words}
    for relation in prose.EMBEDDED_RELATIONS:
        pairs = prose.relation_pairs(relation)
        words = {w for pair in pairs for w in pair}
        assert len(words) >= 21 and len(set(pairs)) == len(pairs) and words <= seen


def test_only_what_can_be_known_is_learnt():
    rng = random.Random(3)
    for sentence in prose.arithmetic(rng):
        learnt = sentence.words[sentence.given :]
        a, op = sentence.words[2:4] if sentence.words[0] == "what" else sentence.words[:2]
        assert learnt == (str(apply(op, int(a))), ".")
    listing, again, *lookups = prose.copying(rng)
    items = listing.words[2:-1]
    assert listing.given == len(listing.words) - 1 and again.words[2:-1] == items
    for lookup in lookups:
        _, item, _, following, _ = lookup.words
        assert items[items.index(item) + 1] == following and lookup.words[lookup.given] == following


def test_base_text_holds_no_chain_of_thought():
    rng = random.Random(4)
    for _ in range(2000):
        document = prose.base_document(rng)
        assert all(s.label in ("general", "other") for s in document)
        assert ("think", ":") not in {s.words[:2] for s in document}


def test_vocabulary_is_fixed_and_has_no_doubles():
    vocabulary = prose.vocabulary()
    assert vocabulary[:4] == ("<pad>", "<bos>", "<eos>", "<unk>") and len(set(vocabulary)) == len(vocabulary)
    assert vocabulary[4:] == tuple(sorted(vocabulary[4:]))


def test_verdicts_are_right_and_the_statements_are_not_learnt():
    rng = random.Random(5)
    seen = {"true": 0, "false": 0}
    for _ in range(200):
        sentences = prose.comparing(rng, stop=rng.random() < 0.5)
        target = int(sentences[0].words[1]) if sentences[0].words[0] == "reach" else None
        for sentence in sentences[target is not None :]:
            *statement, verdict, stop = (w for w in sentence.words)
            statement = [w for w in statement if w != "."]
            right = int(statement[-1]) == (
                apply(statement[1], int(statement[0])) if target is None else target
            )
            assert verdict == ("true" if right else "false") and sentence.words[sentence.given :] == (
                verdict,
                stop,
            )
            seen[verdict] += 1
    assert 0.8 < seen["true"] / seen["false"] < 1.25


def test_every_mix_is_of_known_documents_and_sums_to_one():
    for mix in (prose.BASE_MIX, prose.MID_MIX, prose.LATE_MIX, *(m for _, m in prose.CURRICULUM)):
        assert abs(sum(mix.values()) - 1) < 1e-9
        for kind in mix:
            assert prose.base_document(random.Random(0), {kind: 1.0})
