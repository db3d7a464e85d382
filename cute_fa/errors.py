"""The one exception family of cute_fa.

Every message says what was wrong, what was got, what was expected and how to mend it; where
another generation or architecture would do, it names it.
"""

from __future__ import annotations

from collections.abc import Sequence


class CuteFAError(Exception):
    """Base of every error that cute_fa raises on purpose.

    Args:
        what: one sentence naming the thing that is wrong.
        got: the value that was found.
        expected: what would have been accepted.
        fix: what the caller can do about it.
        alternatives: generations or architectures that would serve the same request.
    """

    def __init__(
        self,
        what: str,
        *,
        got: object = None,
        expected: object = None,
        fix: str | None = None,
        alternatives: Sequence[str] = (),
    ) -> None:
        self.what = what
        self.got = got
        self.expected = expected
        self.fix = fix
        self.alternatives = tuple(alternatives)
        super().__init__(self._render())

    def _render(self) -> str:
        lines = [self.what]
        if self.got is not None:
            lines.append(f"  got:      {self.got}")
        if self.expected is not None:
            lines.append(f"  expected: {self.expected}")
        if self.fix:
            lines.append(f"  to mend:  {self.fix}")
        if self.alternatives:
            lines.append(f"  would do: {', '.join(self.alternatives)}")
        return "\n".join(lines)


class InvalidArgumentError(CuteFAError, ValueError):
    """A value that no kernel of this library could accept."""


class InvalidTypeError(CuteFAError, TypeError):
    """An argument of the wrong Python type or tensor dtype."""


class UnsupportedError(CuteFAError, NotImplementedError):
    """A valid request that the chosen generation, architecture or build does not serve."""


class CompileError(CuteFAError, RuntimeError):
    """The compiler failed, or produced something other than what was asked for."""


class MissingToolError(CuteFAError, RuntimeError):
    """A program or package that the request needs is not installed."""


class CacheError(CuteFAError, RuntimeError):
    """The artefact cache cannot be used as it is."""


class BundleError(CuteFAError, RuntimeError):
    """A bundle of compiled kernels is damaged, or was made for something else than this."""


class LaunchError(CuteFAError, RuntimeError):
    """CUDA refused to load or launch a kernel, or said that an earlier one had failed."""
