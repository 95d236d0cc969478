"""The lines of a file, each with its place in it, for errors."""

import gzip
import io
import json
import zlib
from codecs import BOM_UTF8
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, cast

from ngame.progress import Progress


def json_objects(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Give each line's place, ``file:line``, and its JSON object; there is at least one."""
    empty = True
    for where, line in text_lines(path):
        empty = False
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            what = f"malformed JSON: {error.msg} (column {error.colno})"
            raise ValueError(f"{where}: {what}") from None
        except (ValueError, RecursionError) as error:  # too long a number, too deep a nesting
            raise ValueError(f"{where}: malformed JSON: {error}") from None
        if not isinstance(row, dict):
            raise ValueError(f"{where}: expected a JSON object")
        yield where, row
    if empty:
        raise ValueError(f"{path}:1: the file is empty")


def text_lines(path: Path) -> Iterator[tuple[str, str]]:
    """Give each line's place, ``file:line``, and its text; blank lines at the end are skipped.

    Long files show how much is read.
    """
    size = path.stat().st_size
    with open(path, "rb") as file, Progress(path.name, size, "B") as progress:
        stream: BinaryIO = file
        if path.suffix == ".gz":  # with a buffer, since GzipFile is slow line by line
            stream = cast(BinaryIO, io.BufferedReader(gzip.GzipFile(fileobj=file)))
        number = blank = 0
        try:
            # Lines are decoded one by one, so that a byte that is not UTF-8 has a line number.
            for number, line in enumerate(stream, 1):
                if number % 1024 == 0:
                    progress.reach(file.tell())
                if number == 1:
                    line = line.removeprefix(BOM_UTF8)
                if not line.strip():
                    blank = blank or number
                    continue
                if blank:
                    raise ValueError(f"{path}:{blank}: the line is blank")
                yield f"{path}:{number}", line.decode().rstrip("\r\n")
        except UnicodeDecodeError as error:
            raise ValueError(f"{path}:{number}: not UTF-8 at byte {error.start + 1}") from None
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            what = f"truncated or damaged gzip file: {error}"
            raise ValueError(f"{path}:{number + 1}: {what}") from None
