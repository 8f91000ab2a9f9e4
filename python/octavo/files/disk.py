# SPDX-License-Identifier: Apache-2.0
"""Files of others are opened with suspicion; files of ours appear whole or not at all.

Reading: only regular files are opened, for a named pipe would wait for ever and a device need not end. Links are
followed, because caches of the Hugging Face hub are made of them, and what they lead to must be a regular file.

Writing: `save_into` collects the new files in a hidden folder. Its rename to PENDING is the moment at which they become
the ones that count: readers look there first (`current`), so that a process may be killed while the files move to their
places, and the next writer moves the rest.
"""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import stat
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

try:
    import fcntl
except (
    ImportError
):  # Windows: two writers of one folder are not kept apart, and nobody clears up after a killed one
    fcntl = None  # type: ignore[assignment]

JSON_BYTES = 64 << 20  # an index of 100,000 tensors has 10 MB
JSON_DEPTH = 64
PENDING, GONE = ".octavo.new", ".gone"
POINTERS = {
    b"version https://git-lfs.github.com/spec/": "a Git LFS pointer: run `git lfs pull` to get the file itself",
    b"/annex/objects/": "a git-annex pointer: run `git annex get` to get the file itself",
}
_KINDS = {
    stat.S_IFIFO: "a named pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFDIR: "a folder",
}


# --- reading --------------------------------------------------------------------------------------------------------


def require_regular(path: Path) -> None:
    """Raises: FileNotFoundError if `path` is missing, PermissionError if it cannot be read, ValueError if it is neither
    a regular file nor a link to one, or if a version control system has put a pointer in the place of the file."""
    try:
        kind = stat.S_IFMT(os.stat(path).st_mode)
        if kind != stat.S_IFREG:
            raise ValueError(f"{path} is {_KINDS.get(kind, 'a special file')}; only regular files are read")
        with open(path, "rb") as file:
            start = file.read(max(map(len, POINTERS)))
    except (FileNotFoundError, NotADirectoryError):
        target = f": it is a link to {os.readlink(path)}" if path.is_symlink() else ""
        raise FileNotFoundError(f"{path} does not exist{target}; the checkpoint is incomplete") from None
    except OSError as error:
        raise type(error)(f"{path} cannot be read ({error.strerror})") from error
    for prefix, what in POINTERS.items():
        if start.startswith(prefix):
            raise ValueError(f"{path} is {what}")


