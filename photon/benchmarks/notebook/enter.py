"""What starts a kernel shut in: this file is run by itself, with nothing but the standard library.

Three processes, one inside the other:

* the *launcher* makes namespaces (mounts, processes, network, and users where it is not root) and ends all
  that is within when the process that started it is gone;
* the *keeper* is process 1 within: it builds a root folder that has only what the plan names, waits for the
  kernel's sockets, closes the folder they lie in to further writes, and gives up its rights;
* the *kernel* has no rights, no way to more of them, and the limits of the plan.

The plan is a JSON object in the only argument. One line goes to standard output: ``ready``, or ``error`` and
what went wrong. Root is needed for nothing; where it is root that starts a kernel, the kernel runs as nobody.
"""

import ctypes
import errno
import json
import os
import resource
import select
import shutil
import signal
import stat
import sys
import time
from pathlib import Path
from typing import Any, NoReturn

_LIBC = ctypes.CDLL(None, use_errno=True)
# From <sched.h>, <sys/mount.h> and <linux/prctl.h>.
_NEWNS, _NEWUTS, _NEWIPC = 0x0002_0000, 0x0400_0000, 0x0800_0000
_NEWUSER, _NEWPID, _NEWNET = 0x1000_0000, 0x2000_0000, 0x4000_0000
_NAMESPACES = _NEWUTS | _NEWIPC | _NEWPID | _NEWNET
_MS_NOSUID, _MS_NODEV, _MS_NOEXEC, _MS_BIND, _MS_REC, _MS_PRIVATE = 2, 4, 8, 4096, 16384, 1 << 18
_MNT_DETACH = 2
_SYS_PIVOT_ROOT = {"x86_64": 155, "aarch64": 41}
_SYS_MOUNT_SETATTR = 442  # the same on every machine, since Linux 5.12
_AT_FDCWD, _AT_RECURSIVE = -100, 0x8000
_ATTR_RDONLY, _ATTR_NOSUID, _ATTR_NODEV = 1, 2, 4
_PR_SET_PDEATHSIG, _PR_CAPBSET_DROP, _PR_SET_NO_NEW_PRIVS = 1, 24, 38
_DEVICES = ("null", "zero", "full", "random", "urandom")
_NOBODY = 65534


def _checked(result: int, what: str) -> None:
    if result != 0:
        raise OSError(ctypes.get_errno(), f"{what}: {os.strerror(ctypes.get_errno())}")


def _unshare(flags: int) -> None:
    _checked(_LIBC.unshare(flags), "namespaces")


def _mount(source: str | None, target: str, kind: str | None, flags: int, data: str | None = None) -> None:
    encoded = [None if text is None else text.encode() for text in (source, target, kind)]
    _checked(
        _LIBC.mount(*encoded, ctypes.c_ulong(flags), None if data is None else data.encode()),
        f"mounting {target}",
    )


def _set_attributes(target: str, attributes: int, *, below: bool = True) -> None:
    """Set attributes of a mount and, where ``below``, of all mounts below it."""
    wanted = (ctypes.c_uint64 * 4)(attributes, 0, 0, 0)
    result = _LIBC.syscall(
        ctypes.c_long(_SYS_MOUNT_SETATTR),
        ctypes.c_int(_AT_FDCWD),
        ctypes.c_char_p(target.encode()),
        ctypes.c_uint(_AT_RECURSIVE if below else 0),
        ctypes.byref(wanted),
        ctypes.c_size_t(ctypes.sizeof(wanted)),
    )
    _checked(result, f"making {target} read-only")


def _map_user(uid: int, gid: int) -> None:
    """Keep one's own ids in a new user namespace, and no others."""
    Path("/proc/self/setgroups").write_text("deny")
    Path("/proc/self/uid_map").write_text(f"{uid} {uid} 1")
    Path("/proc/self/gid_map").write_text(f"{gid} {gid} 1")


