"""Contract kits: what every prior, window and layout promises, as tests that a subclass inherits.

A prior of one's own is tested by

    class TestMyPrior(PriorContract):
        def make(self):
            return MyPrior(...)

and likewise a weight's distribution, a way of cutting windows, a layout of packed weights, a kind of runs, a
state that is kept to go on from, a logger. Beside them the assertions that hold for every result and every call.
Needs pytest and hypothesis: ``pip install 'sqs-pyro[testing]'``.
"""

import pytest

pytest.register_assert_rewrite(  # before they are imported: a failure then shows both sides
    *(
        f"sqs_pyro.testing.{kit}"
        for kit in (
            "distributions",
            "kept_state",
            "layouts",
            "loggers",
            "run_kinds",
            "shipped",
            "untouched",
            "windows",
        )
    )
)

from sqs_pyro.testing.distributions import PriorContract, WeightDistributionContract  # noqa: E402
from sqs_pyro.testing.kept_state import KeptStateContract  # noqa: E402
from sqs_pyro.testing.layouts import LayoutContract, random_coded  # noqa: E402
from sqs_pyro.testing.loggers import LoggerContract  # noqa: E402
from sqs_pyro.testing.run_kinds import RunKindContract  # noqa: E402
from sqs_pyro.testing.shipped import assert_shipped  # noqa: E402
from sqs_pyro.testing.untouched import untouched  # noqa: E402
from sqs_pyro.testing.windows import WindowsContract  # noqa: E402

__all__ = [
    "KeptStateContract",
    "LayoutContract",
    "LoggerContract",
    "PriorContract",
    "RunKindContract",
    "WeightDistributionContract",
    "WindowsContract",
    "assert_shipped",
    "random_coded",
    "untouched",
]
