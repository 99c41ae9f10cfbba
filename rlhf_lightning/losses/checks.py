"""What coefficients must be, and what a class of the user's own must have."""

import inspect
import re
from typing import Any

from rlhf_lightning.errors import UserError

QUALIFIED = re.compile(r"(?:\w+\.)+(?=\w)")


def require_positive(name: str, value: float) -> None:
    if not value > 0:
        raise UserError(f"{name} must be positive, not {value}")


def require_not_negative(**coefficients: float) -> None:
    for name, value in coefficients.items():
        if not value >= 0:
            raise UserError(f"{name} must not be negative, not {value}")


def require_one_or_more(**counts: int) -> None:
    for name, value in counts.items():
        if value < 1:
            raise UserError(f"{name} must be at least 1, not {value}")


def require_flip_probability(label_smoothing: float) -> None:
    if not 0 <= label_smoothing < 0.5:
        raise UserError(f"label_smoothing is a flip probability in [0, 0.5), not {label_smoothing}")


def require_interface(name: str, value: Any, *bases: type) -> None:
    """Make sure that an object can be used where one of these base classes is expected.

    Args:
        name: The argument that received it, for the message.
        value: An instance of a subclass, or of any class that has the same members.
        bases: The base classes; abstract methods and annotated attributes are what is needed.

    Raises:
        UserError: If a member is missing, or a method has another signature; shows what to write.
    """
    if isinstance(value, type):
        raise UserError(f"{name}: {value.__name__} is a class; give an object, {value.__name__}(...)")
    own = [base for base in bases if isinstance(value, base)] or list(bases)
    wrong = [problem(value, base) for base in own]
    if None not in wrong:
        raise UserError(f"{name}: {type(value).__name__} {wrong[0]}; {' or '.join(contract(base) for base in own)}")


def problem(value: Any, base: type) -> str | None:
    """What makes an object unusable as an instance of a base class; None if nothing does."""
    missing = [name for name in needed(base, own=isinstance(value, base)) if not hasattr(value, name)]
    if missing:
        return f"has no {', '.join(missing)}"
    for name in abstract_methods(base):
        method, expected = getattr(type(value), name, None), getattr(base, name)
        if not inspect.isfunction(expected) or not inspect.isfunction(method):
            continue
        if not accepts(inspect.signature(method), inspect.signature(expected)):
            return f"has {name}{inspect.signature(method)}, which can't be called as it will be"
    return None


def needed(base: type, *, own: bool) -> list[str]:
    """Members without which an object is none of this base class.

    Args:
        base: The base class.
        own: Whether the object is an instance of a subclass, which inherits what is not abstract.
    """
    annotated = [name for cls in base.__mro__ for name in inspect.get_annotations(cls)]
    names = {*abstract_methods(base), *(name for name in annotated if not name.startswith("_"))}
    if not own:
        names |= {name for name in dir(base) if not name.startswith("_")}
    return sorted(names)


def accepts(given: inspect.Signature, expected: inspect.Signature) -> bool:
    """Whether a method can be called with the arguments of another one: by position, the keyword-only ones by name."""
    kinds = inspect.Parameter
    arguments = [
        p for p in expected.parameters.values() if p.kind in (kinds.POSITIONAL_ONLY, kinds.POSITIONAL_OR_KEYWORD)
    ]
    by_name = {p.name: None for p in expected.parameters.values() if p.kind is kinds.KEYWORD_ONLY}
    try:
        given.bind(*[None] * len(arguments), **by_name)
    except TypeError:
        return False
    return True


def abstract_methods(cls: type) -> list[str]:
    """Names of what a class leaves to its subclasses."""
    return sorted(getattr(cls, "__abstractmethods__", ()))


def contract(base: type) -> str:
    """What to write for a class of one's own: the base class, and each member that it must define."""
    members = []
    for name in abstract_methods(base):
        member = getattr(base, name)
        function = member.fget if isinstance(member, property) else member
        first = QUALIFIED.sub("", str(inspect.signature(function))) if inspect.isfunction(function) else "(self)"
        doc = (inspect.getdoc(member) or "").split("\n")[0].split(";")[0].rstrip(".")
        members.append(f"{'@property ' * isinstance(member, property)}def {name}{first}{f' ({doc})' * bool(doc)}")
    abstract = set(abstract_methods(base))
    members += [name for name in needed(base, own=True) if name not in abstract and not hasattr(base, name)]
    return f"write a subclass of {base.__module__}.{base.__name__} with {', '.join(members)}"
