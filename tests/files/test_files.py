# SPDX-License-Identifier: Apache-2.0
"""Files: nothing but regular ones is opened, and a folder holds the old files or the new ones wherever a save ends."""

import json
import os
import socket
import stat
import tempfile
from pathlib import Path

import pytest

from octavo.files import disk as files

# --- reading --------------------------------------------------------------------------------------------------------


def make_pipe(path: Path) -> None:
    os.mkfifo(path)


def make_socket(path: Path) -> None:
    before = os.getcwd()
    os.chdir(path.parent)  # addresses are short
    try:
        socket.socket(socket.AF_UNIX).bind(path.name)
    finally:
        os.chdir(before)


def make_link(target: str):
    return lambda path: path.symlink_to(target)


def make_text(text: str):
    return lambda path: path.write_text(text)


LFS_POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"
NOT_TO_BE_READ = {
    "a named pipe": (make_pipe, "is a named pipe; only regular files are read"),
    "a socket": (make_socket, "is a socket; only regular files are read"),
    "a device": (make_link("/dev/zero"), "is a device; only regular files are read"),
    "a folder": (Path.mkdir, "is a folder; only regular files are read"),
    "a Git LFS pointer": (make_text(LFS_POINTER), "is a Git LFS pointer: run `git lfs pull`"),
    "a git-annex pointer": (make_text("/annex/objects/SHA256E-s5--0.json\n"), "is a git-annex pointer"),
}


@pytest.mark.parametrize("make, message", NOT_TO_BE_READ.values(), ids=NOT_TO_BE_READ)
def test_what_is_no_regular_file_is_named_and_not_opened(tmp_path, make, message):
    make(tmp_path / "x.json")
    with pytest.raises(ValueError, match=f"x.json {message}"):
        files.require_regular(tmp_path / "x.json")
    with pytest.raises(ValueError, match=f"x.json {message}"):
        files.read_json(tmp_path / "x.json")


def test_links_are_followed_as_caches_of_the_hub_need_it(tmp_path):
    (tmp_path / "blobs").mkdir()
    (tmp_path / "blobs" / "1f2e").write_text('{"a": 1}')
    (tmp_path / "snapshots" / "main").mkdir(parents=True)
    (tmp_path / "snapshots" / "main" / "config.json").symlink_to("../../blobs/1f2e")
    assert files.read_json(tmp_path / "snapshots" / "main" / "config.json") == {"a": 1}
    (tmp_path / "blobs" / "1f2e").unlink()
    with pytest.raises(FileNotFoundError, match="it is a link to ../../blobs/1f2e"):
        files.read_json(tmp_path / "snapshots" / "main" / "config.json")


@pytest.mark.skipif(
    os.name != "posix" or os.geteuid() != 0, reason="needs root, to be somebody else for a moment"
)
def test_a_file_that_may_not_be_read_is_not_called_missing():
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        path = Path(folder) / "x.json"
        path.write_text("{}")
        path.chmod(0)
        os.seteuid(65534)
        try:
            with pytest.raises(PermissionError, match="x.json cannot be read .Permission denied."):
                files.read_json(path)
        finally:
            os.seteuid(0)


def test_only_special_files_that_somebody_would_open_count(tmp_path):
    (tmp_path / "model.safetensors").write_text("")
    (tmp_path / "sub").mkdir()
    make_pipe(tmp_path / ".hidden")
    files.require_regular_files(tmp_path)
    make_pipe(tmp_path / "tokenizer.json")
    with pytest.raises(ValueError, match="tokenizer.json is a named pipe"):
        files.require_regular_files(tmp_path)


@pytest.mark.parametrize(
    "text, message",
    [
        ("", "is not JSON"),
        ("{", "is not JSON"),
        ("\0\0", "is not JSON"),
        ("[" * 100_000, "is not JSON"),
        ("[1]", "is not a JSON object"),
        ('{"a":' * 200 + "1" + "}" * 200, "is nested more than 64 levels"),
        ('{"a":' + "[" * 64 + "]" * 64 + "}", "is nested more than 64 levels"),
    ],
)
def test_what_is_no_json_object_of_ours_is_refused(tmp_path, text, message):
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(ValueError, match=f"x.json {message}"):
        files.read_json(tmp_path / "x.json")


def test_json_has_a_largest_size(tmp_path, monkeypatch):
    (tmp_path / "x.json").write_text(json.dumps({"a": "b" * 100}))
    assert files.read_json(tmp_path / "x.json") == {"a": "b" * 100}
    monkeypatch.setattr(files, "JSON_BYTES", 50)
    with pytest.raises(ValueError, match="x.json has 109 bytes, JSON of up to 50 is read"):
        files.read_json(tmp_path / "x.json")


@pytest.mark.parametrize(
    "given, error, message",
    [
        ("", ValueError, "f: folder is ''; give a name, or '.'"),
        (" ", ValueError, "f: folder is ' '"),
        ("a\0b", ValueError, "f: folder is 'a"),
        (None, TypeError, "f: folder is NoneType, a path is needed"),
        (b"x", TypeError, "f: folder is bytes, a path is needed"),
        (3, TypeError, "f: folder is int"),
    ],
)
def test_what_names_no_folder_is_refused(given, error, message):
    with pytest.raises(error, match=message):
        files.folder_argument("f", given)


# --- writing --------------------------------------------------------------------------------------------------------

NAMES = ("weights", "buffers", "config")
OLD = {"weights": "old", "buffers": "old", "config": "old"}
NEW = {"weights": "new", "config": "new"}  # one file fewer


