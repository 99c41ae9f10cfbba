"""What the code is allowed to look like: imports point one way, and nothing grows too big to read."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "rlhf_lightning"
FILES = sorted(PACKAGE.rglob("*.py"))
LAYERS = [
    ["errors"],
    ["functional"],
    ["losses", "batches"],
    ["data"],
    ["worlds"],
    ["models"],
    ["generation"],
    ["rewards"],
    ["rollouts"],
    ["modules"],
    ["callbacks"],
    ["evaluation", "feedback"],
    ["commands"],
    ["cli"],
    ["__main__"],
]
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}
FREE_OF_LIGHTNING = ["functional", "losses", "batches", "models", "generation", "rewards", "rollouts"]


def part_of(file: Path) -> str:
    """``models`` of rlhf_lightning/models/policy.py, ``batches`` of rlhf_lightning/batches.py."""
    return file.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(file: Path) -> list[str]:
    names = []
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative import"
            names += [f"{node.module}.{alias.name}" for alias in node.names]
    return names


def test_every_part_of_the_package_has_a_layer():
    assert {part_of(file) for file in FILES} - {"__init__"} <= set(LEVEL)


def test_imports_point_down():
    upward = []
    for file in FILES:
        own = part_of(file)
        for name in imports(file):
            if not name.startswith("rlhf_lightning.") or name == "rlhf_lightning.__version__":
                continue
            other = name.split(".")[1]
            if own != "__init__" and other != own and LEVEL[other] >= LEVEL[own]:
                upward.append(f"{file.relative_to(PACKAGE)} imports {name}")
    assert upward == []


def test_formulas_import_torch_alone():
    modules = [f"rlhf_lightning.functional.{file.stem}" for file in (PACKAGE / "functional").glob("[!_]*.py")]
    assert len(modules) > 5
    heavy = ("lightning", "transformers", "datasets", "pandas", "pyarrow", "tokenizers", "torchmetrics", "jsonargparse")
    code = f"import sys, {', '.join(modules)}; print([m for m in {heavy} if m in sys.modules])"
    command = [sys.executable, "-c", code]
    result = subprocess.run(command, capture_output=True, text=True, check=True, cwd=PACKAGE.parent)
    assert result.stdout.strip() == "[]"


def test_what_is_not_a_lightning_module_does_not_know_lightning():
    files = [file for file in FILES if part_of(file) in FREE_OF_LIGHTNING]
    assert len(files) > 20
    found = [
        f"{file.relative_to(PACKAGE)}: {name}"
        for file in files
        for name in imports(file)
        if name.split(".")[0] in ("lightning", "pytorch_lightning")
    ]
    assert found == []


def test_only_manual_backward_is_called_in_modules():
    found = []
    for file in FILES:
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "backward":
                found.append(f"{file.relative_to(PACKAGE)}:{node.lineno}")
    assert found == []


CLOCKS = {"perf_counter", "perf_counter_ns", "monotonic", "monotonic_ns", "process_time", "thread_time"}


def test_no_test_asserts_the_seconds_of_a_clock():
    """A busy machine is no fault. Work is counted in calls: tests/calls.py."""
    found = []
    for file in sorted(PACKAGE.parent.glob("tests/**/test_*.py")):
        text = file.read_text()
        for node in ast.walk(ast.parse(text)) if any(name in text for name in CLOCKS) else []:
            inside = list(ast.walk(node)) if isinstance(node, ast.Assert) else []
            names = {part.attr for part in inside if isinstance(part, ast.Attribute)}
            names |= {part.id for part in inside if isinstance(part, ast.Name)}
            if names & CLOCKS:
                found.append(f"{file.relative_to(PACKAGE.parent)}:{node.lineno}")
    assert found == []


# What follows the training, where the user must learn that the training is kept whatever fails; and the loop of chat.
CATCH_ALL = [
    *("callbacks/kept_training.py", "callbacks/loggers.py", "commands/pipeline.py"),
    *("commands/chat.py", "commands/chat.py", "commands/speaker.py"),  # no error ends a conversation
]


def test_no_exception_is_caught_that_was_not_expected():
    found = []
    for file in FILES:
        for node in ast.walk(ast.parse(file.read_text())):
            if not isinstance(node, ast.ExceptHandler):
                continue
            caught = node.type.elts if isinstance(node.type, ast.Tuple) else [node.type]
            if any(kind is None or getattr(kind, "id", "") in ("Exception", "BaseException") for kind in caught):
                found.append(f"{file.relative_to(PACKAGE)}:{node.lineno}")
    assert sorted(place.split(":")[0] for place in found) == sorted(CATCH_ALL), found


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(PACKAGE)))
def test_files_functions_and_constructors_stay_small(file):
    text = file.read_text()
    assert len(text.splitlines()) <= 400
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert node.end_lineno - node.lineno + 1 <= 80, f"{node.name} is too long"
            if node.name == "__init__":
                arguments = node.args.posonlyargs + node.args.args + node.args.kwonlyargs
                # A data module has an argument for each key that YAML may set on it.
                most = 16 if file.parent.name == "data" else 11
                assert len(arguments) - 1 <= most, f"line {node.lineno}: {len(arguments) - 1} constructor arguments"
