"""What a YAML may make Python import: a few packages, and what the person at the keyboard names with ``--import``.

A config that came with somebody's model must not be able to run somebody's code. jsonargparse holds every import path
against an allow-list before it imports anything; this module sets that list, checks what jsonargparse leaves to us, and
says which flag to add. The flag is read from the command line before any parser sees it, so no file can give it.
"""

import importlib
import inspect
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jsonargparse import Namespace, set_parsing_settings

from rlhf_lightning.commands.config_lines import config_files, keys_of_file
from rlhf_lightning.errors import UserError

FLAG = "--import"
PACKAGES = (
    "rlhf_lightning",
    "lightning",
    "torch.optim",
    "torch.nn",
    "torch.distributed.fsdp",
    "transformers.optimization",
)
FUNCTIONS = ("rlhf_lightning.rewards",)  # reward functions; the rest of a package is not meant to be called by a file
# A callback made of nothing but callables.
NEVER = ("lightning.pytorch.callbacks.LambdaCallback", "lightning.pytorch.callbacks.lambda_function")
DENIED = re.compile(r"Importing '([^']+)' is not allowed")


@dataclass
class Policy:
    """What the command line of this process allows.

    Attributes:
        given: Names and files behind ``--import``.
        files: The config files as typed, and where they are: jsonargparse changes the working directory while it parses.
        on: False until a command line was read: code that is written in Python imports what it likes.
    """

    given: tuple[str, ...] = ()
    files: dict[str, Path] = field(default_factory=dict)
    on: bool = False

    def modules(self) -> list[str]:
        """The names under which class paths reach what was given."""
        return [Path(name).stem if is_file(name) else name for name in self.given]

    def allows(self, where: str) -> bool:
        """Whether the user named this import path, or the file of ``file.py:name``."""
        file, _, name = where.rpartition(":")
        if name and file.endswith(".py"):
            return Path(file).resolve() in [Path(given).resolve() for given in self.given if is_file(given)]
        return under(where, self.modules())


POLICY = Policy()


def take_imports(args: list[str]) -> list[str]:
    """Read the ``--import`` flags off a command line, import what they name, and allow that and nothing more.

    Args:
        args: As typed, the command first.

    Returns:
        The other arguments.

    Raises:
        UserError: If something can't be imported.
    """
    rest = read_imports(args)
    for name in POLICY.given:
        import_given(name)
    return rest


def read_imports(args: list[str]) -> list[str]:
    """Read the ``--import`` flags off a command line and allow imports of the packages alone; nothing is imported.

    Args:
        args: As typed, the command first.

    Returns:
        The other arguments.

    Raises:
        UserError: If a flag has no value.
    """
    rest, given = [], []
    words = iter(args)
    for word in words:
        name, equals, value = word.partition("=")
        if name != FLAG:
            rest.append(word)
        elif value := value if equals else next(words, ""):
            given.append(value)
        else:
            raise UserError(f"{FLAG} needs the name of a module, or a Python file")
    files = {name: Path(name).resolve() for name in config_files(rest)}
    # What an earlier command in this process allowed is taken back.
    set_parsing_settings(
        import_path_denylist=["*", *POLICY.modules(), *NEVER],
        import_path_allowlist=list(PACKAGES),
        instantiate_subclass_spec_in_any=False,
    )
    POLICY.given, POLICY.files, POLICY.on = tuple(given), files, True
    return rest


def import_given(name: str) -> None:
    """Import a module by name, or a file, whose stem is then a module that class paths reach."""
    if not is_file(name):
        if Path(name).is_dir() or "/" in name:
            return  # a model whose own code is trusted
        if not {"", str(Path.cwd())} & set(sys.path):  # the console script lacks it, python -m does not
            sys.path.insert(0, "")
        try:
            importlib.import_module(name)
        except ImportError as error:
            raise UserError(f"{FLAG} {name}: {error}") from error
        set_parsing_settings(import_path_allowlist=[name])
        return
    from rlhf_lightning.rewards.function import module_from_file  # not above: it needs torch

    module = module_from_file(name)
    set_parsing_settings(import_path_allowlist=[module.__name__])


