"""Hold what mutmut found against the list of mutants that change nothing; the last step of ``make mutants``.

A mutant is known by its function and by the lines that it changes, for its number moves with every edit. The check fails
when too few mutants are killed, when a survivor is not listed, and when a listed one is no survivor any more.
"""

import subprocess
import sys
import tomllib
from pathlib import Path
from typing import NamedTuple

LISTED = Path(__file__).with_name("equivalent.toml")
LEAST_KILLED = 0.95
KILLED = ("killed", "timeout")  # a loop that never ends is noticed too


class Mutant(NamedTuple):
    """One change: the function as ``package.module.function`` or ``package.module.Class.method``, and its lines."""

    function: str
    before: str
    after: str


def read_statuses(listing: str) -> dict[str, str]:
    """Name and status of every mutant, from the lines ``name: status`` of ``mutmut results``."""
    pairs = (line.strip().rpartition(": ") for line in listing.splitlines() if "__mutmut_" in line)
    return {name: status for name, _, status in pairs}


def read_mutant(name: str, diff: str) -> Mutant:
    """The mutant of that name, from the diff that ``mutmut show`` prints."""
    function = name.rpartition("__mutmut_")[0].replace(".x_", ".").replace(".xǁ", ".").replace("ǁ", ".")
    lines = [line for line in diff.splitlines() if not line.startswith(("---", "+++"))]
    before, after = ("\n".join(line[1:].strip() for line in lines if line.startswith(sign)) for sign in "-+")
    return Mutant(function, before, after)


def read_listed(path: Path) -> set[Mutant]:
    """Mutants that are said to change nothing. Raises KeyError if one comes without a reason."""
    entries = tomllib.loads(path.read_text())["equivalent"]
    return {Mutant(e["function"], e["before"], e["after"]) for e in entries if e["reason"]}


def judge(statuses: dict[str, str], survivors: set[Mutant], listed: set[Mutant]) -> tuple[str, bool]:
    """What is to be printed, and whether it will do."""
    killed = sum(status in KILLED for status in statuses.values())
    share = killed / max(len(statuses), 1)
    left = len(statuses) - killed
    unlisted, stale = sorted(survivors - listed), sorted(listed - survivors)
    lines = [f"not listed: {m.function}\n  - {m.before}\n  + {m.after}" for m in unlisted]
    lines += [f"listed, but no survivor any more: {m.function}\n  - {m.before}\n  + {m.after}" for m in stale]
    told = "all listed" if not unlisted else f"{len(unlisted)} not listed"
    lines.append(f"{len(statuses)} mutants, {killed} killed ({share:.1%}), {left} survivors {told}")
    return "\n".join(lines), share >= LEAST_KILLED and not unlisted and not stale


def mutmut(*arguments: str) -> str:
    """What this environment's mutmut prints."""
    command = [str(Path(sys.executable).with_name("mutmut")), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def main() -> int:
    """Print the verdict; 1 if it is bad."""
    statuses = read_statuses(mutmut("results", "--all", "true"))
    survivors = {read_mutant(name, mutmut("show", name)) for name, status in statuses.items() if status not in KILLED}
    text, good = judge(statuses, survivors, read_listed(LISTED))
    print(text)
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
