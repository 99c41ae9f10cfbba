"""Write down what the installed TRL computes: ``python -m tests.peers.record`` in an environment that ``make peers`` made.

1.16.0 is the peer of the offline methods and of those that learn from groups, 1.12.0 the last with PPO. Names of cases write
these alone anew.
"""

import json
import platform
import sys
import tempfile
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from tests.peers.cases import OFFLINE, ONLINE
from tests.peers.group_cases import GROUPS
from tests.peers.problem import ARCHITECTURES, checksum, folders
from tests.peers.unpaired_cases import UNPAIRED

RECORDED = Path(__file__).parent / "recorded"
CASES: dict[str, dict[str, Any]] = {"1.16.0": OFFLINE | GROUPS | UNPAIRED, "1.12.0": ONLINE}


def installed() -> str | None:
    """TRL's version, None where there is none."""
    try:
        return version("trl")
    except PackageNotFoundError:
        return None


def compute(name: str, paths: dict[str, dict[str, str]], scratch: Path) -> dict[str, Any]:
    """Run one case in the TRL that has it."""
    if name in OFFLINE:
        from tests.peers import trl_offline

        return trl_offline.run(OFFLINE[name], paths[OFFLINE[name].architecture], scratch)
    if name in GROUPS:
        from tests.peers import trl_group

        return trl_group.run(GROUPS[name], paths[GROUPS[name].architecture], scratch)
    if name in UNPAIRED:
        from tests.peers import trl_unpaired

        return trl_unpaired.run(UNPAIRED[name], paths[UNPAIRED[name].architecture], scratch)
    from tests.peers import trl_ppo

    return trl_ppo.run(ONLINE[name], paths[ONLINE[name].architecture], scratch)


def read(trl: str) -> dict[str, Any]:
    """What was recorded with a version, for the problem of today.

    Raises:
        AssertionError: If the problem has changed since.
    """
    record = json.loads((RECORDED / f"trl-{trl}.json").read_text())
    assert record["problem"] == checksum(), (
        f"weights or rows are not those that TRL {trl} was recorded with: tests/peers/problem.py or the names and shapes of "
        "transformers' parameters have changed; see README.md on how to record anew"
    )
    return record


def rounded(x: Any) -> Any:
    """Floats to eight digits: a float32 holds no more."""
    if isinstance(x, float):
        return float(f"{x:.8g}")
    if isinstance(x, dict):
        return {key: rounded(value) for key, value in x.items()}
    return [rounded(value) for value in x] if isinstance(x, list) else x


def main() -> None:
    trl = installed()
    if trl not in CASES:
        raise SystemExit(f"trl is {trl or 'not installed'}; this records {' or '.join(CASES)}")
    with tempfile.TemporaryDirectory() as scratch:
        paths = {name: folders(name, Path(scratch)) for name in ARCHITECTURES}
        names = sys.argv[1:] or CASES[trl]
        new = {name: rounded(compute(name, paths, Path(scratch) / "out")) for name in names}
    runs = {**read(trl)["runs"], **new} if sys.argv[1:] else new
    packages = {name: version(name) for name in ("trl", "torch", "transformers", "accelerate")}
    head = {"how": "python -m tests.peers.record", "python": platform.python_version(), "packages": packages}
    lines = [f"  {json.dumps(name)}: {json.dumps(run)}" for name, run in runs.items()]
    body = f'"problem": {json.dumps(checksum())},\n"recorded": {json.dumps(head)},\n"runs": {{\n' + ",\n".join(lines)
    (RECORDED / f"trl-{trl}.json").write_text("{\n" + body + "\n}}\n")


if __name__ == "__main__":
    main()
