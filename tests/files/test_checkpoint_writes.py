"""How checkpoints come to the disk: a file's name stands for the old content or the new, whole."""

import contextlib
import dis
import errno
import fcntl
import inspect
import itertools
import os
import shutil
import stat
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from support import contents, python

from fastopt import SGD, Adam, checkpoint

SIZE = 500
BF16 = ml_dtypes.bfloat16


def made():
    return Adam({"w": np.zeros(SIZE), "b": np.zeros((), BF16)}, ema_decay=0.9)


def advanced(opt, steps=1):
    for k in range(opt.completed_steps, opt.completed_steps + steps):
        opt.step({"w": np.full(SIZE, k + 0.5), "b": np.array(1 / (k + 1), BF16)})
    return opt


def loaded(path):
    opt = made()
    opt.load(path)
    return opt


@pytest.fixture
def path(tmp_path):
    """Where a checkpoint of one step is."""
    path = tmp_path / "run.safetensors"
    advanced(made()).save(path)
    return path


# ---- the ways of a save to fail ------------------------------------------------------------------

# An interrupt between a file's opening and its name leaves it to be closed when it is freed.
LEFT_OPEN = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
MODULES = {"os": os, "fcntl": fcntl, "fastopt.checkpoint": checkpoint}
CALLS = [  # in a save's order: what is called, and which time
    ("os.mkdir", 1),
    ("fastopt.checkpoint.FileIO", 1),
    ("os.fstat", 1),
    ("fastopt.checkpoint.save_file", 1),
    ("fastopt.checkpoint._read", 1),
    ("os.chmod", 1),
    ("os.fsync", 1),
    ("os.replace", 1),
    ("os.fsync", 2),
]


@LEFT_OPEN
@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError, OSError(errno.ENOSPC, "full")])
@pytest.mark.parametrize(("call", "which"), CALLS)
def test_a_save_that_fails_anywhere_leaves_the_old_file_or_the_new(
    call, which, error, after, path, monkeypatch
):
    where, _, name = call.rpartition(".")
    module = MODULES[where]
    original, left = getattr(module, name), which

    def failing(*args, **kwargs):
        nonlocal left
        left -= 1
        if left == 0 and not after:
            raise error
        result = original(*args, **kwargs)
        if left == 0:
            raise error
        return result

    opt = advanced(made(), 2)
    monkeypatch.setattr(module, name, failing)
    if call == "os.fstat" and isinstance(error, OSError):  # then it goes without a lock
        opt.save(path)
        monkeypatch.undo()
        assert os.listdir(path.parent) == [path.name]
        assert contents(loaded(path)) == contents(opt)
        return
    with pytest.raises(error if isinstance(error, type) else OSError):
        opt.save(path)
    monkeypatch.undo()
    assert left == 0
    assert os.listdir(path.parent) == [path.name]
    replaced = (call, which) == CALLS[-1] or (after and call == "os.replace")
    assert contents(loaded(path)) == contents(advanced(made(), 2 if replaced else 1))
    opt.save(path)
    assert contents(loaded(path)) == contents(opt)


def test_file_and_folder_reach_the_disk_in_this_order(path, monkeypatch):
    happened, sync, replace = [], os.fsync, os.replace

    def recorded_sync(descriptor):
        sync(descriptor)
        happened.append(("synced", os.fstat(descriptor).st_ino))

    def recorded_replace(source, target):
        happened.append(("replaced by", os.stat(source).st_ino, source))
        replace(source, target)

    monkeypatch.setattr(os, "fsync", recorded_sync)
    monkeypatch.setattr(os, "replace", recorded_replace)
    advanced(made(), 2).save(path)
    assert [event[:2] for event in happened] == [
        ("synced", path.stat().st_ino),
        ("replaced by", path.stat().st_ino),
        ("synced", path.parent.stat().st_ino),
    ]
    # On the same file system, and nobody takes it for a checkpoint.
    assert Path(happened[1][2]).parent.parent == path.parent
    assert Path(happened[1][2]).parent.match("run.safetensors.*.part")


def test_a_file_is_replaced_only_by_one_that_has_been_read_back(path, monkeypatch):
    opt, save_file = advanced(made(), 2), checkpoint.save_file

    def changed_first(arrays, *args):
        opt.params[0][7] += 1
        save_file(arrays, *args)

    def cut_off(arrays, name, *args):
        save_file(arrays, name, *args)
        os.truncate(name, os.stat(name).st_size - 1)

    for spoil, message in [(changed_first, "its checksum"), (cut_off, "no whole safetensors file")]:
        monkeypatch.setattr(checkpoint, "save_file", spoil)
        with pytest.raises(RuntimeError, match=f"'{path}' was not saved, .*{message}"):
            opt.save(path)
        assert os.listdir(path.parent) == [path.name]
        assert contents(loaded(path)) == contents(advanced(made()))