def require_regular_files(folder: Path) -> None:
    """Looks at every file of `folder` that another package may open. Raises: as `require_regular`, for the first one
    that is neither a file nor a folder; hidden ones are left out, because tools keep sockets there."""
    for path in sorted(folder.iterdir()):
        if not path.name.startswith(".") and path.exists() and not path.is_file() and not path.is_dir():
            require_regular(path)


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in `path`.

    Raises: as `require_regular`, and ValueError if the file is no JSON object, holds more than 64 MB or is nested more
    than 64 levels deep.
    """
    require_regular(path)
    if path.stat().st_size > JSON_BYTES:
        raise ValueError(f"{path} has {path.stat().st_size:,} bytes, JSON of up to {JSON_BYTES:,} is read")
    return parse_json(path.read_bytes(), str(path))


def parse_json(text: str | bytes, name: str) -> dict[str, Any]:
    """The JSON object in `text`, which errors call `name`. Raises: ValueError as `read_json`."""
    try:
        content = json.loads(text.decode("utf-8") if isinstance(text, bytes) else text)
    except (ValueError, RecursionError) as error:  # JSON and UTF-8 errors
        raise ValueError(f"{name} is not JSON ({error})") from error
    if not isinstance(content, dict):
        raise ValueError(f"{name} is not a JSON object")
    level: list[Any] = [content]
    for _ in range(JSON_DEPTH):
        level = [inner for value in level for inner in _values(value)]
        if not level:
            return content
    raise ValueError(f"{name} is nested more than {JSON_DEPTH} levels deep")


def _values(value: Any) -> list[Any]:
    if isinstance(value, dict):
        return list(value.values())
    return value if isinstance(value, list) else []


def current(folder: Path, name: str) -> Path:
    """Where the file `name` of `folder` is: in its place, unless a writer was killed before it could move it there."""
    pending = folder / PENDING
    is_pending = (pending / name).exists() or (pending / (name + GONE)).exists()
    return pending / name if is_pending else folder / name


# --- writing --------------------------------------------------------------------------------------------------------


def folder_argument(function: str, folder: Any) -> Path:
    """`folder` as a path. Raises: TypeError if it is none, ValueError if it is empty: that is no name of a folder."""
    text = os.fspath(folder) if isinstance(folder, str | os.PathLike) else None
    if not isinstance(text, str):
        raise TypeError(
            f"{function}: folder is {type(folder).__name__}, a path is needed: a str or a pathlib.Path"
        )
    if not text.strip() or "\0" in text:
        raise ValueError(f"{function}: folder is {text!r}; give a name, or '.' for the current folder")
    return Path(folder)


@contextmanager
def save_into(folder: Path, names: Sequence[str]) -> Iterator[Path]:
    """A folder to write into; when all goes well its files take their places in `folder`, all of them at once.

    A file of `names` that was not written is removed from `folder`, which is made if it is missing; other files stay.
    The last of `names` is always written: it is the one without which readers find nothing. After an error or a kill
    `folder` holds the old files or the new ones, never some of each; what killed writers left is removed by the next
    one.
    """
    made = _made(folder)
    try:
        with _locked(folder):  # another writer waits
            _settle(folder, names[-1])
            with scratch(folder, ".octavo-") as temporary:
                yield temporary
                for name in names:
                    if not (temporary / name).exists():
                        (temporary / (name + GONE)).touch()
                for path in [*temporary.iterdir(), temporary]:
                    _to_disk(path)
                os.rename(temporary, folder / PENDING)  # from here on the new files are the ones that count
                _to_disk(folder)
            _settle(folder, names[-1])
    except BaseException:
        for path in made:
            with suppress(OSError):
                path.rmdir()  # only if it is empty
        raise


@contextmanager
def scratch(folder: Path, prefix: str, suffix: str = "") -> Iterator[Path]:
    """A new folder in `folder`, with eight letters and digits between `prefix` and `suffix`, removed in the end.

    Folders of such names whose writers were killed are removed first; the lock of a living writer keeps its folder.
    """
    pattern = re.compile(f"{re.escape(prefix)}[a-z0-9_]{{8}}{re.escape(suffix)}")
    for other in folder.iterdir():
        if pattern.fullmatch(other.name):
            with _locked(other, wait=False) as is_left:
                if is_left:
                    shutil.rmtree(other, ignore_errors=True)
    while True:
        path = folder / f"{prefix}{uuid.uuid4().hex[:8]}{suffix}"
        path.mkdir()
        with _locked(path):
            if path.exists():  # else it was taken for one that was left, before it was locked
                try:
                    yield path
                finally:
                    shutil.rmtree(path, ignore_errors=True)
                return


def _made(folder: Path) -> list[Path]:
    """Makes `folder`; returns the folders that were added for it, the innermost one first."""
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise NotADirectoryError(
            f"{folder} is not a folder, and none can be made there; give another name"
        ) from error
    return missing


def _settle(folder: Path, key: str) -> None:
    """Moves what is pending to its place. JSON files say what tensors mean: they are taken away first and come last, so
    that a reader who does not know of PENDING finds nothing rather than some files of each. `key` is the very last."""
    pending = folder / PENDING
    if not pending.exists():
        return
    if (pending / key).exists():  # else it has moved, and everything before it
        names = sorted(
            (path.name for path in pending.iterdir()),
            key=lambda name: (name == key, name.endswith(".json"), name),
        )
        for name in names:
            if name.endswith((".json", GONE)):
                (folder / name.removesuffix(GONE)).unlink(missing_ok=True)
        for name in names:
            if (pending / name).is_dir():
                shutil.rmtree(folder / name, ignore_errors=True)
            if not name.endswith(GONE):
                os.replace(pending / name, folder / name)
        _to_disk(folder)
    shutil.rmtree(pending)


@contextmanager
def _locked(folder: Path, wait: bool = True) -> Iterator[bool]:
    """Whether the lock on `folder` is ours while the block runs. The system takes it back from a process that dies.

    Without locks, as on some network file systems, writers are not kept apart, and nothing that is left is removed.
    """
    descriptor = _lock(folder, wait)
    try:
        yield descriptor is not None
    finally:
        if descriptor is not None:
            fcntl.flock(
                descriptor, fcntl.LOCK_UN
            )  # a process that was forked meanwhile has the descriptor, too
            os.close(descriptor)


def _lock(folder: Path, wait: bool) -> int | None:
    if fcntl is None:
        return None
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BaseException as error:
        os.close(descriptor)
        if isinstance(error, OSError):
            return None
        raise
    return descriptor


def _to_disk(path: Path) -> None:
    """Waits until the file, or the list of the folder's contents, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if not path.is_dir() or error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EIO):
            raise  # else a file system that cannot do this with folders
    finally:
        os.close(descriptor)
