"""The classes that fit a key, and which of them a mistyped name is most likely meant to be."""

import inspect
import sys
import typing
from collections.abc import Iterator, Sequence
from difflib import get_close_matches
from typing import Any

# Modules whose classes are types of values, such as Path, and what the command line or other classes build.
NEVER_NAMED = ("builtins", "pathlib", "datetime", "collections", "typing")
BUILT_BY_COMMANDS = ("rlhf_lightning.callbacks.", "rlhf_lightning.commands.")
BUILT_BY_CLASSES = ("GuardedReward", "Iteration", "Members", "AcceleratedOptimizer", "RowsDataModule", "DatasetSource")
SUFFIXES = ("DataModule", "Module", "Loss", "Reward", "Source", "Callback", "Logger", "Strategy", "Engine", "LR")


def classes_in(kind: Any) -> list[type]:
    """The classes in a type hint that a config may name: in a union, a list, or what a callable returns."""
    if isinstance(kind, type) and not typing.get_args(kind):
        return [] if kind.__module__.partition(".")[0] in NEVER_NAMED or kind.__module__ == "torch" else [kind]
    parts = typing.get_args(kind)
    if getattr(typing.get_origin(kind), "__name__", "") == "Callable":
        parts = parts[-1:]
    return list(dict.fromkeys(cls for part in parts for cls in classes_in(part)))


def subclasses(base: type) -> Iterator[type]:
    """The class and every loaded class below it."""
    yield base
    below: list[type] = type.__subclasses__(base)
    for cls in below:
        yield from subclasses(cls)


def fitting_names(bases: Sequence[type]) -> list[str]:
    """Names of the loaded classes that a key with these base classes takes."""
    found = {cls for base in bases for cls in subclasses(base) if not inspect.isabstract(cls) and is_choice(cls)}
    return sorted({cls.__name__ for cls in found - {base for base in bases if not is_ours(base)}})


def is_choice(cls: type) -> bool:
    """Whether a config is meant to name a class: not what the command line or another class builds itself."""
    internal = cls.__module__.startswith(BUILT_BY_COMMANDS) or cls.__name__ in BUILT_BY_CLASSES
    return not internal and not cls.__name__.startswith(("_", "Base"))


def is_ours(cls: type) -> bool:
    """Whether a class is of this package."""
    return cls.__module__.startswith("rlhf_lightning.")


def nearest_class(value: str, names: Sequence[str]) -> str | None:
    """The class name that a mistyped one is most likely meant to be; None where none is near.

    Case and the usual suffix do not count: ``dpo`` is DPOLoss where losses fit, and PPOModule is what ``ppo`` means.

    Args:
        value: As typed: a name or an import path.
        names: Names that fit.
    """
    typed = _bare(value.rpartition(".")[2])
    bare: dict[str, str] = {}
    for name in names:
        bare.setdefault(_bare(name), name)
    lower = {name.lower(): name for name in names}
    if typed in bare:
        return bare[typed]
    if close := get_close_matches(value.rpartition(".")[2].lower(), lower, 1, 0.6):
        return lower[close[0]]
    close = get_close_matches(typed, bare, 1, 0.6)
    return bare[close[0]] if close else None


def _bare(name: str) -> str:
    """A class name in lower case, without separators and the usual suffix."""
    name = name.replace("_", "").replace("-", "").lower()
    suffix = next((end.lower() for end in SUFFIXES if name.endswith(end.lower()) and name != end.lower()), "")
    return name.removesuffix(suffix)


def imported(path: str) -> type | None:
    """The class of an import path whose module is loaded: nothing is imported for the sake of an error message."""
    module, _, name = path.rpartition(".")
    cls: Any = getattr(sys.modules.get(module), name, None)
    return cls if isinstance(cls, type) else None


def named_classes(names: set[str], bases: Sequence[type]) -> list[type]:
    """Classes with these names or import paths, the short names among the subclasses of ``bases``."""
    found = [cls for base in bases for cls in subclasses(base) if cls.__name__ in names]
    return list(dict.fromkeys(found + [cls for name in names if (cls := imported(name))]))


def loaded_names() -> set[str]:
    """Names of all loaded classes of this package: what has one of them was not mistyped."""
    modules = [module for name, module in list(sys.modules.items()) if name.startswith("rlhf_lightning.")]
    return {name for module in modules for name, x in vars(module).items() if isinstance(x, type)}
