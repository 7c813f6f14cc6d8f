"""A private folder of small files that are whole, unaltered and one's own, or else are not there.

What is read back from it is run as machine code, so nothing is believed that another user, a crash or a full disk may
have touched.  A file is

    magic | sha256(name, data) | data

and is used only if folder and file belong to this user, nobody else may write to either, neither is a link, and the
checksum fits; the name is part of it, so that a file copied from another key does not pass.  Folder and file are
looked at through open descriptors: exchanging them between the look and the use changes nothing.

Writing goes to a new name in the same folder and is renamed when complete: readers, of this process or another, see
the old file, the new one or none.  Nothing here raises because of the disk: what went wrong becomes a sentence.
"""

from __future__ import annotations

import hashlib
import os
import secrets
import stat
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

MAX_FILES = 4096
MAX_BYTES = 64 << 20  # of one file; more is not one of ours
MAX_NOTES = 32
STALE_S = 3600.0  # an unfinished file older than this was left by a process that was killed
PRUNE_EVERY = 256  # writes

# Windows has neither owners as numbers nor opening relative to a folder: there the user's profile is private already.
_POSIX = os.open in os.supports_dir_fd and hasattr(os, "geteuid")
_NOFOLLOW = getattr(os, "O_NOFOLLOW", 0)
_CLOEXEC = getattr(os, "O_CLOEXEC", 0)
_NONBLOCK = getattr(os, "O_NONBLOCK", 0)  # a pipe in the file's place must not hold us up
_BINARY = getattr(os, "O_BINARY", 0)
_PART = ".part"


class Store:
    """Files of one folder, by name. `folder` is None: nothing is kept, and `why` says so."""

    def __init__(self, folder: Path | None, magic: bytes, why: str | None = None) -> None:
        self.folder = folder
        self._magic = magic
        self._notes: deque[str] = deque(maxlen=MAX_NOTES)  # no lock: what it does here, it does at once
        self._writes = 0
        if why:
            self._note(why)

    def notes(self) -> tuple[str, ...]:
        """What was ignored, or could not be kept, and why; one sentence each."""
        return tuple(self._notes)

    def read(self, name: str) -> bytes | None:
        """The data kept under `name`, or None."""
        try:
            with self._opened(make=False) as at:
                return self._check(name, at.read(name))
        except FileNotFoundError:
            return None
        except _Refused as refusal:
            self._note(str(refusal))
        except OSError as error:
            self._note(f"{self._path(name)} could not be read ({_reason(error)}), so it was ignored")
        return None

    def write(self, name: str, data: bytes) -> bool:
        """Keep `data` under `name`; False if that could not be done."""
        try:
            with self._opened(make=True) as at:
                if self._writes % PRUNE_EVERY == 0:
                    at.prune()
                self._writes += 1
                at.write(name, self._magic + self._digest(name, data) + data)
            return True
        except _Refused as refusal:
            self._note(str(refusal))
        except OSError as error:
            self._note(f"nothing could be kept in {self.folder} ({_reason(error)})")
        return False

    def look(self) -> None:
        """Record whether the folder must not be used, if there is one."""
        try:
            with suppress(OSError), self._opened(make=False):
                pass
        except _Refused as refusal:
            self._note(str(refusal))

    def reject(self, name: str, why: str) -> None:
        """Record that the data kept under `name` turned out to be of no use."""
        self._note(f"{self._path(name)} {why}, so it was ignored")

    def _digest(self, name: str, data: bytes) -> bytes:
        return hashlib.sha256(name.encode() + b"\0" + data).digest()

    def _check(self, name: str, content: bytes) -> bytes:
        begin = len(self._magic) + hashlib.sha256().digest_size
        data = content[begin:]
        if content[:begin] != self._magic + self._digest(name, data):
            raise _Refused(f"{self._path(name)} is damaged or is not what its name says, so it was ignored")
        return data

    def _path(self, name: str) -> str:
        return f"{self.folder}{os.sep}{name}"

    def _note(self, sentence: str) -> None:
        if sentence not in self._notes:
            self._notes.append(sentence)

    @contextmanager
    def _opened(self, make: bool) -> Iterator[_Folder]:
        if self.folder is None:
            raise FileNotFoundError
        if make and not os.path.lexists(self.folder):
            _make(self.folder)
        if not _POSIX:
            yield _Folder(self.folder, None)
            return
        flags = os.O_RDONLY | os.O_DIRECTORY | _CLOEXEC
        if stat.S_ISLNK(os.lstat(self.folder).st_mode):
            raise _Refused(f"{self.folder} is a link, so it was ignored")
        descriptor = os.open(self.folder, flags | _NOFOLLOW)  # fails if it became a link since
        try:
            _must_be_ours(os.fstat(descriptor), str(self.folder))
            yield _Folder(self.folder, descriptor)
        finally:
            os.close(descriptor)