def _drop_capabilities() -> None:
    """Give up every right of root, for this process and whatever it starts."""
    last = int(Path("/proc/sys/kernel/cap_last_cap").read_text())
    for capability in range(last + 1):
        # Who is nobody already may not; that no program of root's brings rights, the next line sees to.
        _LIBC.prctl(_PR_CAPBSET_DROP, capability, 0, 0, 0)
    _checked(_LIBC.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), "dropping rights")
    header = (ctypes.c_uint32 * 2)(0x2008_0522, 0)
    _checked(_LIBC.capset(ctypes.byref(header), ctypes.byref((ctypes.c_uint32 * 6)())), "dropping rights")


# --- the launcher ---------------------------------------------------------------------------------------


def _launch(plan: dict[str, Any]) -> int:
    as_root = plan["as_root"]
    if plan["isolate"] and as_root:
        _unshare(_NAMESPACES)
    elif plan["isolate"]:
        uid, gid = os.geteuid(), os.getegid()
        _unshare(_NAMESPACES | _NEWUSER)
        _map_user(uid, gid)
    keeper = os.fork()
    if keeper == 0:
        _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        _guarded(lambda: _keep(plan))
    os.close(1)
    ended = os.pidfd_open(keeper)
    waiting = select.poll()
    waiting.register(ended, select.POLLIN)
    # Nothing is ever written there: it is readable when whoever started this is gone.
    waiting.register(0, select.POLLIN | select.POLLHUP)
    while not any(descriptor == ended for descriptor, _ in waiting.poll()):
        os.kill(keeper, signal.SIGKILL)
        waiting.unregister(0)
    status = os.waitpid(keeper, 0)[1]
    # Who would remove it may be gone.
    shutil.rmtree(plan["base"], ignore_errors=True)
    return os.waitstatus_to_exitcode(status)


def _guarded(work: Any) -> NoReturn:
    try:
        os._exit(work())
    except BaseException as error:
        text = f"{type(error).__name__}: {error}" if not isinstance(error, OSError) else str(error)
        os.write(1, f"error {' '.join(text.split())}\n".encode())
        os._exit(1)


# --- the keeper -----------------------------------------------------------------------------------------


def _keep(plan: dict[str, Any]) -> int:
    os.setsid()
    if plan["isolate"]:
        _build_root(plan)
    else:
        _write_texts("", plan)
    log = os.open(plan["log"], os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o600)
    kernel = os.fork()
    if kernel == 0:
        _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        _guarded(lambda: _become_kernel(plan, log))
    _wait_for_sockets(plan, kernel, log)
    os.close(log)
    if plan["isolate"]:
        # From here on nobody within can put a file, or a link to somewhere else, beside the sockets.
        _close(plan["sockets"])
        if plan["as_root"]:
            _become_nobody()
        _drop_capabilities()
    os.write(1, b"ready\n")
    os.close(1)
    while True:
        # Orphans come to process 1, which must take note of their end.
        pid, status = os.wait()
        if pid == kernel:
            return max(0, os.waitstatus_to_exitcode(status))


def _build_root(plan: dict[str, Any]) -> None:
    root = plan["root"]
    # Here and not in the launcher, which goes on seeing the folders that it is to remove.
    _unshare(_NEWNS)
    _mount(None, "/", None, _MS_REC | _MS_PRIVATE)
    _mount("tmpfs", root, "tmpfs", _MS_NOSUID | _MS_NODEV, "size=1m,mode=755")
    for target, size in plan["tmpfs"].items():
        os.makedirs(root + target, exist_ok=True)
        options = f"size={size},nr_inodes={plan['files']},mode=1777"
        _mount("tmpfs", root + target, "tmpfs", _MS_NOSUID | _MS_NODEV, options)
    _write_texts(root, plan)
    for target, to in plan["links"].items():
        os.symlink(to, root + target)
    for target, source in plan["read_only"].items():
        _bind(source, root + target)
        _set_attributes(root + target, _ATTR_RDONLY | _ATTR_NOSUID | _ATTR_NODEV)
    _bind(plan["sockets"], root + plan["sockets"])
    _set_attributes(root + plan["sockets"], _ATTR_NOSUID | _ATTR_NODEV)
    for name in _DEVICES:
        _bind(f"/dev/{name}", f"{root}/dev/{name}")
    os.makedirs(f"{root}/proc")
    _mount("proc", f"{root}/proc", "proc", _MS_NOSUID | _MS_NODEV | _MS_NOEXEC)
    os.chdir(root)
    # The new root over the old one, and the old one away.
    number = _SYS_PIVOT_ROOT[os.uname().machine]
    _checked(_LIBC.syscall(ctypes.c_long(number), b".", b"."), "changing the root folder")
    _checked(_LIBC.umount2(b".", _MNT_DETACH), "leaving the old root folder")
    os.chdir("/")
    _set_attributes("/", _ATTR_RDONLY | _ATTR_NOSUID | _ATTR_NODEV, below=False)
    _LIBC.sethostname(b"sandbox", 7)


