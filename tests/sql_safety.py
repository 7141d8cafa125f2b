"""Looks for what an attacker could use in the extension's install script and in the SQL of its Python modules.

Each check takes a script (SQL text) and returns complaints, one a line; none is well. pglast parses with the server's
own grammar. What a string concatenates at run time cannot be parsed whole: it is looked at token by token.
"""

from __future__ import annotations

import ast as python_ast
import re
import textwrap
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import pglast
from pglast import ast, enums, parse_plpgsql
from pglast.parser import ParseError, scan
from pglast.visitors import Visitor

PINNED = ("pg_catalog", "pg_temp")
_SQL = re.compile(r"\s*(SELECT|INSERT|UPDATE|DELETE|WITH|SET|RESET|LOCK)\b|.*\bpg_catalog\.", re.DOTALL)
_NO_FUNCTIONS = frozenset(("COALESCE", "CONFLICT", "EXISTS", "OPERATOR", "OVER", "ROW", "VALUES"))
_OPERATORS = re.compile(r"[!-/:-@`|~]+")
_NO_OPERATORS = frozenset(("(", ")", ".", ",", ";", ":", "::", ":=", "=>", "*", "-", "'", '"'))


class Function(NamedTuple):
    """A CREATE FUNCTION of the script."""

    signature: str
    language: str
    body: str | None  # None: BEGIN ATOMIC, which is parsed and bound once, when the extension is created
    definer: bool
    search_path: tuple[str, ...] | None  # of its SET clause
    text: str


# --- reading the script ---------------------------------------------------------------------------


def _statements(script: str) -> Iterator[tuple[Any, str]]:
    """Each statement's parse tree and text."""
    sql = re.sub(r"^\\echo.*$", "", script, flags=re.MULTILINE)
    encoded = sql.encode()
    raw: Any
    for raw in pglast.parse_sql(sql):
        end = raw.stmt_location + raw.stmt_len if raw.stmt_len else len(encoded)
        yield raw.stmt, encoded[raw.stmt_location : end].decode()


def _type(name: Any) -> str:
    return str(name.names[-1].sval) + "[]" * len(name.arrayBounds or ())


def _function(statement: Any, text: str) -> Function:
    options = {option.defname: option.arg for option in statement.options or ()}
    inputs = [p for p in statement.parameters or () if p.mode in _INPUT_MODES]
    setting = options.get("set")
    path = None
    if setting is not None and setting.name == "search_path" and setting.args:
        path = tuple(argument.val.sval for argument in setting.args)
    return Function(
        f"{statement.funcname[-1].sval}({', '.join(_type(p.argType) for p in inputs)})",
        options["language"].sval if "language" in options else "sql",
        options["as"][0].sval if "as" in options else None,
        "security" in options and options["security"].boolval,
        path,
        text,
    )


_INPUT_MODES = (
    enums.FunctionParameterMode.FUNC_PARAM_IN,
    enums.FunctionParameterMode.FUNC_PARAM_INOUT,
    enums.FunctionParameterMode.FUNC_PARAM_VARIADIC,
    enums.FunctionParameterMode.FUNC_PARAM_DEFAULT,
)


def functions(script: str) -> list[Function]:
    """All functions that the script creates."""
    return [_function(s, text) for s, text in _statements(script) if isinstance(s, ast.CreateFunctionStmt)]


def blocks(script: str) -> list[Function]:
    """The DO blocks, which a superuser runs at CREATE EXTENSION: as functions without arguments."""
    found: list[Function] = []
    for statement, _ in _statements(script):
        if isinstance(statement, ast.DoStmt):
            parts = {part.defname: part.arg.sval for part in statement.args or ()}
            language, body = parts.get("language", "plpgsql"), parts["as"]
            name = f"DO block {len(found) + 1}"
            text = f"CREATE FUNCTION block() RETURNS pg_catalog.void LANGUAGE {language} AS $block${body}$block$"
            found.append(Function(name, language, body, definer=False, search_path=None, text=text))
    return found


# --- definer functions, and what PUBLIC may ---------------------------------------------------------


def unlisted_definers(script: str, reasons: Mapping[str, str]) -> list[str]:
    """Definer functions without a reason, and reasons without a function."""
    definers = {function.signature for function in functions(script) if function.definer}
    return [f"{name}: SECURITY DEFINER, for no listed reason" for name in sorted(definers - reasons.keys())] + [
        f"{name}: listed, but no definer function" for name in sorted(reasons.keys() - definers)
    ]


def unpinned_definers(script: str) -> list[str]:
    """Definer functions that their caller's search_path or temporary schema could bend."""
    return [
        f"{function.signature}: SECURITY DEFINER with search_path {function.search_path}"
        for function in functions(script)
        if function.definer and function.search_path != PINNED
    ]


