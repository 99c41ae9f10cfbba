"""First code in a sandbox: sets the limits, closes system calls, says that it is ready, and takes up its role.

``python start.py FD``: a JSON object is read from that file descriptor; ``role`` names a module beside this file, whose
``main`` is given the object. Until the first line is out, whatever goes wrong is the sandbox's fault; after it, the program's.
"""

import importlib
import json
import os
import resource
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

PACKAGE = "rlhf_lightning.rewards.inside"


def limit(limits: dict[str, int]) -> None:
    """Ceilings that a process without privileges can't raise again; below zero: none."""
    memory, files = limits["memory"], limits["files"]
    ceilings = {
        "RLIMIT_AS": memory,
        "RLIMIT_CPU": limits["cpu_seconds"],
        "RLIMIT_NPROC": limits["processes"],
        "RLIMIT_FSIZE": files,
        "RLIMIT_NOFILE": 64,
        "RLIMIT_CORE": 0,
        "RLIMIT_MEMLOCK": 0,
        "RLIMIT_MSGQUEUE": 0,
        "RLIMIT_SIGPENDING": 256,
    }
    if sys.platform != "linux":  # macOS has the name, and refuses to set it
        del ceilings["RLIMIT_AS"]
    for name, most in ceilings.items():
        kind = getattr(resource, name, None)  # some are Linux's alone
        if kind is not None and most >= 0:
            hard = resource.getrlimit(kind)[1]
            most = most if hard == resource.RLIM_INFINITY else min(most, hard)
            resource.setrlimit(kind, (most, most))


def only_this_package() -> None:
    """Make the modules beside this file importable under their full names, without running what lies above them."""
    for depth in range(1, PACKAGE.count(".") + 2):
        name = ".".join(PACKAGE.split(".")[:depth])
        module = ModuleType(name)
        module.__path__ = [str(Path(__file__).parent)] if name == PACKAGE else []
        sys.modules[name] = module


def main() -> None:
    """Read the order, obey."""
    with os.fdopen(int(sys.argv[1]), "rb") as file:
        order: dict[str, Any] = json.loads(file.read())
    sys.path += order["packages"]
    only_this_package()
    os.chdir(order["folder"])
    role = importlib.import_module(f"{PACKAGE}.{order['role']}")
    system_calls, plain = (importlib.import_module(f"{PACKAGE}.{name}") for name in ("system_calls", "plain"))
    limit(order["limits"])
    if order["filtered"]:
        system_calls.forbid()
    plain.quiet(2)
    os.write(1, b"ready\n")
    role.main(order)


if __name__ == "__main__":
    main()
