"""The first step of a program's process, before bubblewrap makes its room. Run as a file, with what to do as JSON.

It enters the control groups, sets the limits, and, where the program has a user of its own, shows the folders that it
may read as belonging to that user: by mounts that nobody else sees, whatever rights the files have on the node. Then
it becomes the command. It knows nothing of the platform, so that it starts at once.
"""

import base64
import ctypes
import json
import os
import resource
import sys
from pathlib import Path
from typing import Any, NoReturn

FAILED = 125
"""The exit code where the program was not started."""

_CLONE_NEWNS, _CLONE_NEWUSER = 0x20000, 0x10000000
_MS_REC, _MS_SLAVE = 0x4000, 0x80000
_OPEN_TREE, _MOVE_MOUNT, _MOUNT_SETATTR = 428, 429, 442
_AT_FDCWD, _AT_EMPTY_PATH, _AT_RECURSIVE = -100, 0x1000, 0x8000
_OPEN_TREE_CLONE, _MOVE_MOUNT_F_EMPTY_PATH = 1, 4
_MOUNT_ATTR_RDONLY, _MOUNT_ATTR_IDMAP = 0x1, 0x100000

_libc = ctypes.CDLL(None, use_errno=True)


class _MountAttributes(ctypes.Structure):
    _fields_ = [(name, ctypes.c_uint64) for name in ("set", "clear", "propagation", "userns")]


def main() -> None:
    """Do what the first argument says and become the command in it."""
    given: dict[str, Any] = json.loads(sys.argv[1])
    for group in given["groups"]:
        Path(group, "cgroup.procs").write_text(str(os.getpid()))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (given["largest_file_bytes"],) * 2)
    owner = given["owner"]
    if owner is not None:
        _limit_processes(given["tasks"])
        _show_as_owned([Path(path) for path in given["readable"]], owner, Path(given["home"]))
    command = [_word(each) for each in given["command"]]
    os.execvp(command[0], command)


def _limit_processes(tasks: int) -> None:
    """To this user alone; what is root on the way there is not counted."""
    _, hard = resource.getrlimit(resource.RLIMIT_NPROC)
    tasks = tasks if hard == resource.RLIM_INFINITY else min(tasks, hard)
    resource.setrlimit(resource.RLIMIT_NPROC, (tasks, tasks))


def _word(given: Any) -> str:
    """A word of the command; in place of bytes, or of words to be read from a file, the number of an open file."""
    if isinstance(given, str):
        return given
    if "words" in given:
        content = "".join(f"{_word(each)}\0" for each in given["words"]).encode()
    else:
        content = base64.b64decode(given["bytes"])
    descriptor = os.memfd_create("tunesmith", 0)
    os.write(descriptor, content)
    os.lseek(descriptor, 0, os.SEEK_SET)
    return str(descriptor)


def _show_as_owned(paths: list[Path], owner: int, home: Path) -> None:
    """In a mount namespace of this process's own, mount each path over itself, read only and as the owner's.

    Some file systems, overlayfs among them, and kernels before 5.12 cannot do this. Then the files' own modes must let
    all users read; below `home`, into which nobody else gets, they are changed so.
    """
    _checked("unshare", _libc.unshare(_CLONE_NEWNS))
    _checked("mount", _libc.mount(b"none", b"/", None, _MS_REC | _MS_SLAVE, None))
    mapping = _mapping(owner)
    done: list[Path] = []
    for path in sorted({path.resolve() for path in paths}):
        if any(path.is_relative_to(above) for above in done):
            continue
        try:
            tree = _call(_OPEN_TREE, _AT_FDCWD, bytes(path), _OPEN_TREE_CLONE | _AT_RECURSIVE | os.O_CLOEXEC)
            wish = _MountAttributes(_MOUNT_ATTR_IDMAP | _MOUNT_ATTR_RDONLY, 0, 0, mapping)
            _call(_MOUNT_SETATTR, tree, b"", _AT_EMPTY_PATH | _AT_RECURSIVE, ctypes.byref(wish), ctypes.sizeof(wish))
            _call(_MOVE_MOUNT, tree, b"", _AT_FDCWD, bytes(path), _MOVE_MOUNT_F_EMPTY_PATH)
            os.close(tree)
        except OSError as error:
            _make_readable(path, error, home)
        done.append(path)
    os.close(mapping)


def _mapping(owner: int) -> int:
    """A user namespace in which root is the owner, as an open file."""
    told, tell = os.pipe()
    wait, end = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(end)
        os.write(tell, b"1" if _libc.unshare(_CLONE_NEWUSER) == 0 else b"0")
        os.read(wait, 1)
        os._exit(0)
    try:
        if os.read(told, 1) != b"1":
            _fail("no user namespace can be made, which shows files as the program's own")
        for kind in ("uid", "gid"):
            Path(f"/proc/{child}/{kind}_map").write_text(f"0 {owner} 1")
        return os.open(f"/proc/{child}/ns/user", os.O_RDONLY | os.O_CLOEXEC)
    finally:
        for each in (told, tell, wait, end):
            os.close(each)
        os.waitpid(child, 0)


def _make_readable(path: Path, error: OSError, home: Path) -> None:
    """Let all users read what lies below the path. End this process where it may not be changed."""
    for folder, _, names in os.walk(path):
        for each, needed in ((Path(folder), 5), *((Path(folder, name), 4) for name in names)):
            if each.is_symlink() or (mode := each.stat().st_mode) & needed == needed:
                continue
            if not each.resolve().is_relative_to(home):
                _fail(
                    f"{each} is not readable by all, and its file system cannot show it to the program ({error}): "
                    f"give it to all by `chmod -R o+rX {path}`, or keep it on ext4, xfs, btrfs or tmpfs"
                )
            each.chmod(mode & 0o7777 | needed)


def _call(number: int, *arguments: Any) -> int:
    return _checked(f"system call {number}", _libc.syscall(number, *arguments))


def _checked(what: str, result: int) -> int:
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, f"{what}: {os.strerror(code)}")
    return result


def _fail(why: str) -> NoReturn:
    sys.stderr.write(f"tunesmith: the program was not started: {why}\n")
    sys.exit(FAILED)


if __name__ == "__main__":
    try:
        main()
    except OSError as trouble:
        _fail(str(trouble))
