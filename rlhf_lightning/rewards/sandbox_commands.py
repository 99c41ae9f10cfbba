"""The command lines that put a process into a room of its own: bubblewrap's, or util-linux' ``unshare``."""

import shlex
from dataclasses import dataclass
from pathlib import Path

DEVICES = ("null", "zero", "urandom")
LINKED = ("/bin", "/sbin", "/lib", "/lib64")
NOBODY = "65534"


@dataclass(frozen=True)
class Room:
    """What a process in the sandbox sees of the machine.

    Attributes:
        folders: Visible at their own places, read-only; nothing else of the file system is.
        files: Size of /tmp, the one place that can be written, in bytes; it is in memory and goes with the process.
        uid: An unprivileged user id that nobody has, for a trainer that runs as root; None for one that does not.
        tied: Whether it is killed when the thread that started it ends.
    """

    folders: list[str]
    files: int
    uid: int | None
    tied: bool


def outermost(folders: list[str]) -> list[str]:
    """The folders without those that lie in another of them, and the system's own, where they are no links into /usr."""
    system = [path for path in LINKED if Path(path).is_dir() and not Path(path).is_symlink()]
    kept: list[str] = []
    for folder in sorted({"/usr", *system, *folders}):
        if not any(Path(folder).is_relative_to(other) for other in kept):
            kept.append(folder)
    return kept


def links() -> list[tuple[str, str]]:
    """(target, path) of the system's folders that are links."""
    return [(str(Path(path).readlink()), path) for path in LINKED if Path(path).is_symlink()]


def drop(uid: int) -> list[str]:
    """From root to a user that owns nothing, for good."""
    ids = [f"--reuid={uid}", f"--regid={uid}", "--clear-groups", "--inh-caps=-all", "--bounding-set=-all"]
    return ["setpriv", *ids, "--no-new-privs"]


def bubblewrap(room: Room, command: list[str]) -> list[str]:
    """The command in bubblewrap. When process 1 of its namespace ends, the kernel kills the others."""
    line = ["bwrap", "--unshare-pid", "--unshare-net", "--unshare-ipc", "--unshare-uts", "--unshare-cgroup-try"]
    line += [*(["--die-with-parent"] if room.tied else []), "--cap-drop", "ALL"]
    if room.uid is None:
        # As process 1: bubblewrap's own would have the same user and no limits, and its memory could be written to.
        line += ["--unshare-user", "--uid", NOBODY, "--gid", NOBODY, "--as-pid-1"]
    else:  # no limit on processes holds for root, in whatever namespace
        line += [part for name in ("SETUID", "SETGID", "SETPCAP") for part in ("--cap-add", f"CAP_{name}")]
    line += ["--perms", "1777", "--size", str(room.files), "--tmpfs", "/tmp"]
    folders = outermost(room.folders)
    above = {str(parent) for folder in folders for parent in list(Path(folder).parents)[:-1]}
    for folder in sorted({"/dev", *above}):  # which would be made for root alone
        line += ["--perms", "0755", "--dir", folder]
    for folder in folders:
        line += ["--ro-bind", folder, folder]
    for target, path in links():
        line += ["--symlink", target, path]
    for device in DEVICES:  # not --dev: its /dev/shm is as large as half the memory
        line += ["--dev-bind", f"/dev/{device}", f"/dev/{device}"]
    line += ["--proc", "/proc", "--remount-ro", "/", "--chdir", "/tmp", "--"]
    return [*line, *(drop(room.uid) if room.uid is not None else []), *command]


def unshare(room: Room, command: list[str]) -> list[str]:
    """The command in namespaces made with util-linux, where bubblewrap is missing; process 1 is a shell that waits."""
    line = ["setpriv", "--pdeathsig", "KILL"] if room.tied else []
    line += ["unshare", "--pid", "--net", "--ipc", "--uts", "--cgroup", "--mount", "--fork", "--kill-child=KILL"]
    if room.uid is None:
        line += ["--user", "--map-root-user"]
        inner = [
            "unshare",
            "--user",
            f"--map-user={NOBODY}",
            f"--map-group={NOBODY}",
            "setpriv",
            "--no-new-privs",
            *command,
        ]
    else:
        inner = [*drop(room.uid), *command]
    return [*line, "sh", "-c", "\n".join([*furnish(room), shlex.join(inner), "exit $?"])]


def furnish(room: Room) -> list[str]:
    """The shell commands that make the room's file system and move into it."""
    # Over /sys, which is everywhere and where nothing is looked for: no folder has to be made, and none is left.
    lines = [
        "set -eu",
        "mount -t tmpfs -o mode=755,size=1m,nosuid,nodev none /sys",
        "cd /sys",
        "mkdir tmp proc dev old",
    ]
    lines.append(f"mount -t tmpfs -o mode=1777,size={room.files},nr_inodes=4096,nosuid,nodev none tmp")
    for folder in map(shlex.quote, outermost(room.folders)):
        lines += [f"mkdir -p .{folder}", f"mount --bind {folder} .{folder}"]
        lines.append(f"mount -o remount,bind,ro,nosuid,nodev .{folder}")
    lines += [shlex.join(["ln", "-s", target, f".{path}"]) for target, path in links()]
    lines += [f": >dev/{device}; mount --bind /dev/{device} dev/{device}" for device in DEVICES]
    lines += ["mount -t proc -o nosuid,nodev,noexec proc proc", "pivot_root . old", "cd /", "umount -l old"]
    return [*lines, "mount -o remount,bind,ro,nosuid,nodev /", "cd /tmp"]


def unused_uid(number: int) -> int:
    """A user id far from anybody's; root of a container has few. Another one for each program, as limits are by user."""
    size = min(int(Path("/proc/self/uid_map").read_text().split()[2]), 1 << 31)
    return size // 2 + number % (size // 4)
