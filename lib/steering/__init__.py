"""Are the features causes (notebooks 04 and 13)? Open ``ablation.py`` first, then ``steer.py``.

artefacts       what a run holds: models, store, crosscoder, feature table
ablation        E4: features taken out of the forward pass, and what the next token loses
steer           E5: directions, which features are worth trying, a model under steering
search          E5 over several crosscoders and layers: what is tried, chosen and reported
outcomes        what an intervention did: lengths, answers, kinds of sentences; the choice of a condition
tasks           two ways to ask: puzzles, and chat
generate        the engine: who writes, what is changed, where; one model or both
interventions   what can be changed: remove, swap, reconstruct, transplant, add, bias
experiments     whole thoughts: which features, which conditions (notebook 13)
effects         what whole thoughts show, with intervals (notebook 13)
control         a planted behaviour, removed and added (the pair tiny_planted)
facts           errors and careful thoughts: their features and directions, thoughts without them
plots           the figures of notebooks 04 and 13
report          its numbers, sentences and scoreboard
playground      the widget
"""

import lazy_loader as lazy

__getattr__, __dir__, __all__ = lazy.attach(
    __name__,
    submodules=[
        "ablation", "effects", "experiments", "generate", "outcomes", "plots", "report", "search", "steer",
    ],
    submod_attrs={"artefacts": ["open_run"], "playground": ["Playground"], "ablation": ["Removal"]},
)  # fmt: skip
