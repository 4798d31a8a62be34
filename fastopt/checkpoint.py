"""Checkpoints: a safetensors file of arrays and texts that is there whole or not at all.

The texts are in the header's metadata, beside the format and its version and a checksum of
everything. ``_saved`` knows what the arrays and texts mean.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import re
import secrets
import stat
from collections.abc import Mapping
from io import FileIO
from typing import Any

import numpy as np

from fastopt._bfloat16 import bfloat16
from fastopt._memory import Array
from fastopt._version import __version__

try:
    import fcntl
except ImportError:  # not here: a folder is then never known to be a dead process's
    fcntl = None  # type: ignore[assignment]

try:
    import safetensors
    from safetensors.numpy import save_file
except ImportError as error:
    raise ImportError(
        "checkpoints need the package safetensors: pip install 'fastopt[checkpoint]'"
    ) from error

__all__ = ["read", "source", "write"]

FORMAT = "fastopt checkpoint"
VERSION = "1"  # of the format; files of every version up to this one can be read

_DTYPES = {
    "float32": "F32",
    "float64": "F64",
    "bfloat16": "BF16",
    "float16": "F16",
    "int64": "I64",
    "uint16": "U16",
    "uint8": "U8",
}


def write(
    path: str | os.PathLike[str], texts: Mapping[str, str], arrays: Mapping[str, Array]
) -> None:
    """Write a file so that its name stands for the old content or for the new, whole."""
    target = os.path.realpath(_name(path))  # of a link, what it leads to
    _refuse_special(target)
    about = {"format": FORMAT, "format_version": VERSION, "fastopt_version": __version__}
    _replace(target, {**about, **texts}, arrays)


def read(path: str | os.PathLike[str]) -> tuple[dict[str, str], dict[str, Array]]:
    """Return a file's texts and arrays, having verified that the file is whole and undamaged."""
    return _read(_name(path))


def source(path: str | os.PathLike[str]) -> str:
    """Return what messages call a file."""
    return f"checkpoint {_name(path)!r}"


def _name(path: str | os.PathLike[str]) -> str:
    return os.fsdecode(os.fspath(path))


def _refuse_special(name: str) -> None:
    if os.path.exists(name) and not os.path.isfile(name):
        raise ValueError(f"{source(name)}: this is not a regular file")


# ---- files ---------------------------------------------------------------------------------------


def _description(metadata: Mapping[str, str], layout: list[tuple[str, str, Any]]) -> bytes:
    """Return what the checksum begins with; the tensors' bytes follow in the layout's order."""
    said = sorted(item for item in metadata.items() if item[0] != "sha256")
    return json.dumps([said, layout]).encode()


def _bytes(array: Array) -> memoryview:
    return array.reshape(-1).view(np.uint8).data


def _replace(target: str, metadata: dict[str, str], arrays: Mapping[str, Array]) -> None:
    """Write what `write` says."""
    ordered = sorted(arrays.items())
    layout = [(name, _DTYPES[array.dtype.name], array.shape) for name, array in ordered]
    checksum = hashlib.sha256(_description(metadata, layout))
    for _, array in ordered:
        checksum.update(_bytes(array))
    metadata["sha256"] = checksum.hexdigest()
    folder, lock = "", None
    try:
        while lock is None:
            # A folder, since safetensors has a temporary file of its own, beside what it writes.
            folder = f"{target}.{secrets.token_hex(4)}.part"
            os.mkdir(folder)
            lock = _locked(folder)
        if not lock.closed:
            with contextlib.suppress(Exception):  # the save goes on, whatever becomes of this
                _clear_leftovers(target, folder)
        written = os.path.join(folder, _CHECKPOINT)
        try:
            save_file(dict(arrays), written, metadata)
        except safetensors.SafetensorError as error:
            raise _as_os_error(error, target) from None
        try:
            _read(written, keep=False)
        except ValueError as error:
            raise RuntimeError(
                f"{source(target)} was not saved, since what was written cannot be loaded; did "
                f"the parameters change meanwhile? {error}"
            ) from None
        _set_mode(written, folder, target)
        _sync(written)
        os.replace(written, target)
        _sync(os.path.dirname(target))
    finally:
        _remove(folder, lock)


def _remove(folder: str, lock: FileIO | None) -> None:
    """Remove a folder of files, if it is there; shutil's way is not safe against interrupts."""
    try:
        with contextlib.suppress(OSError):
            for name in sorted(os.listdir(folder)):  # the lock is the last
                os.unlink(os.path.join(folder, name))
    finally:
        if lock is not None:
            lock.close()
    with contextlib.suppress(OSError):
        os.rmdir(folder)


def _as_os_error(error: Exception, target: str) -> OSError:
    number = re.search(r"os error (\d+)", str(error))
    if number is None:
        return OSError(f"{source(target)}: {error}")
    return OSError(int(number[1]), os.strerror(int(number[1])), target)


def _set_mode(written: str, folder: str, target: str) -> None:
    """Give a file the permissions of what it replaces, or else those of any new file."""
    try:
        mode = stat.S_IMODE(os.stat(target).st_mode)
    except FileNotFoundError:
        mode = os.stat(folder).st_mode & 0o666
    os.chmod(written, mode)


