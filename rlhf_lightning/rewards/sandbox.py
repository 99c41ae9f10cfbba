"""Programs of unknown intent, run where they can do no harm and can't tell us what they like."""

import contextlib
import itertools
import json
import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from rlhf_lightning.errors import UserError
from rlhf_lightning.rewards.inside import system_calls
from rlhf_lightning.rewards.sandbox_commands import Room, bubblewrap, unshare, unused_uid
from rlhf_lightning.rewards.sandbox_process import Outcome, Running, in_memory

Isolation = Literal["auto", "bubblewrap", "unshare", "none"]
INSIDE = Path(__file__).parent / "inside"
PYTHON = Path(getattr(sys, "_base_executable", sys.executable)).resolve()
ENVIRONMENT = {
    "PATH": "/usr/bin:/bin:/usr/sbin:/sbin", "HOME": "/tmp", "LANG": "C.UTF-8", "PYTHONUTF8": "1",
    "PYTHONHASHSEED": "0",  # the same program has the same score
    "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1",
}  # fmt: skip
MB = 1 << 20
UIDS = itertools.count(os.getpid() * 64)
# The first program of every sandbox: all that it finds has to be true.
CHECK = """
import json, os, socket, sys
sys.path += sys.modules['rlhf_lightning.rewards.inside'].__path__
status = dict(line.split(":", 1) for line in open("/proc/self/status"))
def refused(action, *arguments):
    try:
        action(*arguments)
    except OSError:
        return True
    return False
outside = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
print(json.dumps({
    "no root": os.getuid() != 0,
    "no privileges": int(status["CapEff"], 16) == 0 and int(status["NoNewPrivs"]) == 1,
    "filtered system calls": int(status["Seccomp"]) == 2,
    "processes of its own": sum(name.isdigit() for name in os.listdir("/proc")) < 5,
    "no network": refused(outside.connect, ("198.51.100.1", 9)),
    "no place to write": all(refused(open, folder + "/x", "w") for folder in ("", "/usr", "/dev", sys.path[-1])),
    "none of your files": refused(os.listdir, "/etc") and refused(os.listdir, "/var"),
}))
"""


@dataclass(frozen=True)
class Limits:
    """How much a program may use. All that it can hold in memory is ``processes * memory_mb + files_mb``.

    Attributes:
        seconds: By the clock, from the program's first line on.
        cpu_seconds: Of computing, a process.
        memory_mb: Address space, a process.
        processes: Processes and threads at a time, the first one included.
        files_mb: All files together; they are in memory.
        output_kb: Standard output.
    """

    seconds: float = 10.0
    cpu_seconds: int = 5
    memory_mb: int = 512
    processes: int = 4
    files_mb: int = 16
    output_kb: int = 256

    @property
    def output(self) -> int:
        """In bytes."""
        return self.output_kb * 1024

    def __post_init__(self) -> None:
        """Refuse what no program could live with."""
        if min(vars(self).values()) <= 0:
            raise UserError(f"every limit of a sandbox is more than 0: {self}")