LIMITED = """
import os, resource, sys
import numpy as np, fastopt
path = sys.argv[1]
opt = fastopt.SGD({"w": np.zeros(40)}, lr=1.0, momentum=0.5)
opt.save(path)
size, before = os.stat(path).st_size, open(path, "rb").read()
opt.step({"w": np.ones(40)})
refused = 0
for limit in range(0, size + 100, 7):
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    try:
        opt.save(path)
    except OSError as error:
        assert (error.errno, error.filename) == (27, path), error  # EFBIG
        assert open(path, "rb").read() == before
        refused += 1
    else:
        assert limit >= os.stat(path).st_size
    assert os.listdir(os.path.dirname(path)) == [os.path.basename(path)]
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)
other = fastopt.SGD({"w": np.ones(40)})
other.load(path)
assert (other.params[0] == -1).all()
print(refused, size)
"""


def test_a_file_that_may_not_be_so_large_leaves_the_old_one(tmp_path):
    path = os.path.realpath(tmp_path / "run.safetensors")
    done = python("-c", LIMITED, path)
    assert done.returncode == 0, done.stderr
    refused, size = map(int, done.stdout.split())
    assert abs(7 * refused - size) < 32


@pytest.fixture
def little_disk(tmp_path):
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = shutil.which("mount") and subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", folder], capture_output=True, text=True
    )
    if not mounted or mounted.returncode:
        pytest.skip("no tmpfs can be mounted here; the test of the limit on a file's size has run")
    yield folder
    subprocess.run(["umount", folder], check=True)


def test_a_full_disk_leaves_the_old_file(little_disk):
    path, opt, full = little_disk / "run.safetensors", advanced(made()), 0
    opt.save(path)
    for pages in range(16):
        (little_disk / "ballast").write_bytes(b"")
        try:
            (little_disk / "ballast").write_bytes(bytes(4096 * pages))
        except OSError:
            break
        before, failure = contents(loaded(path)), None
        advanced(opt)
        try:
            opt.save(path)
        except OSError as error:
            failure = error.errno, error.filename
            full += 1
        assert failure in (None, (errno.ENOSPC, os.path.realpath(path)))
        assert contents(loaded(path)) == (before if failure else contents(opt))
        assert set(os.listdir(little_disk)) == {path.name, "ballast"}
    assert full >= 3
    (little_disk / "ballast").unlink()
    opt.save(path)
    assert contents(loaded(path)) == contents(opt)


READ_ONLY = """
import os, sys
import numpy as np, fastopt
folder = sys.argv[1]
path = os.path.join(folder, "run.safetensors")
opt = fastopt.SGD([np.ones(3)], lr=1.0)
opt.save(path)
opt.load(path)  # all is imported now, which another user may not be able to read
opt.step([np.ones(3)])
os.chmod(folder, 0o555)
if os.geteuid() == 0:  # to whom modes mean nothing
    os.setgroups([])
    os.setgid(65534)
    os.setuid(65534)
for name in (path, os.path.join(folder, "new.safetensors")):
    try:
        opt.save(name)
    except PermissionError as error:
        assert error.filename.startswith(name), error
    else:
        raise AssertionError("saved")
assert os.listdir(folder) == ["run.safetensors"]
assert (opt.params[0] == 0).all()
opt.load(path)
assert (opt.params[0] == 1).all()
"""


def test_a_folder_that_cannot_be_written_to_keeps_its_file():
    with tempfile.TemporaryDirectory() as parent:  # pytest's folders are closed to others
        os.chmod(parent, 0o755)
        folder = Path(parent) / "folder"
        folder.mkdir()
        done = python("-c", READ_ONLY, str(folder))
        folder.chmod(0o755)
    assert done.returncode == 0, done.stderr


def test_a_folder_that_is_none_is_an_error_of_the_system(path):
    opt = made()
    with pytest.raises(FileNotFoundError, match="none"):
        opt.save(path.parent / "none" / "run.safetensors")
    with pytest.raises(NotADirectoryError):
        opt.save(path / "run.safetensors")
    with pytest.raises(OSError, match="too long"):
        opt.save(path.parent / ("x" * 300))
    assert os.listdir(path.parent) == [path.name]


# ---- names and permissions -----------------------------------------------------------------------


