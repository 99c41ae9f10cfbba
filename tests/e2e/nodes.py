"""Hosts on one machine: network namespaces joined by a cable, or where those are not to be had, agents on loopback."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

PREFIX = "10.77.5"


class Hosts:
    """Two hosts, each with a name, an address, an interface and a disk of its own.

    Attributes:
        apart: Whether they are in namespaces of their own, so that a cable can be pulled.
    """

    def __init__(self, folder: Path) -> None:
        self.names = [f"rl{os.getpid()}{end}" for end in "ab"]
        self.homes = [folder / name for name in ("host-a", "host-b")]
        for home in self.homes:
            home.mkdir(parents=True)
        self.apart = self._lay_cable()
        self.addresses = [f"{PREFIX}.1", f"{PREFIX}.2"] if self.apart else ["127.0.0.1"] * 2

    def _lay_cable(self) -> bool:
        if shutil.which("ip") is None or os.geteuid() != 0:
            return False
        a, b = self.names
        made = [ip("netns", "add", name) for name in self.names]
        if not all(made) or not ip("link", "add", a, "netns", a, "type", "veth", "peer", "name", b, "netns", b):
            self.close()
            return False
        for name, end in zip(self.names, (1, 2), strict=True):
            ip("-n", name, "addr", "add", f"{PREFIX}.{end}/24", "dev", name)
            ip("-n", name, "link", "set", name, "up")
            ip("-n", name, "link", "set", "lo", "up")
        return True

    def pull_cable(self) -> None:
        """From now on no packet passes, and neither end is told."""
        assert self.apart
        ip("-n", self.names[0], "link", "set", self.names[0], "down")

    def plug_in(self) -> None:
        """As before."""
        ip("-n", self.names[0], "link", "set", self.names[0], "up")

    def command(self, host: int, *words: str) -> list[str]:
        """A command that runs on a host."""
        return [*(["ip", "netns", "exec", self.names[host]] if self.apart else []), *words]

    def environment(self, host: int) -> dict[str, str]:
        """Of a process there: a cache of its own, and the interface that gloo is to use."""
        interface = self.names[host] if self.apart else "lo"
        cache = str(self.homes[host] / "cache")
        return {"GLOO_SOCKET_IFNAME": interface, "RLHF_LIGHTNING_CACHE": cache, "OMP_NUM_THREADS": "1"}

    def close(self) -> None:
        """Remove the namespaces, the cable with them."""
        for name in self.names:
            ip("netns", "delete", name)


def ip(*words: str) -> bool:
    """Whether the command could be carried out."""
    return subprocess.run(["ip", *words], capture_output=True, check=False).returncode == 0


class TwoNodes:
    """A run on two hosts, one torchrun agent with one rank on each, begun at once."""

    def __init__(self, hosts: Hosts, args: list[str], log: Path, backend: str = "static") -> None:
        with socket.create_server(("127.0.0.1", 0)) as server:
            endpoint = f"{hosts.addresses[0]}:{server.getsockname()[1]}"
        self.logs = [log.with_name(f"{log.name}-{end}.log") for end in "ab"]
        self.agents: list[subprocess.Popen[bytes]] = []
        training = [*args, "--trainer.num_nodes", "2", "--trainer.devices", "1"]
        for host, path in enumerate(self.logs):
            agent = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1"]
            agent += ["--local-addr", hosts.addresses[host], "--rdzv-id", "test", "--rdzv-backend", backend]
            where = [
                "--node-rank",
                str(host),
                "--master-addr",
                hosts.addresses[0],
                "--master-port",
                endpoint.split(":")[1],
            ]
            if backend == "c10d":
                where = ["--rdzv-endpoint", endpoint, "--rdzv-conf", f"is_host={int(host == 0)},read_timeout=15"]
            command = hosts.command(host, *agent, *where, "-m", "rlhf_lightning", *training)
            environment = os.environ | hosts.environment(host)
            with path.open("ab") as file:
                self.agents.append(
                    subprocess.Popen(command, cwd=hosts.homes[host], env=environment, stdout=file, stderr=file)
                )

    def join(self, timeout: float, of: tuple[int, ...] = (0, 1)) -> list[int]:
        """Wait for agents to end.

        Returns:
            Their exit codes.
        """
        end = time.monotonic() + timeout
        return [self.agents[host].wait(max(0.1, end - time.monotonic())) for host in of]

    def wait_for(self, path: Path, timeout: float = 120) -> None:
        """Until there is such a file."""
        end = time.monotonic() + timeout
        while not path.exists():
            assert time.monotonic() < end, f"{path} never came: {self.text()}"
            assert all(agent.poll() is None for agent in self.agents), self.text()
            time.sleep(0.005)

    def kill(self, host: int) -> None:
        """SIGKILL to everything of this run on a host, the agent first."""
        for pid in family(self.agents[host].pid):
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue

    def text(self, host: int | None = None) -> str:
        """What the run has said, on one host or on both."""
        logs = self.logs if host is None else [self.logs[host]]
        return "\n".join(path.read_text()[-4000:] for path in logs)

    def close(self) -> None:
        """Leave nothing behind."""
        for host, agent in enumerate(self.agents):
            self.kill(host)
            agent.wait()


def family(pid: int) -> list[int]:
    """A process and its descendants, the oldest first."""
    parents: dict[int, int] = {}
    for entry in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = entry.read_text().rsplit(")", 1)[1].split()
        except OSError:
            continue
        parents[int(entry.parent.name)] = int(fields[1])
    found = [pid]
    for parent in found:
        found += [child for child, its in parents.items() if its == parent]
    return found
