"""Files to rows: JSON objects from jsonl, json, csv, parquet, gz, a `datasets` folder or the hub.

A new kind of file is one entry in READERS, at the end of this file, and one function above it.
"""

import csv
import gzip
import json
import os
import re
from pathlib import Path

from plumbing.reading import one_line, read_json

HUB = r"([\w.-]+/[\w.-]+)(?:/([\w.-]+))?(?::(.+))?"        # org/name, org/name/config:split


def records(name, flag="--data"):
    """Yield (where, JSON object) for every row of `name`, which is one of these:

    .jsonl, .json   an object per line; an array of objects
    .csv            its first row names the columns
    .parquet
    .jsonl.gz       or .json.gz, .csv.gz
    a folder        that the `datasets` library wrote with save_to_disk
    org/name        a data set of the Hugging Face hub: org/name:split, org/name/config:split
    """
    file = Path(name)
    kind = Path(file.stem if file.suffix == ".gz" else file.name).suffix
    refusal = "cannot be read"
    if os.path.isdir(file):
        rows = _saved_rows(file)
    elif os.path.isfile(file):
        rows = READERS.get(kind, _json_rows)(file)
    elif kind not in READERS and (hub := re.fullmatch(HUB, str(name))):
        rows, refusal = _hub_rows(*hub.groups()), "no such file, and the hub does not give it"
    else:
        raise SystemExit(f"{flag} {name}: no such file")
    done = 0
    try:
        for where, row in rows:
            yield f"{name}: {where}", row
            done += 1
    except Exception as error:           # of many libraries: not installed, half a file, offline
        raise SystemExit(f"{flag} {name}: {refusal} ({one_line(error)}; {done:,} rows were read)")


def _numbered(name, rows):
    for number, row in enumerate(rows, 1):
        yield f"{name} {number}", row


def _text(file):
    """An open text file, unpacked. newline: strings may contain U+0085 and form feeds."""
    opened = gzip.open if file.suffix == ".gz" else open
    return opened(file, "rt", encoding="utf-8-sig", newline="\n")


def _json_rows(file):
    with _text(file) as lines:
        first = next(filter(str.strip, lines), "")
        lines.seek(0)
        if first.lstrip().startswith("["):
            yield from _numbered("record", json.load(lines))
            return
        for where, line in _numbered("line", lines):
            if line.strip():
                yield where, _from_json(line, f"{file}: {where}")


def _from_json(text, where):
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise SystemExit(f"{where}: broken JSON ({one_line(error)})")


class CsvRow(dict):
    """A row whose cells are all texts; Record reads numbers from them."""


def _csv_rows(file):
    csv.field_size_limit(2 ** 31 - 1)
    with _text(file) as lines:
        for where, row in _numbered("row", csv.DictReader(lines, strict=True)):
            if None in row or None in row.values():
                raise ValueError(f"{where} has more cells than the header, or fewer")
            yield where, CsvRow(row)


def _parquet_rows(file):
    from pyarrow.parquet import ParquetFile
    yield from _numbered("row", _of_tables(ParquetFile(file).iter_batches()))


def _saved_rows(folder):
    from pyarrow import ipc
    state = folder / "state.json"
    if not state.is_file():
        raise ValueError("no state.json, which save_to_disk writes into the folder of each split")
    names = read_json(state, folder)["_data_files"]
    files = [open(folder / name["filename"], "rb") for name in names]
    yield from _numbered("row", _of_tables(table for file in files
                                           for table in ipc.open_stream(file)))


def _of_tables(tables):
    for table in tables:
        yield from table.to_pylist()


def _hub_rows(name, configuration, split):
    from datasets import load_dataset
    split = split or "train"
    yield from _numbered(f"{split} row", load_dataset(name, configuration, split=split))


READERS = {".json": _json_rows, ".jsonl": _json_rows, ".csv": _csv_rows, ".parquet": _parquet_rows}
