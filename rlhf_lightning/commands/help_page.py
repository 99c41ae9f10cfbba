"""The page of ``COMMAND -c CONFIG --help``: every key of the chosen classes, with its meaning, type, default and value."""

import inspect
import re
import shlex
import shutil
import textwrap
import typing
from argparse import SUPPRESS
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

from docstring_parser import parse
from jsonargparse import ArgumentParser

from rlhf_lightning.commands.class_names import classes_in, fitting_names, named_classes, subclasses
from rlhf_lightning.commands.config_lines import CONFIG_FLAGS, Typed, typed_keys
from rlhf_lightning.commands.type_names import in_words, shown
from rlhf_lightning.commands.typed_keys import nearest, parser_of
from rlhf_lightning.errors import UserError

FLAGS = ("-h", "--help")
OWN = "command"  # the section of keys that are of no class
ORDER = ("model", "data", "", "checkpoint", "export", "samples", "heartbeat", "trainer")
SKIPPED = ("help", "config", "print_config", "print_shtab", "subcommand")
WIDEST = 110  # columns that are still easy to read
ROLES = re.compile(r":\w+:`~?(?:[\w.]*\.)?(\w+)`")
THEIR_DEFAULT = re.compile(r"\s*Defaults?(?: to|:) ``[^`]*``\.?|\s*\(default: [^()]*(?:\([^()]*\))?[^()]*\)")
NO_MEANING = "One or more arguments specifying"


@dataclass
class Entry:
    """One key of the page.

    Attributes:
        key: Dotted, as on the command line.
        kind: Its type hint.
        default: Its default, as the parser has it.
        help: From the docstring.
        typed: Where it is set; None where the default holds.
        required: Whether there is no default.
    """

    key: str
    kind: Any
    default: Any
    help: str
    typed: Typed | None
    required: bool


@dataclass
class Section:
    """The keys of one object: its key, its class, what else fits there, and where the class was chosen."""

    key: str
    cls: type | None
    kind: Any = None
    help: str = ""
    typed: Typed | None = None
    entries: list[Entry] = field(default_factory=list)

    @property
    def title(self) -> str:
        return f"{self.key or OWN}{f': {self.cls.__name__}' if self.cls else ''}"


def wants_help(args: Sequence[str]) -> bool:
    """Whether a command line asks for the page."""
    return any(arg.partition("=")[0] in FLAGS for arg in args)


def help_page(command: str, parser: ArgumentParser, args: Sequence[str]) -> str:
    """The page of a command with these config files and flags; of one section, if ``--help`` names one.

    Args:
        command: Its name.
        parser: Its parser.
        args: The command line, without the command.

    Raises:
        UserError: If a config file is missing or no YAML, or there is no such section.
    """
    width = min(shutil.get_terminal_size((100, 24)).columns, WIDEST)
    rest, name = without_help(args)
    for flag, value in pairwise(rest):
        if flag in CONFIG_FLAGS and not Path(value).is_file():
            raise UserError(f"-c {value}: there is no such file")
    found = [section for section in sections(parser, in_order(rest)) if section.entries or section.cls]
    found.sort(key=lambda section: _rank(section.key))
    if name is not None:
        wanted = [section for section in found if f"{section.key or OWN}.".startswith(f"{name.removeprefix('--')}.")]
        if not wanted:
            near = nearest(name, [section.key or OWN for section in found])
            raise UserError(
                f"--help {name}: there is no such section{f'; did you mean {near}?' if near else ''}; --help alone lists them"
            )
        return "\n\n".join(_lines(section, width, {}) for section in wanted)
    documented: dict[Any, str] = {}
    return "\n\n".join([_top(command, rest, found, width), *(_lines(section, width, documented) for section in found)])


def without_help(args: Sequence[str]) -> tuple[list[str], str | None]:
    """The command line without ``--help``, and the section that it names."""
    rest, name, words = [], None, list(args)
    while words:
        word, equals, value = words.pop(0).partition("=")
        if word not in FLAGS:
            rest.append(f"{word}{equals}{value}")
        elif equals:
            name = value
        elif words and not words[0].startswith("-"):
            name = words.pop(0)
    return rest, name


def in_order(args: Sequence[str]) -> list[Typed]:
    """What was typed, each key after those that it wins over: files in their order, then flags."""
    typed = list(typed_keys(args))
    return [t for t in typed if t.file is not None] + [t for t in typed if t.file is None]


# ---------------------------------------------------------------- the keys, by object


def sections(parser: ArgumentParser, typed: list[Typed]) -> Iterator[Section]:
    """A section for each object that the command builds, and one for the keys of no object."""
    yield from _of_parser(parser, Section("", None), typed, {})


