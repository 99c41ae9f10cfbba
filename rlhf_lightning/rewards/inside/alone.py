"""A program that reads its standard input and writes its standard output."""

import builtins
import sys
from types import ModuleType
from typing import Any


def main(order: dict[str, Any]) -> None:
    """Run the source as ``__main__``."""
    module = ModuleType("__main__")
    module.__dict__["__builtins__"] = builtins
    sys.modules["__main__"] = module
    sys.argv = ["program.py"]
    exec(compile(order["source"], "program.py", "exec"), module.__dict__)
