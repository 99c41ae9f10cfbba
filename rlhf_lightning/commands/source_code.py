"""Signatures and docstrings read from source files.

Help and errors over a config need the names of arguments, and an import of torch and Lightning for them would take several
seconds. Nothing here executes or imports what it reads. What the source does not tell for certain is None.
"""

import ast
import importlib.util
import inspect
import re
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any, Literal, NamedTuple, Optional, Union

Definition = ast.ClassDef | ast.FunctionDef | ast.Assign | ast.AnnAssign
PACKAGE = "rlhf_lightning"
# Types that are known without an import.
NUMBERS = {"int": int, "float": float, "bool": bool}
PLAIN = NUMBERS | {"str": str, "list": list, "dict": dict, "typing.Any": Any}
FORMS: dict[str, Any] = {"typing.Optional": Optional, "typing.Union": Union}


class Module:
    """The top level of a source file: what it defines, and what it imports from where."""

    def __init__(self, name: str, file: Path) -> None:
        """Args: the dotted name and the file."""
        self.name, self.file = name, file
        self.definitions: dict[str, Definition] = {}
        self.imported: dict[str, str] = {}
        for statement in top_level(ast.parse(file.read_bytes()).body):
            if isinstance(statement, ast.ClassDef | ast.FunctionDef):
                self.definitions[statement.name] = statement
            elif isinstance(statement, ast.Assign) and isinstance(statement.targets[0], ast.Name):
                self.definitions[statement.targets[0].id] = statement
            elif isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
                self.definitions[statement.target.id] = statement
            elif isinstance(statement, ast.Import):
                for alias in statement.names:
                    head = alias.name.split(".")[0]
                    self.imported[alias.asname or head] = alias.name if alias.asname else head
            elif isinstance(statement, ast.ImportFrom):
                origin = self._origin(statement)
                self.imported |= {alias.asname or alias.name: f"{origin}.{alias.name}" for alias in statement.names}

    def _origin(self, statement: ast.ImportFrom) -> str:
        if not statement.level:
            return statement.module or ""
        package = self.name if self.file.name == "__init__.py" else self.name.rpartition(".")[0]
        for _ in range(statement.level - 1):
            package = package.rpartition(".")[0]
        return f"{package}.{statement.module}" if statement.module else package

    def path_of(self, node: ast.expr) -> str | None:
        """The import path that a name or an attribute stands for in this module."""
        if isinstance(node, ast.Attribute):
            owner = self.path_of(node.value)
            return f"{owner}.{node.attr}" if owner else None
        if not isinstance(node, ast.Name):
            return None
        return f"{self.name}.{node.id}" if node.id in self.definitions else self.imported.get(node.id)


class Found(NamedTuple):
    """A definition and the module that it is in."""

    module: Module
    node: Definition

    @property
    def path(self) -> str:
        """Import path."""
        return f"{self.module.name}.{getattr(self.node, 'name', '')}"


class Parameter(NamedTuple):
    """An argument of a function or class, or a field of a dataclass."""

    name: str
    annotation: ast.expr | None
    default: ast.expr | None
    module: Module


def top_level(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """Statements of a module, also those under ``if TYPE_CHECKING``."""
    for statement in body:
        if isinstance(statement, ast.If):
            yield from top_level(statement.body)
        else:
            yield statement


@cache
def module(name: str) -> Module | None:
    """The module with a dotted name; None if it has no source file."""
    top, *parts = name.split(".")
    spec = importlib.util.find_spec(top) if top.isidentifier() else None  # of a top-level name: imports nothing
    if spec is None or not spec.origin or not spec.origin.endswith(".py"):
        return None
    file = Path(spec.origin)
    if parts:
        file = file.parent.joinpath(*parts, "__init__.py")
        file = file if file.is_file() else file.parent.with_suffix(".py")
    return Module(name, file) if file.is_file() else None


def find(path: str | None) -> Found | None:
    """The definition behind an import path; re-exports are followed."""
    owner, _, name = (path or "").rpartition(".")
    if not owner or (here := module(owner)) is None:
        return None
    if name in here.definitions:
        return Found(here, here.definitions[name])
    return find(here.imported.get(name))


@cache
def classes_named(name: str) -> tuple[str, ...]:
    """Import paths of this package's classes with a short name."""
    root = Path(__file__).parents[1]
    pattern = re.compile(rf"^class {re.escape(name)}\b".encode(), re.MULTILINE)
    files = [file for file in sorted(root.rglob("*.py")) if pattern.search(file.read_bytes())]
    return tuple(".".join((PACKAGE, *file.relative_to(root).with_suffix("").parts, name)) for file in files)


def first_line(path: str) -> str:
    """First line of the docstring of a function."""
    found = find(path)
    text = ast.get_docstring(found.node) if found and isinstance(found.node, ast.FunctionDef) else None
    return (text or "").split("\n")[0]


def is_dataclass(found: Found) -> bool:
    """Whether a definition is a class with the decorator."""
    decorators = found.node.decorator_list if isinstance(found.node, ast.ClassDef) else []
    names = [found.module.path_of(d.func if isinstance(d, ast.Call) else d) for d in decorators]
    return "dataclasses.dataclass" in names


def parameters(found: Found) -> list[Parameter] | None:
    """Arguments of a function or of a class's constructor; None where a part of them is not in the source."""
    here, node = found
    if isinstance(node, ast.FunctionDef):
        return None if node.args.kwarg else _arguments(here, node.args)
    if not isinstance(node, ast.ClassDef):
        return None
    for statement in node.body:
        if isinstance(statement, ast.FunctionDef) and statement.name == "__init__":
            return _of_constructor(found, statement)
    inherited = _of_bases(found)
    if inherited is None:
        return None
    if not is_dataclass(found):
        return list(inherited.values())
    for statement in node.body:
        if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name) and _is_field(statement):
            name = statement.target.id
            inherited[name] = Parameter(name, statement.annotation, statement.value, here)
    return list(inherited.values())