def _of_parser(
    parser: ArgumentParser, root: Section, typed: list[Typed], defaults: dict[str, Any]
) -> Iterator[Section]:
    """The section of a class and of everything below it, in the order of its arguments."""
    titles = {getattr(group, "dest", None): group.title for group in parser._action_groups}
    groups, found = {"": root}, [root]
    skipped = arguments_of_caller(root)
    for action in parser._actions:
        dest = action.dest
        if dest in (*SKIPPED, *skipped) or dest.endswith(".help") or action.help == SUPPRESS:
            continue
        key = f"{root.key}.{dest}".lstrip(".")
        if (base := getattr(action, "basetype", None)) is not None:  # a dataclass, whose keys follow
            groups[dest] = Section(key, base, help=titles.get(dest) or "" if root.key else "")
            found.append(groups[dest])
            continue
        kind, default = getattr(action, "_typehint", None), defaults.get(dest, action.default)
        own = [t for t in typed if full_key(t) == key and not t.key.endswith(".init_args")]
        last = own[-1] if own else None
        inner = list(_objects(key, kind, default, typed))
        for name, cls, values, chosen in inner:
            section = Section(name, cls, kind, action.help or "", chosen or last)
            found += _of_parser(parser_of(cls), section, _since(cls, name, typed), values)
        if not inner:
            parent = groups.get(dest.rpartition(".")[0], root)
            parent.entries.append(Entry(key, kind, default, action.help or "", last, bool(action.required)))
    yield from found


def arguments_of_caller(section: Section) -> list[str]:
    """Arguments of a class that the code gives it where the key takes a callable, such as an optimizer's parameters."""
    if section.cls is None or getattr(typing.get_origin(section.kind), "__name__", "") != "Callable":
        return []
    given = typing.get_args(section.kind)[0]
    return list(inspect.signature(section.cls).parameters)[: len(given)] if isinstance(given, list) else []


def full_key(typed: Typed) -> str:
    """A key without the levels that only files have, and with the indices of lists."""
    parts = typed.key.rstrip("+").split(".")
    return ".".join(part for part in parts if part not in ("init_args", "dict_kwargs", "class_path"))


def names_class(typed: Typed) -> bool:
    """Whether a value can be the name of a class."""
    return bool(typed.value) and typed.value[0] not in "{[" and not typed.key.endswith(".init_args")


def _objects(
    key: str, kind: Any, default: Any, typed: list[Typed]
) -> Iterator[tuple[str, type, dict[str, Any], Typed | None]]:
    """The objects of a key: name, class, what the default says of its arguments, and what named the class."""
    bases = classes_in(kind)
    last = {full_key(t): t for t in typed if bases and t.name == key and names_class(t)}
    for name, t in last.items():
        for cls in named_classes({t.value}, bases)[:1]:
            yield name, cls, {}, t
    if last or not bases or isinstance(default, type):
        return
    values: dict[str, Any] = default if isinstance(default, dict) else dict(getattr(default, "__dict__", {}))
    path = values.get("class_path")
    if path is not None and (found := named_classes({path, path.rpartition(".")[2]}, bases)):
        arguments = values.get("init_args") or {}
        yield key, found[-1], arguments if isinstance(arguments, dict) else vars(arguments), None
    elif hasattr(default, "__dataclass_fields__"):
        yield key, type(default), values, None
    elif any(t.name.startswith(f"{key}.") for t in typed):
        for cls in [base for base in bases if hasattr(base, "__dataclass_fields__")][:1]:
            yield key, cls, {}, None


def _since(cls: type, key: str, typed: list[Typed]) -> list[Typed]:
    """What was typed since the class of a key was chosen last: arguments of an earlier class are forgotten."""
    start, before = 0, None
    for index, t in enumerate(typed):
        if full_key(t) == key and names_class(t):
            name = t.value.rpartition(".")[2]
            start, before = (start if before in (None, name) else index), name
    return typed[start:] if before in (None, cls.__name__) else typed


def _rank(key: str) -> tuple[int, int]:
    first = key.partition(".")[0]
    return (ORDER.index(first) if first in ORDER else ORDER.index(""), 0 if key else -1)


# ---------------------------------------------------------------- the text


def _top(command: str, args: list[str], found: list[Section], width: int) -> str:
    line = f"python -m rlhf_lightning {command}{''.join(f' {shlex.quote(arg)}' for arg in args)}"
    lines = [*_wrapped(f"usage: {line} [--KEY VALUE ...]", width, "", "    "), ""]
    lines += _wrapped(
        "Every key of this command with its value. Set a key by a flag (--trainer.max_epochs 3) or in a YAML file, where the "
        "keys of a chosen class are below init_args. The last one wins: files in their order, then flags. "
        "* marks what your files and flags set.",
        width,
    )
    if not args and any(section.key == "trainer" for section in found):
        lines += [""]
        lines += _wrapped(
            "This page has no model and no data yet. With a config it shows all their keys: "
            f"python -m rlhf_lightning {command} -c configs/quickstart/ppo.yaml --help",
            width,
        )
    lines += ["", f"Sections ({command} ... --help SECTION shows one alone):"]
    longest = max((len(section.key or OWN) for section in found), default=0)
    for section in found:
        about = section.cls.__name__ if section.cls else f"keys of {command} itself"
        mark = "*" if is_set(section) else " "
        lines.append(f"{mark} {section.key or OWN:<{longest}}  {about}")
    return "\n".join(lines)