def check_imports(config: Any) -> None:
    """Hold what jsonargparse does not check against the policy: reward functions, functions as classes, models' code.

    Args:
        config: Parsed, and nothing of it instantiated yet.

    Raises:
        UserError: Names file, key and the flag to add.
    """
    if not POLICY.on:
        return
    for key, value in walk(config):
        last = key.rsplit(".", 1)[-1]
        if last == "function" and (where := import_path(value)) is not None and not allowed_function(where):
            raise UserError(refusal(where))
        if last == "class_path" and not POLICY.allows(value) and not is_class(value):
            raise UserError(
                f"{place(value)}: {value!r} is not a class; a config names classes, never functions to call"
            )
        if isinstance(value, dict) and value.get("trust_remote_code") is True and value.get("path") not in POLICY.given:
            raise UserError(
                f"{key}.trust_remote_code: the code that comes with {value.get('path')} is run only with "
                f"{FLAG} {value.get('path')} on the command line; read it first"
            )


def check_checkpoint(config: Any) -> None:
    """See that Lightning loads a checkpoint as tensors and plain data, from wherever: anything more is a pickle.

    Args:
        config: Of one of the Trainer's commands; ``weights_only`` is set in it.

    Raises:
        UserError: If a pickle was asked for.
    """
    if config.get("weights_only") is False:
        raise UserError(
            "weights_only: a checkpoint is loaded as tensors and plain data, never as a pickle; remove the key"
        )
    config.weights_only = True  # None means False to Lightning where the path is a URL
    path = config.get("ckpt_path")
    if path is not None and Path(path).is_dir():
        raise UserError(f"--ckpt_path {path} is a folder; sharded checkpoints hold pickles, give a .ckpt file")


def denied(message: str) -> UserError | None:
    """jsonargparse's refusal of an import, as a line that says what to do; None if that was not it."""
    found = DENIED.search(message)
    return UserError(refusal(found[1])) if found else None


def refusal(where: str) -> str:
    """The one line over an import path that was not allowed."""
    file = where.rpartition(":")[0]
    name = file if file.endswith(".py") else where.split(".")[0]
    return (
        f"{place(where)}: {where!r} is outside the packages that a config may import; if you trust it, add {FLAG} {name} to "
        "the command line"
    )


def place(value: str) -> str:
    """The config file, line and key that hold a value."""
    for file, path in POLICY.files.items():
        for typed in keys_of_file(str(path)):
            if typed.value == value:
                return typed._replace(file=file if typed.file == str(path) else typed.file).place
    return "command line"


def walk(value: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """Every value in nested namespaces, dictionaries and lists, with its dotted key."""
    value = vars(value) if isinstance(value, Namespace) else value
    yield key, value
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list | tuple) else ()
    for name, part in inner:
        yield from walk(part, f"{key}.{name}".lstrip("."))


def allowed_function(where: str) -> bool:
    """Whether a file may name this reward function."""
    return POLICY.allows(where) or under(where, FUNCTIONS)


def import_path(value: Any) -> str | None:
    """Where a function stands, given as text or resolved already; None for anything else."""
    if isinstance(value, str):
        return value
    return f"{value.__module__}.{value.__qualname__}" if inspect.isroutine(value) else None


def is_class(path: str) -> bool:
    """Whether an import path, or a short name that the parser resolved, is a class."""
    module, _, name = path.rpartition(".")
    return inspect.isclass(getattr(sys.modules.get(module), name, None))


def is_file(name: str) -> bool:
    return name.endswith(".py")


def under(path: str, packages: list[str] | tuple[str, ...]) -> bool:
    """Whether an import path is one of these or inside one."""
    return any(path == package or path.startswith(f"{package}.") for package in packages)
