"""Words for E7: relations between them, and their vectors, read in context from a model's residual stream.

A word's vector is the residual stream at its last token, in a few fixed carrier prompts, averaged. It is
never read at position 0: there an attention sink drowns the word (in SmolLM2 norms of 22,000 against 180 in
context, mutual cosines above 0.9999). The carriers are the same for every word, else the offset between
inputs and outputs of a relation would be the offset between their carriers.

    relations = load_relations()                                     # data/relations/*.json
    readings = read_models(pair, ["base", "distilled"], vocabulary(relations), folder)
    vectors = {model: read.mean(1) for model, read in readings.items()}       # [n_words, n_carriers, d] -> [n_words, d]
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from ..models.pairs import Pair, check_layer
from ..models.reader import capture
from ..runs import MANIFEST, fingerprint, is_current, write_manifest
from ..settings import ROOT, UserError, check, integer

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


# --- relations: pairs of words ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Relation:
    """Word pairs (input, output) of one relation, without repeated rows."""

    name: str
    pairs: tuple[tuple[str, str], ...]

    @property
    def words(self) -> tuple[str, ...]:
        """Every word once, in the order of its first appearance."""
        return tuple(dict.fromkeys(word for pair in self.pairs for word in pair))


def load_relations(
    folder: str | Path = RELATIONS,
    names: Sequence[str] | None = None,
    max_pairs: int | None = None,
    seed: int = 0,
) -> list[Relation]:
    """The relations of a folder of ``<name>.json`` files, each a list of {"input": ..., "output": ...}.

    This is the format of Todd et al. 2023 ("Function Vectors in Large Language Models"). ``names`` None takes
    all files. Of a relation with more than ``max_pairs`` distinct pairs a seeded random subset is used. A
    relative folder is looked for from the repository's root. UserError for a missing folder, an unknown name,
    or a file of another format.
    """
    path = ROOT / folder
    files = {file.stem: file for file in sorted(path.glob("*.json"))}
    if not files:
        raise UserError(
            f"{folder} has no relations: it must be a folder of <relation>.json files of "
            '[{"input": word, "output": word}, ...]'
        )
    if unknown := [name for name in names or () if name not in files]:
        raise UserError(f"unknown relation {unknown[0]!r}: {folder} has {', '.join(files)}")
    check("max_pairs", max_pairs, integer(MIN_PAIRS) | None)
    return [
        Relation(name, _pairs(files[name], max_pairs, seed))
        for name in (dict.fromkeys(names) if names else files)
    ]


def _pairs(file: Path, max_pairs: int | None, seed: int) -> tuple[tuple[str, str], ...]:
    try:
        rows = [
            (row["input"].strip(), row["output"].strip())
            for row in json.loads(file.read_text(encoding="utf-8"))
        ]
    except (ValueError, KeyError, TypeError, AttributeError):
        raise UserError(
            f'{file.name} is not a relation: it must be a JSON list of {{"input": word, "output": word}}'
        ) from None
    # the same row twice would be a parallelogram of no height
    rows = list(dict.fromkeys(row for row in rows if all(row)))
    if len(rows) < MIN_PAIRS:
        raise UserError(
            f"relation {file.stem!r} has {len(rows)} distinct pairs: it must have at least {MIN_PAIRS}"
        )
    if max_pairs is not None and len(rows) > max_pairs:
        keep = np.sort(
            np.random.default_rng([seed, zlib.crc32(file.stem.encode())]).permutation(len(rows))[:max_pairs]
        )
        rows = [rows[i] for i in keep]
    return tuple(rows)


def vocabulary(relations: Sequence[Relation]) -> tuple[str, ...]:
    """Every word of all relations once: the vocabulary over which vectors are centred."""
    return tuple(dict.fromkeys(word for relation in relations for word in relation.words))


# --- vectors: words read in context -------------------------------------------------------------------------


def word_tokens(
    words: Sequence[str], tokenizer, carriers: Sequence[str] = CARRIERS, differing_ids: Sequence[int] = ()
) -> list[list[int]]:
    """Token ids of every word in every carrier: ``len(words) * len(carriers)`` lists, carriers fastest.

    The word comes last, so the last token of a list is the word's last token. Where the tokenizer has a BOS
    that means the same to all models, it comes first. UserError if a carrier does not end with {word}, if a
    word or a carrier holds a token that the tokenizer does not know (the words are listed), or if a word
    would be read at position 0.
    """
    check("carriers", carriers, list)
    if not carriers or not all(isinstance(c, str) and c.endswith("{word}") for c in carriers):
        raise UserError(
            f"carriers are {list(carriers)!r}: each must be a text that ends with {{word}}, such as 'this is"
            " not {word}'"
        )

    def ids(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    unk = tokenizer.unk_token_id
    if unk is not None:
        bad = [w for w in (*words, *(c.removesuffix("{word}").strip() for c in carriers)) if unk in ids(w)]
        if bad:
            raise UserError(
                f"{len(bad)} words are unknown to the tokenizer ({tokenizer.unk_token}):"
                f" {', '.join(bad[:30])}{', ...' if len(bad) > 30 else ''}; all unknown words would be one"
                " vector, so use words that it knows"
            )
    bos = (
        []
        if tokenizer.bos_token_id is None or tokenizer.bos_token_id in differing_ids
        else [tokenizer.bos_token_id]
    )
    lists = [bos + ids(carrier.removesuffix("{word}") + word) for word in words for carrier in carriers]
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
    average: bool = True,
) -> np.ndarray:
    """The residual stream after ``layer`` at the word's last token, averaged over carriers: [n_words, d],
    float64.

    With ``average=False`` carrier by carrier: [n_words, n_carriers, d].
    """
    lists = word_tokens(words, tokenizer, carriers, differing_ids)
    acts = np.asarray(capture(model, tokenizer, lists, layer), dtype=np.float64)
    last = np.cumsum([len(tokens) for tokens in lists]) - 1
    vectors = acts[last].reshape(len(words), len(carriers), -1)
    if not np.isfinite(vectors).all():
        raise UserError(f"activations of layer {layer} are not finite: load the model in float32 or bfloat16")
    return vectors.mean(1) if average else vectors


def read_models(
    pair: Pair,
    names: Sequence[str],
    words: Sequence[str],
    folder: Path,
    carriers: Sequence[str] = CARRIERS,
    layer: int | None = None,
) -> dict[str, np.ndarray]:
    """Vectors of several models of a pair, carrier by carrier: name -> [n_words, n_carriers, d_m]; average
    over axis 1.

    Kept in ``folder`` (one file a model): nothing is read again while words, carriers, layer and weights are
    the same. ``layer`` None: the pair's own, or half depth.
    """
    vectors, tokenizer = {}, None
    layer = pair.layer if layer is None else layer
    for name in names:
        part = Path(folder) / name
        mark = fingerprint("words", list(words), list(carriers), layer, pair.dtype, pair.fingerprint(name))
        vectors[name] = _kept(part, mark)
        if vectors[name] is None:
            tokenizer = tokenizer or pair.tokenizer()
            model = pair.load(name)
            read_at = check_layer(model, layer)
            vectors[name] = read_words(
                model, tokenizer, words, read_at, carriers, pair.differing_ids, average=False
            )
            part.mkdir(parents=True, exist_ok=True)
            (part / MANIFEST).unlink(missing_ok=True)
            save_file({"vectors": vectors[name]}, part / "vectors.safetensors")
            write_manifest(part, mark, model=name, layer=read_at, words=list(words), carriers=list(carriers))
    return vectors


def _kept(part: Path, mark: str) -> np.ndarray | None:
    """Vectors that were read before from exactly this; None if there are none, or their file is damaged."""
    try:
        return load_file(part / "vectors.safetensors")["vectors"] if is_current(part, mark) else None
    except (OSError, SafetensorError, KeyError):
        return None