def save(folder: Path, content: dict[str, str]) -> None:
    with files.save_into(folder, NAMES) as temporary:
        for name, text in content.items():
            (temporary / name).write_text(text)


def seen(folder: Path) -> dict[str, str]:
    """What a reader finds."""
    found = {name: files.current(folder, name) for name in NAMES}
    return {name: path.read_text() for name, path in found.items() if path.exists()}


def listed(folder: Path) -> dict[str, str]:
    return {path.name: path.read_text() if path.is_file() else "a folder" for path in folder.iterdir()}


class Interruption:
    """Ends the process, or raises, at the n-th call that changes a file system or waits for the disk."""

    CALLS = ("mkdir", "rename", "replace", "unlink", "rmdir", "fsync", "open")

    def __init__(self, monkeypatch, at: int, end):
        self.left = at
        for name in self.CALLS:
            original = getattr(os, name)
            monkeypatch.setattr(os, name, self._counted(original, end))

    def _counted(self, original, end):
        def call(*args, **options):
            self.left -= 1
            if self.left == 0:
                end()
            return original(*args, **options)

        return call


def killed_at(folder: Path, content: dict[str, str], step: int) -> bool:
    """Whether a process that saves `content` reaches `step`, where it is killed."""
    child = os.fork()
    if child == 0:
        with pytest.MonkeyPatch.context() as monkeypatch:
            Interruption(monkeypatch, step, lambda: os._exit(9))
            save(folder, content)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9


@pytest.fixture
def quick_disk(monkeypatch):
    """Nobody waits for the disk; the calls still count as steps."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


@pytest.mark.usefixtures("quick_disk")
def test_wherever_a_save_is_killed_one_of_the_two_is_whole_and_the_next_save_clears_up(tmp_path):
    outcomes = []
    for step in range(1, 100):
        folder = tmp_path / str(step)
        save(folder, OLD)
        (folder / "tokenizer").write_text("theirs")
        if not killed_at(folder, NEW, step):
            break
        assert seen(folder) in (OLD, NEW)
        outcomes.append(seen(folder))
        again = killed_at(folder, OLD, step)  # and killed once more
        assert not again or seen(folder) in (outcomes[-1], OLD)
        save(folder, NEW)
        assert listed(folder) == {**NEW, "tokenizer": "theirs"}
    assert (
        OLD in outcomes and NEW in outcomes
    )  # killed before and after the moment at which the new ones count
    assert seen(folder) == NEW


def raise_full():
    raise OSError(28, "No space left on device")


def raise_interrupt():
    raise KeyboardInterrupt


@pytest.mark.usefixtures("quick_disk")
@pytest.mark.parametrize("end", [raise_full, raise_interrupt])
def test_wherever_a_save_fails_one_of_the_two_is_whole(tmp_path, end):
    outcomes = []
    for step in range(1, 100):
        folder = tmp_path / str(step)
        save(folder, OLD)
        with pytest.MonkeyPatch.context() as monkeypatch:
            interruption = Interruption(monkeypatch, step, end)
            try:
                save(folder, NEW)
            except (OSError, KeyboardInterrupt):
                outcomes.append(seen(folder))
        if interruption.left > 0:
            break
        assert seen(folder) in (OLD, NEW)
        save(folder, OLD)
        assert listed(folder) == OLD
    assert OLD in outcomes


def test_a_failed_save_leaves_no_folder_that_it_made(tmp_path):
    (tmp_path / "there").mkdir()
    with (
        pytest.raises(OSError, match="No space"),
        files.save_into(tmp_path / "there" / "a" / "b", NAMES) as temporary,
    ):
        (temporary / "weights").write_text("new")
        raise_full()
    assert listed(tmp_path) == {"there": "a folder"} and listed(tmp_path / "there") == {}


def test_a_file_in_the_way_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(NotADirectoryError, match="is not a folder"):
            save(folder, NEW)
    assert listed(tmp_path) == {"file": ""}


def test_a_living_writer_keeps_its_folder_and_a_dead_one_s_is_removed(tmp_path):
    (tmp_path / ".x.0a1b2c3d.partial").mkdir()
    (tmp_path / ".x.0a1b2c3d.partial" / "much").write_text("data")
    (tmp_path / ".x.somebody else's").mkdir()
    with files.scratch(tmp_path, ".x.", ".partial") as first:
        assert listed(tmp_path).keys() == {first.name, ".x.somebody else's"}
        with files.scratch(tmp_path, ".x.", ".partial") as second:
            assert listed(tmp_path).keys() == {first.name, second.name, ".x.somebody else's"}
    assert listed(tmp_path).keys() == {".x.somebody else's"}


def test_a_second_writer_waits_for_the_first(tmp_path):
    save(tmp_path, OLD)
    with files.save_into(tmp_path, NAMES) as temporary:
        child = os.fork()
        if child == 0:
            save(tmp_path, {"config": "second"})
            os._exit(0)
        (temporary / "config").write_text("first")
        assert os.waitpid(child, os.WNOHANG) == (0, 0)
        assert seen(tmp_path) == OLD
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert listed(tmp_path) == {"config": "second"}


def test_new_folders_are_readable_as_the_umask_says(tmp_path):
    before = os.umask(0o022)
    try:
        with files.save_into(tmp_path / "new", NAMES) as temporary:
            assert stat.S_IMODE(temporary.stat().st_mode) == 0o755
    finally:
        os.umask(before)