class Sandbox:
    """Starts programs in processes without network, privileges, other files or other processes, and with limits.

    ``auto`` takes bubblewrap where it is installed and util-linux' ``unshare`` where not, and refuses where neither works (in a
    container without user namespaces, or on macOS). ``none`` sets the limits alone: such a program can read and write
    whatever you can, send it anywhere, and outlive its limit as a daemon.
    """

    def __init__(
        self, isolation: Isolation = "auto", limits: Limits = Limits(), packages: tuple[str, ...] = ()
    ) -> None:
        """Remember what to do; nothing is started.

        Args:
            isolation: Which tool.
            limits: Of each program.
            packages: Folders of Python packages that programs may import, beside the standard library.
        """
        self.isolation, self.limits, self.packages = isolation, limits, packages
        self._tool: Isolation | None = None

    @property
    def tool(self) -> Isolation:
        """What isolates here, found out once by running a program that looks around.

        Raises:
            UserError: If nothing does.
        """
        if self._tool is None:
            wanted: list[Isolation] = ["bubblewrap", "unshare"] if self.isolation == "auto" else [self.isolation]
            faults = []
            for tool in wanted:
                fault = None if tool == "none" else self._fault(tool)
                if fault is None:
                    self._tool = tool
                    return tool
                faults.append(f"{tool}: {fault}")
            raise UserError(
                f"no sandbox can be had here ({'; '.join(faults)}); install bubblewrap, allow user namespaces or use a machine "
                "of its own as root; or, where programs may do all that you can, set isolation: none"
            )
        return self._tool

    def _fault(self, tool: Isolation) -> str | None:
        """Why this tool does not isolate here."""
        needed = {"bubblewrap": ["bwrap"], "unshare": ["unshare", "setpriv", "mount", "pivot_root"]}[tool]
        missing = [name for name in needed if shutil.which(name, path=ENVIRONMENT["PATH"]) is None]
        if missing or not system_calls.known_machine():
            return f"{', '.join(missing)} not found" if missing else "no filter of system calls for this machine"
        trial = Sandbox(tool, self.limits, self.packages)
        trial._tool = tool
        try:
            found = trial.run(CHECK)
            facts = json.loads(found.output or b"{}")
        except (UserError, ValueError) as error:
            return str(error)
        open_ = [name for name, holds in facts.items() if not holds]
        return f"lacks {', '.join(open_)}" if open_ else None if facts else f"its first program ended with {found}"

    def run(self, source: str, stdin: str = "") -> Outcome:
        """Run a program to its end or its limit.

        Raises:
            UserError: If the sandbox can't be set up; a program can't bring that about.
        """
        with self.start("alone", {"source": source}, stdin.encode(errors="surrogatepass")) as running:
            return running.outcome(self.limits.seconds, self.limits.output)

    def start(
        self,
        role: str,
        order: dict[str, Any],
        stdin: bytes | None = b"",
        share: tuple[int, ...] = (),
        tied: bool = True,
    ) -> Running:
        """Start a process and wait until it is about to begin.

        Args:
            role: Module of ``inside`` that it runs.
            order: What it is told.
            stdin: What it reads; None for a pipe.
            share: File descriptors that it keeps under their numbers.
            tied: Whether it ends with the thread that started it.
        """
        alone = self.tool == "none"
        limits = {"memory": self.limits.memory_mb * MB, "files": self.limits.files_mb * MB}
        limits |= {"cpu_seconds": self.limits.cpu_seconds, "processes": -1 if alone else self.limits.processes}
        limits |= order.pop("limits", {})
        with contextlib.ExitStack() as stack:
            folder = tempfile.TemporaryDirectory(prefix="sandbox-") if alone else None
            order |= {"role": role, "limits": limits, "folder": folder.name if folder else "/tmp"}
            order |= {"packages": self.packages, "filtered": system_calls.known_machine()}
            told = stack.enter_context(in_memory(json.dumps(order).encode()))
            given = subprocess.PIPE if stdin is None else stack.enter_context(in_memory(stdin))
            process = subprocess.Popen(
                self._command(["-P", "-s", "-S", "-B", str(INSIDE / "start.py"), str(told)], tied),
                stdin=given,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                pass_fds=(told, *share),
                env=ENVIRONMENT,
                start_new_session=True,
            )
        with contextlib.ExitStack() as until_ready:
            running = until_ready.enter_context(Running(process, folder))
            running.until_ready()
            until_ready.pop_all()
        return running

    def _command(self, arguments: list[str], tied: bool) -> list[str]:
        command = [str(PYTHON), *arguments]
        if self.tool == "none":
            return command
        folders = [str(PYTHON.parents[1]), str(Path(sys.base_prefix).resolve()), str(INSIDE), *self.packages]
        uid = unused_uid(next(UIDS)) if os.getuid() == 0 else None
        room = Room(folders=folders, files=self.limits.files_mb * MB, uid=uid, tied=tied)
        return (bubblewrap if self.tool == "bubblewrap" else unshare)(room, command)


def installed_packages() -> tuple[str, ...]:
    """The folders of the packages that are installed here, for verifiers that need them."""
    return tuple(path for path in sys.path if path.endswith(("site-packages", "dist-packages")) and Path(path).is_dir())
