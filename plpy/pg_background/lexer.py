"""Splits a SQL string into its statements, as the server will when it gets the string in one message.

A launch asks two things before anything runs: does the string hold a command that a background worker
refuses, and how many statements are there? The lexer answers both without a parser. Where it cannot know,
it takes text for code, not for the inside of a literal: the worst outcome is a refusal too many, never a
COMMIT that slips through.

What makes this safe with so few rules: the server parses the whole string before it runs any of it, with the
standard_conforming_strings of that moment. A string with a lexical or syntax error does nothing at all, so
only strings that the grammar accepts have to be split right. Nothing here raises: what is not terminated
reaches to the end of the text, and the server reports the error.
"""

from __future__ import annotations

import functools
import re
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

# Letters, the underscore, and all that is not ASCII; then digits, and the dollar sign too. As what they are not: to
# compile ranges up to the last character takes 40 ms.
_WORD_START = r"[^\x00-@\[-^`{-\x7f]"
_WORD_PART = r"[^\x00-/:-@\[-^`{-\x7f]"
_WORD_PART_OR_DOLLAR = r"[^\x00-#%-/:-@\[-^`{-\x7f]"
# White space behind a token is taken with it: that halves the number of matches, and harms no literal.
_TOKEN = r"""
    (?: [ \t\n\r\f\v]+
      | --[^\n\r]*
      | (?P<comment> /\* )
      | (?P<escaped> {escape_quote} )
      | (?P<string>  (?: [bBxX] | [uU]& )? '[^']*'? )
      | (?P<quoted>  (?: [uU]& )? "[^"]*"? )
      | (?P<dollar>  \$ (?: {start}{part}* )? \$ )
      | (?P<word>    {start}{part_or_dollar}* )
      | (?P<number>  (?: [0-9]+ \.? [0-9]* | \.[0-9]+ ) (?: [eE][-+]?[0-9]+ )? | \$[0-9]+ )
      | (?P<other>   . )
    ) [ \t\n\r\f\v]*
"""


@functools.cache
def _token_pattern(standard_conforming_strings: bool) -> re.Pattern[str]:
    pattern = _TOKEN.format(
        start=_WORD_START,
        part=_WORD_PART,
        part_or_dollar=_WORD_PART_OR_DOLLAR,
        escape_quote="[eE]'" if standard_conforming_strings else "[eE]?'",
    )
    return re.compile(pattern, re.VERBOSE | re.DOTALL)


_COMMENT_EDGE = re.compile(r"/\*|\*/")
_ESCAPED_EDGE = re.compile(r"\\.|''|'", re.DOTALL)
# A literal goes on, in the same mode, behind white space and line comments that hold a line end.
_CONTINUATION = re.compile(r"[ \t\f\v]*(?:--[^\n\r]*)?[\n\r](?:[ \t\n\r\f\v]|--[^\n\r]*[\n\r])*'")
_WRITES = re.compile(r"[ \t\n\r\f\v]*(?:INSERT|UPDATE|DELETE|MERGE)\b", re.IGNORECASE | re.ASCII)
_SELECTS = re.compile(r"[ \t\n\r\f\v]*SELECT\b", re.IGNORECASE | re.ASCII)
_BLANK_START = re.compile(r"[ \t\n\r\f\v]*(?:[-/;]|\Z)")

_SPACE = " \t\n\r\f\v"
_STRING = "'"
_QUOTED = '"'
_NUMBER = "0"

_HEAD_TOKENS = 4
_ONE_WORD_COMMANDS = frozenset({"BEGIN", "END", "ABORT", "SAVEPOINT", "RELEASE"})
_FIRST_WORDS = (*_ONE_WORD_COMMANDS, "COMMIT", "ROLLBACK", "COPY", "START", "PREPARE")
_ROUTINES = frozenset({"FUNCTION", "PROCEDURE"})
_CLIENT_STREAMS = frozenset({"STDIN", "STDOUT"})


class Statement(NamedTuple):
    """One statement of a SQL string.

    `text` runs from the end of the statement before it to its own semicolon, without that. `head` holds
    its first tokens outside of parentheses: words without quotes in upper case, `'` for a string, `"` for a
    quoted identifier, `0` for a number or parameter, else the character.
    """

    text: str
    head: tuple[str, ...]


class Script(NamedTuple):
    """What a launch wants to know of a SQL string."""

    forbidden: str | None  # the first command that no background worker can run
    statements: int  # of one without a semicolon it is known that there is no more than one
    returns_no_rows: bool
    names_no_table: bool


