"""When a long run saves: from time to time, and at once where it is asked to stop."""

import signal
import sys
import threading
import time

PERIOD = 300.0  # seconds


class SaveTimes:
    """Says after each step whether to save: every `every` steps, or where that is None every five minutes.

    SIGINT, from a person, and SIGTERM, from SLURM and others, no longer end the process where it stands: the step is
    finished, saved, and `leave_if_asked` exits with 130 or 143. A second one ends it as ever. Only the main thread can
    listen to signals; elsewhere they stay what they were.
    """

    def __init__(self, every: int | None):
        self.every, self.last, self.asked, self.before = every, time.monotonic(), 0, {}
        if threading.current_thread() is threading.main_thread():
            self.before = {number: signal.signal(number, self._ask) for number in (signal.SIGINT, signal.SIGTERM)}

    def _ask(self, number: int, frame: object) -> None:
        self.asked = number
        self.restore()

    def due(self, step: int) -> bool:
        """Save now? step: how many are done."""
        now = time.monotonic()
        due = bool(self.asked) or (step % self.every == 0 if self.every else now - self.last >= PERIOD)
        self.last = now if due else self.last
        return due

    def leave_if_asked(self, text: str) -> None:
        """Exits, having said `text`, where a signal has come since this was made."""
        if self.asked:
            sys.stderr.write(f"\n{text}\n")
            sys.exit(128 + self.asked)

    def restore(self) -> None:
        """Signals are again what they were."""
        for number, handler in self.before.items():
            signal.signal(number, handler)
        self.before = {}
