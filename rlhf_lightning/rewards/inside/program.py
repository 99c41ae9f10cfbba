"""The program under test, in a process that never sees a test: it is asked for values, and answers with plain data."""

import builtins
import json
from types import ModuleType
from typing import Any

from rlhf_lightning.rewards.inside.plain import Caught, Lines, decode, encode, quiet


class Served:
    """The names of a module, and the objects that were given out by number."""

    def __init__(self, module: ModuleType) -> None:
        self.module = module
        self.objects: list[Any] = []

    def keep(self, value: Any) -> int:
        """Hold an object that is no plain data; its number stands for it."""
        self.objects.append(value)
        return len(self.objects) - 1

    def answer(self, request: dict[str, Any]) -> dict[str, Any]:
        """Do what is asked; see ``tester.Program``."""
        caught = Caught()
        with caught:
            return self.done(request)
        error = caught.error
        return {"raised": [kind.__name__ for kind in type(error).__mro__], "message": str(error)[:1000]}

    def done(self, request: dict[str, Any]) -> dict[str, Any]:
        if "name" in request:
            return {"value": encode(getattr(self.module, request["name"]), self.keep)}
        target = self.objects[request["object"]]
        if "attribute" in request:
            return {"value": encode(getattr(target, request["attribute"]), self.keep)}
        arguments = [decode(value, self.objects.__getitem__) for value in request["arguments"]]
        named = {key: decode(value, self.objects.__getitem__) for key, value in request["named"].items()}
        value = encode(target(*arguments, **named), self.keep)
        # What the call did to its arguments, for tests of functions that work in place.
        after = [encode(x, self.keep) if isinstance(x, list | dict | set | bytearray) else None for x in arguments]
        return {"value": value, "after": after}


def main(order: dict[str, Any]) -> None:
    """Run the source, then answer until nobody asks."""
    quiet(0, 1)
    lines = Lines(order["channel"])
    module = ModuleType("solution")
    module.__dict__["__builtins__"] = builtins
    exec(compile(order["source"], "solution.py", "exec"), module.__dict__)
    served = Served(module)
    while True:
        request = json.loads(lines.receive())
        lines.send(json.dumps(served.answer(request)).encode())
