"""Pairs of models: where they come from, how they are loaded, and the residual stream at one layer.

Start with pairs.py.

    registry.py  data/pairs.yaml, or a file of one's own: entries, checked
    pairs.py     loading; half depth; vocabularies that must agree
    reader.py    the residual stream of texts at one layer; models as nnsight sees them, here or on NDIF
    checks.py    weights against their files, tokenizers, architectures: before anything is computed
    decode.py    many prompts decoded at once; noise for sampling
    sources.py   commits and data sets of the hub, models inside packages, adapters
"""

import lazy_loader as lazy

__getattr__, __dir__, __all__ = lazy.attach(
    __name__,
    submodules=["decode", "sources"],
    submod_attrs={
        "pairs": ["Pair", "check_layer", "check_vocabularies", "decoder_layers", "half_depth", "load_pair"],
        "reader": ["LayerReader", "capture", "open_models", "wrap"],
    },
)
