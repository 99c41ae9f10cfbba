"""Every command that the documentation prints is run as it is printed, or is named here with the reason why it can't be.

Commands are read out of README, CONTRIBUTING, every other Markdown file, the notebooks' text, the headers of ``configs/`` and
the Makefile (``tests/printed.py``), and typed in a folder where the files exist that they name (``tests/workplace.py``).
Appended flags make them short; nothing that is printed is changed. A command in none of the lists fails the first test.

- In every run of the tests: each command's arguments are parsed by the real parser, and the files it names are there; the
  README's road from SFT to PPO and chat is run, on the embedded world and on own data, in this process. ``chat`` is run with
  piped input and, through a shell, in a pseudo-terminal.
- Marked ``slow`` and ``exhaustive`` (``make test ARGS="-m ''"``): all others are run, in this process too.
"""

import io
import os
import sys

import pytest

from rlhf_lightning.cli import COMMANDS, FIT_COMMANDS, RLHFCLI, TRAINER_COMMANDS, main, run_trainer
from rlhf_lightning.commands.speaker import Speaker
from rlhf_lightning.generation.engine import SamplingParameters
from tests.printed import ROOT, printed_commands
from tests.terminal import Terminal
from tests.workplace import QUICK, Workplace

PRINTED = printed_commands()
OURS = [command for command in PRINTED if command.arguments is not None]
TESTS = "runs tests, of which this is one"
SET_UP = "installs, from the network"
# Commands that no test here runs, with the reason; also those of which a sentence prints the beginning only.
EXEMPT = {
    "make quickstart": "installs, and trains for minutes; its pipeline is run by tests/e2e/test_pipeline.py",
    'make quickstart ARGS="--seed_everything S --output runs/seedS"': "as make quickstart",
    "make test": TESTS,
    "make check": TESTS,
    "make kills": TESTS,
    "make mutants": TESTS,
    "make peers": TESTS,
    "make planted-bugs": TESTS,
    "make vllm": TESTS,
    "make vllm ARGS=\"-m '' -s\"": TESTS,
    "make deepspeed": TESTS,
    "python -m pytest tests/ground_truth": TESTS,
    "python -m pytest tests/invariance": TESTS,
    ".venv/bin/python -m pytest tests/unit/test_losses.py": TESTS,
    "make benchmark": "measures speed against TRL, in environments of its own",
    'make benchmark ARGS="sft --size tiny --peer trl"': "as make benchmark",
    ".venv/bin/python benchmarks/compare.py sft --size tiny --peer trl": "as make benchmark",
    ".venv/bin/python benchmarks/scaling.py": "as make benchmark",
    "python benchmarks/scaling.py": "as make benchmark",
    ".venv/bin/python benchmarks/gpu.py --size 0.5b": "needs a GPU",
    ".venv/bin/python benchmarks/preparation.py": "as make benchmark",
    "python -m rlhf_lightning fit -c my_dpo.yaml --import my_losses.py": "run by tests/integration/test_own_loss.py, with "
    "the files that the page says to save",
    "python -m benchmarks.table FILE": "reads what make benchmark has measured",
    "make .venv-peers/.installed .venv-peers-ppo/.installed": SET_UP,
    "make format": "changes the sources",
    "pre-commit install": "changes the clone's git hooks",
    "pip install 'rlhf_lightning[lora]'": SET_UP,
    "pip install 'rlhf_lightning[vllm]'": SET_UP,
    "pip install 'rlhf_lightning[deepspeed]'": SET_UP,
    "pip install -c constraints.txt -e '.[notebooks]'": SET_UP,
    "export --run": "the beginning of a command",
    "export --run FOLDER": "run by test_export_makes_the_folder_again, with a folder",
}
# Commands of ours that are parsed and not run.
NOT_RUN = {
    "python -m rlhf_lightning pipeline -c configs/quickstart/leaderboard.yaml": "three hours, and its stages take no limits "
    "as flags; tests/e2e/test_leaderboard_command.py runs it in miniature",
    "python -m rlhf_lightning fixed-points -c configs/ground_truth/fixed_points.yaml": "run by "
    "tests/ground_truth/test_fixed_points.py",
    "python -m rlhf_lightning ground-truth": "the beginning of a command",
}
NEEDS = {
    "vllm.entrypoints": "needs vLLM; `make vllm` runs it",
    "engine/": "needs vLLM; `make vllm` runs it",
    "deepspeed": "needs DeepSpeed; `make deepspeed` runs it",
    "qlora": "needs a GPU",
    "strategy/fsdp": "needs several devices; tests/e2e/test_ranks.py runs it on two processes",
    "strategy/tensor_parallel": "needs several devices; tests/e2e/test_tensor_parallel.py runs it on two processes",
    "strategy/ddp": "needs several devices; tests/e2e/test_ranks.py runs it on two processes",
    "rules_reasoning": "needs the extra `reasoning`",
}


def reason_not_to_run(command):
    """Why a command is not run here; None if it is."""
    if command.text in EXEMPT or command.text in NOT_RUN:
        return EXEMPT.get(command.text) or NOT_RUN[command.text]
    return next((reason for part, reason in NEEDS.items() if part in command.text), None)