def script(sql: str, standard_conforming_strings: bool) -> Script:
    """That of a SQL string."""
    return Script(
        forbidden(sql, standard_conforming_strings),
        statement_count(sql, standard_conforming_strings) if ";" in sql else 1,
        returns_no_rows(sql),
        names_no_table(sql),
    )


def forbidden(sql: str, standard_conforming_strings: bool) -> str | None:
    """The first command in `sql` that a background worker refuses, in upper case, or None.

    Refused are transaction control (`BEGIN`, `START TRANSACTION`, `COMMIT`, `END`, `ROLLBACK`, `ABORT`,
    `SAVEPOINT`, `RELEASE`, `ROLLBACK TO`, `PREPARE TRANSACTION`, `COMMIT PREPARED`, `ROLLBACK PREPARED`) and
    copying from or to the client (`COPY FROM STDIN`, `COPY TO STDOUT`). What strings, DO blocks and called
    procedures hold is the server's affair.
    """
    if not _may_hold_refused_command(sql.upper()):
        return None
    for statement in statements(sql, standard_conforming_strings):
        command = _refused_command(statement.head)
        if command is not None:
            return command
    return None


def statement_count(sql: str, standard_conforming_strings: bool) -> int:
    """The number of statements in `sql`; empty ones, and those of comments only, do not count.

    Text without a semicolon but at its end needs no lexer, unless it may start with a comment.
    """
    if not _BLANK_START.match(sql):
        first_end = sql.find(";")
        if first_end < 0 or not sql[first_end + 1 :].strip(_SPACE):
            return 1
    return sum(1 for _ in statements(sql, standard_conforming_strings))


def returns_no_rows(sql: str) -> bool:
    """Whether a statement is one that returns no rows: INSERT, UPDATE, DELETE or MERGE, without RETURNING.

    A rule may make it return some all the same.
    """
    return _WRITES.match(sql) is not None and "RETURNING" not in sql.upper()


def names_no_table(sql: str) -> bool:
    """Whether it is a SELECT without FROM: only functions could give it columns of other types another time."""
    return _SELECTS.match(sql) is not None and "FROM" not in sql.upper()


def is_balanced(sql: str, standard_conforming_strings: bool) -> bool:
    """Whether text that is put between parentheses stays there: it closes none but its own, and ends no statement."""
    depth = 0
    for token, _ in _tokens(sql, standard_conforming_strings):
        depth += (token == "(") - (token == ")")
        if depth < 0 or token == ";":
            return False
    return depth == 0


def statements(sql: str, standard_conforming_strings: bool) -> Iterator[Statement]:
    """The statements of `sql` that are not empty, in order, in one pass."""
    start = 0
    depth = 0
    in_body = False
    previous = ""
    head: list[str] = []
    for token, end in _tokens(sql, standard_conforming_strings):
        if token == ")":
            depth = max(depth - 1, 0)
        if depth == 0:
            if token == ";" and not in_body:
                if head:
                    yield Statement(sql[start : end - 1], tuple(head))
                start, head = end, []
                continue
            if in_body:
                in_body = not _ends_body(previous, token)
            else:
                in_body = _starts_body(previous, token) and _creates_routine(head)
            if _wants_token(head):
                head.append(token)
            previous = token
        if token == "(":
            depth += 1
    if head:
        yield Statement(sql[start:], tuple(head))


def _may_hold_refused_command(upper_sql: str) -> bool:
    """False if no word occurs that a refused command starts with."""
    return any(word in upper_sql for word in _FIRST_WORDS)


def _tokens(sql: str, standard_conforming_strings: bool) -> Iterator[tuple[str, int]]:
    """The tokens of `sql`, in the form of `Statement.head`, each with the offset of its end
    (or behind it, white space between).

    A doubled quote inside a literal shows as two literals side by side: where it ends is what counts.
    Numbers and parameters are read as PostgreSQL 14 does: later servers refuse what would differ (1e-, 1a).
    """
    match = _token_pattern(standard_conforming_strings).match
    position = 0
    length = len(sql)
    while position < length:
        found = match(sql, position)
        assert found is not None, "the last alternative takes any character"
        position = found.end()
        kind = found.lastgroup
        if kind is None:
            continue
        if kind == "word":
            yield _keyword(found.group(kind)), position
        elif kind == "other":
            yield found.group(kind), found.end(kind)
        elif kind == "string":
            yield _STRING, position
        elif kind == "quoted":
            yield _QUOTED, position
        elif kind == "number":
            yield _NUMBER, position
        elif kind == "comment":
            position = _comment_end(sql, position)
        elif kind == "escaped":
            position = _escaped_string_end(sql, position)
            yield _STRING, position
        else:
            position = _dollar_quote_end(sql, found.group(kind), position)
            yield _STRING, position


