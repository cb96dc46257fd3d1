"""What decides an artefact is in its fingerprint: these stand in committed and published manifests."""

import pytest

from lib.crosscoder.training import TrainConfig
from lib.distil import adapters, organism
from lib.runs import fingerprint
from lib.study.planted import Planted


@pytest.mark.parametrize(
    "parameters, expected",
    [
        (TrainConfig(), "77bf3175a16b76a2"),
        (TrainConfig(n_features=64, l1=2, variant="jumprelu"), "556253ff78859706"),
        (Planted(), "b18ecee9e0ac39a9"),
        (Planted(mean_share=(0.1, 0.2)), "b702630d481d8924"),
        (Planted().null(), "52bccb0b6d1129b6"),
        (organism.Recipe(), "dcb8e784cc52e56c"),
        (adapters.Recipe(), "4367c384b04b7d17"),
    ],
    ids=lambda value: type(value).__qualname__ if not isinstance(value, str) else value,
)
def test_fingerprints_of_parameters_have_not_moved(parameters, expected):
    assert fingerprint(parameters) == expected
