"""What the programs have in common: the name of the mistake that they are written with."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Program:
    """A ``@cute.jit`` function with one mistake, ``bug``; sound if that is ""."""

    bug: str = ""

    def has(self, bug: str) -> bool:
        """Whether the program is written with this mistake."""
        return self.bug == bug
