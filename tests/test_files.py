"""`replace_files`: at every moment the folder holds all the old files or all the new ones."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import json
import os
import shutil
import signal
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from support import Trap

from misscompile.storage import atomic_files as files  # internal: adapters are saved by its replace_files

OLD = {"config.json": b"old config", "weights.bin": b"old weights"}
NEW = {"config.json": b"new config!", "weights.bin": b"new weights!" * 1000}
OTHERS = {"README.md": b"read me", "sub/inner/data": b"\0\1", "sub/config.json": b"not this one"}


def write(folder: Path, contents: Mapping[str, bytes]) -> Path:
    for name, data in contents.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return folder


def read(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def refuse_exchange(monkeypatch: pytest.MonkeyPatch, code: int | None) -> None:
    """Let `renameat2` fail with `code`, or not exist where `code` is None."""

    def renameat2(*arguments: Any) -> int:
        ctypes.set_errno(code or 0)
        return -1

    libc = SimpleNamespace() if code is None else SimpleNamespace(renameat2=renameat2)
    monkeypatch.setattr(ctypes, "CDLL", lambda *args, **kwargs: libc)


def refuse_links(monkeypatch: pytest.MonkeyPatch) -> None:
    def link(*args: Any, **kwargs: Any) -> None:
        raise PermissionError(errno.EPERM, "no hard links here")

    monkeypatch.setattr(os, "link", link)


Route = Callable[[pytest.MonkeyPatch], None]
ROUTES: dict[str, Route] = {
    "exchange": lambda monkeypatch: None,
    "no renameat2": lambda monkeypatch: refuse_exchange(monkeypatch, None),
    **{
        code: lambda monkeypatch, code=code: refuse_exchange(monkeypatch, getattr(errno, code))  # type: ignore[misc]
        for code in ("EINVAL", "ENOSYS", "EBUSY", "EXDEV", "EPERM")
    },
    "no hard links": refuse_links,
    "not Linux": lambda monkeypatch: monkeypatch.setattr(sys, "platform", "darwin"),
}


@pytest.fixture(params=list(ROUTES))
def route(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    ROUTES[request.param](monkeypatch)
    return str(request.param)


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """A folder with nothing in it but what a test puts there, so that leftovers show."""
    home = tmp_path / "home"
    home.mkdir()
    return home


# What is written


@pytest.mark.parametrize("folder", ["adapter", "a/b/adapter"])
def test_a_new_folder_and_its_parents_are_made(home: Path, folder: str) -> None:
    files.replace_files(home / folder, NEW)
    assert read(home) == {f"{folder}/{name}": data for name, data in NEW.items()}
    assert os.listdir((home / folder).parent) == ["adapter"]


def test_a_relative_path(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(home)
    files.replace_files(Path("adapter"), NEW)
    files.replace_files(Path("x/../adapter"), OLD)
    assert read(home) == {f"adapter/{name}": data for name, data in OLD.items()}


CASES: dict[str, tuple[dict[str, bytes], dict[str, bytes]]] = {
    # the folder before, and what is saved
    "one changes": (OLD | OTHERS, OLD | {"config.json": b"new config!"}),
    "the other changes": (OLD | OTHERS, OLD | {"weights.bin": b"new weights!"}),
    "both change": (OLD | OTHERS, NEW),
    "other bytes of equal size": (
        {"config.json": b"123", "weights.bin": b"x"},
        {"config.json": b"124", "weights.bin": b"x"},
    ),
    "neither was there": (OTHERS, NEW),
    "one was there": ({"config.json": b"old config"}, NEW),
    "nothing was there": ({}, NEW),
    "the user has a file .old": (OLD | {"config.json.old": b"mine"}, NEW),
    "the user has a file .tmp": (OLD | {"config.json.tmp": b"mine"}, NEW),
}


@pytest.mark.parametrize("case", list(CASES))
def test_existing_folder(home: Path, route: str, case: str) -> None:
    """Other files and unchanged ones stay the same files, no copies: a log that is kept open goes on in the folder.

    A changed file is replaced and never written into: safetensors maps the file that it reads.
    """
    before, contents = CASES[case]
    (home / "adapter").mkdir()
    folder = write(home / "adapter", before)
    (folder / "link").symlink_to("README.md")
    kept = {name: (folder / name).stat() for name in before if contents.get(name, before[name]) == before[name]}
    with contextlib.ExitStack() as stack:
        readers = {name: stack.enter_context((folder / name).open("rb")) for name in before}
        files.replace_files(folder, contents)
        assert {name: reader.read() for name, reader in readers.items()} == before
    assert os.readlink(folder / "link") == "README.md"
    (folder / "link").unlink()
    assert read(folder) == before | contents
    for name, old in kept.items():
        assert ((folder / name).stat().st_ino, (folder / name).stat().st_mtime_ns) == (old.st_ino, old.st_mtime_ns)
    assert os.listdir(home) == ["adapter"]


def test_unchanged_contents_rewrite_nothing(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write(home / "adapter", OLD | OTHERS)
    paths = [folder, *folder.rglob("*")]
    before = [(path, path.stat().st_ino, path.stat().st_mtime_ns, path.stat().st_ctime_ns) for path in paths]
    monkeypatch.setattr(os, "umask", None)  # nor is a new folder prepared
    files.replace_files(folder, OLD)
    assert [(path, path.stat().st_ino, path.stat().st_mtime_ns, path.stat().st_ctime_ns) for path in paths] == before
    assert os.listdir(home) == ["adapter"]


def test_one_changed_file_takes_one_rename_inside_the_folder(home: Path, route: str) -> None:
    folder = write(home / "adapter", OLD)
    inode = folder.stat().st_ino
    files.replace_files(folder, OLD | {"config.json": b"new"})
    assert folder.stat().st_ino == inode


@pytest.mark.parametrize("before", [{}, OLD], ids=["new folder", "old files"])
def test_everything_is_on_the_disk_before_it_is_in_place(
    home: Path, before: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = home / "adapter"
    if before:
        write(folder, before)
    synced: list[tuple[str, bool]] = []

    def fsync(handle: int) -> None:
        synced.append(
            (os.path.basename(os.readlink(f"/proc/self/fd/{handle}")), read(folder) == NEW if folder.exists() else False)
        )

    monkeypatch.setattr(os, "fsync", fsync)
    files.replace_files(folder, NEW)
    names = [name for name, _ in synced]
    assert names[:2] == list(NEW)
    assert names[2].startswith(".adapter.")
    assert names[3:] == ["home"]
    assert [done for _, done in synced] == [False, False, False, True]


@pytest.mark.parametrize("mask", [0o022, 0o002, 0o077, 0o027], ids=oct)
def test_a_new_folder_and_its_files_follow_the_umask(home: Path, mask: int) -> None:
    before = os.umask(mask)
    try:
        files.replace_files(home / "adapter", NEW)
    finally:
        assert os.umask(before) == mask  # and it is left as it was
    assert stat.S_IMODE((home / "adapter").stat().st_mode) == 0o777 & ~mask
    assert {stat.S_IMODE((home / "adapter" / name).stat().st_mode) for name in NEW} == {0o666 & ~mask}


@pytest.mark.parametrize("mode", [0o755, 0o700, 0o775], ids=oct)
def test_an_existing_folder_keeps_its_permissions(home: Path, route: str, mode: int) -> None:
    folder = write(home / "adapter", OLD)
    folder.chmod(mode)
    files.replace_files(folder, NEW)
    assert stat.S_IMODE(folder.stat().st_mode) == mode
    assert read(folder) == NEW


def test_through_a_link_to_a_folder(home: Path, route: str) -> None:
    real = write(home / "real", OLD | OTHERS)
    (home / "link").symlink_to("real")
    files.replace_files(home / "link", NEW)
    assert (home / "link").is_symlink()
    assert read(real) == OTHERS | NEW
    assert sorted(os.listdir(home)) == ["link", "real"]


def test_the_working_directory_stays_usable(home: Path, route: str, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write(home / "adapter", OLD)
    monkeypatch.chdir(folder)
    files.replace_files(Path("."), NEW)
    assert os.path.samefile(os.curdir, folder)
    assert sorted(os.listdir()) == sorted(NEW)


# Errors on the way: an exception at every step

STEPS = ["Path.open", "write", "os.fsync", "os.replace", "os.rename", "os.link", "shutil.copytree", "shutil.copy2"]
STEPS += ["Path.chmod", "renameat2"]
EXCHANGE_ONLY = {"os.link", "shutil.copytree", "renameat2"}


def install(trap: Trap, monkeypatch: pytest.MonkeyPatch, step: str) -> None:
    real_open, real_cdll = Path.open, ctypes.CDLL

    @contextlib.contextmanager
    def torn(path: Path, mode: str = "r", *args: Any, **kwargs: Any) -> Iterator[Any]:
        with real_open(path, mode, *args, **kwargs) as file:
            write = trap.guard(lambda data: file.write(data[:3]) and file.write(data[3:]))
            yield SimpleNamespace(write=write, read=file.read, flush=file.flush, fileno=file.fileno)

    def libc(*args: Any, **kwargs: Any) -> SimpleNamespace:
        return SimpleNamespace(renameat2=trap.guard(real_cdll(*args, **kwargs).renameat2))

    if step == "write":
        monkeypatch.setattr(Path, "open", torn)
    elif step == "renameat2":
        monkeypatch.setattr(ctypes, "CDLL", libc)
    else:
        owner, name = step.split(".")
        target: Any = {"os": os, "shutil": shutil, "Path": Path}[owner]
        monkeypatch.setattr(target, name, trap.guard(getattr(target, name)))


def attempts(
    root: Path, before: Mapping[str, bytes] | None, exchange: bool, step: str, error: BaseException, done: bool = False
) -> Iterator[tuple[Path, BaseException | None]]:
    """Save again and again, with an error at the k-th time of one step, until it happens less often than k times."""
    for k in range(1, 20):
        home = root / str(k)
        home.mkdir()
        if before is not None:
            write(home / "adapter", before)
        trap, raised = Trap(k, error, done), None
        with pytest.MonkeyPatch.context() as monkeypatch:
            if not exchange:
                refuse_exchange(monkeypatch, None)
            if step != "renameat2" or exchange:
                install(trap, monkeypatch, step)
            try:
                files.replace_files(home / "adapter", NEW)
            except (OSError, KeyboardInterrupt) as caught:
                raised = caught
        if trap.calls < k:
            assert raised is None
            check_whole(home, before, failed=False)
            return
        yield home, raised
    pytest.fail("the step never ended")


def check_whole(home: Path, before: Mapping[str, bytes] | None, failed: bool) -> None:
    """All old or all new, other files kept, nothing left over; after an error of a step that was not done, all old."""
    found = read(home / "adapter") if (home / "adapter").exists() else None
    new = NEW | {name: data for name, data in (before or {}).items() if name not in NEW}
    assert found == before if failed else found in (before, new)
    assert os.listdir(home) == (["adapter"] if found is not None else [])


exchanges = pytest.mark.parametrize("exchange", [True, False], ids=["exchange", "fallback"])


@pytest.mark.parametrize("before", [None, OTHERS, OLD | OTHERS], ids=["new folder", "no old files", "old files"])
@exchanges
@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "full"), KeyboardInterrupt()], ids=lambda e: type(e).__name__)
@pytest.mark.parametrize("step", STEPS)
def test_an_error_at_any_step_leaves_the_old_files(
    tmp_path: Path, before: Mapping[str, bytes] | None, exchange: bool, error: BaseException, step: str
) -> None:
    reached = 0
    for home, raised in attempts(tmp_path, before, exchange, step, error):
        reached += 1
        # what only the exchange needs is answered with the fallback, and a folder that cannot be synced is none the worse
        handled = isinstance(error, OSError) and raised is None and (step in EXCHANGE_ONLY or step == "os.fsync")
        assert raised is error or handled
        check_whole(home, before, failed=not handled and step != "os.fsync")  # the last sync comes when all is done
    expected = {"os.rename": before is None, "Path.chmod": before is None, "os.replace": before is not None and not exchange}
    expected |= {"shutil.copy2": before == OLD | OTHERS and not exchange, "os.link": before is not None}
    expected |= {"shutil.copytree": before is not None, "renameat2": before is not None and exchange}
    assert (reached > 0) == expected.get(step, True)


@exchanges
@pytest.mark.parametrize("before", [None, OLD | OTHERS], ids=["new folder", "old files"])
@pytest.mark.parametrize("step", ["os.replace", "os.rename", "renameat2", "os.fsync"])
def test_an_interrupt_right_after_any_step_leaves_all_old_or_all_new(
    tmp_path: Path, before: Mapping[str, bytes] | None, exchange: bool, step: str
) -> None:
    error = KeyboardInterrupt()
    for home, raised in attempts(tmp_path, before, exchange, step, error, done=True):
        assert raised is error
        check_whole(home, before, failed=False)


@pytest.mark.parametrize("code", [errno.EIO, errno.ENOSPC, errno.EACCES, errno.EROFS], ids=errno.errorcode.get)
def test_an_exchange_that_fails_for_another_reason_is_an_error(
    home: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    refuse_exchange(monkeypatch, code)
    folder = write(home / "adapter", OLD | OTHERS)
    with pytest.raises(OSError, match=str(folder)) as caught:
        files.replace_files(folder, NEW)
    assert caught.value.errno == code
    check_whole(home, OLD | OTHERS, failed=True)


def test_a_folder_in_the_place_of_a_file_is_an_error(home: Path, route: str) -> None:
    folder = write(home / "adapter", {"config.json": b"old config", "weights.bin/inside": b"x"} | OTHERS)
    before = read(folder)
    with pytest.raises(OSError, match=r"weights\.bin"):
        files.replace_files(folder, NEW)
    assert read(folder) == before
    assert os.listdir(home) == ["adapter"]


def test_a_file_in_the_place_of_the_folder_is_an_error(home: Path) -> None:
    (home / "adapter").write_bytes(b"a file")
    with pytest.raises(OSError, match="adapter"):
        files.replace_files(home / "adapter", NEW)
    assert read(home) == {"adapter": b"a file"}


# A crash: the process is gone between two lines, or just before a system call

CRASH_PROGRAM = """
import importlib.util, json, os, shutil, signal, sys
from pathlib import Path

