"""Passes under way in a model, and verbs that change it: a verb waits for the passes, and passes for the verb."""

import contextlib
import sys
import threading
from collections.abc import Iterator
from types import FrameType

# Seconds that a verb waits for passes in other threads.
PATIENCE = 60.0


class _Entry:
    """The passes of one thread, one within the other; ``frame`` runs while the outermost does."""

    __slots__ = ("depth", "frame")

    def __init__(self, frame: FrameType):
        self.frame = frame
        self.depth = 1

    def is_running(self, innermost: FrameType | None) -> bool:
        """Whether the pass still runs in the thread that executes ``innermost``.

        One that an interrupt ended never says so: torch calls no hook then.
        """
        while innermost is not None:
            if innermost is self.frame:
                return True
            innermost = innermost.f_back
        return False


class Traffic:
    """Who reads a model's adapters, and who changes them."""

    def __init__(self) -> None:
        self._changed = threading.Condition(threading.Lock())
        self._passes: dict[int, _Entry] = {}
        self._writer: int | None = None
        self._depth = 0

    def begin(self, frame: FrameType) -> bool:
        """Count a pass of this thread; whether it is the outermost. Waits while a verb changes the model."""
        me = threading.get_ident()
        entry = self._passes.get(me)
        if entry is not None and entry.is_running(frame):
            entry.depth += 1
            return False
        with self._changed:
            while self._writer not in (None, me):
                self._changed.wait()
            self._passes[me] = _Entry(frame)
        return True

    def end(self) -> bool:
        """Count off a pass of this thread; whether it was the outermost."""
        me = threading.get_ident()
        entry = self._passes.get(me)
        if entry is None:  # it failed to begin
            return False
        entry.depth -= 1
        if entry.depth:
            return False
        with self._changed:
            self._passes.pop(me, None)
            if self._writer is not None:
                self._changed.notify_all()
        return True

    @contextlib.contextmanager
    def changing(self) -> Iterator[None]:
        """Change the model's adapters while no pass runs; passes that begin meanwhile wait.

        Raises: RuntimeError: called inside a pass, or passes of other threads do not end.
        """
        me = threading.get_ident()
        with self._changed:
            mine = self._passes.get(me)
            if mine is not None and self._writer != me and mine.is_running(sys._getframe()):
                raise RuntimeError(
                    "model: its adapters cannot be changed from inside one of its forward passes"
                )
            ready = self._writer == me or self._changed.wait_for(lambda: self._writer is None, PATIENCE)
            if ready and self._writer != me:
                self._writer = me
                ready = self._changed.wait_for(lambda: not self._others(me), PATIENCE)
                if not ready:
                    self._writer = None
                    self._changed.notify_all()
            if not ready:
                raise RuntimeError(
                    f"model: its adapters cannot be changed, other threads have been using it for {PATIENCE:.0f} s"
                )
            self._depth += 1
        try:
            yield
        finally:
            with self._changed:
                self._depth -= 1
                if not self._depth:
                    self._writer = None
                    self._changed.notify_all()

    def _others(self, me: int) -> bool:
        """Whether a pass runs in another thread; forgets those that an interrupt ended."""
        frames = sys._current_frames()
        running = {
            thread: entry for thread, entry in self._passes.items() if entry.is_running(frames.get(thread))
        }
        self._passes = running
        return any(thread != me for thread in running)
