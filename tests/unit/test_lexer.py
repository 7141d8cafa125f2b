"""The lexer on its own; tests/test_lexer_psql.py holds it against psql and the server."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pg_background import lexer

# Literals, names and comments that each try to pass a semicolon and a COMMIT off as code.
INERT = [
    "'; COMMIT; '",
    "'it''s; COMMIT'",
    "E'\\'; COMMIT; \\''",
    "e'\\\\'",
    "E'a''\\'; COMMIT'",
    "E'a'\n  -- it's a gap\n '\\'; COMMIT; '",
    "U&'d\\0061t; COMMIT'",
    "N'; COMMIT'",
    "B'01'",
    "x'1F'",
    '"; COMMIT; "',
    '"a"";COMMIT;"',
    'U&"d;COMMIT"',
    "$$; COMMIT; $$",
    "$a$; $$ COMMIT; $b$ $a$",
    "$é_1$; COMMIT; $é_$ $é_1$",
    "/* ; COMMIT; /* nested; */ 'it */",
    "/**/",
    "/*/ ; */",
    "-- ; COMMIT; 'it\n",
    "(SELECT ';)' ; COMMIT; (x) ;)",
    "a$b$c",
    "é",
    "$1",
    "1.5e-3",
    "->",
    "* - / $",
]
STARTS = [
    "SELECT",
    "insert into t values",
    "Vacuum",
    "PREPARE p AS select",
    "SET TRANSACTION",
    "copy_x",
    "begins",
]
BLANKS = ["", " ", "\n", "/* ; */", "-- x;\n", "\t\f\r\n"]
BODY = (
    "CREATE {replace} {kind} f(x int DEFAULT 1) RETURNS int {name}BEGIN ATOMIC"
    " SELECT CASE WHEN true THEN 1 END; SELECT 1 AS end; SELECT t.case FROM t; SELECT 2 case; END"
)

statement = st.builds(
    lambda start, parts: " ".join([start, *parts]),
    st.sampled_from(STARTS),
    st.lists(st.sampled_from(INERT), max_size=6),
)
routine = st.builds(
    lambda replace, kind, name: BODY.format(replace=replace, kind=kind, name=name),
    st.sampled_from(["", "OR REPLACE", "/* ; */ or\nreplace"]),
    st.sampled_from(["FUNCTION", "procedure"]),
    st.sampled_from(["", "LANGUAGE begin ", "SET x TO begin, atomic "]),
)
blank = st.sampled_from(BLANKS)
scripts = st.lists(st.one_of(statement, routine, blank), max_size=8)
SCRAPS = [
    "'", '"', "$a$", "$", "\\", "/*", "*/", "--", "(", ")", ";", "E'", "U&'", "\n", "BEGIN", "ATOMIC", "END",
    "CREATE", "FUNCTION", "COPY", "FROM", "TO", "STDIN", "CASE", "PREPARE",
]  # fmt: skip
scrap = st.one_of(st.sampled_from([*INERT, *BLANKS, *SCRAPS]), st.text(max_size=5))
anything = st.lists(scrap, max_size=40).map("".join)


@given(scripts)
def test_counts_and_splits_what_was_joined(pieces):
    sql = ";".join(pieces)
    kept = [piece for piece in pieces if piece not in BLANKS]
    assert [found.text for found in lexer.statements(sql, True)] == kept
    assert lexer.statement_count(sql, True) == len(kept)
    assert lexer.forbidden(sql, True) is None


@given(scripts, st.sampled_from(["COMMIT", "end", "Savepoint s", "ABORT"]), scripts)
def test_finds_the_command_between_other_statements(before, command, after):
    sql = ";".join([*before, command, *after])
    assert lexer.forbidden(sql, True) == command.split()[0].upper()


@given(anything, st.booleans())
def test_never_raises_and_loses_no_text(sql, standard_conforming_strings):
    found = list(lexer.statements(sql, standard_conforming_strings))
    assert lexer.statement_count(sql, standard_conforming_strings) == len(found)
    assert [one.head for one in found] == [
        next(lexer.statements(one.text, standard_conforming_strings)).head for one in found
    ]
    lexer.forbidden(sql, standard_conforming_strings)
    position = 0
    for one in found:
        position = sql.index(one.text, position) + len(one.text)


@pytest.mark.parametrize(
    ("sql", "command"),
    [
        ("BEGIN", "BEGIN"),
        ("begin work", "BEGIN"),
        ("BEGIN ISOLATION LEVEL SERIALIZABLE", "BEGIN"),
        ("START TRANSACTION READ ONLY", "START TRANSACTION"),
        ("start/**/transaction", "START TRANSACTION"),
        ("COMMIT", "COMMIT"),
        ("commit and chain", "COMMIT"),
        ("END", "END"),
        ("END TRANSACTION", "END"),
        ("ROLLBACK", "ROLLBACK"),
        ("ROLLBACK WORK", "ROLLBACK"),
        ("ROLLBACK TO s", "ROLLBACK TO"),
        ("ROLLBACK TRANSACTION TO SAVEPOINT s", "ROLLBACK TO"),
        ("ROLLBACK WORK TO s", "ROLLBACK TO"),
        ("ABORT", "ABORT"),
        ("SAVEPOINT s", "SAVEPOINT"),
        ("RELEASE s", "RELEASE"),
        ("RELEASE SAVEPOINT s", "RELEASE"),
        ("PREPARE TRANSACTION 'x'", "PREPARE TRANSACTION"),
        ("PREPARE TRANSACTION $$x$$", "PREPARE TRANSACTION"),
        ("PREPARE TRANSACTION E'x'", "PREPARE TRANSACTION"),
        ("COMMIT PREPARED 'x'", "COMMIT PREPARED"),
        ("ROLLBACK PREPARED 'x'", "ROLLBACK PREPARED"),
        (";;\n-- x\n;COMMIT", "COMMIT"),
        ("SELECT 1;/* /* */ */commit;", "COMMIT"),
        ("SELECT 1 AS a$b$;COMMIT;SELECT 1 AS c$b$", "COMMIT"),
        ("SELECT $1;COMMIT;SELECT $1", "COMMIT"),
        ("SELECT 'a' \\ ; COMMIT", "COMMIT"),
        ("SELECT $é$;$é $é$;COMMIT", "COMMIT"),
        ("SELECT 1 AS \u00a0;COMMIT", "COMMIT"),
    ],
)
def test_refuses_transaction_control(sql, command):
    assert lexer.forbidden(sql, True) == command


@pytest.mark.parametrize(
    "sql",
    [
        "",
        ";",
        "SELECT 1",
        "SET TRANSACTION READ ONLY",
        "SET SESSION CHARACTERISTICS AS TRANSACTION READ ONLY",
        "PREPARE transaction AS SELECT 1",
        "PREPARE transaction (int) AS SELECT $1",
        "PREPARE begin AS SELECT 1",
        "EXECUTE transaction",
        "DEALLOCATE PREPARE ALL",
        "SELECT 1 AS commit",
        "SELECT 1 commit",
        "SELECT begin, commit FROM savepoint",
        'INSERT INTO "COMMIT" VALUES (1)',
        "DO $$ BEGIN PERFORM 1; END $$",
        "CREATE FUNCTION f() RETURNS void LANGUAGE plpgsql AS 'BEGIN COMMIT; END'",
        "CREATE RULE r AS ON INSERT TO t DO ALSO (DELETE FROM a; DELETE FROM b; COMMIT)",
        "vendor; prepared; copying; ending; begins",
        "commit$",
        "COMM\u0131T",
        "\u017fAVEPOINT s",
        '"COMMIT"',
        "'COMMIT'",
        "SELECT 'unterminated; COMMIT",
        "SELECT /* unterminated; /* */ COMMIT",
        "SELECT $a$ unterminated; COMMIT",
        'SELECT "unterminated; COMMIT',
        "SELECT (1; COMMIT",
        "CREATE FUNCTION f() RETURNS int BEGIN ATOMIC SELECT 1; COMMIT",
    ],
)
def test_lets_pass_what_is_no_transaction_control(sql):
    assert lexer.forbidden(sql, True) is None


@pytest.mark.parametrize(
    ("sql", "command"),
    [
        ("COPY t FROM STDIN", "COPY FROM STDIN"),
        ("copy t to stdout", "COPY TO STDOUT"),
        ("COPY t FROM STDOUT", "COPY FROM STDIN"),
        ("COPY t TO STDIN", "COPY TO STDOUT"),
        ("COPY BINARY t FROM STDIN", "COPY FROM STDIN"),
        ('COPY s.t (a, "b", c) FROM STDIN WITH (FORMAT csv)', "COPY FROM STDIN"),
        ("COPY a.b.c.d.e TO STDOUT", "COPY TO STDOUT"),
        ("COPY public.from TO STDOUT", "COPY TO STDOUT"),
        ("COPY public.to.from FROM STDIN", "COPY FROM STDIN"),
        ('COPY "from" TO STDOUT', "COPY TO STDOUT"),
        ("COPY stdin TO STDOUT", "COPY TO STDOUT"),
        ("COPY (SELECT a FROM b) TO STDOUT", "COPY TO STDOUT"),
        ("COPY (SELECT ';)' FROM (SELECT 1) x) TO /* */ stdout csv", "COPY TO STDOUT"),
        ("SELECT 1; COPY t FROM\nSTDIN; SELECT 2", "COPY FROM STDIN"),
    ],
)
def test_refuses_copy_with_the_client(sql, command):
    assert lexer.forbidden(sql, True) == command


@pytest.mark.parametrize(
    "sql",
    [
        "COPY t FROM '/tmp/x'",
        "COPY t TO '/tmp/stdout'",
        "COPY t FROM PROGRAM 'cat stdin'",
        "COPY stdin FROM '/tmp/x'",
        "COPY t (stdin, stdout) FROM '/tmp/x'",
        "COPY \"stdin\" FROM '/tmp/x' (FORMAT csv)",
        'COPY t FROM "stdin"',
        "COPY (SELECT a FROM stdin) TO '/tmp/x'",
        "COPY (SELECT a FROM STDIN) TO PROGRAM 'stdout'",
        "COPY t FROM '/tmp/x' WHERE stdin > 1",
        "SELECT copy FROM stdin",
        "COPY",
        "COPY t FROM",
    ],
)
def test_lets_other_copies_pass(sql):
    assert lexer.forbidden(sql, True) is None


@pytest.mark.parametrize(
    "sql",
    [
        "CREATE FUNCTION begin() RETURNS int LANGUAGE sql AS 'SELECT 1'; COMMIT",
        "CREATE FUNCTION begin.atomic() RETURNS int LANGUAGE sql AS 'SELECT 1'; COMMIT",
        "CREATE FUNCTION f(begin int) RETURNS begin LANGUAGE sql AS ''; COMMIT",
        "CREATE FUNCTION f() RETURNS int SET x TO \"begin\" LANGUAGE sql AS ''; COMMIT",
        "CREATE TABLE function (begin atomic); COMMIT; END",
        "CREATE VIEW v AS SELECT begin atomic FROM t; COMMIT; END",
        "CREATE FUNCTION f() RETURNS int BEGIN ATOMIC SELECT 1 AS case; END; COMMIT; SELECT 1 end; END",
        "CREATE FUNCTION f() RETURNS int BEGIN ATOMIC SELECT begin atomic FROM t; END; COMMIT; END; END",
        "CREATE FUNCTION f() RETURNS int BEGIN ATOMIC SELECT x.case; END; COMMIT",
        "CREATE FUNCTION f() RETURNS int BEGIN ATOMIC END; COMMIT",
        "CREATE FUNCTION f() RETURNS int BEGIN ATOMIC (SELECT 1); END; COMMIT",
    ],
)
def test_a_routine_hides_no_commit(sql):
    """psql's own rule, which counts BEGIN, CASE and END, is misled by most of these."""
    assert lexer.forbidden(sql, True) == "COMMIT"