def _sync(name: str) -> None:
    """Wait until a file or folder is on the disk."""
    descriptor = os.open(name, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _read(name: str, *, keep: bool = True) -> tuple[dict[str, str], dict[str, Array]]:
    """Return a file's metadata and (unless told not to keep them) tensors, verified.

    Each byte is read once, into memory of our own, so that what is verified is what is used,
    whatever happens to the file.
    """
    _refuse_special(name)
    open(name, "rb").close()  # for Python's own errors
    try:
        with safetensors.safe_open(name, framework="np", backend="pread") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != FORMAT:
                raise ValueError("it was not written by fastopt")
            if metadata.get("format_version") != VERSION:
                raise ValueError(
                    f"its format has version {metadata.get('format_version')!r}, and fastopt "
                    f"{__version__} reads {VERSION!r}; a newer fastopt may read it"
                )
            parts = {tensor: file.get_slice(tensor) for tensor in sorted(file.keys())}
            layout = [(n, part.get_dtype(), part.get_shape()) for n, part in parts.items()]
            checksum, arrays = hashlib.sha256(_description(metadata, layout)), {}
            for tensor, dtype, _ in layout:
                if dtype not in _DTYPES.values():
                    raise ValueError(f"tensor {tensor!r} has an unexpected dtype, {dtype}")
                if dtype == _DTYPES["bfloat16"]:  # which safetensors makes arrays of once it exists
                    bfloat16(f"{source(name)}: tensor {tensor!r}, of bfloat16,")
                array = file.get_tensor(tensor)
                checksum.update(_bytes(array))
                if keep:
                    arrays[tensor] = array
    except safetensors.SafetensorError as error:
        raise ValueError(f"{source(name)}: no whole safetensors file: {error}") from None
    except (ValueError, OverflowError) as error:
        raise ValueError(f"{source(name)}: {error}") from None
    if metadata.get("sha256") != checksum.hexdigest():
        raise ValueError(f"{source(name)}: it is damaged: its checksum is not that of its content")
    return metadata, arrays


# ---- what killed processes leave -----------------------------------------------------------------

# While a folder is written, a file in it is locked, which the system unlocks when the process dies.
# Its name says which boot of which machine that was, since the locks of some file systems (NFS or
# Lustre with some options, FUSE) do not reach other machines. Only who holds the lock removes the
# file: who gets the lock, and still finds the file under its name, has the folder for itself.

_CHECKPOINT = "checkpoint"
_OURS = re.compile(rf"lock-[0-9a-f-]*|{_CHECKPOINT}|\.tmp[0-9A-Za-z]+")  # safetensors' own, too
_LONG_AGO = 86_400.0  # seconds since something happened in a folder of another machine


@functools.cache
def _lock_name() -> str:
    try:
        with open("/proc/sys/kernel/random/boot_id") as file:
            return f"lock-{file.read().strip()}"
    except OSError:
        return "lock-"


def _locked(folder: str) -> FileIO | None:
    """Lock a new folder; return the file that holds the lock, closed where there are no locks.

    None: somebody has taken the folder for a dead process's, before it was locked. The file is an
    object, not a descriptor, so that it is closed wherever an interrupt ends the save: a lock that
    stays would keep later saves from clearing the folder.
    """
    if fcntl is None:
        lock = FileIO(os.devnull)
        lock.close()
        return lock
    name = os.path.join(folder, _lock_name())
    try:
        lock = FileIO(name, "x")
    except FileNotFoundError:
        return None
    ours = False
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        ours = os.path.samestat(os.fstat(lock.fileno()), os.stat(name))
    except (BlockingIOError, FileNotFoundError):
        pass
    except OSError:  # this file system has no locks: nobody is to ask for this one
        os.rename(name, os.path.join(folder, "unlocked"))
        lock.close()
        ours = True
    finally:
        if not ours:
            lock.close()
    return lock if ours else None


def _clear_leftovers(target: str, own: str) -> None:
    """Remove the folders that saves of this file have left whose processes are dead."""
    now = os.stat(own).st_mtime  # the new folder's, by the clock of the file system
    parent, name = os.path.split(target)
    leftover = re.compile(re.escape(name) + r"\.[0-9a-f]{8}\.part")
    for found in os.listdir(parent):
        if leftover.fullmatch(found) and found != os.path.basename(own):
            with contextlib.suppress(OSError):
                _clear(os.path.join(parent, found), now)


def _clear(folder: str, now: float) -> None:
    """Remove a folder if it is a dead process's, and has nothing else in it."""
    inside = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        names = os.listdir(inside)
        locks = [name for name in names if name.startswith("lock-")]
        if names and (len(locks) != 1 or not _cleared(inside, locks[0], now)):
            return
    finally:
        os.close(inside)
    os.rmdir(folder)  # fails if it is not empty


def _cleared(inside: int, lock_name: str, now: float) -> bool:
    """Remove the files in a folder, if they are a dead process's; tell whether they were."""
    lock = os.open(lock_name, os.O_RDWR | os.O_NOFOLLOW, dir_fd=inside)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        files = {
            name: os.stat(name, dir_fd=inside, follow_symlinks=False)
            for name in sorted(os.listdir(inside))  # the lock is the last
        }
        if lock_name not in files or not os.path.samestat(os.fstat(lock), files[lock_name]):
            return False
        if not all(_OURS.fullmatch(n) and stat.S_ISREG(f.st_mode) for n, f in files.items()):
            return False
        here = lock_name == _lock_name() != "lock-"
        if not here and now - max(file.st_mtime for file in files.values()) < _LONG_AGO:
            return False
        for name in files:
            os.unlink(name, dir_fd=inside)
        return True
    finally:
        os.close(lock)
