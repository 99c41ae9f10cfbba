"""What means harm, in a sandbox: no score, an end at its limit, and nothing left behind."""

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from rlhf_lightning.errors import UserError
from rlhf_lightning.rewards import sandbox as sandbox_module
from rlhf_lightning.rewards.inside import system_calls
from rlhf_lightning.rewards.parallel import in_parallel
from rlhf_lightning.rewards.sandbox import ENVIRONMENT, INSIDE, Limits, Sandbox
from rlhf_lightning.rewards.verdicts import passed_tests
from tests.faults.hostile import ATTEMPTS, LIES, hostile

LIMITS = Limits(seconds=3, cpu_seconds=1, memory_mb=256, processes=4, files_mb=8, output_kb=64)
# An honest program beside hostile ones is slow where the machine is busy.
PATIENT = Limits(seconds=120, cpu_seconds=60, memory_mb=256, processes=4, files_mb=8, output_kb=64)
TESTS = ["assert answer(6) == 42", "assert answer(7) == 49"]
HONEST = "def answer(x):\n    return 7 * x"
MARK = "SANDBOX_OF_THIS_TEST"


def usable(tool):
    """A sandbox made by that tool; skips where there is none."""
    made = Sandbox(tool, LIMITS)
    try:
        assert made.tool == tool
    except UserError as error:
        pytest.skip(str(error))
    return made


@pytest.fixture(scope="module", params=["bubblewrap", "unshare"])
def sandbox(request):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SECRET_OF_THE_TRAINER", "hush")
        patch.setitem(ENVIRONMENT, MARK, str(os.getpid()))
        yield usable(request.param)