def open_to_public(script: str) -> list[str]:
    """Functions and types that PUBLIC may use, and whatever else is granted to PUBLIC."""
    created: dict[str, None] = {}
    closed: set[str] = set()
    complaints = []
    for statement, text in _statements(script):
        kind = type(statement)
        if kind is ast.CreateFunctionStmt:
            created[_function(statement, text).signature] = None
        elif kind is ast.CompositeTypeStmt:
            created[statement.typevar.relname] = None
        elif kind is ast.GrantStmt and _names_public(statement.grantees):
            if statement.is_grant:
                complaints.append(f"granted to PUBLIC: {text.strip()}")
            else:
                closed.update(map(_granted_object, statement.objects))
        elif kind is ast.AlterDefaultPrivilegesStmt:
            complaints.append(f"default privileges: {text.strip()}")
    return complaints + [f"{name}: open to PUBLIC" for name in created if name not in closed]


def _names_public(grantees: Any) -> bool:
    return any(grantee.roletype == enums.RoleSpecType.ROLESPEC_PUBLIC for grantee in grantees)


def _granted_object(granted: Any) -> str:
    if hasattr(granted, "objname"):
        return f"{granted.objname[-1].sval}({', '.join(map(_type, granted.objargs or ()))})"
    return str(granted[-1].sval if isinstance(granted, tuple) else granted.relname)


# --- names that a search_path resolves --------------------------------------------------------------


def unqualified_names(script: str) -> list[str]:
    """Names in bodies that are resolved when they run, with the search_path of whoever calls, or of the script."""
    return [
        f"{function.signature}: {complaint}"
        for function in functions(script) + blocks(script)
        if function.body is not None
        for complaint in _READERS[function.language](function)
    ]


def unqualified_names_of_python(source: str) -> list[str]:
    """The same for the SQL in a Python module's strings."""
    complaints = []
    inner: set[int] = set()
    for node in python_ast.walk(python_ast.parse(source)):
        text = None if id(node) in inner else _string(node)
        if text is not None and _SQL.match(text):
            inner.update(map(id, python_ast.walk(node)))
            complaints += [f"line {getattr(node, 'lineno', 0)}: {complaint}" for complaint in _of_sql(text)]
    return complaints


def _string(node: python_ast.AST) -> str | None:
    """A string expression's text, q.q for what is put into it at run time; None for anything else."""
    if isinstance(node, python_ast.Constant) and isinstance(node.value, (str, bytes)):
        return node.value if isinstance(node.value, str) else node.value.decode("latin-1")
    if isinstance(node, python_ast.JoinedStr):
        return "".join(_string(part) or "q.q" for part in node.values)
    if isinstance(node, python_ast.BinOp) and isinstance(node.op, python_ast.Mod):
        template = _string(node.left)
        return None if template is None else re.sub(r"%[ds]", "q.q", template)
    if isinstance(node, python_ast.BinOp) and isinstance(node.op, python_ast.Add):
        parts = _string(node.left), _string(node.right)
        return None if parts == (None, None) else "".join(part or "q.q" for part in parts)
    return None


def _of_sql(text: str) -> list[str]:
    """Complaints about statements; about a fragment, or what is none without what is put into it, by its tokens."""
    try:
        tree = pglast.parse_sql(text)
    except ParseError:
        return _of_fragment(text)
    names = _WithQueries()
    names(tree)
    visitor = _Unqualified(frozenset(names.found))
    visitor(tree)
    return visitor.complaints


def _of_plpython(function: Function) -> list[str]:
    return unqualified_names_of_python("def body():\n" + textwrap.indent(function.body or "", "    "))


def _of_plpgsql(function: Function) -> list[str]:
    """Each expression and statement, the types of variables, and the strings that EXECUTE puts together."""
    declared = re.search(r"^DECLARE$(.*?)^BEGIN$", function.body or "", re.DOTALL | re.MULTILINE)
    types = re.findall(r"^    \w+(?: CONSTANT)? (\S+?)(?:;| :=)", declared.group(1) if declared else "", re.MULTILINE)
    complaints = [f"type {name} of a variable" for name in types if not name.startswith("pg_catalog.")]
    for text, is_dynamic in _expressions(parse_plpgsql(function.text)):
        complaints += _of_sql(text)
        if is_dynamic:
            complaints += [c for constant in _constants(text) for c in _of_fragment(constant)]
    return complaints


def _expressions(tree: Any, parent: str = "", *, is_dynamic: bool = False) -> Iterator[tuple[str, bool]]:
    """Statements and expressions of a PL/pgSQL function, and whether what they result in is run as SQL."""
    if isinstance(tree, list):
        for part in tree:
            yield from _expressions(part, parent, is_dynamic=is_dynamic)
    elif isinstance(tree, dict):
        for name, part in tree.items():
            if name == "PLpgSQL_expr":
                yield _PARSE_MODES[part.get("parseMode", 0)](part["query"]), is_dynamic
            else:
                yield from _expressions(part, name, is_dynamic=(parent, name) in _DYNAMIC or name == "dynquery")


