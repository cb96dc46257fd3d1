"""Did the geometry of words change (notebook 05)? Open ``parallelograms.py`` first.

words            relations between words, and their vectors, read in context
parallelograms   E7: the parallelogram loss, its null, its intervals; base against distilled
similarity       CKA, Procrustes, ranks of two models' activations; where features write
plots            the figures of notebook 05
"""

import lazy_loader as lazy

__getattr__, __dir__, __all__ = lazy.attach(
    __name__,
    submodules=["parallelograms", "plots", "similarity", "words"],
    submod_attrs={"words": ["CARRIERS", "read_relations"]},
)
