"""Finders, one a file; each says in its decorator what it does, and enters itself when it is imported."""

from . import (  # noqa: F401, I001  (the order is that of tables)
    base_sae, diff_sae, l1_nrn, batchtopk_nrn, random_features, dedicated_nrn, batchtopk_nu, batchtopk_use,
    delta, bridge, attributed, mean_difference, before_behaviours, principal,
)  # fmt: skip