def test_a_path_may_be_of_any_kind(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    opt = advanced(made())
    odd = os.fsdecode(b"\xff\xfe of no encoding")
    paths = [
        "a",
        Path("b"),
        b"c",
        "./d",
        "with space",
        "größe",
        odd,
        "line\nbreak",
        "quote'\"",
        "%s",
    ]
    for path in paths:
        opt.save(path)
        assert contents(loaded(path)) == contents(opt), path
    assert len(os.listdir()) == len(paths)


def test_a_link_stays_and_what_it_leads_to_is_replaced(path):
    (path.parent / "elsewhere").mkdir()
    link, dangling = path.parent / "link", path.parent / "dangling"
    link.symlink_to(path.name)
    dangling.symlink_to("elsewhere/new.safetensors")
    opt = advanced(made(), 2)
    for name in (link, dangling):
        opt.save(name)
        assert name.is_symlink()
        assert contents(loaded(name)) == contents(opt)
    assert contents(loaded(path)) == contents(opt)
    assert os.listdir(path.parent / "elsewhere") == ["new.safetensors"]


def test_permissions_are_those_of_any_new_file_or_of_the_old_one(tmp_path):
    opt = made()
    before = os.umask(0)
    try:
        for mask in (0o000, 0o022, 0o027, 0o077):
            os.umask(mask)
            path = tmp_path / f"{mask:o}"
            opt.save(path)
            assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~mask
    finally:
        os.umask(before)
    for mode in (0o600, 0o640, 0o444):
        path.chmod(mode)
        opt.save(path)
        assert stat.S_IMODE(path.stat().st_mode) == mode


# ---- what killed processes leave -----------------------------------------------------------------

# A child is killed before or after each of these.
KILLS = """
import fcntl, os, signal, sys
import numpy as np, fastopt
from fastopt import checkpoint
path = sys.argv[1]
opt = fastopt.SGD({"w": np.zeros(500)}, lr=1.0)
opt.save(path)
opt.step({"w": np.ones(500)})
CALLS = [(os, "mkdir"), (os, "open"), (fcntl, "flock"), (os, "fstat"), (checkpoint, "save_file"),
         (checkpoint, "_read"), (os, "chmod"), (os, "fsync"), (os, "replace"), (os, "unlink"),
         (os, "close"), (os, "rmdir")]

def refuse(*args, **kwargs):
    raise ValueError

def killed(module, name, after):
    if name == "unlink":  # while it clears up after a failure
        checkpoint._read = refuse
    def call(*args, **kwargs):
        if after:
            original(*args, **kwargs)
        os.kill(os.getpid(), signal.SIGKILL)
    original = getattr(module, name)
    setattr(module, name, call)
    opt.save(path)

left = []
for module, name in CALLS:
    for after in (False, True):
        pid = os.fork()
        if pid == 0:
            try:
                killed(module, name, after)
            finally:
                os._exit(1)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL, name
        left.append(len(os.listdir(os.path.dirname(path))) - 1)
        other = fastopt.SGD({"w": np.ones(500)})
        other.load(path)
        assert (other.params[0] == -other.completed_steps).all()
        opt.save(path)
        assert os.listdir(os.path.dirname(path)) == [os.path.basename(path)], (name, after)
print(*left)
"""


def test_what_a_process_left_that_was_killed_anywhere_is_cleared_by_the_next_save(tmp_path):
    done = python("-c", KILLS, os.path.realpath(tmp_path / "run.safetensors"))
    assert done.returncode == 0, done.stderr
    left = done.stdout.split()
    assert len(left) == 24
    assert left.count("1") == 22  # but before the folder is made, and after it is removed


def leftover(path, *files, name="0badcafe", lock=None):
    """Make a folder as a killed process leaves it; return it."""
    folder = path.parent / f"{path.name}.{name}.part"
    folder.mkdir()
    for file in [lock or checkpoint._lock_name(), *files]:
        (folder / file).write_bytes(b"")
    return folder


def listing(folder):
    return sorted(os.path.relpath(Path(at, name), folder) for at, _, names in os.walk(folder)
                  for name in [".", *names])  # fmt: skip


def test_a_folder_that_may_be_anybody_elses_stays(path):
    folder = path.parent
    ours = [
        leftover(path, "checkpoint", "mine", name="00000001"),
        leftover(path, "checkpoint", "lock-0", name="00000002"),
        leftover(path, "checkpoint", name="00000003", lock="not-a-lock"),
        leftover(path, "checkpoint", name="0000000A"),
        leftover(path, "checkpoint", name="0000001"),
        leftover(path, "checkpoint", name="0000000g"),
        leftover(folder / "other", "checkpoint"),
        leftover(folder / "run.safetensorsx", "checkpoint"),
        leftover(folder / "run_safetensors", "checkpoint"),
    ]
    (leftover(path, "checkpoint", name="00000004") / "folder").mkdir()
    (leftover(path, name="00000005") / "checkpoint").symlink_to(path)
    elsewhere = leftover(folder / "elsewhere", "checkpoint")
    (folder / "run.safetensors.00000006.part").symlink_to(elsewhere)
    (folder / "run.safetensors.00000007.part").write_bytes(b"")
    for file in [file for each in folder.glob("*.part") for file in each.glob("*")]:
        os.utime(file, (0, 0), follow_symlinks=False)
    before, saved = listing(folder), path.read_bytes()
    advanced(made(), 2).save(path)
    assert listing(folder) == before
    assert path.read_bytes() != saved
    for each in ours:
        assert each.is_dir()


def test_the_leftovers_of_another_machine_are_cleared_once_nothing_has_happened_there_for_a_day(
    path,
):
    """The locks of some file systems do not reach other machines."""
    opt = advanced(made(), 2)
    folder = leftover(path, "checkpoint", ".tmpAbCdEf", lock="lock-0123-4567")
    for hours, stays in [((0, 0, 0), True), ((30, 30, 23), True), ((25, 30, 26), False)]:
        for file, age in zip(sorted(folder.iterdir()), hours, strict=True):
            then = path.parent.stat().st_mtime - 3600 * age
            os.utime(file, (then, then))
        opt.save(path)
        assert folder.exists() == stays
    assert os.listdir(path.parent) == [path.name]


def test_a_locked_folder_stays_however_old_it_is(path):
    opt = advanced(made(), 2)
    for lock in ("lock-0123-4567", checkpoint._lock_name()):
        folder = leftover(path, "checkpoint", lock=lock)
        for file in folder.iterdir():
            os.utime(file, (0, 0))
        with open(folder / lock) as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            opt.save(path)
            assert len(listing(folder)) == 3
        opt.save(path)
        assert not folder.exists()


def test_a_lock_counts_only_while_it_is_the_one_in_the_folder(path, monkeypatch):
    """Who had it may have removed it meanwhile, and somebody made another."""
    folder, original, opt = leftover(path, "checkpoint"), fcntl.flock, advanced(made(), 2)
    lock = folder / checkpoint._lock_name()

    def after_another(file, how):
        descriptor = file if isinstance(file, int) else file.fileno()
        if os.path.samestat(os.fstat(descriptor), lock.stat()):
            lock.unlink()
            lock.write_bytes(b"")
        original(file, how)

    with monkeypatch.context() as patch:
        patch.setattr(fcntl, "flock", after_another)
        opt.save(path)
    assert listing(folder) == [".", "checkpoint", lock.name]
    opt.save(path)
    assert os.listdir(path.parent) == [path.name]


def test_an_empty_folder_is_cleared(path):
    (path.parent / f"{path.name}.0badcafe.part").mkdir()
    advanced(made(), 2).save(path)
    assert os.listdir(path.parent) == [path.name]


LIVING = """
import os, signal, sys
import numpy as np, fastopt
from fastopt import checkpoint
path, how = sys.argv[1:]

def made(value):
    return fastopt.SGD({"w": np.full(500, float(value))})

def paused(original):
    def call(*args, **kwargs):
        setattr(checkpoint, how, original)
        result = original(*args, **kwargs)
        os.kill(os.getpid(), signal.SIGSTOP)
        return result
    return call

def saved():
    other = made(0)
    other.load(path)
    return other.params[0][0]

def others():
    return len(os.listdir(os.path.dirname(path))) - 1

made(1).save(path)
pid = os.fork()
if pid == 0:
    try:
        setattr(checkpoint, how, paused(getattr(checkpoint, how)))
        made(2).save(path)
        os._exit(0)
    finally:
        os._exit(1)
assert os.WIFSTOPPED(os.waitpid(pid, os.WUNTRACED)[1])
assert others() == 1
made(3).save(path)
assert others() == 1 and saved() == 3
os.kill(pid, signal.SIGCONT)
assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
assert others() == 0 and saved() == 2
"""


@pytest.mark.parametrize("how", ["_locked", "save_file", "_read", "_sync"])
def test_what_a_living_process_is_writing_stays(how, tmp_path):
    done = python("-c", LIVING, os.path.realpath(tmp_path / "run.safetensors"), how)
    assert done.returncode == 0, done.stderr


def test_what_another_thread_is_writing_stays(path, monkeypatch):
    writing, go_on, original = threading.Event(), threading.Event(), checkpoint.save_file

    def slow(*args):
        original(*args)
        writing.set()
        go_on.wait(60)

    opt, other = advanced(made(), 2), advanced(made(), 3)
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save_file", slow)
        thread = threading.Thread(target=opt.save, args=(path,))
        thread.start()
        assert writing.wait(60)
    try:
        other.save(path)
        assert len(os.listdir(path.parent)) == 2
        assert contents(loaded(path)) == contents(other)
    finally:
        go_on.set()
        thread.join()
    assert os.listdir(path.parent) == [path.name]
    assert contents(loaded(path)) == contents(opt)


BEGINNING = [
    ("os.mkdir", 1),
    ("fastopt.checkpoint.FileIO", 1),
    ("fcntl.flock", 1),
    ("os.fstat", 1),
    ("os.stat", 3),
]


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
@pytest.mark.parametrize(("call", "which"), BEGINNING)
def test_a_folder_that_another_clears_before_it_is_locked_is_made_anew(
    call, which, after, path, monkeypatch
):
    where, _, name = call.rpartition(".")
    module = MODULES[where]
    original, left, cleared = getattr(module, name), which, []

    def meanwhile():
        before = len(os.listdir(path.parent))
        checkpoint._clear_leftovers(str(path), str(path.parent))
        cleared.append(before - len(os.listdir(path.parent)))

    def call_and_clear(*args, **kwargs):
        nonlocal left
        left -= 1
        if left == 0 and not after:
            meanwhile()
        result = original(*args, **kwargs)
        if left == 0 and after:
            left -= 1
            meanwhile()
        return result

    opt = advanced(made(), 2)
    monkeypatch.setattr(module, name, call_and_clear)
    opt.save(path)
    monkeypatch.undo()
    locked = call in ("os.fstat", "os.stat") or (call, after) == ("fcntl.flock", True)
    exists = (call, after) != ("os.mkdir", False)
    assert cleared == [1 if exists and not locked else 0]
    assert os.listdir(path.parent) == [path.name]
    assert contents(loaded(path)) == contents(opt)


def test_a_folder_that_another_looks_at_before_it_is_locked_is_left_to_it(path, monkeypatch):
    original, held = fcntl.flock, []

    def flock(lock, how):
        if not held:
            (name,) = path.parent.glob("*.part/lock-*")
            held.append(name.open())
            original(held[0], fcntl.LOCK_EX)
        original(lock, how)

    opt = advanced(made(), 2)
    monkeypatch.setattr(fcntl, "flock", flock)
    opt.save(path)
    (left,) = path.parent.glob("*.part")
    assert [file.name for file in left.iterdir()] == [checkpoint._lock_name()]
    assert contents(loaded(path)) == contents(opt)
    held[0].close()
    opt.save(path)
    assert os.listdir(path.parent) == [path.name]


CLEARING = [  # the calls that clear a leftover, after those that begin the save
    ("os.stat", 4),
    ("os.listdir", 1),
    ("os.open", 1),
    ("os.listdir", 2),
    ("os.open", 2),
    ("fcntl.flock", 2),
    ("os.listdir", 3),
    ("os.fstat", 2),
    ("os.unlink", 1),
    ("os.unlink", 2),
    ("os.close", 1),
    ("os.close", 2),
    ("os.rmdir", 1),
]


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
@pytest.mark.parametrize(
    "error", [KeyboardInterrupt, MemoryError, OSError(errno.EIO, "broken")], ids=str
)
@pytest.mark.parametrize(("call", "which"), CLEARING)
def test_a_save_succeeds_though_clearing_fails_and_the_next_one_clears(
    call, which, error, after, path, monkeypatch
):
    """An interrupt ends the save, before anything is written."""
    where, _, name = call.rpartition(".")
    module = MODULES[where]
    original, left = getattr(module, name), which
    leftover(path, "checkpoint")

    def failing(*args, **kwargs):
        nonlocal left
        left -= 1
        if left == 0 and not after:
            raise error
        result = original(*args, **kwargs)
        if left == 0:
            raise error
        return result

    opt, old = advanced(made(), 2), contents(loaded(path))
    with monkeypatch.context() as patch:
        patch.setattr(module, name, failing)
        if error is KeyboardInterrupt:
            with pytest.raises(KeyboardInterrupt):
                opt.save(path)
        else:
            opt.save(path)
    assert left <= 0
    assert contents(loaded(path)) == (old if error is KeyboardInterrupt else contents(opt))
    opt.save(path)
    assert os.listdir(path.parent) == [path.name]
    assert contents(loaded(path)) == contents(opt)


@pytest.mark.parametrize("lacking", ["the module", errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS])
def test_where_there_are_no_locks_a_save_succeeds_and_nothing_is_cleared(
    lacking, path, monkeypatch
):
    def flock(lock, how):
        raise OSError(lacking, os.strerror(lacking))

    def seen_by_others(arrays, name, *args):
        save_file(arrays, name, *args)
        monkeypatch.undo()  # another machine may have locks
        checkpoint._clear_leftovers(str(path), str(path.parent))
        seen.append(os.listdir(os.path.dirname(name)))

    folder, save_file, seen = leftover(path, "checkpoint"), checkpoint.save_file, []
    empty = path.parent / f"{path.name}.00000000.part"  # somebody is about to write there
    empty.mkdir()
    named = ["checkpoint"] if lacking == "the module" else ["checkpoint", "unlocked"]
    if lacking == "the module":
        monkeypatch.setattr(checkpoint, "fcntl", None)
    else:
        monkeypatch.setattr(fcntl, "flock", flock)
    opt = advanced(made(), 2)
    opt.save(path)
    assert contents(loaded(path)) == contents(opt)
    assert folder.exists()
    assert empty.exists()
    monkeypatch.setattr(checkpoint, "save_file", seen_by_others)
    opt.save(path)
    assert [sorted(names) for names in seen] == [named]
    assert contents(loaded(path)) == contents(opt)
    assert os.listdir(path.parent) == [path.name]


def test_a_leftover_that_fills_the_disk_is_cleared_before_the_next_file_is_written(little_disk):
    path, opt = little_disk / "run.safetensors", advanced(made())
    opt.save(path)
    folder = leftover(path, "checkpoint")
    with open(folder / "checkpoint", "wb", buffering=0) as file, contextlib.suppress(OSError):
        while file.write(bytes(4096)) == 4096:
            pass
    advanced(opt).save(path)
    assert contents(loaded(path)) == contents(opt)
    assert os.listdir(little_disk) == [path.name]


# ---- other threads -------------------------------------------------------------------------------


def test_a_file_is_not_torn_by_steps_in_another_thread(tmp_path):
    path, stop = tmp_path / "run.safetensors", threading.Event()
    opt = SGD([np.zeros(20_000) for _ in range(4)], lr=1.0)
    grads = [np.ones(20_000) for _ in range(4)]

    def run():
        while not stop.is_set():
            opt.step(grads)

    thread = threading.Thread(target=run)
    thread.start()
    seen = []
    try:
        for _ in range(20):
            opt.save(path)
            other = SGD([np.zeros(20_000) for _ in range(4)])
            other.load(path)
            assert {float(v) for p in other.params for v in p} == {-other.completed_steps}
            seen.append(other.completed_steps)
    finally:
        stop.set()
        thread.join()
    assert seen == sorted(seen)
    assert len(set(seen)) > 5


def test_optimizers_that_save_to_one_path_at_the_same_time_replace_each_other(tmp_path):
    path = tmp_path / "run.safetensors"
    optimizers = [SGD([np.full(5000, float(i))]) for i in range(3)]

    def save(opt):
        for _ in range(30):
            opt.save(path)

    threads = [threading.Thread(target=save, args=(opt,)) for opt in optimizers]
    optimizers[0].save(path)
    for thread in threads:
        thread.start()
    other, loads = SGD([np.zeros(5000)]), 0
    while any(thread.is_alive() for thread in threads):
        other.load(path)
        assert len({*other.params[0]}) == 1
        loads += 1
    assert loads > 10
    assert os.listdir(tmp_path) == [path.name]


# ---- interrupts and kills ------------------------------------------------------------------------

TRAINING = """
import glob, os, random, select, signal, sys, time, traceback
import numpy as np, fastopt
path, rounds, by_rows = sys.argv[1], int(sys.argv[2]), sys.argv[3:] == ["rows"]
random.seed(0)
SHAPES = {"w": (500, 128), "v": (3,)}

def made():
    params = {name: np.zeros(shape, np.float32) for name, shape in SHAPES.items()}
    options = {"rows": "exact"} if by_rows else {"ema_decay": 0.9}
    return fastopt.Adam(params, num_threads=1, state_dtype="8bit", **options)

def advanced(opt, to=None):
    for k in range(opt.completed_steps, opt.completed_steps + 1 if to is None else to):
        value = np.float32(k % 7 - 2.5)
        grads = {name: np.full(shape, value) for name, shape in SHAPES.items()}
        if by_rows:
            grads["w"] = fastopt.Rows([7 * k % 500, k % 500, 3], grads["w"][:3])
        opt.step(grads)
    return opt

def same(a, b):
    def every(opt):
        opt.refresh()
        return [*opt.params, *(opt.ema or ()), *(x for s in opt.state for x in s.values())]
    return all(x.tobytes() == y.tobytes() for x, y in zip(every(a), every(b), strict=True))

opt, twin = advanced(made()), advanced(made())
durations = []
for _ in range(5):
    began = time.perf_counter()
    opt.save(path)
    durations.append(time.perf_counter() - began)
whole = sorted(durations)[2]
"""
CRASHES = """
amid = 0
for _ in range(rounds):
    out, into = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            while True:
                advanced(opt).save(path)
                os.write(into, b".")
        finally:
            os._exit(1)
    os.close(into)
    time.sleep(random.uniform(0, 3 * whole))
    os.kill(pid, signal.SIGKILL)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL
    completed = len(os.read(out, 1 << 16))
    os.close(out)
    whole *= 0.95 if completed else 1.1  # whatever else runs, most save once at least
    amid += len(glob.glob(path + ".*.part"))
    before = opt.completed_steps
    opt.load(path)
    opt.save(path)
    assert os.listdir(os.path.dirname(path)) == [os.path.basename(path)]
    # What the child has been told is saved, is.
    assert 0 <= opt.completed_steps - before - completed <= 1, (before, completed, opt)
    assert same(opt, advanced(twin, opt.completed_steps))
print(rounds, opt.completed_steps, amid)
"""
SEVERAL = """
def saver():
    out, into = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            while True:
                advanced(opt).save(path)
                os.write(into, b".")
        except BaseException:
            os.write(into, traceback.format_exc().encode())
        finally:
            os._exit(1)
    os.close(into)
    return pid, out

savers, left, saved = [saver() for _ in range(3)], set(), 0
for _ in range(rounds):
    time.sleep(random.uniform(0, 2 * whole))
    pid, out = savers.pop(random.randrange(3))
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    said = os.read(out, 1 << 16)
    os.close(out)
    assert not said.strip(b"."), said.decode()
    saved += len(said)
    whole *= 0.95 if said else 1.1  # as above
    left |= {*glob.glob(path + ".*.part")}
    savers.append(saver())
    made().load(path)
for pid, out in savers:
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    said = os.read(out, 1 << 16) if select.select([out], [], [], 0)[0] else b""
    assert not said.strip(b"."), said.decode()
opt.save(path)
assert os.listdir(os.path.dirname(path)) == [os.path.basename(path)]
print(rounds, saved, len(left))
"""
INTERRUPTS = """
amid = 0
signal.signal(signal.SIGALRM, signal.default_int_handler)
for _ in range(rounds):
    before = opt.completed_steps
    advanced(opt)
    saved = False
    try:
        try:
            began = time.perf_counter()
            signal.setitimer(signal.ITIMER_REAL, random.uniform(1e-6, 2 * whole))
            opt.save(path)
            saved = True
            whole += (time.perf_counter() - began - whole) / 4  # now, whatever else runs
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
    except KeyboardInterrupt:
        amid += not saved
    other = made()
    other.load(path)
    assert other.completed_steps == opt.completed_steps or not saved
    assert before <= other.completed_steps <= opt.completed_steps
    assert same(other, advanced(twin, other.completed_steps))
    if not saved:
        opt.load(path)
opt.save(path)
assert os.listdir(os.path.dirname(path)) == [os.path.basename(path)]
print(rounds, opt.completed_steps, amid)
"""
LOADS = """
import random, signal, sys, time
import numpy as np, fastopt
folder, rounds = sys.argv[1], int(sys.argv[2])
random.seed(0)
N = 300_000
opts = [
    fastopt.SGD([np.full(N, i, np.float32)], lr=float(i), momentum=0.5, state_dtype=state)
    for i, state in enumerate(("8bit", "float32"), 1)
]
for i, opt in enumerate(opts, 1):
    for _ in range(i):
        opt.step([np.zeros(N, np.float32)])
    opt.save(f"{folder}/{i}")
signal.signal(signal.SIGALRM, signal.default_int_handler)
opt, interrupted, seen = opts[0], 0, set()
loads = [
    lambda i: opt.load(f"{folder}/{i}", convert=True),
    lambda i: opt.load_state_dict(states[i]),
]
opt.load(f"{folder}/2", convert=True)
states = {2: opt.state_dict()}
opt.load(f"{folder}/1")
states[1] = opt.state_dict()
for load in loads:
    began = time.perf_counter()
    for i in (2, 1, 2, 1):
        load(i)
    whole = (time.perf_counter() - began) / 4
    now = 1
    for _ in range(rounds):
        to = 3 - now
        try:
            try:
                began = time.perf_counter()
                signal.setitimer(signal.ITIMER_REAL, random.uniform(1e-6, 1.2 * whole))
                load(to)
                whole += (time.perf_counter() - began - whole) / 4  # now, whatever else runs
            finally:
                signal.setitimer(signal.ITIMER_REAL, 0)
        except KeyboardInterrupt:
            interrupted += 1
        first = opt.completed_steps
        if load is loads[0]:
            assert {*opt.params[0][[0, N // 2, -1]]} == {float(first)}
        assert opt.param_groups[0]["lr"] == opt.state[0]["step"] == first, (first, opt)
        seen.add((load is loads[0], now == first))
        now = first
print(2 * rounds, interrupted, len(seen))
"""


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@pytest.mark.parametrize("grads", ["dense", "rows"])
def test_a_process_killed_at_any_moment_leaves_a_file_that_loads(grads, tmp_path):
    path = os.path.realpath(tmp_path / "run.safetensors")
    done = python("-c", TRAINING + CRASHES, path, "250", grads, timeout=300)
    assert done.returncode == 0, done.stderr
    kills, steps, amid = map(int, done.stdout.split())
    print(f"{kills} kills, {amid} of them amid a save; {steps} steps saved")
    assert kills == 250
    assert steps > 50
    assert amid > 50


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_processes_that_save_to_one_path_and_are_killed_clear_nothing_of_the_living(tmp_path):
    path = os.path.realpath(tmp_path / "run.safetensors")
    done = python("-c", TRAINING + SEVERAL, path, "300", timeout=300)
    assert done.returncode == 0, done.stderr
    kills, saved, left = map(int, done.stdout.split())
    print(f"{kills} kills, {saved} saves, {left} folders seen")
    assert saved > 100
    assert left > 100


@pytest.mark.slow
def test_a_save_interrupted_at_any_moment_leaves_a_file_that_loads(tmp_path):
    path = os.path.realpath(tmp_path / "run.safetensors")
    done = python("-c", TRAINING + INTERRUPTS, path, "300", timeout=300)
    assert done.returncode == 0, done.stderr
    rounds, steps, amid = map(int, done.stdout.split())
    assert rounds == 300
    print(f"{rounds} interrupts, {amid} of them amid a save; {steps} steps saved")
    assert amid > 20
    assert steps > 20


@pytest.mark.slow
@LEFT_OPEN
def test_a_save_interrupted_wherever_python_handles_signals_is_cleared_up_by_the_next(path):
    """Python handles them when it has entered a function, and after a call."""
    places = {
        function.__code__: {
            after.offset
            for before, after in itertools.pairwise(dis.get_instructions(function))
            if before.opname.startswith(("RESUME", "CALL"))
        }
        for function in vars(checkpoint).values()
        if inspect.isfunction(function) and function.__module__ == checkpoint.__name__
    }

    def trace(frame, event, arg):
        frame.f_trace_opcodes = frame.f_code in places
        if event == "opcode" and frame.f_lasti in places[frame.f_code] and next(passed) == at:
            raise KeyboardInterrupt
        return trace if frame.f_trace_opcodes else None

    old, opt = contents(loaded(path)), advanced(made(), 2)
    traced = sys.gettrace()
    for at in itertools.count():
        passed = itertools.count()
        try:
            sys.settrace(trace)
            opt.save(path)
            break
        except KeyboardInterrupt:
            sys.settrace(traced)
        finally:
            sys.settrace(traced)
        assert contents(loaded(path)) in (old, contents(opt))
        opt.save(path)
        assert os.listdir(path.parent) == [path.name], f"interrupted at place {at}"
    assert at > 100
    assert next(passed) == at


@pytest.mark.slow
def test_a_load_interrupted_at_any_moment_is_done_or_not_begun(tmp_path):
    done = python("-c", LOADS, str(tmp_path), "300", timeout=300)
    assert done.returncode == 0, done.stderr
    rounds, amid, outcomes = map(int, done.stdout.split())
    print(f"{rounds} loads, {amid} of them interrupted")
    assert amid > 100
    assert outcomes == 4  # of either kind of load, some were done and some were not
