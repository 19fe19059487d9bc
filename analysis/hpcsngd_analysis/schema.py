"""The tables that `load` returns, as a table: for notebooks, and for analysis/TABLES.md.

``python -m hpcsngd_analysis.schema`` prints that file.
"""

from __future__ import annotations

import sys

import pandas as pd

from hpcsngd.tables import TABLES
from hpcsngd_analysis import attempts
from hpcsngd_analysis.csv_table import dtypes


def columns() -> pd.DataFrame:
    """Returns every column of every table: ``table, column, dtype, unit, doc``, in the order of the tables.

    The tables of `Runs.tables` begin with ``run``; ``attempts`` is `Runs.attempts`.
    """
    rows = []
    for table in TABLES.values():
        rows.append((table.name, "run", "str", "", "the run's name"))
        kinds = dtypes(table)
        rows += [
            (table.name, column.name, kinds[column.name], column.unit, column.doc) for column in table.columns
        ]
    rows += [("attempts", name, kind, unit, doc) for name, (kind, unit, doc) in attempts.COLUMNS.items()]
    return pd.DataFrame(rows, columns=["table", "column", "dtype", "unit", "doc"])


def markdown() -> str:
    """Returns the schema for people, one section per table."""
    lines = [
        "# Tables",
        "",
        "What `hpcsngd_analysis.load.load` returns: `Runs.tables[name]`, and `Runs.attempts`. Run",
        "directories and the files of the original HyLo scripts are read into the same tables. Made by",
        "`python -m hpcsngd_analysis.schema`; a test compares.",
    ]
    docs = {table.name: table.doc for table in TABLES.values()} | {"attempts": "One row per attempt."}
    for name, rows in columns().groupby("table", sort=False):
        lines += [
            "",
            f"## {name}",
            "",
            docs[str(name)],
            "",
            "| column | dtype | unit | meaning |",
            "| --- | --- | --- | --- |",
        ]
        lines += [
            f"| `{row.column}` | {row.dtype} | {row.unit} | {_cell(str(row.doc))} |"
            for row in rows.itertuples()
        ]
    return "\n".join(lines) + "\n"


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


if __name__ == "__main__":
    sys.stdout.write(markdown())