def _keyword(word: str) -> str:
    """The word in upper case, as the server compares keywords: its letters are the ASCII ones only.

    Python's upper() would make a keyword of a word with a long s or a dotless i.
    """
    return word.upper() if word.isascii() else word


def _comment_end(sql: str, position: int) -> int:
    """Where the comment ends whose opening ends at `position`; comments nest."""
    depth = 1
    for edge in _COMMENT_EDGE.finditer(sql, position):
        depth += 1 if edge.group() == "/*" else -1
        if depth == 0:
            return edge.end()
    return len(sql)


def _escaped_string_end(sql: str, position: int) -> int:
    """Where the string with backslash escapes ends whose opening quote ends at `position`."""
    while True:
        for edge in _ESCAPED_EDGE.finditer(sql, position):
            if edge.group() == "'":
                break
        else:
            return len(sql)
        continuation = _CONTINUATION.match(sql, edge.end())
        if continuation is None:
            return edge.end()
        position = continuation.end()


def _dollar_quote_end(sql: str, delimiter: str, position: int) -> int:
    """Where the string ends whose opening `delimiter` ends at `position`."""
    closing = sql.find(delimiter, position)
    return len(sql) if closing < 0 else closing + len(delimiter)


def _wants_token(head: Sequence[str]) -> bool:
    """True while the next token may tell what the statement is: for COPY, up to the one behind FROM or TO."""
    if len(head) < _HEAD_TOKENS:
        return True
    return head[0] == "COPY" and not _is_copy_direction(head, len(head) - 2)


def _creates_routine(head: Sequence[str]) -> bool:
    """True for CREATE [OR REPLACE] FUNCTION or PROCEDURE, which may have a body of statements."""
    if not head or head[0] != "CREATE":
        return False
    kind = 3 if head[1:3] == ["OR", "REPLACE"] else 1
    return len(head) > kind and head[kind] in _ROUTINES


def _starts_body(previous: str, token: str) -> bool:
    """True for BEGIN ATOMIC. A lone BEGIN may be the routine's own name, or that of its type or language."""
    return token == "ATOMIC" and previous == "BEGIN"


def _ends_body(previous: str, token: str) -> bool:
    """True for the END of a BEGIN ATOMIC body.

    Every statement of a body has its semicolon, and none may start with END, so the first END that starts a
    statement is the body's own. That of a CASE, or a label named "end", never starts one; so there is no
    need to count CASEs, which labels could throw off.
    """
    return token == "END" and previous in (";", "ATOMIC")


def _refused_command(head: Sequence[str]) -> str | None:
    """The refused command that a statement with these first tokens is, or None."""
    first, second, third = (*head[:3], "", "")[:3]
    if first in _ONE_WORD_COMMANDS:
        return first
    if first in ("COMMIT", "ROLLBACK"):
        return _ending_command(first, second, third)
    if first == "COPY":
        return _client_copy(head)
    if (first, second) == ("START", "TRANSACTION"):
        return "START TRANSACTION"
    # PREPARE transaction AS, or with types in parentheses, prepares a statement of that name.
    if (first, second) == ("PREPARE", "TRANSACTION") and third not in ("AS", "("):
        return "PREPARE TRANSACTION"
    return None


def _ending_command(first: str, second: str, third: str) -> str:
    """Which of the commands it is that start with COMMIT or ROLLBACK."""
    if second == "PREPARED":
        return f"{first} PREPARED"
    target = third if second in ("WORK", "TRANSACTION") else second
    return "ROLLBACK TO" if first == "ROLLBACK" and target == "TO" else first


def _client_copy(head: Sequence[str]) -> str | None:
    """COPY FROM STDIN or COPY TO STDOUT where the other end is the client, else None.

    The grammar takes STDIN and STDOUT for each other, so the direction alone names the command.
    """
    direction = _copy_direction(head)
    if direction is None or direction + 1 >= len(head) or head[direction + 1] not in _CLIENT_STREAMS:
        return None
    return "COPY FROM STDIN" if head[direction] == "FROM" else "COPY TO STDOUT"


def _copy_direction(head: Sequence[str]) -> int | None:
    """The index of the FROM or TO of a COPY, or None."""
    return next((index for index in range(1, len(head)) if _is_copy_direction(head, index)), None)


def _is_copy_direction(head: Sequence[str], index: int) -> bool:
    """True for a FROM or TO, reserved words both: only behind a dot can they be names."""
    return head[index] in ("FROM", "TO") and head[index - 1] != "."
