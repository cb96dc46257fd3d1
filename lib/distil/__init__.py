"""Distillation: how the pairs of models are made, and what a distilled model can do (notebook 00).

Start with organism.py.

    organism.py    the embedded pair: recipe, stages, training, the models that are shipped
    control.py     the positive control: a pair whose difference is known
    adapters.py    a real model distilled by low-rank adapters
    fit.py         the training that both share: batches, schedule, loop, states, log
    trials.py      puzzles put to a model; transcripts as tables; P(reflection | error)
    writing.py     a real pair writes the text that is harvested from it
    plots.py       the figures of notebook 00
"""

import lazy_loader as lazy

__getattr__, __dir__, __all__ = lazy.attach(
    __name__,
    submodules=["adapters", "organism", "plots", "trials", "writing"],
    submod_attrs={"trials": ["BEHAVIOURS", "PARAPHRASES", "Puzzle", "Teacher", "first_words"]},
)