def user_store(name: str, magic: bytes, kept: str) -> Store:
    """The folder `name` of plainconv's in the user's cache, as platformdirs finds it; `kept` says what is in it."""
    import platformdirs

    folder = platformdirs.user_cache_path("plainconv", appauthor=False) / name
    if not folder.is_absolute():  # no home, and no entry in the list of users either
        return Store(None, magic, f"this user has no home folder, so {kept} are kept in memory only")
    return Store(folder, magic)


class _Refused(Exception):
    """A file or folder that must not be used; str() is the sentence."""


class _Folder:
    """The folder, opened: names are looked up through its descriptor, or by path where the system has no such thing."""

    def __init__(self, path: Path, descriptor: int | None) -> None:
        self._path, self._fd = path, descriptor

    def _at(self, name: str) -> str:
        return name if self._fd is not None else str(self._path / name)

    def read(self, name: str) -> bytes:
        flags = os.O_RDONLY | _NOFOLLOW | _CLOEXEC | _NONBLOCK | _BINARY
        if stat.S_ISLNK(os.stat(self._at(name), dir_fd=self._fd, follow_symlinks=False).st_mode):
            raise _Refused(f"{self._path / name} is a link, so it was ignored")
        with open(os.open(self._at(name), flags, dir_fd=self._fd), "rb") as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode) or status.st_size > MAX_BYTES:
                raise _Refused(f"{self._path / name} is not one of plainconv's files, so it was ignored")
            if _POSIX:
                _must_be_ours(status, str(self._path / name))
            return file.read(MAX_BYTES)

    def write(self, name: str, content: bytes) -> None:
        part = f"{name}.{os.getpid()}.{secrets.token_hex(4)}{_PART}"
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | _NOFOLLOW | _CLOEXEC | _BINARY
        descriptor = os.open(self._at(part), flags, 0o600, dir_fd=self._fd)
        try:
            with open(descriptor, "wb") as file:
                file.write(content)  # not synced: a file that a crash left short fails its checksum
            os.replace(self._at(part), self._at(name), src_dir_fd=self._fd, dst_dir_fd=self._fd)
        except BaseException:
            with suppress(OSError):
                os.unlink(self._at(part), dir_fd=self._fd)
            raise

    def prune(self) -> None:
        """Remove what killed processes left unfinished, and the oldest files of too many."""
        names = os.listdir(self._path if self._fd is None else self._fd)
        ages: list[tuple[float, str]] = []
        for name in names:
            with suppress(OSError):
                status = os.stat(self._at(name), dir_fd=self._fd, follow_symlinks=False)
                ages.append((status.st_mtime, name))
        ages.sort()
        stale = [name for when, name in ages if name.endswith(_PART) and when < time.time() - STALE_S]
        whole = [name for _, name in ages if not name.endswith(_PART)]
        for name in stale + whole[: max(0, len(whole) - MAX_FILES)]:
            with suppress(OSError):
                os.unlink(self._at(name), dir_fd=self._fd)


def _must_be_ours(status: os.stat_result, path: str) -> None:
    if status.st_uid != os.geteuid():
        raise _Refused(f"{path} belongs to another user, so it was ignored")
    if status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise _Refused(f"{path} may be written by others (chmod go-w would mend it), so it was ignored")


def _make(folder: Path) -> None:
    """Make the folder, readable by its owner alone."""
    above = next(parent for parent in folder.parents if os.path.lexists(parent))
    if _POSIX and os.geteuid() == 0 and above.stat().st_uid != 0:
        # Root under somebody's HOME (sudo -E): a folder of root's would shut its owner out for good.
        raise _Refused(f"{above} belongs to another user, so nothing was kept in {folder}")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with suppress(FileExistsError):  # another process was quicker
        folder.mkdir(mode=0o700)


def _reason(error: OSError) -> str:
    return error.strerror or str(error)
