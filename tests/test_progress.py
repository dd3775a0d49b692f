"""The counter of long generations."""

import io
import time

from lamemo_fairseq.generation import progress


class Terminal(io.StringIO):
    def isatty(self):
        return True


def counted(monkeypatch, seconds, screen=Terminal):
    """What a terminal, or a file, shows of twenty tokens in so many seconds."""
    clock, screen = [100.0], screen()
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


def test_a_file_gets_a_line_rarely(monkeypatch):
    assert "generated" not in counted(monkeypatch, 8.0, io.StringIO)
    assert 3 <= counted(monkeypatch, 40.0, io.StringIO).count("generated") <= 5
    assert counted(monkeypatch, 40.0).count("generated") >= 20
