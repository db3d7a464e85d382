"""PTX text with its comments blanked out, and the error that points into it."""

from __future__ import annotations

import re

from cute_fa.errors import CuteFAError

_COMMENT_OR_STRING = re.compile(r'"(?:[^"\\\n]|\\.)*"|//[^\n]*|/\*.*?\*/', re.S)
_STRING = re.compile(r'"(?:[^"\\\n]|\\.)*"')
_NOT_NEWLINE = re.compile(r"[^\n]")
_TAB_WIDTH = 4


class PtxSyntaxError(CuteFAError, ValueError):
    """PTX text that is not well-formed.

    Attributes:
        line: 1-based line of the PTX text.
        column: 1-based column, in characters.
        source_line: that line as written.
    """

    def __init__(
        self,
        what: str,
        *,
        line: int,
        column: int,
        source_line: str,
        expected: object = None,
        fix: str | None = None,
    ) -> None:
        self.line = line
        self.column = column
        self.source_line = source_line
        number = str(line)
        before = source_line[: column - 1].expandtabs(_TAB_WIDTH)
        excerpt = (
            f"  {number} | {source_line.expandtabs(_TAB_WIDTH)}\n"
            f"  {' ' * len(number)} | {' ' * len(before)}^"
        )
        super().__init__(f"PTX line {line}: {what}\n{excerpt}", expected=expected, fix=fix)


class Source:
    """PTX text and ``code``, a copy of equal length in which comments are spaces.

    Offsets into ``code`` are offsets into ``text``, so errors quote what was written.
    """

    def __init__(self, text: str) -> None:
        self.text = text
        self.code = _COMMENT_OR_STRING.sub(_blank_comment, text) if "/" in text else text
        if "/*" in self.code:
            unclosed = _STRING.sub(lambda m: " " * len(m.group()), self.code).find("/*")
            if unclosed >= 0:
                raise self.error(unclosed, "comment is never closed", expected="*/")

    def line_of(self, offset: int) -> int:
        """1-based line number of ``offset``."""
        return self.text.count("\n", 0, offset) + 1

    def line_text(self, offset: int) -> str:
        """The whole line that holds ``offset``, without its newline."""
        start = self.text.rfind("\n", 0, offset) + 1
        end = self.text.find("\n", offset)
        return self.text[start : end if end >= 0 else len(self.text)].rstrip("\r")

    def error(
        self, offset: int, what: str, *, expected: object = None, fix: str | None = None
    ) -> PtxSyntaxError:
        """The error to raise for the text at ``offset``."""
        offset = min(offset, len(self.text))
        return PtxSyntaxError(
            what,
            line=self.line_of(offset),
            column=offset - (self.text.rfind("\n", 0, offset) + 1) + 1,
            source_line=self.line_text(offset),
            expected=expected,
            fix=fix,
        )


def _blank_comment(match: re.Match[str]) -> str:
    found = match.group()
    if found[0] == '"':
        return found
    return " " * len(found) if "\n" not in found else _NOT_NEWLINE.sub(" ", found)
