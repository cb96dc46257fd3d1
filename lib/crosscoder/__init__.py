"""One dictionary of features for several models' activations (notebook 02). Open ``model.py`` first.

model      encoder, decoder, four kinds of sparsity, norm ratios (NRN), losses
sparse     products with sparse codes: compiled loops, and the same in plain torch
loops      the compiled loops
fixed      the same with shapes known beforehand, for a GPU
triton_kernels  what ``fixed`` runs on one
training   the loop: batches, losses, optimiser, checkpoints
codes      the features of tokens, chunk by chunk
health     four numbers that say whether to believe a crosscoder
norms      whose the features are: the census of all decoder rows
plots      the figures of notebook 02
processes  what several processes share out in training
launch     starting these processes
seeds      the crosscoders of a run, which differ in their seed
recurrence which features come back with another seed
sharing    opening a crosscoder from anywhere, checking it on data, the hub
exchange   the formats of others
claims     what file and log say of a crosscoder
"""

import lazy_loader as lazy

__getattr__, __dir__, __all__ = lazy.attach(
    __name__,
    submodules=["norms", "plots", "recurrence", "seeds"],
    submod_attrs={
        "model": ["CrossCoder"],
        "training": ["TrainConfig", "train", "read_log"],
        "health": ["health_cards"],
        "sharing": ["load_pair", "open_store", "open_crosscoder"],
    },
)
