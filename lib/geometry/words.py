"""Words for E7: relations between them, and their vectors, read in context from a model's residual stream.

A word's vector is the residual stream at its last token, in a few fixed carrier prompts, averaged. It is
never read at position 0: there an attention sink drowns the word (in SmolLM2 norms of 22,000 against 180 in
context, mutual cosines above 0.9999). The carriers are the same for every word, else the offset between
inputs and outputs of a relation would be the offset between their carriers."""

import json
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from ..models.pairs import Pair, check_layer, load_pair
from ..models.reader import capture
from ..runs import MANIFEST, Run, fingerprint, kept
from ..settings import ROOT, UserError, check, integer, read_text, user_path

RELATIONS = ROOT / "data" / "relations"
# Of words that the embedded pair knows too; each is natural for some relations, none for all.
CARRIERS = (
    "first we saw the {word}",
    "this is not {word}",
    "what comes after {word}",
    "yesterday they {word}",
    "people in {word}",
)
MIN_PAIRS = 5  # below that neither a covariance nor a bootstrap says anything


@dataclass(frozen=True)
class Relation:
    """Word pairs (input, output) of one relation, without repeated pairs."""

    name: str
    pairs: tuple[tuple[str, str], ...]

    @property
    def words(self) -> tuple[str, ...]:
        """Every word once, in the order of its first appearance."""
        return tuple(dict.fromkeys(word for pair in self.pairs for word in pair))


def load_relations(
    folder: str | Path = RELATIONS, max_pairs: int | None = None, seed: int = 0
) -> list[Relation]:
    """The relations of a folder of ``<name>.json`` files, each a list of {"input": ..., "output": ...}: the
    format of Todd et al. 2023 ("Function Vectors in Large Language Models").

    Of a relation with more than ``max_pairs`` distinct pairs a seeded random subset is used. A relative
    folder is looked for from the repository's root. UserError for a missing folder or another format."""
    check("max_pairs", max_pairs, integer(MIN_PAIRS) | None)
    files = sorted((ROOT / user_path(folder)).glob("*.json"))
    if not files:
        raise UserError(
            f"{folder} has no relations: it must be a folder of <relation>.json files of "
            '[{"input": word, "output": word}, ...]'
        )
    return [Relation(file.stem, _pairs(file, max_pairs, seed)) for file in files]


def _pairs(file: Path, max_pairs: int | None, seed: int) -> tuple[tuple[str, str], ...]:
    try:
        entries = json.loads(read_text(file))
        pairs = [(entry["input"].strip(), entry["output"].strip()) for entry in entries]
    except (ValueError, KeyError, TypeError, AttributeError):
        raise UserError(
            f'{file.name} is not a relation: it must be a JSON list of {{"input": word, "output": word}}'
        ) from None
    pairs = list(dict.fromkeys(filter(all, pairs)))  # one pair twice would be a parallelogram of no height
    if len(pairs) < MIN_PAIRS:
        raise UserError(
            f"relation {file.stem!r} has {len(pairs)} distinct pairs: it must have at least {MIN_PAIRS}"
        )
    rng = np.random.default_rng([seed, zlib.crc32(file.stem.encode())])
    return tuple(pairs[i] for i in np.sort(rng.permutation(len(pairs))[:max_pairs]))


def vocabulary(relations: Sequence[Relation]) -> tuple[str, ...]:
    """Every word of all relations once: the vocabulary over which vectors are centred."""
    return tuple(dict.fromkeys(word for relation in relations for word in relation.words))


