"""``python -m tests.faults``: all kills, faults and bad inputs, and one line that counts them.

Cases are marked ``@pytest.mark.fault("kill")``, ``("fault")`` or ``("bad input")``, with ``n=`` where one
test has several; conftest.py writes the mark into the report of the test, which may come from another
process. Every test of these passes only if nothing was lost and what was said is clear, so what fails counts
as one that lost something or was unclear.
"""

from __future__ import annotations

import sys
from collections import Counter

import pytest

FILES = ["tests/house/test_faults.py", "tests/house/test_bad_input.py"]
FILES += ["tests/text/test_files.py", "tests/models/test_checks.py", "tests/crosscoder/test_exchange.py"]
LEAST = {"kill": 30, "fault": 20, "bad input": 200}


class Count:
    """A plugin that counts marked cases by what became of them."""

    def __init__(self):
        self.passed, self.failed, self.done = Counter(), Counter(), set()

    def pytest_runtest_logreport(self, report):
        mark = dict(report.user_properties).get("fault")
        if (
            mark
            and report.nodeid not in self.done
            and (report.failed or (report.when == "call" and report.passed))
        ):
            kind, n = mark
            (self.failed if report.failed else self.passed)[kind] += n
            self.done.add(report.nodeid)


def line(count: Count) -> str:
    """The one line."""
    met = count.passed + count.failed
    return (
        f"{met['kill']} kills, {met['fault']} faults, {met['bad input']} bad inputs: {count.failed.total()}"
        " lost something or gave an unclear error"
    )


def verdict(count: Count, code: int, least: dict[str, int] = LEAST) -> int:
    """0 if everything passed, and enough of each kind did; what was skipped does not count."""
    return int(
        code != 0 or count.failed.total() > 0 or any(count.passed[kind] < n for kind, n in least.items())
    )


def main(arguments: list[str]) -> int:
    count = Count()
    code = pytest.main([*FILES, "-m", "not browser", "-p", "no:cacheprovider", *arguments], plugins=[count])
    print(line(count))
    return verdict(count, int(code))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