source, root, crash, before, new = json.loads(sys.argv[1])
spec = importlib.util.spec_from_file_location("files", source)
files = importlib.util.module_from_spec(spec)
spec.loader.exec_module(files)
os.fsync = lambda handle: None
new = {name: data.encode() for name, data in new.items()}

def read(folder):
    return {path.name: path.read_text() for path in folder.iterdir()} if folder.exists() else None

def replace_and_crash(folder, at):
    count = 0
    def step():
        nonlocal count
        count += 1
        if count == at:
            os.kill(os.getpid(), signal.SIGKILL) if crash == "SIGKILL" else os._exit(3)
    def trace(frame, event, arg):
        if frame.f_code.co_filename == source:
            if event in ("line", "return"):
                step()
            return trace
    def audit(event, arguments):
        if event.partition(".")[0] in ("open", "os", "shutil", "tempfile", "ctypes"):
            step()
    sys.addaudithook(audit)
    sys.settrace(trace)
    files.replace_files(folder, new)
    sys.settrace(None)
    os._exit(7)

found, status = [], None
while status != 7 and len(found) < 2000:
    folder = Path(root, str(len(found)), "adapter")
    folder.parent.mkdir()
    if before is not None:
        folder.mkdir()
        for name, data in before.items():
            (folder / name).write_text(data)
    child = os.fork()
    if child == 0:
        try:
            replace_and_crash(folder, len(found) + 1)
        finally:
            os._exit(1)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    crashed = read(folder)
    files.replace_files(folder, new)
    found.append([status, crashed, read(folder)])
    shutil.rmtree(folder.parent)
