"""Finders, one a file. A finder enters itself (``finder.finder``) when it is imported here."""

from . import (  # noqa: F401, I001  (the order is that of tables)
    base_sae, diff_sae, l1_nrn, batchtopk_nrn, random_features, dedicated_nrn, batchtopk_nu, batchtopk_use,
    delta, bridge, attributed, mean_difference, before_behaviours, principal,
)  # fmt: skip
