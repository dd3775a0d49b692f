"""The counter of long generations."""

import io
import time

from lamemo_fairseq.generation import progress


class Terminal(io.StringIO):
    def isatty(self):
        return True


def counted(monkeypatch, seconds):
    """What a terminal shows of twenty tokens in so many seconds."""
    clock, screen = [100.0], Terminal()
    monkeypatch.setattr(progress.sys, "stderr", screen)
    monkeypatch.setattr(time, "time", lambda: clock[0])
    with progress.counter(20, "generated") as bar:
        bar._time = lambda: clock[0]
        bar.start_t = bar.last_print_t = clock[0]
        for _ in range(20):
            clock[0] += seconds / 20
            bar.update(1)
    return screen.getvalue()


def test_long_generations_count_their_tokens_and_short_ones_are_silent(monkeypatch):
    assert "15/20" in counted(monkeypatch, 10.0) and "generated" in counted(monkeypatch, 10.0)
    assert "generated" not in counted(monkeypatch, 1.0)