def test_backslash_escapes_follow_standard_conforming_strings():
    sql = "SELECT 'a\\'; COMMIT; --'"
    assert lexer.forbidden(sql, True) == "COMMIT"
    assert lexer.forbidden(sql, False) is None
    assert lexer.forbidden("SELECT N'a\\'; COMMIT; --'", False) is None
    assert lexer.forbidden("SELECT 'a'\n'\\'; COMMIT; --'", False) is None
    assert lexer.forbidden("SELECT E'a' -- x\n\n -- y\n '\\'; COMMIT; --'", True) is None
    assert lexer.forbidden("SELECT E'a' '\\'; COMMIT; --'", True) == "COMMIT"


@pytest.mark.parametrize(
    ("sql", "count"),
    [
        ("", 0),
        (" \n\t", 0),
        (";", 0),
        ("; ;/* */;-- x", 0),
        ("-- only; a comment", 0),
        ("/* ; */ SELECT 1", 1),
        ("SELECT 1", 1),
        ("SELECT 1;", 1),
        ("SELECT 1; \n", 1),
        ("SELECT 1; -- done;", 1),
        ("SELECT ';'", 1),
        ("SELECT 1;;SELECT 2", 2),
        ("(SELECT 1); (SELECT 2)", 2),
        (")) ; SELECT 1", 2),
    ],
)
def test_counts_statements(sql, count):
    assert lexer.statement_count(sql, True) == count


