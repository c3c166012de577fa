"""What a hostile program tries from inside a room: run there as a file, it prints what came of each try, as JSON.

It knows nothing of the platform but what it is given: paths, ports and process ids of outside. A try that is refused
raises OSError; what it returns, it has got. Each is a step towards one secret, one byte outside, or the machine itself.
"""

import ctypes
import errno
import fcntl
import json
import mmap
import os
import platform
import resource
import signal
import socket
import stat
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

WRITE_FILES = (
    "/proc/sys/kernel/core_pattern",
    "/proc/sys/kernel/core_pipe_limit",
    "/proc/sys/kernel/hostname",
    "/proc/sys/kernel/modprobe",
    "/proc/sys/kernel/panic",
    "/proc/sys/kernel/randomize_va_space",
    "/proc/sys/kernel/shmmax",
    "/proc/sys/kernel/sysrq",
    "/proc/sys/kernel/yama/ptrace_scope",
    "/proc/sys/fs/binfmt_misc/register",
    "/proc/sys/fs/file-max",
    "/proc/sys/fs/suid_dumpable",
    "/proc/sys/net/ipv4/ip_forward",
    "/proc/sys/net/core/somaxconn",
    "/proc/sys/user/max_user_namespaces",
    "/proc/sys/vm/drop_caches",
    "/proc/sys/vm/overcommit_memory",
    "/proc/sysrq-trigger",
    "/proc/irq/default_smp_affinity",
    "/proc/bus/pci/devices",
    "/proc/mtrr",
    "/proc/self/oom_score_adj",
    "/proc/self/oom_adj",
    "/proc/self/uid_map",
    "/proc/self/gid_map",
    "/proc/self/setgroups",
    "/proc/self/attr/current",
    "/proc/self/clear_refs",
    "/proc/self/coredump_filter",
    "/proc/1/oom_score_adj",
    "/proc/1/mem",
    "/sys/kernel/uevent_helper",
    "/sys/kernel/mm/transparent_hugepage/enabled",
    "/sys/power/state",
    "/sys/fs/cgroup/cgroup.procs",
    "/sys/fs/cgroup/memory/release_agent",
    "/sys/fs/cgroup/pids/cgroup.procs",
    "/dev/mem",
    "/dev/kmsg",
    "/dev/kvm",
    "/dev/vda",
    "/dev/sda",
    "/dev/nvme0n1",
    "/dev/fuse",
    "/dev/net/tun",
    "/dev/userfaultfd",
    "/dev/loop-control",
    "/dev/loop0",
    "/dev/cpu/0/msr",
    "/dev/vsock",
    "/dev/hwrng",
    "/dev/new",
    "/etc/passwd",
    "/etc/ld.so.preload",
    "/etc/ld.so.cache",
    "/etc/new",
    "/usr/bin/new",
    "/usr/bin/env",
    "/usr/lib/new",
    "/new",
    "/root/new",
    "/var/tmp/new",
    "/run/new",
)
"""Files that steer the machine or belong to the node: to open one for writing is the try."""
READ_FILES = (
    "/proc/kcore",
    "/proc/keys",
    "/proc/key-users",
    "/proc/timer_list",
    "/proc/kallsyms",
    "/proc/kmsg",
    "/proc/kpagecount",
    "/proc/kpageflags",
    "/proc/slabinfo",
    "/proc/vmallocinfo",
    "/proc/cmdline",
    "/proc/config.gz",
    "/proc/iomem",
    "/proc/ioports",
    "/proc/interrupts",
    "/proc/locks",
    "/proc/modules",
    "/proc/pagetypeinfo",
    "/sys/kernel/notes",
    "/sys/firmware/acpi/tables/DSDT",
    "/etc/shadow",
    "/etc/gshadow",
    "/etc/sudoers",
    "/etc/pip.conf",
    "/etc/hostname",
    "/etc/machine-id",
    "/etc/ssh/ssh_host_ed25519_key",
    "/etc/crontab",
    "/root/.bashrc",
    "/root/.ssh/id_ed25519",
    "/root/.netrc",
    "/root/.config/pip/pip.conf",
    "/var/log/dpkg.log",
    "/var/lib/dpkg/status",
    "/run/utmp",
)
"""Files that tell secrets, or of other programs: to read a byte of one is the try."""
FOLDERS = ("/etc/ssl/private", "/etc/pki/tls/private", "/proc/fs", "/proc/acpi", "/proc/bus", "/sys/kernel", "/var")
FAMILIES = {
    "AF_KEY": 15,
    "AF_PACKET": 17,
    "AF_ALG": 38,
    "AF_VSOCK": 40,
    "AF_TIPC": 30,
    "AF_BLUETOOTH": 31,
    "AF_XDP": 44,
}
NETLINK = {"SOCK_DIAG": 4, "XFRM": 6, "AUDIT": 9, "NETFILTER": 12, "KOBJECT_UEVENT": 15, "GENERIC": 16, "CRYPTO": 21}
NAMESPACES = {
    "mount": 0x20000,
    "cgroup": 0x2000000,
    "uts": 0x4000000,
    "ipc": 0x8000000,
    "user": 0x10000000,
    "pid": 0x20000000,
    "net": 0x40000000,
}
NUMBERS = {
    "x86_64": {"clone": 56, "ptrace": 101, "ioprio_set": 251},
    "aarch64": {"clone": 220, "ptrace": 117, "ioprio_set": 30},
}

