"""What the features of a crosscoder mean (notebook 03). Open ``table.py`` first.

table            one row of statistics per feature; labels from ground truth; the feature of each category
auroc            AUROC, precision and recall of all features at once; predictors that see the token alone
detectors        E3: the feature of each category against its controls; the feature of errors
uniqueness       latent scaling and NRN beyond a null
control          how much of what was planted is found (the pair tiny_planted)
subspaces        what a category's best detectors span together, over crosscoders
latent_scaling   how much of a feature the other model's activations hold
token_tests      word or function: on new puzzles, and on real text
use              what each model alone activates: how often, how strongly, in which phase
contexts         the texts in which a feature is strongest, or fires at all; its profile, a map
lens             the tokens that its two decoder rows promote and suppress
explorer         the widget
naming           names by a language model, and how good they are
plots            the figures of notebook 03
scores           its predictions against what was observed
"""

import lazy_loader as lazy

__getattr__, __dir__, __all__ = lazy.attach(
    __name__,
    submodules=[
        "auroc", "contexts", "detectors", "explorer", "naming", "plots", "scores", "subspaces", "table",
        "token_tests", "uniqueness", "use",
    ],
)  # fmt: skip
