"""Small acts on files and folders that have to be whole or not at all. Unix only."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import os
import secrets
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from memos.errors import StoreError, StoreLockedError

TEMP = ".tmp-"  # temporary files and folders: whatever a killed writer leaves begins so
DELETED = ".deleted-"  # a tenant's folder on its way out

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_READ_ONLY = {errno.EROFS, errno.EACCES, errno.EPERM}


@contextlib.contextmanager
def explained(what: str, path: Path) -> Iterator[None]:
    """Turn an OSError of the block into a StoreError that says what failed, where and why."""
    try:
        yield
    except StoreError:
        raise
    except OSError as error:
        if error.errno in _FULL:
            why = "no space left; nothing that was stored before is lost"
        elif error.errno in _READ_ONLY:
            why = "the folder is read-only for this process"
        else:
            why = "the operating system refused"
        code = errno.errorcode.get(error.errno or 0, "unknown error")
        raise StoreError(f"{path}: cannot {what}: {why} ({code}: {error.strerror})") from error


def sync_data(fd: int) -> None:
    """Make what was written survive a power cut."""
    getattr(os, "fdatasync", os.fsync)(fd)  # macOS has no fdatasync


def sync_folder(path: Path) -> None:
    """Make renames and removals in this folder survive a power cut."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def temp_path(folder: Path) -> Path:
    """A name for a temporary file in ``folder`` that no one else uses."""
    return folder / f"{TEMP}{os.getpid()}-{secrets.token_hex(6)}"


def write_all(fd: int, data: bytes | memoryview) -> None:
    """Write every byte, however many calls it takes."""
    view = memoryview(data)
    while len(view):
        view = view[os.write(fd, view) :]


def write_file(path: Path, data: bytes, *, durable: bool, mode: int = 0o600) -> None:
    """Put a whole file in place: readers see the old bytes or the new ones, never a mixture."""
    temp = temp_path(path.parent)
    fd = os.open(temp, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
    try:
        try:
            write_all(fd, data)
            if durable:
                os.fsync(fd)
        finally:
            os.close(fd)
        os.rename(temp, path)
    except BaseException:
        temp.unlink(missing_ok=True)
        raise
    if durable:
        sync_folder(path.parent)


def clear_leftovers(folder: Path) -> None:
    """Remove what a killed writer left behind; only the writer may."""
    try:
        names = os.listdir(folder)
    except FileNotFoundError:
        return
    for name in names:
        if name.startswith((TEMP, DELETED)):
            path = folder / name
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)


class FolderLock:
    """The one writer's lock on a folder: flock on the file LOCK, with the holder's pid in it.

    The kernel releases it when the holder dies. It belongs to the process that took it: after a
    fork the child calls ``forget``, which closes the file without unlocking it for the parent.
    """

    def __init__(self, path: Path, wait_s: float, sleep: Callable[[float], None] = time.sleep):
        self._fd = -1
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        deadline = time.monotonic() + wait_s
        while True:
            try:
                fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() >= deadline:
                    holder = os.pread(self._fd, 32, 0).decode("ascii", "replace").strip()
                    self.forget()
                    raise StoreLockedError(
                        f"{path.parent}: no other writer wanted, but process "
                        f"{holder or 'unknown'} holds the folder; wait with wait_s=..., or open "
                        "it with mode='r'"
                    ) from None
                sleep(0.01)
        with contextlib.suppress(OSError):  # a full disk: the lock holds without a name in it
            os.ftruncate(self._fd, 0)
            os.pwrite(self._fd, f"{os.getpid()}\n".encode(), 0)

    def __del__(self) -> None:
        self.forget()

    def release(self) -> None:
        """Give the lock back."""
        if self._fd >= 0:
            with contextlib.suppress(OSError):
                os.ftruncate(self._fd, 0)
            self.forget()

    def forget(self) -> None:
        """Close the file; the lock stays with the process that shares it, if there is one."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


_KEEP_SIZE, _PUNCH_HOLE = 1, 2
_fallocate = None
if sys.platform == "linux":
    with contextlib.suppress(OSError, AttributeError):
        _fallocate = ctypes.CDLL(None, use_errno=True).fallocate
        _fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]


def punch_hole(fd: int, offset: int, num_bytes: int) -> bool:
    """Give a range's pages back to the filesystem; it reads as zeros. False: it cannot do that."""
    if _fallocate is None:
        return False
    while True:
        if _fallocate(fd, _KEEP_SIZE | _PUNCH_HOLE, offset, num_bytes) == 0:
            return True
        code = ctypes.get_errno()
        if code in (errno.EOPNOTSUPP, errno.ENOSYS):
            return False
        if code != errno.EINTR:
            raise OSError(code, os.strerror(code))


def write_zeros(fd: int, offset: int, num_bytes: int) -> None:
    """Overwrite a range."""
    zeros = memoryview(bytes(min(num_bytes, 1 << 20)))
    while num_bytes:
        written = os.pwrite(fd, zeros[: min(num_bytes, len(zeros))], offset)
        offset += written
        num_bytes -= written


def can_punch(folder: Path) -> bool:
    """Does the filesystem of this folder give back the pages of a hole?"""
    temp = temp_path(folder)
    fd = os.open(temp, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        write_zeros(fd, 0, 8192)
        return punch_hole(fd, 0, 4096)
    except OSError as error:
        if error.errno not in _FULL:
            raise
        return True  # a full disk does not tell; the first eviction will
    finally:
        os.close(fd)
        temp.unlink(missing_ok=True)
