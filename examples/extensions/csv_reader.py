"""A dataset reader: rows of a CSV file.

    data.labelled.path=questions.csv data.labelled.reader=import:csv_reader:read

The other fields of the data set apply as to a JSONL file: prompt_field, answer_field, limit and so on. Of each row only
the columns that these fields name are kept.
"""

from __future__ import annotations

import csv
from collections.abc import Iterator
from pathlib import Path


def read(path: Path) -> Iterator[dict[str, str]]:
    """The rows in a fixed order: every rank reads them, more than once.

    `path` is the data set's `path`. It need not be a file, so a reader can also take the name of a folder or a table.
    """
    with path.open(newline="", encoding="utf-8") as file:
        yield from csv.DictReader(file)
