"""Which method finds what distillation changed? An open test of finders, where it is known (notebook 17).
Open ``finder.py`` first; docs/finders.md says how to enter another one.

finder        what a finder is: a function of data that returns claims, under a name
claims        directions with a side and a confidence, and the file in which anybody can give them
methods       one finder a file: mean differences, principal components, sparse autoencoders, crosscoders
dictionary    what finders that train a dictionary share: views of a store, features as claims
truths        planted data, the positive control, the embedded pair; which claims are right
scores        precision, recall, calibration, recurrence, causal effects
bench         every finder on every truth; the part "finders" of the study
report        the best of each truth, who beats NRN, figures
"""

import lazy_loader as lazy

__getattr__, __dir__, __all__ = lazy.attach(
    __name__,
    submodules=["bench", "claims", "report", "scores", "truths"],
    submod_attrs={"bench": ["open_variant"]},
)