libc = ctypes.CDLL(None, use_errno=True)
given: dict[str, Any] = {}
"""What the program is told of outside: `inputs`, `output`, `paths`, `port`, `abstract`, `pid`, `system_calls`."""
Try = Callable[[], object]


def checked(result: int) -> int:
    if result < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return result


def call(number: int, *arguments: Any) -> int:
    return checked(libc.syscall(ctypes.c_long(number), *[ctypes.c_long(each) for each in arguments]))


def own_number(name: str) -> int:
    return NUMBERS[platform.machine()][name]


def refuse(holds: bool, why: str) -> None:
    """A try that is refused without an error."""
    if holds:
        raise PermissionError(errno.EPERM, why)


def open_for_writing(path: str) -> Try:
    return lambda: os.close(os.open(path, os.O_WRONLY | os.O_CREAT, 0o600))


def read(path: str) -> Try:
    def look() -> object:
        with open(path, "rb") as file:
            found = file.read(64)
        refuse(not found, "nothing is in it")
        return found

    return look


def enter(path: str) -> Try:
    def look() -> object:
        found = os.listdir(path)
        refuse(not found, "nothing is in it")
        return found

    return look


def clone_into(flag: int) -> Try:
    def clone() -> object:
        child = call(own_number("clone"), flag | signal.SIGCHLD, 0, 0, 0, 0)
        if child == 0:
            os._exit(0)
        return os.waitpid(child, 0)

    return clone


def status_field(name: str) -> str:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return line.split(":", 1)[1].strip()
    raise KeyError(name)