@pytest.mark.parametrize(
    "piece",
    [
        "''", "\\'", "$a$ ", "/* ", "*/ /*", "(", "--", "E'a' \n -- x\n", "E'a'  -- ", "COPY ",
        "COPY FROM x.", "1e+ ", "$$", "CREATE FUNCTION BEGIN ATOMIC ", "END ", ";", "a.", "\n", "-",
    ],
)  # fmt: skip
@pytest.mark.parametrize("start", ["COMMI ", "E'", "'", "COPY x "])
def test_time_grows_with_the_length_only(start, piece):
    def seconds(length: int) -> float:
        sql = start + piece * (length // len(piece))
        return _cpu_seconds(lambda: list(lexer.statements(sql, False)))

    small = seconds(20_000)
    assert seconds(160_000) < 8 * 4 * small + 0.05, "eight times the text, quadratic would be 64 times"


def test_a_short_insert_costs_next_to_nothing():
    sql = "INSERT INTO audit_log (id, message, at) VALUES (42, 'something happened', now())"

    def launches() -> None:
        for _ in range(1000):
            lexer.forbidden(sql, True)

    assert _cpu_seconds(launches) < 1000 * 2e-6 * 5, "2 us on an idle machine, five times that on a busy one"


def _cpu_seconds(action: Callable[[], object]) -> float:
    """The least CPU time of three runs."""
    times = []
    for _ in range(3):
        start = time.process_time()
        action()
        times.append(time.process_time() - start)
    return min(times)
