"""A plain Python function as a reward, with the signature that TRL's users have."""

import asyncio
import importlib
import importlib.util
import inspect
import sys
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from rlhf_lightning.errors import UserError
from rlhf_lightning.rewards.reward import Reward, Samples


class FunctionReward(Reward):
    """``f(prompts, completions, completion_ids, **columns) -> list[float | None]``.

    ``completions`` are texts for text prompts and ``[{"role": "assistant", "content": text}]`` for conversations. Only the
    arguments that the function names are passed, all of them if it takes ``**kwargs``. None for a response says that the
    function does not apply to it. The function may be ``async``.
    """

    def __init__(self, function: str | Callable[..., Any]) -> None:
        """Find the function.

        Args:
            function: The function, or where it stands: ``package.module.name`` or ``path/to/file.py:name``.

        Raises:
            UserError: If it can't be found or is not callable.
        """
        self.function = find_function(function) if isinstance(function, str) else function
        parameters = inspect.signature(self.function).parameters.values()
        variable = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
        self._needs = {p.name for p in parameters if p.default is p.empty and p.kind not in variable}
        self._takes_all = any(p.kind is p.VAR_KEYWORD for p in parameters)
        self._takes = {p.name for p in parameters}
        self.waits = inspect.iscoroutinefunction(self.function)

    @property
    def name(self) -> str:
        return getattr(self.function, "__name__", type(self.function).__name__)

    def score(self, samples: Samples) -> Tensor | list[float | None]:
        completions = [
            text if isinstance(prompt, str) else [{"role": "assistant", "content": text}]
            for prompt, text in zip(samples.prompts, samples.completions, strict=True)
        ]
        given = {
            **samples.columns,
            "prompts": samples.prompts,
            "completions": completions,
            "completion_ids": samples.completion_ids,
        }
        missing = sorted(self._needs - given.keys())
        if missing:
            raise UserError(
                f"{self.name} needs {', '.join(missing)}, which the rows have not; they have {', '.join(sorted(given))}"
            )
        result = self.function(**{k: v for k, v in given.items() if self._takes_all or k in self._takes})
        if inspect.isawaitable(result):
            result = _awaited(result)
        if not isinstance(result, list | tuple | Tensor):
            raise UserError(f"{self.name} returned {type(result).__name__}; return a list with one number a response")
        if isinstance(result, Tensor):
            return result
        try:
            numbers = [None if x is None else _number(x) for x in result]
        except (TypeError, ValueError) as error:
            raise UserError(f"{self.name} returned something that is not a number: {error}") from error
        return numbers if None in numbers else torch.tensor(numbers, dtype=torch.float32)


def _awaited(result: Awaitable[Any]) -> Any:
    """What comes of it, in a thread of its own: in a notebook this one has an event loop already."""

    async def wait() -> Any:
        return await result

    with ThreadPoolExecutor(1, thread_name_prefix="async reward") as pool:
        return pool.submit(asyncio.run, wait()).result()


def _number(x: Any) -> float:
    if isinstance(x, str):
        raise TypeError(f"the text {x!r}")
    return float(x)


def find_function(where: str) -> Callable[..., Any]:
    module_name, _, name = where.rpartition(":" if ":" in where else ".")
    if not module_name:
        raise UserError(f"{where!r} names no function; write package.module.name or path/to/file.py:name")
    try:
        module = module_from_file(module_name) if module_name.endswith(".py") else importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        raise UserError(f"{where}: {error}") from error
    function = getattr(module, name, None)
    if not callable(function):
        raise UserError(f"{module_name} holds no function {name!r}")
    return function


_LOADED: dict[tuple[Path, bytes], ModuleType] = {}


def module_from_file(path: str) -> ModuleType:
    """A Python file as a module; run once, until its text changes.

    Raises:
        UserError: If it is not there, or no Python.
    """
    file = Path(path).expanduser().resolve()
    if not file.is_file():
        raise UserError(f"{path} does not exist")
    key = file, file.read_bytes()
    if key not in _LOADED:
        name = _free_name(file)
        spec = importlib.util.spec_from_file_location(name, file)
        if spec is None or spec.loader is None:
            raise UserError(f"{path} can't be imported as Python")
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        try:
            spec.loader.exec_module(module)
        except SyntaxError as error:
            raise UserError(f"{path}, line {error.lineno}: {error.msg}") from error
        _LOADED[key] = module
    return _LOADED[key]


def _free_name(file: Path) -> str:
    """The file's stem, under which a saved config finds its classes; not where that is another module's name."""
    known = sys.modules.get(file.stem)
    if known is None:
        spec = importlib.util.find_spec(file.stem) if file.stem.isidentifier() else None
        taken = not file.stem.isidentifier() or (spec is not None and spec.origin != str(file))
    else:
        taken = getattr(known, "__file__", None) != str(file)
    # A user's math.py must not become everybody's `math`.
    return f"rlhf_lightning_user_{file.stem}_{abs(hash(file))}" if taken else file.stem
