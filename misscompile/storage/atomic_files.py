"""Writing the files of a folder so that a crash at any moment leaves either all the old ones or all the new ones."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import shutil
import sys
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path

_AT_FDCWD = -100
_RENAME_EXCHANGE = 2


def replace_files(folder: Path, contents: Mapping[str, bytes]) -> None:
    """Write `contents` (file name to bytes) into `folder`, creating it where needed; other files in it are kept.

    A new folder appears whole by one rename, and so does a single changed file. When several files change, the folder is
    built anew beside the old one (its other files hard-linked) and the two are exchanged by one system call (`renameat2`,
    Linux). Elsewhere the files are renamed one by one, and put back if one fails. After an `OSError` the old files are
    whole.
    """
    folder = Path(os.path.realpath(folder))
    folder.parent.mkdir(parents=True, exist_ok=True)
    changed = {name: data for name, data in contents.items() if not _holds(folder / name, data)}
    if not changed:
        return
    staged = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        if not folder.exists():
            _write_all(staged, changed)
            mask = os.umask(0)  # it cannot be read without setting it
            os.umask(mask)
            staged.chmod(0o777 & ~mask)
            try:
                os.rename(staged, folder)
            except OSError as error:
                if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                    raise
                replace_files(folder, contents)  # another process made it meanwhile
        elif len(changed) == 1 or _is_working_directory(folder) or not _exchange_with(folder, staged, changed):
            shutil.rmtree(staged)
            staged.mkdir()
            _write_all(staged, changed)
            _replace_each(folder, staged, changed)
        _sync(folder.parent)
    finally:
        shutil.rmtree(staged, ignore_errors=True)


def _holds(path: Path, data: bytes) -> bool:
    return path.is_file() and path.stat().st_size == len(data) and path.read_bytes() == data


def _write_all(folder: Path, contents: Mapping[str, bytes]) -> None:
    for name, data in contents.items():
        path = folder / name
        path.unlink(missing_ok=True)  # it may be a hard link to the old file, which must stay whole
        with path.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
    _sync(folder)


def _exchange_with(folder: Path, staged: Path, contents: Mapping[str, bytes]) -> bool:
    """Swap `folder` with a copy of itself that holds `contents`; False where the system cannot, with nothing changed."""
    if not sys.platform.startswith("linux"):
        return False
    try:
        shutil.copytree(folder, staged, copy_function=os.link, symlinks=True, dirs_exist_ok=True)
    except (OSError, shutil.Error):  # no hard links here
        return False
    _write_all(staged, contents)
    libc = ctypes.CDLL(None, use_errno=True)
    if not hasattr(libc, "renameat2"):
        return False
    if libc.renameat2(_AT_FDCWD, os.fsencode(staged), _AT_FDCWD, os.fsencode(folder), _RENAME_EXCHANGE) == 0:
        return True
    code = ctypes.get_errno()
    if code in (errno.EINVAL, errno.ENOSYS, errno.EBUSY, errno.EXDEV, errno.EPERM):  # file system or mount point says no
        return False
    raise OSError(code, os.strerror(code), str(folder))


def _replace_each(folder: Path, staged: Path, names: Iterable[str]) -> None:
    """Rename the staged files into `folder` one by one; put the old ones back if that fails."""
    replaced: list[str] = []
    try:
        for name in names:
            if (folder / name).exists():
                shutil.copy2(folder / name, staged / f"{name}.old")
            replaced.append(name)
            os.replace(staged / name, folder / name)
    except BaseException:
        for name in reversed(replaced):
            kept, target = staged / f"{name}.old", folder / name
            with contextlib.suppress(OSError):
                os.replace(kept, target) if kept.exists() else target.unlink(missing_ok=True)
        raise


def _is_working_directory(folder: Path) -> bool:
    """Whether this process stands in `folder`, which an exchange would pull from under its feet."""
    try:
        return Path.cwd().is_relative_to(folder)
    except FileNotFoundError:
        return False


def _sync(folder: Path) -> None:
    with contextlib.suppress(OSError):  # not every system can sync a folder
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