def _write_texts(root: str, plan: dict[str, Any]) -> None:
    for target, text in plan["texts"].items():
        os.makedirs(os.path.dirname(root + target), exist_ok=True)
        Path(root + target).write_text(text)


def _bind(source: str, target: str) -> None:
    if stat.S_ISDIR(os.stat(source).st_mode):
        os.makedirs(target, exist_ok=True)
    else:
        os.makedirs(os.path.dirname(target), exist_ok=True)
        Path(target).touch()
    _mount(source, target, None, _MS_BIND | _MS_REC)


def _close(folder: str) -> None:
    """Make a folder read-only as soon as nobody is writing in it."""
    for _ in range(500):
        try:
            _set_attributes(folder, _ATTR_RDONLY)
            return
        except OSError as error:
            if error.errno != errno.EBUSY:
                raise
        time.sleep(0.01)
    raise RuntimeError("the kernel does not stop writing beside its sockets")


def _wait_for_sockets(plan: dict[str, Any], kernel: int, log: int) -> None:
    until = time.monotonic() + plan["start_seconds"]
    names = set(plan["socket_names"])
    while not names <= set(os.listdir(plan["sockets"])):
        pid, _ = os.waitpid(kernel, os.WNOHANG)
        if pid or time.monotonic() > until:
            size = os.fstat(log).st_size
            said = os.pread(log, 2000, max(0, size - 2000)).decode(errors="replace").strip()
            how = "ended before it began" if pid else f"did not begin within {plan['start_seconds']} s"
            raise RuntimeError(f"the kernel {how}: {said[-1000:]}")
        time.sleep(0.01)


# --- the kernel -----------------------------------------------------------------------------------------


def _become_nobody() -> None:
    os.setgroups([])
    os.setresgid(_NOBODY, _NOBODY, _NOBODY)
    os.setresuid(_NOBODY, _NOBODY, _NOBODY)


def _become_kernel(plan: dict[str, Any], log: int) -> NoReturn:
    if plan["isolate"]:
        if plan["as_root"]:
            _become_nobody()
        try:
            # A user namespace of its own, so that the limit of processes counts its own alone, and one in
            # which there can be no further ones: with those would come rights to try the system with.
            uid, gid = os.geteuid(), os.getegid()
            _unshare(_NEWUSER)
            _map_user(uid, gid)
            Path("/proc/sys/user/max_user_namespaces").write_text("0")
        except OSError:
            if not plan["as_root"]:
                raise
            # No user namespaces are made here, so there is none to forbid; processes count for nobody.
        _drop_capabilities()
    for name, value in plan["limits"].items():
        kind = getattr(resource, name)
        hard = resource.getrlimit(kind)[1]
        bound = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(kind, (bound, bound))
    os.chdir(plan["work"])
    nothing = os.open("/dev/null", os.O_RDWR)
    os.dup2(nothing, 0)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.closerange(3, 256)
    os.execve(plan["argv"][0], plan["argv"], plan["env"])


if __name__ == "__main__":
    asked = json.loads(sys.argv[1])
    _guarded(lambda: _launch(asked))
