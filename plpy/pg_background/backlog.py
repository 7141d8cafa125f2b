"""What a worker has said and nobody has read yet: in memory up to a bound, past it in a temporary file."""

from __future__ import annotations

import os
import pickle
import tempfile
from collections import deque
from typing import IO, NamedTuple, Union

from .errors import Report

# A temporary file goes where the server keeps its own.
_FOLDER = os.path.join("base", "pgsql_tmp")


class Rows(NamedTuple):
    """A batch of rows, column by column, each column one literal that the server can unnest."""

    columns: tuple[bytes, ...]

    def size(self) -> int:
        """Bytes, about."""
        return sum(map(len, self.columns))


Item = Union[Rows, Report]

_REPORT_BYTES = 200


def _size(item: Item) -> int:
    return item.size() if isinstance(item, Rows) else _REPORT_BYTES + len(item.message)


class Backlog:
    """A queue of rows and notices, in order."""

    # Most never change: each job has one of these.
    bytes_in_memory = 0
    _file: IO[bytes] | None = None
    _read_at = 0
    _in_file = 0

    def __init__(self) -> None:
        self._memory: deque[Item] = deque()

    def append(self, item: Item, memory_limit: int) -> None:
        """Add an item at the end; in the file when memory holds memory_limit bytes, or others went there.

        OSError where the file does not take it; all others stay.
        """
        if self._in_file or self.bytes_in_memory >= memory_limit:
            self._spill(item)
        else:
            self._memory.append(item)
            self.bytes_in_memory += _size(item)

    def popleft(self) -> Item | None:
        """Take the oldest item; None when there is none."""
        if self._memory:
            item = self._memory.popleft()
            self.bytes_in_memory -= _size(item)
            return item
        return self._unspill() if self._in_file else None

    def only_rows(self) -> Rows | None:
        """The one batch of rows, if there is just one beside the notices, and nothing went to the file."""
        if self._in_file:
            return None
        batches = [item for item in self._memory if isinstance(item, Rows)]
        return batches[0] if len(batches) == 1 else None

    def __bool__(self) -> bool:
        return bool(self._memory or self._in_file)

    def clear(self) -> None:
        """Forget everything, the file included."""
        if not self._memory and self._file is None:
            return
        self._memory.clear()
        self.bytes_in_memory = self._in_file = self._read_at = 0
        if self._file is not None:
            self._file.close()
            self._file = None

    def _spill(self, item: Item) -> None:
        if self._file is None:
            os.makedirs(_FOLDER, mode=0o700, exist_ok=True)
            # Without a buffer, which would keep what could not be written and write it later.
            self._file = tempfile.TemporaryFile(dir=_FOLDER, buffering=0)
        end = self._file.seek(0, os.SEEK_END)
        unwritten = memoryview(pickle.dumps(item, pickle.HIGHEST_PROTOCOL))
        try:
            while unwritten:
                unwritten = unwritten[self._file.write(unwritten) :]
        except OSError:
            self._file.truncate(end)
            raise
        self._in_file += 1

    def _unspill(self) -> Item:
        assert self._file is not None
        self._file.seek(self._read_at)
        item: Item = pickle.load(self._file)
        self._read_at = self._file.tell()
        self._in_file -= 1
        if not self._in_file:
            self.clear()
        return item


NOTHING = Backlog()  # of a worker that has said nothing yet; nothing is ever put into it