_DYNAMIC = {("PLpgSQL_stmt_dynexecute", "query"), ("PLpgSQL_stmt_dynfors", "query")}


def _as_select(expression: str) -> str:
    return f"SELECT {expression}"


def _assigned(assignment: str) -> str:
    return _as_select(assignment.partition(":=")[2])


# enum RawParseMode: a statement, a type, an expression, assignments
_PARSE_MODES = (str, str, _as_select, _assigned, _assigned, _assigned)


def _constants(expression: str) -> list[str]:
    collected: list[str] = []

    class Collector(Visitor):
        def visit_A_Const(self, _: Any, node: Any) -> None:  # noqa: N802
            if isinstance(node.val, ast.String):
                collected.append(str(node.val.sval))

    Collector()(pglast.parse_sql(expression))
    return collected


_READERS: dict[str, Callable[[Function], list[str]]] = {
    "sql": lambda function: _of_sql(function.body or ""),
    "plpgsql": _of_plpgsql,
    "plpython3u": _of_plpython,
}


class _WithQueries(Visitor):
    """Collects the names of WITH queries."""

    def __init__(self) -> None:
        self.found: set[str] = set()

    def visit_CommonTableExpr(self, _: Any, node: Any) -> None:  # noqa: N802
        self.found.add(node.ctename)


class _Unqualified(Visitor):
    """Collects what the server would look up by search_path, operators behind IN, CASE and the like included."""

    def __init__(self, with_queries: frozenset[str] = frozenset()) -> None:
        self.complaints: list[str] = []
        self._with_queries = with_queries

    def _want_schema(self, what: str, names: Any) -> None:
        if len(names or ()) < 2:
            self.complaints.append(f"{what} {names[-1].sval if names else '='} has no schema")

    def visit_RangeVar(self, _: Any, node: Any) -> None:  # noqa: N802
        if node.schemaname is None and node.relname not in self._with_queries:
            self.complaints.append(f"relation {node.relname} has no schema")

    def visit_FuncCall(self, _: Any, node: Any) -> None:  # noqa: N802
        self._want_schema("function", node.funcname)

    def visit_TypeName(self, _: Any, node: Any) -> None:  # noqa: N802
        self._want_schema("type", node.names)

    def visit_A_Expr(self, _: Any, node: Any) -> None:  # noqa: N802
        self._want_schema("operator", node.name)

    def visit_SubLink(self, _: Any, node: Any) -> None:  # noqa: N802
        if node.testexpr is not None:
            self._want_schema("operator", node.operName)

    def visit_CaseExpr(self, _: Any, node: Any) -> None:  # noqa: N802
        if node.arg is not None:
            self.complaints.append("CASE with an operand compares by =")

    def visit_JoinExpr(self, _: Any, node: Any) -> None:  # noqa: N802
        if node.usingClause or node.isNatural:
            self.complaints.append("JOIN USING compares by =")

    def visit_CollateClause(self, _: Any, node: Any) -> None:  # noqa: N802
        self._want_schema("collation", node.collname)


def _of_fragment(text: str) -> list[str]:
    """Calls, casts and operators that do not follow a schema and a dot, in what cannot be parsed."""
    try:
        # A % before a letter and a name in braces are none of SQL's: format() or Python puts something in its place.
        text = re.sub(r"%[ILs]|\{\w+\}", "q.q", text)
        tokens = [(token.kind, text[token.start : token.end + 1]) for token in scan(text)]
    except ParseError:
        return []  # it ends within a string: no SQL, or the whole is parsed elsewhere
    complaints = []
    for place, (kind, word) in enumerate(tokens):
        before = [word for _, word in tokens[max(0, place - 2) : place]]
        after = [word for _, word in tokens[place + 1 : place + 3]]
        last = before[-1] if before else ""
        is_name = word.isidentifier() and kind != "RESERVED_KEYWORD" and word.upper() not in _NO_FUNCTIONS
        if is_name and after[:1] == ["("] and last.upper() not in (".", "AS"):
            complaints.append(f"function {word} has no schema in: {text[:80]}")
        if last == "::" and after[:1] != ["."]:
            complaints.append(f"type {word} has no schema in: {text[:80]}")
        if word.upper() == "CASE" and after[:1] and after[0].upper() != "WHEN":
            complaints.append(f"CASE with an operand compares by = in: {text[:80]}")
        if _OPERATORS.fullmatch(word) and word not in _NO_OPERATORS and last != "." and not _assigns(before):
            complaints.append(f"operator {word} has no schema in: {text[:80]}")
    return complaints


def _assigns(before: list[str]) -> bool:
    """Whether an = after these words assigns: SET name =, RAISE USING option =."""
    return before[:1] in (["SET"], ["LOCAL"]) or before[-1:] in (["ERRCODE"], ["MESSAGE"])