def _of_bases(found: Found) -> dict[str, Parameter] | None:
    """Arguments that a class inherits, by name."""
    inherited: dict[str, Parameter] = {}
    for base in found.node.bases if isinstance(found.node, ast.ClassDef) else []:
        path = found.module.path_of(base)
        if path in ("abc.ABC", "typing.Generic", "typing.Protocol"):
            continue
        above = find(path)
        if above is None or (theirs := parameters(above)) is None:
            return None
        inherited = {p.name: p for p in theirs} | inherited
    return inherited


def _of_constructor(found: Found, init: ast.FunctionDef) -> list[Parameter] | None:
    """Arguments of ``__init__``; what it passes on as ``**kwargs`` to that of its base are the base's."""
    rest = init.args.kwarg
    own = _arguments(found.module, init.args)
    if own is None or rest is None:
        return None if own is None else own[1:]
    for call in ast.walk(init):
        if isinstance(call, ast.Call) and ast.unparse(call.func) == "super().__init__":
            passed = any(word.arg is None and ast.unparse(word.value) == rest.arg for word in call.keywords)
            inherited = _of_bases(found) if passed else None
            if inherited is None:
                return None
            given = {*list(inherited)[: len(call.args)], *(word.arg for word in call.keywords)}
            return own[1:] + [p for name, p in inherited.items() if name not in given]
    return None


def _is_field(statement: ast.AnnAssign) -> bool:
    keywords = statement.value.keywords if isinstance(statement.value, ast.Call) else []
    return "ClassVar" not in ast.unparse(statement.annotation) and not any(word.arg == "init" for word in keywords)


def _arguments(here: Module, given: ast.arguments) -> list[Parameter] | None:
    if given.vararg:
        return None
    positional = [*given.posonlyargs, *given.args]
    defaults = [*[None] * (len(positional) - len(given.defaults)), *given.defaults, *given.kw_defaults]
    return [
        Parameter(argument.arg, argument.annotation, default, here)
        for argument, default in zip([*positional, *given.kwonlyargs], defaults, strict=True)
    ]


def names_in(annotation: ast.expr | None, here: Module) -> Iterator[str]:
    """Import paths of what an annotation names, or the bare names of builtins; aliases are followed."""
    if annotation is None:
        yield "typing.Any"
        return
    if isinstance(annotation, ast.Constant):
        if isinstance(annotation.value, str):
            yield from names_in(ast.parse(annotation.value, mode="eval").body, here)
        return
    if isinstance(annotation, ast.Subscript) and here.path_of(annotation.value) == "typing.Literal":
        return
    if not isinstance(annotation, ast.Name | ast.Attribute):
        for part in ast.iter_child_nodes(annotation):
            if isinstance(part, ast.expr):
                yield from names_in(part, here)
        return
    path = here.path_of(annotation)
    alias = find(path)
    if alias is not None and isinstance(alias.node, ast.Assign | ast.AnnAssign) and alias.node.value is not None:
        yield from names_in(alias.node.value, alias.module)
    else:
        yield path or ast.unparse(annotation)


def type_of(annotation: ast.expr | None, here: Module, names: Mapping[str, Any]) -> Any:
    """The type hint that an annotation stands for.

    Args:
        annotation: The annotation.
        here: The module that it is in.
        names: Builtins and import paths that it may name. Unions and choices by name may be made of them.

    Raises:
        LookupError: If the annotation has anything else in it.
    """
    if isinstance(annotation, ast.Constant) and annotation.value is None:
        return None
    if isinstance(annotation, ast.BinOp) and isinstance(annotation.op, ast.BitOr):
        return Union[type_of(annotation.left, here, names), type_of(annotation.right, here, names)]  # noqa: UP007
    if isinstance(annotation, ast.Subscript):
        form = here.path_of(annotation.value) or ast.unparse(annotation.value)
        parts = annotation.slice.elts if isinstance(annotation.slice, ast.Tuple) else [annotation.slice]
        if form == "typing.Literal":
            return Literal[tuple(part.value for part in parts if isinstance(part, ast.Constant))]
        inner = tuple(type_of(part, here, names) for part in parts)
        return {**FORMS, **names}[form][inner if len(inner) > 1 else inner[0]]
    if not isinstance(annotation, ast.Name | ast.Attribute):
        raise LookupError
    path = here.path_of(annotation)
    alias = find(path)
    if alias is not None and isinstance(alias.node, ast.Assign | ast.AnnAssign):
        return type_of(alias.node.value, alias.module, names)
    return names[path or ast.unparse(annotation)]


def stand_in(path: str) -> Callable[..., Any] | None:
    """A function with the signature and the docstring of another one, which need not be imported for it.

    Args:
        path: Import path of the other.

    Returns:
        The function; None if an annotation or a default needs an import.
    """
    found = find(path)
    arguments = parameters(found) if found is not None else None
    if found is None or arguments is None or not isinstance(found.node, ast.FunctionDef):
        return None

    def command(**_: Any) -> None: ...

    kind, empty = inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.empty
    try:
        command.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
            [
                inspect.Parameter(
                    argument.name,
                    kind,
                    default=empty if argument.default is None else ast.literal_eval(argument.default),
                    annotation=type_of(argument.annotation, found.module, PLAIN),
                )
                for argument in arguments
            ]
        )
    except (LookupError, ValueError):
        return None
    command.__name__, command.__doc__ = found.node.name, ast.get_docstring(found.node)
    return command