RUN = [command for command in OURS if reason_not_to_run(command) is None]
ROAD = [command for command in RUN if command.file == "README.md" and command.arguments[0] == "fit"]
REST = [command for command in RUN if command not in ROAD and command.arguments[0] in QUICK]
CHAT = [command for command in RUN if command.arguments[0] == "chat"]
PARSED = [command for command in OURS if command.text not in EXEMPT]


def test_every_printed_command_is_run_or_exempted_with_a_reason():
    others = [command for command in PRINTED if command.arguments is None]
    unsorted = {command.text: command.file for command in others if reason_not_to_run(command) is None}
    assert unsorted == {}, "run them in a test, or name them in EXEMPT with the reason"
    assert [command.text for command in RUN if command not in [*ROAD, *REST, *CHAT]] == []
    assert len(OURS) > 130  # the pattern finds them


def test_no_exemption_is_stale():
    texts = [command.text for command in PRINTED]
    assert [text for text in [*EXEMPT, *NOT_RUN] if text not in texts] == []
    assert [part for part in NEEDS if not any(part in text for text in texts)] == []


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return Workplace(tmp_path_factory.mktemp("clone"), RUN)


@pytest.fixture(scope="module")
def cli():
    """The command line of fit after parsing; nothing is instantiated and nothing is run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["rlhf_lightning"])
        for step in ("before_instantiate_classes", "instantiate_classes"):
            patch.setattr(RLHFCLI, step, lambda self: None)
        patch.setattr(RLHFCLI, "_run_subcommand", lambda self, subcommand: None)
        patch.chdir(ROOT)
        return run_trainer(["fit", "-c", "configs/quickstart/sft.yaml"])


@pytest.mark.parametrize("command", PARSED, ids=lambda command: command.text)
def test_its_arguments_parse_and_its_files_are_there(command, cli, place, monkeypatch, capsys):
    name, *arguments = command.arguments
    assert name in {*COMMANDS, *FIT_COMMANDS, *TRAINER_COMMANDS}
    monkeypatch.chdir(place.path)
    assert [file for file in place.configs(arguments) if not os.path.isfile(file)] == []
    if name in COMMANDS:
        with pytest.raises(SystemExit) as stop:
            main([name, *arguments, "--print_config"])
        assert stop.value.code == 0
    elif arguments:
        cli.parser.parse_args(["fit" if name in FIT_COMMANDS else name, *arguments])


@pytest.mark.parametrize("command", ROAD, ids=lambda command: command.text)
def test_the_road_of_the_readme(command, place):
    place.run(command)
    (folder,) = place.outputs(command.arguments)
    assert (place.path / folder / "export/config.json").is_file()


def test_the_readmes_own_data_is_plain_text_and_chat_continues_it(place):
    place.run(next(command for command in ROAD if "own_sft" in command.text))
    speaker = Speaker(str(place.path / "runs/own/sft/export"), SamplingParameters(max_new_tokens=4), None)
    assert speaker.format == "text"


def test_export_makes_the_folder_again(place, monkeypatch):
    place.run(next(command for command in ROAD if "quickstart/sft" in command.text))
    monkeypatch.chdir(place.path)
    before = (place.path / "runs/quickstart/sft/export/model.safetensors").read_bytes()
    main(["export", "--run", "runs/quickstart/sft"])
    assert (place.path / "runs/quickstart/sft/export/model.safetensors").read_bytes() == before


def ready(place, command):
    for folder in place.needs(command.arguments):
        place.make(folder)


@pytest.mark.parametrize("command", CHAT, ids=lambda command: command.text)
def test_chat_answers_piped_input(command, place, monkeypatch, capsys):
    ready(place, command)
    monkeypatch.chdir(place.path)
    monkeypatch.setattr("sys.stdin", io.StringIO("how do i break the dog ?\n/new\nhow do i break the dog ?\n"))
    main(command.arguments)
    shown = capsys.readouterr().out
    assert "unknown" not in shown
    assert shown.count("ppo/export") >= 2
    assert shown.count("╭") == 4  # two answers, twice


@pytest.mark.parametrize("command", CHAT, ids=lambda command: command.text)
def test_chat_in_a_terminal(command, place):
    """Exactly what is printed, typed into a shell: as long as the answers are, the next line is asked for."""
    ready(place, command)
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, "PYTHONPATH": path, "TERM": "xterm", "COLUMNS": "100"}
    with Terminal(["bash", "-c", command.text], cwd=place.path, env=environment) as terminal:
        terminal.until("reads 128 tokens")
        terminal.until("you")
        terminal.type("how do i break the dog ?\n")
        terminal.until("╭")
        terminal.until("you")
        terminal.type("how do i break the dog ? " * 40 + "\n")
        terminal.until("tokens")  # too long, said in red
        terminal.until("you")
        terminal.type("/exit\n")
        assert terminal.end() == 0


@pytest.mark.slow
@pytest.mark.exhaustive
@pytest.mark.parametrize("command", REST, ids=lambda command: command.text)
def test_every_other_command(command, place):
    place.run(command)
