"""The study: long experiments on a run, each computed once (notebooks 10 to 18), and pairs of several sizes
(notebook 06). Open ``variants.py`` first.

variants        a run and its variants; how a part of the study is computed once and read
nulls           thresholds from nulls, false positives, other seeds, how alike the models are
architectures   kinds of crosscoders compared; when features of three models came
planted         paired activations of known truth
judging         which rule finds the planted features
thoughts        whole thoughts with features removed, exchanged and placed
texts           longer training, and another text
appraisal       what a distilled language model learnt
checkup         is a crosscoder what its file says? (python -m lib checkup)
published       the numbers that the authors published, with their controls
beside          the paper's measurements in its own form, and its numbers beside ours
loop            what each part of the published training loop does to a crosscoder
verdicts        the predictions of notebooks 02 to 04, crosscoder by crosscoder
sizes           the results of several pairs against their size
"""

import lazy_loader as lazy

__getattr__, __dir__, __all__ = lazy.attach(
    __name__,
    submodules=["nulls", "architectures", "judging", "thoughts", "texts", "appraisal", "verdicts", "sizes"]
    + ["checkup", "published", "beside"],
    submod_attrs={"variants": ["open_variant"]},
)
