"""Results without a column list: as a row type that exists, or as JSON."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from .errors import FEATURE_NOT_SUPPORTED, background_error
from .output_settings import PARTS_QUERY
from .results import FIRST_USER_OID, Column, TypeNames
from .server import Server

_SHORT_NAME = 10  # characters, which are 40 bytes at most: a number still fits in an identifier behind them

# The columns of a row type, or the one of any other type; a domain with the type that it comes down to.
_COLUMNS_OF_TYPE = """
    WITH RECURSIVE field(place, oid) AS (
        SELECT a.attnum, a.atttypid
        FROM pg_catalog.pg_type t
        JOIN pg_catalog.pg_attribute a ON a.attrelid OPERATOR(pg_catalog.=) t.typrelid
        WHERE t.oid OPERATOR(pg_catalog.=) $1 AND t.typtype OPERATOR(pg_catalog.=) 'c'
          AND a.attnum OPERATOR(pg_catalog.>) 0::pg_catalog.int2 AND NOT a.attisdropped
        UNION ALL
        SELECT 1::pg_catalog.int2, t.oid FROM pg_catalog.pg_type t
        WHERE t.oid OPERATOR(pg_catalog.=) $1 AND t.typtype OPERATOR(pg_catalog.<>) 'c'
    ), base(place, oid, typmod, is_base) AS (
        SELECT f.place, f.oid, -1, false FROM field f
        UNION ALL
        SELECT b.place,
               CASE WHEN t.typtype OPERATOR(pg_catalog.=) 'd' THEN t.typbasetype ELSE t.oid END,
               CASE WHEN t.typtype OPERATOR(pg_catalog.=) 'd' THEN t.typtypmod ELSE b.typmod END,
               t.typtype OPERATOR(pg_catalog.<>) 'd'
        FROM base b JOIN pg_catalog.pg_type t ON t.oid OPERATOR(pg_catalog.=) b.oid
        WHERE NOT b.is_base
    )
    SELECT f.oid, b.oid AS base, b.typmod, f.oid OPERATOR(pg_catalog.<>) b.oid AS is_domain
    FROM field f JOIN base b ON b.place OPERATOR(pg_catalog.=) f.place AND b.is_base
    ORDER BY f.place"""

# A domain that these types consist of, of an owner who cannot become the reader: input runs what it checks.
_DOMAIN_OF_ANOTHER = f"""
    SELECT pg_catalog.format_type(t.oid, NULL) AS name
    FROM ({PARTS_QUERY}) AS part
    JOIN pg_catalog.pg_type t ON t.oid OPERATOR(pg_catalog.=) part.oid
    WHERE t.typtype OPERATOR(pg_catalog.=) 'd' AND NOT pg_catalog.pg_has_role(t.typowner, $2, 'MEMBER')
    LIMIT 1"""


class RowTypes:
    """Puts the query of a result's rows into one that returns them in another shape."""

    def __init__(self, server: Server, type_names: TypeNames) -> None:
        self._server = server
        self._type_names = type_names

    def query_of_json(self, columns: Sequence[Column], query: str) -> str:
        """One column of JSON objects. 0A000 for a domain of another role's."""
        self._refuse_domains_of_others(columns)
        names = _distinct([self._server.decode(column.name) for column in columns])
        return f"SELECT pg_catalog.to_jsonb(q.*) FROM ({query}) AS q({', '.join(map(_quoted, names))})"

    def _refuse_domains_of_others(self, columns: Iterable[Column]) -> None:
        """0A000 where the reader, who has named no types, would run code of another role."""
        types = [column.type_oid for column in columns if column.type_oid >= FIRST_USER_OID]
        if not types:
            return
        caller = self._server.caller()
        found = self._server.query(_DOMAIN_OF_ANOTHER, ["pg_catalog.oid[]", "pg_catalog.oid"], [types, caller])
        if found:
            raise background_error(
                FEATURE_NOT_SUPPORTED,
                f"values of domain {found[0]['name']} are not read without a column list",
                detail="What the domain checks is code of its owner, and would run as the current user.",
                hint="Name the types in the column list of pg_background_result_v2().",
            )

    def query_of(self, columns: Sequence[Column], query: str, row_type: int) -> str:
        """The query whose values of a base type are of that domain over it that the row type has in their place."""
        wanted = self._server.query(_COLUMNS_OF_TYPE, ["pg_catalog.oid"], [row_type])
        domains = [
            column._replace(type_oid=int(field["oid"]), typmod=-1)
            if field["is_domain"] and (int(field["base"]), field["typmod"]) == (column.type_oid, column.typmod)
            else None
            for column, field in zip(columns, wanted)
        ]
        if len(wanted) != len(columns) or not any(domains):
            return query
        names = self._type_names.of(tuple(filter(None, domains))) or {}
        values = ", ".join(
            f"q.c{place}" if domain is None else f"q.c{place}::{names[domain.type_oid, -1].exact}"
            for place, domain in enumerate(domains)
        )
        aliases = ", ".join(f"c{place}" for place in range(len(columns)))
        return f"SELECT {values} FROM ({query}) AS q({aliases})"


def _distinct(names: Iterable[str]) -> list[str]:
    """The names, with a number where there was the same one before."""
    taken: list[str] = []
    for name in names:
        number, chosen = 1, name
        while chosen in taken:
            number += 1
            chosen = f"{name[:_SHORT_NAME]}_{number}"
        taken.append(chosen)
    return taken


def _quoted(name: str) -> str:
    """A quoted identifier without a brace: "{schema}" in the query stands for something else."""
    doubled = name.replace('"', '""')
    if "{" not in name:
        return f'"{doubled}"'
    escaped = doubled.replace("\\", "\\\\").replace("{", "\\007B")
    return f'U&"{escaped}"'