print(json.dumps(found))
"""
"""Save once for every line of `files` and every system call below it, and die there; then save again."""


@pytest.mark.parametrize(
    ("before", "crash", "died"),
    [
        (None, "SIGKILL", -signal.SIGKILL),
        ({"config.json": "old", "weights.bin": "old weights", "other": "1"}, "SIGKILL", -signal.SIGKILL),
        ({"config.json": "old", "weights.bin": "old weights", "other": "1"}, "os._exit", 3),
        ({"config.json": "old", "other": "1"}, "SIGKILL", -signal.SIGKILL),
        ({"config.json": "old", "weights.bin": "new weights", "other": "1"}, "SIGKILL", -signal.SIGKILL),
    ],
    ids=["new folder", "both files", "both files, os._exit", "one more file", "one file"],
)
def test_a_crash_at_any_moment(tmp_path: Path, before: dict[str, str] | None, crash: str, died: int) -> None:
    new = {"config.json": "new", "weights.bin": "new weights"}
    arguments = json.dumps([files.__file__, str(tmp_path), crash, before, new])
    command = [sys.executable, "-I", "-S", "-c", CRASH_PROGRAM, arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    steps = json.loads(done.stdout)
    after = (before or {}) | new
    assert [status for status, _, _ in steps] == [died] * (len(steps) - 1) + [7]
    states = [crashed for _, crashed, _ in steps]
    assert [state for state in states if state not in (before, after)] == []
    assert states.index(after) > 30  # it was old for a while, then new, and never old again
    assert states[states.index(after) :] == [after] * (len(states) - states.index(after))
    assert states.count(after) > 5
    assert [state for _, _, state in steps] == [after] * len(steps)  # what a crash leaves is not in the way of the next save


def test_two_processes_that_make_one_new_folder_both_succeed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rename = os.rename

    def late(source: Path, target: Path) -> None:
        monkeypatch.setattr(os, "rename", rename)
        files.replace_files(target, OLD)  # the other process comes first
        rename(source, target)

    monkeypatch.setattr(os, "rename", late)
    files.replace_files(tmp_path / "new", NEW)
    assert read(tmp_path) == {f"new/{name}": data for name, data in NEW.items()}
