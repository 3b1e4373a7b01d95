"""Files that are whole or not there, even if the process is killed while it writes."""

import contextlib
import os
import uuid
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A block that writes a file to the path it is given; then that file takes the place of `path`.

    Each block has a path of its own, so other processes may write the same file meanwhile. If the
    block fails, an earlier file at `path` stays.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(f".{uuid.uuid4().hex}.part")
    try:
        yield partial
        with partial.open("r+b") as file:
            os.fsync(file.fileno())  # before the rename, or a power cut could leave an empty file
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
