"""Progress on stderr for what takes longer than two seconds; silent when it is no terminal."""

from __future__ import annotations

import shutil
import sys
import threading
import time
from types import TracebackType
from typing import TextIO

QUIET_SECONDS = 2.0
_TICK_SECONDS = 0.2
_BAR_CELLS = 24


class Progress:
    """A bar over ``total`` steps, or elapsed time alone where ``total`` is None.

    ``with Progress("compiling", total=8) as progress: progress.update(3, "fa2 fwd sm_80")``.
    Drawn by a thread, so that one long step still shows that time passes.
    """

    def __init__(
        self, title: str, total: int | None = None, *, stream: TextIO | None = None
    ) -> None:
        self.title = title
        self.total = total
        self._stream = stream if stream is not None else sys.stderr
        self._state = (0, "")
        self._started = time.monotonic()
        self._done = threading.Event()
        self._drawn = 0
        self._thread: threading.Thread | None = None

    def __enter__(self) -> Progress:
        if self._stream.isatty():
            self._thread = threading.Thread(target=self._draw_until_done, daemon=True)
            self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._thread is None:
            return
        self._done.set()
        self._thread.join()
        if self._drawn:
            self._stream.write("\r" + " " * self._drawn + "\r")
            self._stream.flush()

    def update(self, done: int, label: str = "") -> None:
        """``done`` steps are finished; ``label`` names the latest."""
        self._state = (done, label)

    def render(self, elapsed: float, columns: int) -> str:
        """The line at ``elapsed`` seconds, at most ``columns`` wide."""
        done, label = self._state
        parts = [self.title]
        if self.total is not None:
            filled = _BAR_CELLS * done // max(self.total, 1)
            parts += [f"[{'#' * filled}{'.' * (_BAR_CELLS - filled)}]", f"{done}/{self.total}"]
        parts += [f"{elapsed:.0f} s", label]
        return " ".join(part for part in parts if part)[: max(columns - 1, 0)]

    def _draw_until_done(self) -> None:
        if self._done.wait(QUIET_SECONDS):
            return
        while True:
            columns = shutil.get_terminal_size().columns
            line = self.render(time.monotonic() - self._started, columns)
            self._stream.write("\r" + line.ljust(self._drawn))
            self._stream.flush()
            self._drawn = max(self._drawn, len(line))
            if self._done.wait(_TICK_SECONDS):
                return
