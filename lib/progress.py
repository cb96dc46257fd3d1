"""What is shown while the work goes on: one line that says how far it has come."""

from __future__ import annotations

import math
import sys
import time

# in an output's metadata: true of this run alone, so no part of a notebook's canonical form (lib.run)
PASSING = "passing"


class Progress:
    """One line that moves: ``rows: 12/50`` and at the end ``rows: 50/50 done``.

    In a kernel it is one display, updated at most twice a second (bars of tqdm freeze at 0% in executed
    notebooks); elsewhere a line on standard error, in place on a terminal, every ten seconds in a log.
    """

    def __init__(self, label: str, total: int):
        self.label, self.total, self.done, self._last, self._handle = label, int(total), 0, -math.inf, None
        shell = sys.modules["IPython"].get_ipython() if "IPython" in sys.modules else None
        self._kernel = shell is not None and hasattr(shell, "kernel")
        self._every = 0.5 if self._kernel or sys.stderr.isatty() else 10.0
        self._closed = False

    def update(self, done: int, note: str = "") -> None:
        """``done`` of ``total`` so far (not an increment). ``note`` is shown while the line moves, and not
        kept.
        """
        self.done = int(done)
        if time.monotonic() - self._last >= self._every:
            self._last = time.monotonic()
            self._show(f"{self.label}: {self.done:,}/{self.total:,}" + (f", {note}" if note else ""))

    def close(self) -> None:
        if not self._closed:
            self._closed = True
            self._show(
                f"{self.label}: {self.done:,}/{self.total:,} "
                + ("done" if self.done >= self.total else "stopped"),
                last=True,
            )

    def _show(self, line: str, last: bool = False) -> None:
        if self._kernel:
            from IPython.display import display

            if self._handle is None:
                self._handle = display(
                    {"text/plain": line}, raw=True, display_id=True, metadata={PASSING: True}
                )
            else:
                self._handle.update({"text/plain": line}, raw=True, metadata={PASSING: True})
        elif sys.stderr.isatty():
            print(f"\r\033[K{line}", end="\n" if last else "", file=sys.stderr, flush=True)
        else:
            print(line, file=sys.stderr, flush=True)

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *error) -> None:
        self.close()


def passing(line: str) -> None:
    """Show a line that is true of this run alone, such as a speed: to be seen while one works, and not kept
    in git.
    """
    from IPython.display import display

    display({"text/plain": line}, raw=True, metadata={PASSING: True})
