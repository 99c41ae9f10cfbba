"""A plain Python function as a reward, with the signature that TRL's users have."""

import asyncio
import importlib
import importlib.util
import inspect
import sys
from collections import defaultdict
from collections.abc import Awaitable, Callable, Iterable, Mapping, Set
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from rlhf_lightning.errors import UserError
from rlhf_lightning.rewards.reward import Reward, Samples

if TYPE_CHECKING:
    from transformers import TrainerState


class FunctionReward(Reward):
    """``f(prompts, completions, completion_ids, trainer_state, log_extra, log_metric, **columns) -> list[float | None]``.

    ``completions`` are texts for text prompts and ``[{"role": "assistant", "content": text}]`` for conversations. Only the
    arguments that the function names are passed, all of them if it takes ``**kwargs``:

    - ``trainer_state``: a ``transformers.TrainerState`` with ``global_step``, ``max_steps`` (planned optimizer steps) and
      ``epoch``, for rewards that change during training. Outside of training it is at step 0 of 1.
    - ``log_extra(column, values)``: a column of the table of samples, with a value for each response.
    - ``log_metric(name, value)``: a scalar, logged as ``train/name``, or ``eval/sampled/name`` and ``eval/greedy/name``; the
      mean over the calls of an iteration or a validation, on all ranks.

    The result may be a list, a tuple, a generator, an array or a tensor. None for a response says that the function does not
    apply to it. The function may be ``async``. Source: TRL's GRPOTrainer, "Using a custom reward function".
    """

    def __init__(self, function: str | Callable[..., Any], skip_special_tokens: bool = True) -> None:
        """Find the function.

        Args:
            function: The function, or where it stands: ``package.module.name`` or ``path/to/file.py:name``.
            skip_special_tokens: Leave special tokens out of ``completions``, as TRL does. False for functions that look for
                them: then every token that was sampled is in the text, the closing EOS included.

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
        self.skip_special_tokens = skip_special_tokens
        self.skips_special_tokens = skip_special_tokens and (self._takes_all or "completions" in self._takes)
        self.logs_metrics = self._takes_all or "log_metric" in self._takes
        self.reads_trainer_state = self._takes_all or "trainer_state" in self._takes
        self._state: TrainerState | None = None
        self._metrics: dict[str, list[float]] = {}

    @property
    def name(self) -> str:
        return getattr(self.function, "__name__", type(self.function).__name__)

    def set_trainer_state(self, state: "TrainerState") -> None:
        self._state = state

    def logged_metrics(self) -> dict[str, list[float]]:
        return self._metrics

    def score(self, samples: Samples) -> Tensor | list[float | None]:
        texts = samples.texts(self.skip_special_tokens)
        completions = [
            text if isinstance(prompt, str) else [{"role": "assistant", "content": text}]
            for prompt, text in zip(samples.prompts, texts, strict=True)
        ]
        logged = Logged(self.name)
        given = {
            **samples.columns,
            "prompts": samples.prompts,
            "completions": completions,
            "completion_ids": samples.completion_ids,
            "trainer_state": self._trainer_state() if self.reads_trainer_state else None,
            "log_extra": logged.log_extra,
            "log_metric": logged.log_metric,
        }
        missing = sorted(self._needs - given.keys())
        if missing:
            raise UserError(
                f"{self.name} needs {', '.join(missing)}, which the rows have not; they have {', '.join(sorted(given))}"
            )
        result = self.function(**{k: v for k, v in given.items() if self._takes_all or k in self._takes})
        if inspect.isawaitable(result):
            result = _awaited(result)
        scores = self._numbers(result)
        samples.extra.update(logged.columns(len(samples.prompts)))
        self._metrics = dict(logged.metrics)
        return scores

    def _trainer_state(self) -> "TrainerState":
        """That of the training, or one at step 0 of 1."""
        from transformers import TrainerState  # takes seconds, which other rewards need not spend

        return TrainerState(max_steps=1) if self._state is None else self._state

    def _numbers(self, result: Any) -> Tensor | list[float | None]:
        """What the function returned, as numbers.

        Raises:
            UserError: If it is not a sequence of numbers and None.
        """
        if isinstance(result, Tensor):
            return result
        if isinstance(result, np.ndarray) and result.ndim > 0 and result.dtype.kind in "biuf":
            return torch.from_numpy(result.astype(np.float32))
        scalar = isinstance(result, np.ndarray) and result.ndim == 0
        if scalar or isinstance(result, str | bytes | Mapping | Set) or not isinstance(result, Iterable):
            raise UserError(f"{self.name} returned {type(result).__name__}; return a list with one number a response")
        try:
            numbers = [None if x is None else _number(x) for x in result]
        except (TypeError, ValueError) as error:
            raise UserError(f"{self.name} returned something that is not a number: {error}") from error
        return numbers if None in numbers else torch.tensor(numbers, dtype=torch.float32)


class Logged:
    """What a function logs during one call."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.metrics: dict[str, list[float]] = defaultdict(list)
        self.extra: dict[str, list[Any]] = defaultdict(list)

    def log_extra(self, column: str, values: Iterable[Any]) -> None:
        """Add values to a column of the table of samples: in all calls together, one for each response, in their order."""
        self.extra[str(column)] += list(values)

    def log_metric(self, name: str, value: float) -> None:
        """Add a value to the mean that is logged under a name.

        Raises:
            UserError: If it is not a number.
        """
        try:
            self.metrics[str(name)].append(_number(value))
        except (TypeError, ValueError) as error:
            raise UserError(f"{self.name}: log_metric({name!r}) needs a number: {error}") from error

    def columns(self, responses: int) -> dict[str, list[Any]]:
        """The logged columns.

        Raises:
            UserError: If one has not a value for each response.
        """
        for column, values in self.extra.items():
            if len(values) != responses:
                raise UserError(
                    f"{self.name}: log_extra({column!r}) got {len(values)} values for {responses} responses; give one each"
                )
        return dict(self.extra)


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
