"""Progress with an estimate of the time left: bars in a terminal, plain lines in a log."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import accumulate
from typing import Protocol

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    SpinnerColumn,
    Task,
    TextColumn,
    TimeElapsedColumn,
)
from rich.text import Text

LINE_INTERVAL = 30.0  # seconds between the lines of one bar where there is no terminal

Advance = Callable[[int], None]


class Listener(Protocol):
    """Hears what a Reporter shows, also when it is quiet."""

    def on_text(self, text: str) -> None:
        """One line was said."""
        ...

    def on_progress(self, description: str, done: int, total: int) -> None:
        """A bar began (``done`` is 0) or moved."""
        ...


class Reporter:
    """Shows what a run is doing, on stderr; silent when made with ``quiet=True``.

    Where stderr is no terminal (CI, a log file) a bar is a line when it begins, one when it ends,
    and one every LINE_INTERVAL seconds in between.

    Args:
        quiet: Show nothing.
        listener: Told everything that is shown or would be.
    """

    def __init__(self, quiet: bool = False, listener: Listener | None = None) -> None:
        self.console = Console(stderr=True, quiet=quiet)
        self.listener = listener

    def say(self, text: str) -> None:
        """Print one line."""
        self._print(text)
        if self.listener:
            self.listener.on_text(text)

    @contextmanager
    def bar(
        self, description: str, total: int, sizes: Sequence[int] | None = None
    ) -> Iterator[Advance]:
        """A progress bar; yields a function that advances it by a number of steps.

        Args:
            description: What is done.
            total: Number of steps.
            sizes: What every step costs, in any unit, for the time left; by default the same.
        """
        done = 0
        drawn = self.console.is_interactive or self.console.is_jupyter
        pace = Pace(total, sizes)
        show_bar = self._bar if drawn else self._lines
        with show_bar(description, total, pace) as show:

            def advance(steps: int) -> None:
                nonlocal done
                done += steps
                show(done)
                if self.listener:
                    self.listener.on_progress(description, done, total)

            advance(0)
            yield advance

    @contextmanager
    def _bar(self, description: str, total: int, pace: Pace) -> Iterator[Advance]:
        columns = (
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("eta"),
            _TimeLeft(pace),
        )
        with Progress(*columns, console=self.console) as progress:
            task = progress.add_task(description, total=total)

            def show(done: int) -> None:
                pace.at(done)
                progress.update(task, completed=done)

            yield show

    @contextmanager
    def _lines(self, description: str, total: int, pace: Pace) -> Iterator[Advance]:
        started = shown = time.monotonic()
        finished = 0
        self._print(f"{description}: {total} steps")

        def show(done: int) -> None:
            nonlocal shown, finished
            finished = done
            pace.at(done)
            now = time.monotonic()
            if now - shown < LINE_INTERVAL or done >= total:
                return
            shown = now
            left = pace.left()
            eta = "" if left is None else f", about {clock(left)} left"
            self._print(f"{description}: {done}/{total} after {clock(now - started)}{eta}")

        try:
            yield show
        finally:
            outcome = "done in" if finished >= total else f"stopped at {finished}/{total} after"
            self._print(f"{description}: {outcome} {clock(time.monotonic() - started)}")

    def _print(self, text: str) -> None:
        soft = not self.console.is_terminal  # a line of a log stays one line
        self.console.print(text, markup=False, highlight=False, soft_wrap=soft)


class Pace:
    """How long a bar will take at its average pace so far, which no single slow step upsets.

    Args:
        total: Number of steps.
        sizes: What every step costs; None for steps that are alike.
    """

    def __init__(self, total: int, sizes: Sequence[int] | None) -> None:
        self._work = [0, *accumulate(sizes)] if sizes else range(total + 1)
        self._began = self._stepped = time.monotonic()
        self._done = 0

    def at(self, done: int) -> None:
        """Note that ``done`` steps are done by now."""
        self._stepped, self._done = time.monotonic(), min(done, len(self._work) - 1)

    def left(self) -> float | None:
        """Seconds left now; None before the first step."""
        left = seconds_left(self._stepped - self._began, self._work[self._done], self._work[-1])
        return None if left is None else max(0.0, left - (time.monotonic() - self._stepped))


class _TimeLeft(ProgressColumn):
    """The time left by the average pace: rich's own goes by the last steps, and wobbles."""

    max_refresh = 0.5

    def __init__(self, pace: Pace) -> None:
        super().__init__()
        self._pace = pace

    def render(self, task: Task) -> Text:
        left = self._pace.left()
        return Text("-:--" if left is None else clock(left), style="progress.remaining")


def seconds_left(elapsed: float, done: int, total: int) -> float | None:
    """Time left at the average pace so far, in seconds; None before the first step."""
    return elapsed * (total - done) / done if done else None


def clock(seconds: float) -> str:
    """Seconds for people.

    >>> clock(7), clock(88), clock(3725)
    ('0:07', '1:28', '1:02:05')
    """
    minutes, second = divmod(round(seconds), 60)
    hour, minute = divmod(minutes, 60)
    return f"{hour}:{minute:02}:{second:02}" if hour else f"{minute}:{second:02}"
