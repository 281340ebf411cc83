"""Data files: csv, tsv and jsonl (each also gzipped), and parquet.

csv follows RFC 4180. tsv knows no quotes (IANA text/tab-separated-values): a quote is a character of the
text, as in the data sets that are distributed in it. jsonl is one object a line.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Literal

from privfed.data.config import DataConfig
from privfed.data.rows import RawDataset, RawTable
from privfed.errors import DataError, nearest

Columns = dict[str, list[object]]


def read_files(config: DataConfig, *, labelled: bool = True) -> RawDataset:
    """Return the tables of ``config.path`` and, where given, ``config.test_path``.

    Raises:
        DataError: If a file is not there, or is not what its extension says.
    """
    path = Path(str(config.path))
    test = None if config.test_path is None else Path(config.test_path)
    return RawDataset(
        name=path.name,
        train=read_table(path, labelled=labelled),
        test=None if test is None else read_table(test, labelled=labelled),
        source=f"The file {path.name}" + (f", tested on {test.name}." if test is not None else "."),
    )


def read_table(path: Path, *, labelled: bool = True) -> RawTable:
    """Return the columns of the file at ``path``.

    Raises:
        DataError: If it is not there, or is not what its extension says.
    """
    suffix, packed = _format(path)
    if not path.is_file():
        kind = "a folder" if path.is_dir() else "not there"
        near = nearest(path.name, (p.name for p in path.parent.iterdir())) if path.parent.is_dir() else ""
        raise DataError(
            f"The data file {str(path)!r} is {kind}, expected a file.{near} Paths are relative to the current folder."
        )
    if suffix == ".parquet":
        return RawTable(origin=str(path), columns=_parquet(path))
    text = _decode(path, _unpack(path) if packed else path.read_bytes())
    if not text.strip():
        expected = "labelled texts" if labelled else "texts"
        raise DataError(f"The data file {str(path)!r} is empty, expected {expected}: check how it was made.")
    return RawTable(origin=str(path), columns=_TEXT_READERS[suffix](path, text))


def _format(path: Path) -> tuple[str, bool]:
    suffixes = [suffix.lower() for suffix in path.suffixes]
    packed = suffixes[-1:] == [".gz"]
    suffix = (suffixes[:-1] if packed else suffixes)[-1:]
    if suffix and (suffix[0] in _TEXT_READERS or (suffix[0] == ".parquet" and not packed)):
        return suffix[0], packed
    extension = "".join(suffixes[-2:] if packed else suffixes[-1:])
    raise DataError(
        f"The data file {str(path)!r} has the extension {extension!r}, "
        "expected .csv, .tsv, .jsonl (each also with .gz) or .parquet: convert or rename it."
    )


def _unpack(path: Path) -> bytes:
    try:
        return gzip.decompress(path.read_bytes())
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(
            f"The data file {str(path)!r} is not a whole gzip file ({error}): pack or download it again."
        ) from error


def _decode(path: Path, raw: bytes) -> str:
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        # The byte order mark is stripped before decoding, so offsets are counted without it.
        offset = error.start + (3 if raw.startswith(b"\xef\xbb\xbf") else 0)
        line = raw[:offset].count(b"\n") + 1
        raise DataError(
            f"The data file {str(path)!r} has byte 0x{raw[offset]:02x} at offset {offset} (line {line}), "
            f"expected UTF-8: convert it, e.g. with iconv -f latin1 -t utf-8."
        ) from error


def _delimited(path: Path, text: str, *, delimiter: str) -> Columns:
    lines = io.StringIO(text, newline="")
    quoting: Literal[0, 3] = csv.QUOTE_MINIMAL if delimiter == "," else csv.QUOTE_NONE
    reader = csv.reader(lines, delimiter=delimiter, quoting=quoting, strict=True)
    limit = csv.field_size_limit(2**31 - 1)  # the default of 128 KiB refuses long documents
    try:
        header = next(record for record in reader if record)
        columns: Columns = {name: [] for name in header}
        if len(columns) < len(header):
            raise DataError(f"The data file {str(path)!r} names a column twice in {header}: rename one.")
        for record in reader:
            if not record:
                continue
            if len(record) != len(header):
                raise DataError(
                    f"The data file {str(path)!r} has {len(record)} fields in line {reader.line_num}, "
                    f"expected the {len(header)} of the header: fix that line."
                )
            for name, value in zip(header, record, strict=True):
                columns[name].append(value)
    except csv.Error as error:
        raise DataError(
            f"The data file {str(path)!r} is not well-formed near line {reader.line_num} ({error}): fix the quotes."
        ) from error
    finally:
        csv.field_size_limit(limit)
    return columns


def _csv(path: Path, text: str) -> Columns:
    header = next((line for line in text.splitlines() if line.strip()), "")
    other = next((mark for mark in (";", "\t", "|") if mark in header), None)
    if "," not in header and other is not None:
        raise DataError(
            f"The data file {str(path)!r} separates its values by {other!r} ({header:.60}), expected commas: save it "
            "with commas, or with tabs as .tsv."
        )
    return _delimited(path, text, delimiter=",")


def _tsv(path: Path, text: str) -> Columns:
    return _delimited(path, text, delimiter="\t")


def _jsonl(path: Path, text: str) -> Columns:
    records: list[dict[str, object]] = []
    # Not splitlines(): it also breaks at characters such as U+2028 that JSON allows inside a string.
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            records.append(_json_object(path, number, line))
    names = dict.fromkeys(name for record in records for name in record)
    # A key that a line lacks is null there, as in the readers of pandas, pyarrow and datasets.
    return {name: [record.get(name) for record in records] for name in names}


def _json_object(path: Path, number: int, line: str) -> dict[str, object]:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise DataError(
            f"The data file {str(path)!r} is not JSON in line {number} ({error}), "
            "expected one object a line: fix the line."
        ) from error
    if not isinstance(record, dict):
        raise DataError(
            f"The data file {str(path)!r} has a JSON {type(record).__name__} in line {number}, "
            'expected an object such as {"text": ..., "label": ...}: fix the line.'
        )
    return record


def _parquet(path: Path) -> Columns:
    import pyarrow  # type: ignore[import-untyped]
    import pyarrow.parquet  # type: ignore[import-untyped]

    try:
        table = pyarrow.parquet.read_table(path)
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(
            f"The data file {str(path)!r} is not a parquet file ({str(error).splitlines()[0]}): write it again."
        ) from error
    return {name: table.column(name).to_pylist() for name in table.column_names}


_TEXT_READERS: dict[str, Callable[[Path, str], Columns]] = {".csv": _csv, ".tsv": _tsv, ".jsonl": _jsonl}