def word_tokens(
    words: Sequence[str], tokenizer, carriers: Sequence[str] = CARRIERS, differing_ids: Sequence[int] = ()
) -> list[list[int]]:
    """Token ids of every word in every carrier: ``len(words) * len(carriers)`` lists, carriers fastest. The
    last token is the word's last; a BOS that means the same to all models comes first.

    UserError if a carrier does not end with {word}, if a word or a carrier holds a token that the tokenizer
    does not know (the words are listed), or if a word would be read at position 0."""
    check("carriers", carriers, list)
    if not carriers or not all(isinstance(c, str) and c.endswith("{word}") for c in carriers):
        raise UserError(
            f"carriers are {list(carriers)!r}: each must be a text that ends with {{word}}, such as 'this is"
            " not {word}'"
        )

    def ids(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    beginnings = [carrier.removesuffix("{word}") for carrier in carriers]
    if (unknown := tokenizer.unk_token_id) is not None:
        bad = [word for word in (*words, *map(str.strip, beginnings)) if unknown in ids(word)]
        if bad:
            raise UserError(
                f"{len(bad)} words are unknown to the tokenizer ({tokenizer.unk_token}):"
                f" {', '.join(bad[:30])}{', ...' if len(bad) > 30 else ''}; all unknown words would be one"
                " vector, so use words that it knows"
            )
    bos = [i for i in (tokenizer.bos_token_id,) if i is not None and i not in differing_ids]
    lists = [bos + ids(beginning + word) for word in words for beginning in beginnings]
    if any(len(tokens) < 2 for tokens in lists):
        raise UserError(
            "a word would be read at position 0, where the attention sink is: put words before {word} in"
            " every carrier"
        )
    return lists


def read_words(
    model,
    tokenizer,
    words: Sequence[str],
    layer: int,
    carriers: Sequence[str] = CARRIERS,
    differing_ids: Sequence[int] = (),
) -> np.ndarray:
    """The residual stream after ``layer`` at the word's last token, in each carrier: [n_words, n_carriers,
    d], float64."""
    lists = word_tokens(words, tokenizer, carriers, differing_ids)
    acts = np.asarray(capture(model, tokenizer, lists, layer), dtype=np.float64)
    vectors = acts[np.cumsum([len(tokens) for tokens in lists]) - 1]
    if not np.isfinite(vectors).all():
        raise UserError(f"activations of layer {layer} are not finite: load the model in float32 or bfloat16")
    return vectors.reshape(len(words), len(carriers), -1)


def read_models(
    pair: Pair, names: Sequence[str], words: Sequence[str], folder: Path, layer: int | None = None
) -> dict[str, np.ndarray]:
    """``read_words`` of several models of a pair: {name: [n_words, n_carriers, d_m]}.

    Kept in ``folder`` (one file a model): nothing is read again while words, carriers, layer and weights are
    the same. ``layer`` None: the pair's own, or half depth."""
    layer = pair.layer if layer is None else layer
    tokenizer, vectors = pair.tokenizer(), {}
    for name in names:

        def make(part: Path, name=name) -> None:
            model = pair.load(name)
            at = check_layer(model, layer)
            arrays = read_words(model, tokenizer, words, at, CARRIERS, pair.differing_ids)
            save_file({"vectors": arrays}, part / "vectors.safetensors")

        def read(part: Path) -> np.ndarray:
            return load_file(part / "vectors.safetensors")["vectors"]

        what = fingerprint("words", list(words), list(CARRIERS), layer, pair.dtype, pair.fingerprint(name))
        info = {"model": name, "words": list(words), "carriers": list(CARRIERS)}
        part = Path(folder) / name
        try:
            vectors[name] = kept(part, what, make, read, **info)
        except (OSError, SafetensorError, KeyError):  # the file is damaged: read the words again
            (part / MANIFEST).unlink(missing_ok=True)
            vectors[name] = kept(part, what, make, read, **info)
    return vectors


@dataclass(frozen=True)
class ReadWords:
    """The words of some relations, read by some models of a pair. ``absent``: models that the pair lacks."""

    pair: Pair
    relations: tuple[Relation, ...]
    words: tuple[str, ...]
    absent: tuple[str, ...]
    by_carrier: dict[str, np.ndarray]  # {model: [n_words, n_carriers, d]}

    @property
    def vectors(self) -> dict[str, np.ndarray]:
        """{model: [n_words, d]}, averaged over carriers."""
        return {model: v.mean(1) for model, v in self.by_carrier.items()}

    def relation(self, name: str) -> Relation:
        check("picture", name, str, choices=tuple(r.name for r in self.relations))
        return next(r for r in self.relations if r.name == name)

    def describe(self) -> str:
        lines = [f"{len(self.relations)} relations, {len(self.words)} distinct words, in the carriers:"]
        lines += [f"  {carrier}" for carrier in CARRIERS]
        for model, v in self.vectors.items():
            lines.append(f"{model:>10}: vectors {v.shape}, mean norm {np.linalg.norm(v, axis=1).mean():.1f}")
        if self.absent:
            lines.append("controls that this pair does not have: " + ", ".join(self.absent))
        return "\n".join(lines)


def read_relations(
    run: Run,
    relations: str | Path = RELATIONS,
    controls: Sequence[str] = (),
    max_pairs: int | None = None,
    layer: int | None = None,
    seed: int = 0,
) -> ReadWords:
    """The words of all relations in a folder, read by the models of the run's pair and by those ``controls``
    that it has. Kept in the run's folder."""
    pair, chosen = load_pair(run.pair), load_relations(relations, max_pairs, seed)
    absent = tuple(c for c in controls if c not in {**pair.models, **pair.others})
    models, words = dict.fromkeys([*pair.models, *controls]), vocabulary(chosen)
    vectors = read_models(pair, [m for m in models if m not in absent], words, run.path("geometry"), layer)
    return ReadWords(pair, tuple(chosen), words, absent, vectors)
