"""Files written whole or not at all, and the one kind of error that is a person's to mend.

A file is written under another name in the same folder and renamed when it is complete: whoever looks sees the old file
or the new one, never half of one, even when the disk is full or the program is stopped.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO


class InputError(ValueError):
    """Something given by a person cannot be used; str() is one sentence that says what and why."""


@contextmanager
def write_whole(path: str | Path) -> Iterator[BinaryIO]:
    """Open a file for writing that takes the name `path` only if the block ends without an error.

    Args:
        path: where the file shall be. An older file there is replaced; a link is followed. Its folder must exist.

    Yields:
        a binary file, open for reading and writing.

    Raises:
        InputError: `path` is a folder or a device.
        OSError: the folder is missing, the disk is full and so on; then nothing is left behind.
    """
    target = Path(path).resolve()
    if target.exists() and not target.is_file():
        raise InputError(f"{path}: not a regular file, so it cannot be replaced")
    part = target.with_name(f".{target.name}.{os.getpid()}.part")
    try:
        with open(part, "w+b") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())  # a full disk is heard of before the rename
        os.replace(part, target)
    except BaseException as error:
        if isinstance(error, OSError) and error.errno and error.filename in (None, str(part)):
            error.filename = str(path)  # the name that the person knows
        with suppress(FileNotFoundError):
            part.unlink()
        raise
