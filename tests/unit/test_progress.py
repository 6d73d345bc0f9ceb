from __future__ import annotations

import io
import time

import pytest
from rich.console import Console

from bitplan._base.progress import Pace, Reporter, clock, seconds_left


class Recorder:
    def __init__(self) -> None:
        self.heard: list[object] = []

    def on_text(self, text: str) -> None:
        self.heard.append(text)

    def on_progress(self, description: str, done: int, total: int) -> None:
        self.heard.append((description, done, total))


class Clock:
    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 100.0
        monkeypatch.setattr(time, "monotonic", lambda: self.now)


def plain(reporter: Reporter, terminal: bool = False) -> io.StringIO:
    text = io.StringIO()
    reporter.console = Console(file=text, force_terminal=terminal, width=40)
    return text


@pytest.mark.parametrize("quiet", [False, True])
def test_a_listener_hears_all_even_of_a_quiet_reporter(
    quiet: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    recorder = Recorder()
    reporter = Reporter(quiet, listener=recorder)
    reporter.say("Loading")
    with reporter.bar("Profiling", 5) as advance:
        advance(2)
        advance(3)
    bars = [("Profiling", 0, 5), ("Profiling", 2, 5), ("Profiling", 5, 5)]
    assert recorder.heard == ["Loading", *bars]
    captured = capsys.readouterr()
    assert captured.out == ""
    assert (captured.err == "") == quiet


def test_a_log_gets_a_line_at_both_ends_and_every_half_minute(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fake = Clock(monkeypatch)
    reporter = Reporter()
    text = plain(reporter)
    with reporter.bar("Profiling with a long description (fisher)", 100) as advance:
        for _ in range(20):  # every 7 s: a line at the first step 30 s or more after the last line
            fake.now += 7
            advance(5)
    assert text.getvalue().splitlines() == [
        "Profiling with a long description (fisher): 100 steps",
        "Profiling with a long description (fisher): 25/100 after 0:35, about 1:45 left",
        "Profiling with a long description (fisher): 50/100 after 1:10, about 1:10 left",
        "Profiling with a long description (fisher): 75/100 after 1:45, about 0:35 left",
        "Profiling with a long description (fisher): done in 2:20",
    ]


def test_a_log_says_where_a_bar_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = Clock(monkeypatch)
    reporter = Reporter()
    text = plain(reporter)
    with pytest.raises(RuntimeError), reporter.bar("Profiling", 9) as advance:
        advance(4)
        fake.now += 3700
        raise RuntimeError
    assert text.getvalue().splitlines()[-1] == "Profiling: stopped at 4/9 after 1:01:40"


def test_a_terminal_gets_a_bar() -> None:
    reporter = Reporter()
    text = plain(reporter, terminal=True)
    with reporter.bar("Profiling", 3) as advance:
        advance(3)
    assert "3/3" in text.getvalue()
    assert "steps" not in text.getvalue()


def test_lines_of_a_log_are_not_wrapped_and_not_read_as_markup() -> None:
    reporter = Reporter()
    text = plain(reporter)
    line = "96 calibration sequences [bold]: each price errs by about 14%"
    reporter.say(line)
    assert text.getvalue() == line + "\n"


def test_the_time_left_goes_by_the_whole_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    """Slow and fast steps in turn: what is left falls steadily, also while a step is at work."""
    fake = Clock(monkeypatch)
    pace, said = Pace(40, None), []
    assert pace.left() is None
    for step in range(1, 40):
        fake.now += 1.0 if step % 2 else 9.0
        pace.at(step)
        if step % 2 == 0:
            said.append(pace.left())
    assert said == pytest.approx([5.0 * (40 - step) for step in range(2, 40, 2)])
    before = pace.left()
    fake.now += 2
    assert before is not None and pace.left() == pytest.approx(before - 2)
    fake.now += 1000
    assert pace.left() == 0


def test_steps_that_cost_more_count_more(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = Clock(monkeypatch)
    reporter = Reporter()
    text = plain(reporter)
    with reporter.bar("Packing", 3, [80, 10, 10]) as advance:
        fake.now += 80
        advance(1)
    assert "1/3 after 1:20, about 0:20 left" in text.getvalue()
    even, uneven = Pace(3, None), Pace(3, [80, 10, 10])
    fake.now += 80
    for pace in (even, uneven):
        pace.at(1)
    assert (even.left(), uneven.left()) == (160, 20)


def test_time_left() -> None:
    assert seconds_left(30.0, 3, 10) == pytest.approx(70.0)
    assert seconds_left(30.0, 0, 10) is None
    assert [clock(s) for s in (0, 59.6, 3599, 3600)] == ["0:00", "1:00", "59:59", "1:00:00"]
