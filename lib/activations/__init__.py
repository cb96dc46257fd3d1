"""Activations of all models on the same tokens: harvested to disk, read in shuffled batches, looked at.

Start with harvest.py, then store.py.

    harvest.py    the models read the same token ids, and the residual stream at one layer goes to disk
    store.py      the activations on disk, opened and checked; rows, labels, batches
    shuffle.py    batches in random order out of a store larger than memory
    stream.py     the same batches without a disk: the models run while a crosscoder trains
    positions.py  where in a text a token stands: sentence ends, phases
    survey.py     a first look: counts, norms, how alike the models are (notebook 01)
    divergence.py where the models expect something else, token by token
"""

import lazy_loader as lazy

__getattr__, __dir__, __all__ = lazy.attach(
    __name__,
    submodules=["divergence", "survey"],
    submod_attrs={
        "harvest": ["harvest_activations", "harvest_run", "harvest_part", "merge_parts", "open_text"],
        "positions": ["LABELS"],
        "store": ["Store", "open_store"],
        "stream": ["Stream"],
        "survey": ["capture"],
    },
)
