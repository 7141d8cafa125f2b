"""The lexer against psql and the server: where do they see statements end, and which commands?

psql splits a script much as the server does, and sends each piece by itself; `psql -L` writes down what it
sent. The server answers a string with one result, and one command tag, for each of its statements.
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import psycopg
import pytest
from hypothesis import HealthCheck, assume, example, given, settings
from hypothesis import strategies as st
from pg_background import lexer
from psycopg import pq
from psycopg.conninfo import make_conninfo

from tests.clusters import Cluster, Session, find_pg_config

# A server's tests take longer than Hypothesis likes, and share the module's session between examples.
unhurried = settings(
    max_examples=300,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)

conforming_on_off = pytest.mark.parametrize("conforming", [True, False], ids=["conforming", "backslashes"])

# --- against psql ---------------------------------------------------------------------------------

_SENT = re.compile(
    r"^(?:\*{9} QUERY \*{10}|/\*{8} QUERY \*{9}/)\n(.*?)\n(?:\*{26}|/\*{24}/)\n", re.DOTALL | re.MULTILINE
)

# No colon before a name: psql would take it for a variable. Backslashes stand in literals only; where the
# mix puts one outside, psql takes it for a command of its own and complains. A letter behind a number is
# an error from PostgreSQL 15 on, and read in different ways until then. No COPY FROM STDIN: where that fails,
# psql throws the rest of its input away.
_FRAGMENTS = [
    "SELECT", "INSERT", "COPY nowhere FROM", "COMMIT", "BEGIN", "END", "CASE", "ATOMIC", "a$b$c",
    "é", ";", ";", ";", "(", ")", "((", "))", "[", "]", ",", "=", "->", "*", "-", "+", "/", "- -", "$", "%",
    "@", "#", "'", "''", "';'", "'it''s;'", "'\\'", "'\\''", "E'\\';'", "e'", "'a'\n';'", "U&'d;'",
    'U&"d;"', "B'01;'", "X'1F;'", "N'n;'", '"', '";"', '"a"";"', "$1 ", "1 ", ".5 ", "1.5e-3 ", "x", "$$",
    "$$;$$", "$a$", "$a$;$$;$b$;$a$", "$a", "$é$", "$1$", "--", "-- ;'\n", "-- it's (\n", "/*", "*/",
    "/* ; */", "/* /* ; */ ; */", "/**/", "/*/", "**/", "\n", " ", "\t", "\n\n", "||/", "@-", "<*",
    "; CREATE FUNCTION f() RETURNS int BEGIN ATOMIC SELECT 1; SELECT CASE WHEN true THEN 1 END; END;",
    "; create or /* ; */ replace procedure p() begin atomic select (case when true then 1 end); end;",
]  # fmt: skip
fragment_scripts = st.lists(
    st.tuples(st.sampled_from(_FRAGMENTS), st.sampled_from(["", " ", " ", "\n"])), max_size=25
).map(lambda parts: "".join(text + gap for text, gap in parts))

# psql reads a line at a time: of a literal that goes on behind a line end it forgets that it was an E'' one.
# The server does not, and the tests against it cover these.
_FORGOTTEN_ESCAPES = re.compile(r"[eE]'.*\n\s*'", re.DOTALL)

Splitter = Callable[[str, bool], "list[str] | None"]


@pytest.fixture
def split_by_psql(cluster: Cluster, tmp_path: Path) -> Splitter:
    """`split_by_psql(script, conforming)`: what psql sends, or None where it saw a command of its own."""
    psql = find_pg_config().with_name("psql")
    log = tmp_path / "sent"

    def split(script: str, conforming: bool) -> list[str] | None:
        conninfo = make_conninfo(cluster.conninfo, options=_options(conforming), client_encoding="UTF8")
        log.write_text("")
        ended = subprocess.run(
            [psql, "-X", "-q", "-L", log, "-d", conninfo],
            input=script,
            capture_output=True,
            encoding="utf-8",
            check=False,
            timeout=60,
        )
        assert "connection" not in ended.stderr, ended.stderr
        if "invalid command" in ended.stderr:
            return None
        return _SENT.findall(log.read_text(encoding="utf-8"))

    return split


def _options(conforming: bool) -> str:
    return f"-c standard_conforming_strings={'on' if conforming else 'off'} -c escape_string_warning=off"


_SPACE = " \t\n\r\f"


def _plain(piece: str) -> str:
    """The piece without white space around it, and empty lines, which psql leaves out."""
    return re.sub("\n+", "\n", piece).strip(_SPACE)


@conforming_on_off
@unhurried
@given(script=fragment_scripts)
@example(script="SELECT--; END;\n; SELECT 2;")
@example(script="SELECT 1; (;")
def test_splits_as_psql_does(split_by_psql: Splitter, script: str, conforming: bool) -> None:
    assume(not _FORGOTTEN_ESCAPES.search(script))
    sent = split_by_psql(script, conforming)
    assume(sent is not None)
    assert sent is not None
    theirs = [_plain(piece) for piece in sent if lexer.statement_count(piece, conforming)]
    ours = [_plain(found.text) for found in lexer.statements(script, conforming)]
    assert len(ours) == len(theirs), (ours, theirs)
    for our_piece, sent_piece in zip(ours, theirs):
        # A last semicolon ends the statement, or stands within open parentheses.
        ends_alike = our_piece.endswith(sent_piece)
        their_piece = sent_piece if ends_alike else _plain(sent_piece.removesuffix(";"))
        # psql leaves out comments in front of a statement.
        assert our_piece.endswith(their_piece), (our_piece, their_piece)
        assert lexer.statement_count(our_piece[: len(our_piece) - len(their_piece)], conforming) == 0


# --- against the server ---------------------------------------------------------------------------

_VALUES = [
    "1", "1.5e-3", ".5", "NULL", "'; COMMIT; '", "'it''s; COMMIT'", "'a'\n '; COMMIT'",
    "E'\\'; COMMIT; --'", "E'a' -- it's\n '\\'; COMMIT; --'", "U&'d!0061t; COMMIT' UESCAPE '!'",
    "N'; COMMIT'", "B'01'", "x'1F'", "$$; COMMIT; $$", "$a$; $$ COMMIT; $b$ $a$", "$é_1$; COMMIT; $é_1$",
    "/* ; /* COMMIT; */ ' */ 2", "- -2", "-- ; COMMIT; '\n 3", "(SELECT ';)')",
    "CASE WHEN true THEN ';' ELSE ';COMMIT' END", "'a'||'b'", "2*-3", "|/4", "'\\'", "'\\''; COMMIT; --'",
    "ARRAY[1, 2]", "(ROW(1, ';')).f2", "'1'::text",
]  # fmt: skip
_LABELS = [
    "",
    "",
    " AS case",
    " AS end",
    " AS commit",
    " commit",
    ' AS ";COMMIT; "',
    " AS a$b$",
    " end",
    " é",
]
_STATEMENTS = [
    "", " ", "-- ; COMMIT;\n", "/* ; */", "(SELECT 1)", "VALUES (1)", "DO $$ BEGIN NULL; END $$", "BEGIN",
    "start transaction", "COMMIT", "end", "ROLLBACK", "ABORT work", "SAVEPOINT s", "release s",
    "ROLLBACK TO s", "COMMIT PREPARED 'none'", "/* */ commit", "PREPARE transaction AS SELECT 1",
    "DEALLOCATE ALL", "SET TRANSACTION READ WRITE", "COPY (SELECT 1) TO STDOUT",
    "COPY (SELECT 1 AS to) TO stdin CSV", "CREATE TEMP TABLE stdin (stdout int)", "COPY stdin FROM STDIN",
    "COPY stdin (stdout) TO STDOUT", "COPY stdin FROM '/dev/null'",
    "COPY pg_temp.stdin FROM PROGRAM 'true'",
    "CREATE RULE r AS ON INSERT TO pg_temp.stdin DO ALSO (SELECT 1; SELECT 2)",
    "CREATE OR REPLACE FUNCTION pg_temp.begin() RETURNS int LANGUAGE sql AS 'SELECT 1'",
    "CREATE FUNCTION pg_temp.f() RETURNS int BEGIN ATOMIC SELECT 1 case;SELECT CASE 1 WHEN 1 THEN 1 END; END",
    "CREATE FUNCTION pg_temp.g() RETURNS int BEGIN ATOMIC SELECT begin atomic FROM (SELECT 1 begin) x; END",
    "CREATE FUNCTION pg_temp.h() RETURNS int SET search_path = begin, atomic RETURN CASE WHEN 1=1 THEN 1 END",
    "CREATE TEMP TABLE stdout (from_ int); COPY stdout (from_) FROM STDOUT",
    "CREATE PROCEDURE pg_temp.p() BEGIN ATOMIC END",
]  # fmt: skip
select = st.lists(
    st.tuples(st.sampled_from(_VALUES), st.sampled_from(_LABELS)).map("".join), min_size=1, max_size=4
).map(lambda targets: "SELECT " + ", ".join(targets))
server_scripts = st.lists(st.one_of(select, st.sampled_from(_STATEMENTS)), max_size=6).map(";".join)

_ERROR = "ERROR"
_SAME_COMMAND = {"END": "COMMIT", "ABORT": "ROLLBACK", "(": "SELECT", "VALUES": "SELECT"}
_CONTROL = re.compile("BEGIN|START TRANSACTION|COMMIT|ROLLBACK|SAVEPOINT|RELEASE|COPY FROM STDIN|COPY TO STDOUT")


@pytest.fixture(scope="module", params=[True, False], ids=["conforming", "backslashes"])
def server_session(cluster: Cluster, request: pytest.FixtureRequest) -> Iterator[Session]:
    """A session with standard_conforming_strings on, then one with it off."""
    session = cluster.connect(options=_options(request.param), client_encoding="UTF8")
    yield session
    session.close()


def _conforming(session: Session) -> bool:
    return session.info.parameter_status("standard_conforming_strings") == "on"


def _answers(session: Session, script: str) -> list[str]:
    """The command tag of each statement that the server ran, in order; ERROR for one that failed."""
    connection = session.pgconn
    connection.send_query(script.encode())
    answers: list[str] = []
    copying = False
    while (result := connection.get_result()) is not None:
        status = result.status
        if status == pq.ExecStatus.COPY_OUT:
            answers.append("COPY TO STDOUT")
            while connection.get_copy_data(0)[0] >= 0:
                pass
        elif status == pq.ExecStatus.COPY_IN:
            answers.append("COPY FROM STDIN")
            connection.put_copy_end()
        elif status in (pq.ExecStatus.COMMAND_OK, pq.ExecStatus.TUPLES_OK) and not copying:
            answers.append((result.command_status or b"").decode())
        elif status == pq.ExecStatus.FATAL_ERROR:
            answers.append(_ERROR)
        copying = status in (pq.ExecStatus.COPY_OUT, pq.ExecStatus.COPY_IN)
    return answers


def _start_clean(session: Session) -> None:
    conforming = "on" if _conforming(session) else "off"
    session.execute("ROLLBACK")
    session.execute("DISCARD ALL")
    assert session.info.parameter_status("standard_conforming_strings") == conforming


@pytest.mark.parametrize("script", _STATEMENTS)
def test_the_statements_of_these_tests_are_valid(server_session: Session, script: str) -> None:
    """Else the comparison below would compare nothing."""
    _start_clean(server_session)
    table = "CREATE TEMP TABLE stdin (stdout int);" if re.match("COPY.*stdin|CREATE RULE", script) else ""
    savepoint = "BEGIN; SAVEPOINT s;" if re.search("SAVEPOINT|release|ROLLBACK TO", script) else ""
    answers = _answers(server_session, table + savepoint + script)
    assert (_ERROR in answers) == (script == "COMMIT PREPARED 'none'")


@unhurried
@given(script=server_scripts)
def test_sees_the_statements_that_the_server_runs(server_session: Session, script: str) -> None:
    conforming = _conforming(server_session)
    _start_clean(server_session)
    answers = _answers(server_session, script)
    found = list(lexer.statements(script, conforming))
    if _ERROR not in answers:
        assert len(answers) == len(found)
    for answer, statement in zip(answers, found):
        command = _SAME_COMMAND.get(statement.head[0], statement.head[0])
        assert answer == _ERROR or answer.startswith(command)
    refused = any(_CONTROL.match(answer) for answer in answers)
    if refused or _ERROR not in answers:
        assert (lexer.forbidden(script, conforming) is not None) == refused, answers


@pytest.mark.parametrize(
    "script",
    [
        "BEGIN; PREPARE TRANSACTION 'lexer'",
        "BEGIN; PREPARE TRANSACTION $$lexer$$",
        "BEGIN; PREPARE TRANSACTION U&'lexer'",
    ],
)
def test_refuses_what_the_server_prepares(cluster: Cluster, script: str) -> None:
    with cluster.connect() as session:
        try:
            session.execute(script)
        except psycopg.errors.ObjectNotInPrerequisiteState:
            pytest.skip("max_prepared_transactions is 0")
        session.execute("ROLLBACK PREPARED 'lexer'")
    assert lexer.forbidden(script.split(";")[1], True) == "PREPARE TRANSACTION"