def capabilities() -> object:
    found = {name: status_field(name) for name in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb")}
    refuse(not any(int(each, 16) for each in found.values()), "there are none")
    return found


def new_rights() -> object:
    refuse(status_field("NoNewPrivs") == "1", "a program never gets more")
    return "setuid files give their rights"


def no_filter() -> object:
    refuse(status_field("Seccomp") == "2", "calls are filtered")
    return "no filter"


def be_root() -> object:
    refuse(0 not in (*os.getresuid(), *os.getresgid(), *os.getgroups()), "it is somebody else")
    return os.getresuid()


def own_setuid_file() -> object:
    path = Path(given["output"], "own-id")
    path.write_bytes(Path("/usr/bin/id").read_bytes())
    path.chmod(0o6755)
    said = subprocess.run([path, "-u"], capture_output=True, text=True, check=True).stdout.strip()
    refuse(int(said) == os.getuid() != 0, "it runs as the same user")
    return said


def setuid_of_the_system() -> object:
    refuse(bool(os.statvfs("/usr").f_flag & os.ST_NOSUID), "its mount knows no setuid")
    return "setuid counts"


def devices_count(path: str) -> Try:
    def look() -> object:
        refuse(bool(os.statvfs(path).f_flag & os.ST_NODEV), "device files are of no use here")
        return "devices work"

    return look


def make_device(kind: int) -> Try:
    return lambda: os.mknod(Path(given["output"], f"device-{kind}"), kind | 0o600, os.makedev(1, 1))


def old_machine_code() -> object:
    """getpid by the numbers of 32 bits."""
    if platform.machine() != "x86_64":
        raise OSError(errno.ENOSYS, "another machine")
    page = mmap.mmap(-1, 4096, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
    page.write(b"\xb8\x14\x00\x00\x00\xcd\x80\xc3")  # mov eax, 20; int 0x80; ret
    place = ctypes.addressof(ctypes.c_char.from_buffer(page))
    result = ctypes.CFUNCTYPE(ctypes.c_int)(place)()
    if result < 0:
        raise OSError(-result, os.strerror(-result))
    return result


def x32_number() -> object:
    if platform.machine() != "x86_64":
        raise OSError(errno.ENOSYS, "another machine")
    return call(0x40000000 | 39)


def number_of_the_future() -> object:
    return call(467, -1, 0, 0, 0, 0)


def type_into_a_terminal() -> object:
    ours, theirs = os.openpty()
    os.setsid() if os.getpid() != os.getsid(0) else None
    del ours
    return fcntl.ioctl(theirs, 0x5412, b"x")


def trace(pid: int) -> Try:
    # PTRACE_SEIZE: what is seized goes on.
    return lambda: call(own_number("ptrace"), 0x4206, pid, 0, 0)


def signal_to(pid_name: str) -> Try:
    return lambda: os.kill(given[pid_name], 0)


def others_processes() -> object:
    found = [int(name) for name in os.listdir("/proc") if name.isdecimal()]
    own = {os.getpid(), os.getppid(), 1}
    strangers = [pid for pid in found if pid not in own and pid > 64]
    refuse(not strangers, "there are few, all of the room")
    return strangers


def secret_variables() -> object:
    found = [name for name in os.environ if name.startswith(("AWS", "RAY", "TUNESMITH", "SECRET", "KUBE"))]
    refuse(set(found) <= {"TUNESMITH_PROGRAM"}, "there are none")
    return found


def variables_of_all() -> object:
    found = b""
    for name in os.listdir("/proc"):
        if name.isdecimal():
            try:
                found += Path("/proc", name, "environ").read_bytes()
            except OSError:
                continue
    refuse(b"s3cret" not in found, "no secret is among them")
    return "a secret"


def command_lines_of_all() -> object:
    found = b"".join(
        Path("/proc", name, "cmdline").read_bytes()
        for name in os.listdir("/proc")
        if name.isdecimal() and name != str(os.getpid())
    )
    refuse(b"--ro-bind" not in found, "none tells what bubblewrap was told")
    return found[:200]


def open_files_of_outside() -> object:
    found = {name: os.readlink(f"/proc/self/fd/{name}") for name in os.listdir("/proc/self/fd") if int(name) > 2}
    outside = {
        name: path for name, path in found.items() if not path.startswith(("/proc/", "pipe:", str(given["self"])))
    }
    refuse(not outside, "none is left open")
    return outside


def root_of_the_first() -> object:
    """The first process sees the room's root and no other."""
    names = set(os.listdir("/proc/1/root/"))
    refuse(names == set(os.listdir("/")), "the same root")
    return names


def below_the_root() -> object:
    os.chdir("/")
    for _ in range(40):
        os.chdir("..")
    refuse(not any(Path(path).exists() for path in given["paths"]), "above the root is the root")
    return os.listdir(".")


def outside_path(number: int) -> Try:
    return lambda: os.stat(given["paths"][number])


def change_input(how: str) -> Try:
    def change() -> object:
        path = Path(given["inputs"], "weights.bin")
        match how:
            case "write":
                return os.close(os.open(path, os.O_WRONLY))
            case "append":
                return os.close(os.open(path, os.O_WRONLY | os.O_APPEND))
            case "truncate":
                return os.truncate(path, 0)
            case "chmod":
                return path.chmod(0o777)
            case "chown":
                return os.chown(path, os.getuid(), os.getgid())
            case "utime":
                return os.utime(path, (1, 1))
            case "unlink":
                return path.unlink()
            case "rename":
                return path.rename(path.with_name("other"))
            case "rename-over":
                Path(given["output"], "mine").write_text("mine")
                return os.rename(Path(given["output"], "mine"), path)
            case "link":
                return os.link(path, Path(given["output"], "linked"))
            case "link-in":
                return os.link("/proc/self/exe", path.with_name("linked"))
            case "create":
                return path.with_name("new").write_text("new")
            case "mkdir":
                return path.with_name("folder").mkdir()
            case "symlink":
                return path.with_name("pointer").symlink_to("/etc/passwd")
            case "xattr":
                return os.setxattr(path, "user.x", b"1")
            case "by-descriptor":
                return os.close(os.open(f"/proc/self/fd/{os.open(path, os.O_RDONLY)}", os.O_WRONLY))
            case "chmod-by-descriptor":
                return os.fchmod(os.open(path, os.O_RDONLY), 0o777)
            case "immutable":
                return fcntl.ioctl(os.open(path, os.O_RDONLY), 0x40086602, struct.pack("l", 0x10))
            case "swap-folder":
                return os.rename(given["inputs"], f"{given['inputs']}-gone")
        raise KeyError(how)

    return change


INPUT_CHANGES = (
    *("write", "append", "truncate", "chmod", "chown", "utime", "unlink", "rename", "rename-over", "link", "link-in"),
    *("create", "mkdir", "symlink", "xattr", "by-descriptor", "chmod-by-descriptor", "immutable", "swap-folder"),
)


def raise_limit(kind: int) -> Try:
    def change() -> object:
        _, hard = resource.getrlimit(kind)
        refuse(hard == resource.RLIM_INFINITY and kind != resource.RLIMIT_FSIZE, "there is none")
        return resource.setrlimit(kind, (hard + 1, hard + 1))

    return change


def dump_core() -> object:
    refuse(resource.getrlimit(resource.RLIMIT_CORE) == (0, 0), "none is written")
    return "cores are written"


def too_large_a_file() -> object:
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    with Path(given["output"], "huge").open("wb") as file:
        return file.truncate(given["largest"] + 1)


def real_time() -> object:
    return os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(1))


def shared_memory_of_the_node() -> object:
    refuse(not Path("/dev/shm", given["shm"]).exists(), "it is another one")
    return "the node's"


def connect(kind: str) -> Try:
    def reach() -> object:
        if kind == "abstract":
            with socket.socket(socket.AF_UNIX) as made:
                return made.connect("\0" + given["abstract"])
        with socket.create_connection(("127.0.0.1", given["port"]), timeout=2):
            return "connected"

    return reach


def be_somebody(user: int) -> Try:
    return lambda: os.setresuid(user, user, user)


TRIES: dict[str, Try] = {
    **{f"write {path}": open_for_writing(path) for path in WRITE_FILES},
    **{f"read {path}": read(path) for path in READ_FILES},
    **{f"enter {path}": enter(path) for path in FOLDERS},
    **{
        f"socket of {name}": lambda number=number: socket.socket(number, socket.SOCK_RAW).close()
        for name, number in FAMILIES.items()
    },  # type: ignore[misc]
    **{
        f"netlink {name}": lambda number=number: socket.socket(16, socket.SOCK_RAW, number).close()
        for name, number in NETLINK.items()
    },  # type: ignore[misc]
    "raw socket": lambda: socket.socket(socket.AF_INET, socket.SOCK_RAW, 1).close(),
    **{f"unshare {name}": lambda flag=flag: checked(libc.unshare(flag)) for name, flag in NAMESPACES.items()},  # type: ignore[misc]
    "unshare time": lambda: checked(libc.unshare(0x80)),
    **{f"clone into {name}": clone_into(flag) for name, flag in NAMESPACES.items()},
    "capabilities": capabilities,
    "new rights": new_rights,
    "no filter": no_filter,
    "be root": be_root,
    "become root": be_somebody(0),
    "become another user": be_somebody(1000),
    "become a member of root": lambda: os.setgroups([0]),
    "a setuid file of its own": own_setuid_file,
    "a setuid file of the system": setuid_of_the_system,
    "devices in its folders": lambda: devices_count(given["output"])(),
    "devices in /tmp": devices_count("/tmp"),
    "devices in /usr": devices_count("/usr"),
    "make a block device": make_device(stat.S_IFBLK),
    "make a device": make_device(stat.S_IFCHR),
    "calls of 32 bits": old_machine_code,
    "calls of x32": x32_number,
    "calls of the future": number_of_the_future,
    "type into a terminal": type_into_a_terminal,
    "another personality": lambda: checked(libc.personality(0x0400000)),
    "trace the first process": trace(1),
    "signal a process of the node": signal_to("pid"),
    "processes of others": others_processes,
    "secrets in variables": secret_variables,
    "secrets in variables of processes": variables_of_all,
    "secrets in command lines": command_lines_of_all,
    "files left open": open_files_of_outside,
    "root of the first process": root_of_the_first,
    "above the root": below_the_root,
    **{f"outside path {number}": outside_path(number) for number in range(6)},
    **{f"input: {how}": change_input(how) for how in INPUT_CHANGES},
    "raise the limit of a file": raise_limit(resource.RLIMIT_FSIZE),
    "raise the limit of processes": raise_limit(resource.RLIMIT_NPROC),
    "dump core": dump_core,
    "too large a file": too_large_a_file,
    "run before all others": real_time,
    "be nicer to itself": lambda: os.setpriority(os.PRIO_PROCESS, 0, -5),
    "read before all others": lambda: call(own_number("ioprio_set"), 1, 0, 1 << 13),
    "shared memory of the node": shared_memory_of_the_node,
    "a port of the node": connect("port"),
    "an abstract socket of the node": connect("abstract"),
    "run bubblewrap": lambda: subprocess.run(["unshare", "-Ur", "true"], check=True, capture_output=True),
}
"""By name."""


def main() -> None:
    """Try everything that standard input's file, the first argument, tells to try, and print the results."""
    given.update(json.loads(sys.argv[1]))
    given["self"] = sys.argv[0]
    tries = dict(TRIES)
    for name, number in given["system_calls"].items():
        tries[f"call {name}"] = lambda number=number: call(number, 0, 0, 0, 0, 0, 0)  # type: ignore[misc]
    results: dict[str, str] = {}
    for name, attempt in tries.items():
        try:
            results[name] = f"got: {attempt()!r:.200}"
        except OSError as error:
            results[name] = errno.errorcode.get(error.errno or 0, str(error))
        except ValueError as error:  # of setrlimit
            results[name] = str(error)
        except subprocess.CalledProcessError as error:
            results[name] = f"exit code {error.returncode}"
    text = json.dumps(results)
    if "results" in given:
        Path(given["results"]).write_text(text)
    sys.stdout.write(f"{text}\n")


if __name__ == "__main__":
    main()