def is_set(section: Section) -> bool:
    """Whether a file or flag sets anything in a section."""
    return section.typed is not None or any(entry.typed for entry in section.entries)


def _lines(section: Section, width: int, documented: dict[Any, str]) -> str:
    """A section as text; the keys of a class that has been shown are listed without their meaning."""
    note = f"({_where(section.typed)})" if section.typed and section.cls else ""
    beside = note if len(section.title) + len(note) + 2 <= width else ""
    lines = [f"{section.title}  {beside}".rstrip(), "-" * len(section.title), *([note] if note and not beside else [])]
    if section.help and not section.help.startswith(NO_MEANING):
        lines += _wrapped(f"{plain(section.help).rstrip('.')}.", width)
    before = documented.get(section.cls) if section.cls else None
    if section.cls is not None and before is None:
        documented[section.cls] = section.key
        lines += _wrapped(about_class(section.cls), width)
    if before is not None:
        lines += _wrapped(f"Its keys mean the same as those of {before}.", width)
    others = [name for name in _names(section.kind) if section.cls and name != section.cls.__name__]
    if others and documented.setdefault(section.kind, section.key) == section.key:
        lines += _wrapped(f"Other classes that fit: {', '.join(others)}", width, "", "  ")
    for entry in section.entries:
        lines += _entry(entry, width, short=before is not None)
    return "\n".join(lines)


def _entry(entry: Entry, width: int, *, short: bool) -> list[str]:
    mark = "*" if entry.typed else " "
    head = f"{mark} --{entry.key} {_value(entry)}".rstrip()
    facts = [in_words(entry.kind)] if entry.kind is not None else []
    if entry.required:
        facts += ["required"] if entry.typed is None else []
    elif entry.typed is not None:
        facts.append(f"default {shown(entry.default)}")
    facts += [_where(entry.typed)] if entry.typed is not None else []
    note = f"({'; '.join(facts)})" if facts else ""
    if len(head) > width:
        head = f"{head[: width - 4].rstrip()} ..."
    lines = [f"{head}  {note}"] if len(head) + len(note) + 2 <= width else [head, *_meaning(note, width)]
    if short:
        return lines
    keep_default = entry.default is None and "``None``" not in entry.help
    if not entry.help.startswith(NO_MEANING):
        lines += _meaning(plain(entry.help if keep_default else THEIR_DEFAULT.sub("", entry.help)), width)
    if entry.key in ("model", "data"):
        for name in _names(entry.kind):
            (cls,) = named_classes({name}, classes_in(entry.kind))[:1]
            lines += _wrapped(f"{name}: {about_class(cls, first=True)}", width, "      ", "        ")
    elif names := _names(entry.kind):
        lines += _wrapped(f"Classes: {', '.join(names)}", width, "      ", "        ")
    else:
        for base in [base for base in classes_in(entry.kind) if hasattr(base, "__dataclass_fields__")]:
            fields = ", ".join(base.__dataclass_fields__)
            lines += _wrapped(f"Keys of {base.__name__}: {fields}", width, "      ", "        ")
    return lines


def _where(typed: Typed) -> str:
    return "set by a flag" if typed.file is None else f"set in {typed.file}:{typed.line}"


def _meaning(text: str, width: int) -> list[str]:
    return _wrapped(text, width, "      ", "      ")


def _value(entry: Entry) -> str:
    if entry.typed is not None:
        return entry.typed.value
    return "" if entry.required else shown(entry.default)


def _names(kind: Any) -> list[str]:
    """The loaded classes that a key takes, where they are to be chosen by name."""
    bases = [base for base in classes_in(kind) if inspect.isabstract(base) or len(list(subclasses(base))) > 1]
    return fitting_names(bases)


def about_class(cls: type, *, first: bool = False) -> str:
    """The description of a class, without its arguments; of other packages' classes the first sentence alone."""
    if cls.__module__.startswith("lightning.pytorch.trainer"):
        return ""
    doc = parse(inspect.getdoc(cls) or "")
    long = doc.long_description if not first and not cls.__module__.startswith(("torch.", "lightning.")) else None
    paragraphs = [part for part in re.split(r"\n\s*\n", long or "") if not part.startswith(".. ")]
    return plain(" ".join([doc.short_description or "", *paragraphs]))


def plain(text: str) -> str:
    """Text of a docstring without its markup."""
    return " ".join(ROLES.sub(r"\1", text).replace("``", "").split())


def _wrapped(text: str, width: int, first: str = "", then: str = "") -> list[str]:
    return textwrap.wrap(text, width, initial_indent=first, subsequent_indent=then, break_on_hyphens=False)
