"""What a person sees on a terminal, and time that a test decides."""

from __future__ import annotations

import io


class Terminal(io.StringIO):
    """One that draws: `screen` is what a person sees."""

    encoding = "utf-8"

    def isatty(self) -> bool:
        return True

    def screen(self) -> list[str]:
        lines: list[list[str]] = [[]]
        column = 0
        for character in self.getvalue():
            if character == "\n":
                lines.append([])
                column = 0
            elif character == "\r":
                column = 0
            else:
                lines[-1][column : column + 1] = [character]
                column += 1
        return ["".join(line).rstrip() for line in lines]

    def states(self) -> list[str]:
        """What was drawn, one over the other or one below the other."""
        return [part.rstrip() for line in self.getvalue().split("\n") for part in line.split("\r") if part.strip()]


class Clock:
    """Stands still, or is `step` seconds later at each look."""

    def __init__(self, step: float = 0.0) -> None:
        self.seconds = 0.0
        self.step = step

    def __call__(self) -> float:
        self.seconds += self.step
        return self.seconds