def survivors():
    """Processes that were started in a sandbox of this test and still are."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if f"{MARK}={os.getpid()}".encode() in (folder / "environ").read_bytes():
                found.append((folder.name, (folder / "cmdline").read_bytes()))
        except OSError:  # gone meanwhile
            pass
    return found


@pytest.fixture(scope="module")
def harm(sandbox, tmp_path_factory):
    """All programs, a few at a time: the tests passed by each, and what they could have left behind.

    That there is a result says that each was ended: some of them sleep for ever.
    """
    folder = tmp_path_factory.mktemp("trainer")
    secret, target = folder / "secret", folder / "target"
    secret.write_text("hush")
    name = f"trainer-{os.getpid()}"
    with socket.create_server(("127.0.0.1", 0)) as server, socket.socket(socket.AF_UNIX) as abstract:
        abstract.bind(f"\0{name}")
        abstract.listen()
        port = server.getsockname()[1]
        programs = hostile(secret_file=secret, target=target, port=port, name=name, parent=os.getpid())
        before = sorted(os.listdir("/tmp"))

        patient = Sandbox(sandbox.isolation, PATIENT)

        def judged(item):
            return passed_tests(patient if item[1] == HONEST else sandbox, item[1], TESTS)

        items = [("honest before", HONEST), *programs.items(), ("honest after", HONEST)]
        results = dict(zip(dict(items), in_parallel(judged, items, "hostile", workers=6), strict=True))
    end = time.monotonic() + 60
    while survivors() and time.monotonic() < end:
        time.sleep(0.05)
    left = {name for name in set(os.listdir("/tmp")) - set(before) if name.startswith("sandbox-")}
    return results, {"processes": survivors(), "target": target.exists(), "tmp": left, "secret": secret.read_text()}


@pytest.mark.parametrize("name", [*ATTEMPTS, *LIES])
def test_a_hostile_program_gets_nothing_and_is_ended(harm, name):
    assert harm[0][name] == [False, False]


def test_nothing_is_left_of_any_of_them(harm):
    assert harm[1] == {"processes": [], "target": False, "tmp": set(), "secret": "hush"}


def test_an_honest_program_beside_them_is_not_disturbed(harm):
    assert harm[0]["honest before"] == harm[0]["honest after"] == [True, True]


# ---------------------------------------------------------------- a program with standard input and output


@pytest.mark.parametrize(
    ("source", "ended"),
    [
        ("while True: print('x' * 9999)", "output"),
        ("import time; time.sleep(1e6)", "time"),
        ("import os, time; os.close(1); time.sleep(1e6)", "time"),
        ("while True: pass", "exit"),
        ("import os; os.abort()", "exit"),
        ("raise SystemExit(3)", "exit"),
        ("print(input() + input())", "exit"),
    ],
)
def test_how_a_program_ends_is_told(sandbox, source, ended):
    outcome = sandbox.run(source, "a\nb\n")
    assert outcome.ended == ended
    assert len(outcome.output) <= LIMITS.output + (1 << 16)
    honest = "input" in source
    assert (outcome.code == 0) == honest
    assert outcome.output == (b"ab\n" if honest else outcome.output)


def test_the_same_program_prints_the_same(sandbox):
    source = "print(hash('a'), {'x', 'y', 'z'})"
    assert sandbox.run(source).output == sandbox.run(source).output


def test_a_trainer_that_is_killed_takes_its_programs_along(sandbox):
    code = (
        "from rlhf_lightning.rewards.sandbox import *\n"
        f"ENVIRONMENT.update({ENVIRONMENT!r})\n"
        f"box = Sandbox({sandbox.isolation!r}, Limits(seconds=60))\nbox.tool\n"
        "with box.start('alone', {'source': 'import time; time.sleep(1e6)'}):\n    print('running', flush=True)\n    input()"
    )
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", code], cwd=Path(__file__).parents[2], **pipes) as trainer:
        assert trainer.stdout.readline() == "running\n"
        assert survivors()
        trainer.kill()
    end = time.monotonic() + 60
    while survivors() and time.monotonic() < end:
        time.sleep(0.05)
    assert survivors() == []


# ---------------------------------------------------------------- where there is no sandbox


def test_without_the_means_it_refuses_and_says_what_to_do(monkeypatch):
    monkeypatch.setitem(ENVIRONMENT, "PATH", "/nowhere")
    with pytest.raises(UserError, match=r"bubblewrap: bwrap not found; unshare: unshare.* not found.*isolation: none"):
        Sandbox().run("print(1)")
    with pytest.raises(UserError, match=r"\(bubblewrap: bwrap not found\)"):
        Sandbox("bubblewrap").run("print(1)")


def test_a_machine_whose_system_calls_are_not_known_is_refused(monkeypatch):
    usable("unshare")
    monkeypatch.setattr(system_calls.platform, "machine", lambda: "abacus")
    with pytest.raises(UserError, match="no filter of system calls"):
        Sandbox("unshare").run("print(1)")


def test_a_sandbox_that_does_not_hold_is_refused(monkeypatch):
    usable("unshare")
    monkeypatch.setattr(sandbox_module, "unshare", lambda room, command: command)
    with pytest.raises(UserError, match=r"lacks no root.*processes of its own.*no network.*none of your files"):
        Sandbox("unshare").run("print(1)")


def test_a_sandbox_that_breaks_in_the_middle_is_an_error_and_no_zero(monkeypatch):
    box = usable("unshare")
    monkeypatch.setattr(
        sandbox_module, "unshare", lambda room, command: ["sh", "-c", "echo out of namespaces >&2; exit 1"]
    )
    with pytest.raises(UserError, match="could not be set up: out of namespaces"):
        passed_tests(box, HONEST, TESTS)


def test_without_isolation_the_limits_still_hold(monkeypatch):
    monkeypatch.setitem(ENVIRONMENT, MARK, str(os.getpid()))
    box = Sandbox("none", LIMITS)
    assert passed_tests(box, HONEST, TESTS) == [True, True]
    for name in ("memory in one piece", "sleep for ever", "a loop for ever", "one huge file", "endless output"):
        assert passed_tests(box, hostile()[name], TESTS) == [False, False], name
    assert box.run("open('left', 'w'); print(open('left').read() == '')").output == b"True\n"
    assert survivors() == []
    assert not Path("left").exists()


@pytest.mark.parametrize("wrong", [{"seconds": 0}, {"memory_mb": -1}, {"processes": 0}], ids=str)
def test_limits_that_nothing_can_live_with_are_refused(wrong):
    with pytest.raises(UserError, match="more than 0"):
        Limits(**wrong)


@pytest.mark.parametrize("machine", ["x86_64", "aarch64"])
def test_the_filter_answers_as_its_table_says(monkeypatch, machine):
    """Every call, and every bit of clone's flags, through an interpreter of the filter's own instructions."""
    monkeypatch.setattr(system_calls.platform, "machine", lambda: machine)
    which, number_of_machine = system_calls.MACHINES[machine]
    forbidden = {numbers[which] for numbers in system_calls.FORBIDDEN.values()}

    def answer(number, first=0, on=number_of_machine):
        data, line, value = {0: number, 4: on, 16: first}, 0, 0
        while True:
            code, yes, no, constant = system_calls.struct.unpack_from("=HBBI", system_calls.program(), 8 * line)
            if code == 0x06:
                return constant
            if code == 0x20:
                value, jump = data[constant], 0
            else:
                jump = yes if {0x15: value == constant, 0x35: value >= constant, 0x45: value & constant}[code] else no
            line += 1 + jump

    allow, refuse, missing, kill = 0x7FFF0000, 0x00050001, 0x00050026, 0x80000000
    clone = system_calls.CLONE[which]
    for number in range(600):
        if number != clone:
            assert answer(number) == (refuse if number in forbidden else missing if number == 435 else allow), number
    namespaces = {1 << bit for bit in range(32) if 0x7E020000 >> bit & 1}
    assert {1 << bit for bit in range(32) if answer(clone, 1 << bit) == refuse} == namespaces
    assert answer(0, on=0x40000003) == kill  # 32-bit calls have other numbers
    if machine == "x86_64":
        assert answer(0x40000000) == kill


def test_what_runs_inside_imports_nothing_of_the_project_but_itself():
    for file in INSIDE.glob("*.py"):
        for line in file.read_text().splitlines():
            if line.startswith(("import rlhf", "from rlhf")):
                assert line.startswith("from rlhf_lightning.rewards.inside"), f"{file.name}: {line}"
