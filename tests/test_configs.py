"""Every YAML under configs/ parses, prints and instantiates, without network and without GPU, and says what it is for."""

import re
import shlex
import socket
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
import yaml
from lightning.pytorch import Trainer

from rlhf_lightning.cli import FIT_COMMANDS, RLHFCLI, main, run_trainer
from rlhf_lightning.data.module import RowsDataModule

CONFIGS = Path(__file__).parents[1] / "configs"
LAUNCH = re.compile(r"^# python -m rlhf_lightning ([\w-]+) (.*)$", re.MULTILINE)


def header(file):
    """The comment that a file opens with."""
    lines = file.read_text().splitlines()
    return "\n".join(lines[: next(i for i, line in enumerate(lines) if not line.startswith("#"))])


def is_of_fit(file):
    """Files of other commands have parsers of their own, and tests beside those; some commands take the files of fit."""
    launch = LAUNCH.search(header(file))
    return launch is None or launch[1] in ("fit", *FIT_COMMANDS)


FILES = sorted(CONFIGS.rglob("*.yaml"))
OVERLAYS = [file for file in FILES if file.parent.name in ("strategy", "debug")]
ENGINES = [file for file in FILES if file.parent.name == "engine"]
CHOICES = [file for file in FILES if file.parent.name in ("losses", "papers")]  # on top of the files in the launch line
METHODS = [
    file for file in FILES if file.parent != CONFIGS and file not in OVERLAYS + ENGINES + CHOICES and is_of_fit(file)
]
SFT = CONFIGS / "quickstart" / "sft.yaml"


def name(file):
    return str(file.relative_to(CONFIGS))


def config_flags(files):
    return [part for file in files for part in ("-c", str(file))]


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    def refuse(*_):
        raise AssertionError("a config file was not to touch the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)


@pytest.fixture(scope="module")
def cli():
    """The command line after parsing; nothing is instantiated and nothing is run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["rlhf_lightning"])  # Lightning warns of pytest's
        for step in ("before_instantiate_classes", "instantiate_classes"):
            patch.setattr(RLHFCLI, step, lambda self: None)
        patch.setattr(RLHFCLI, "_run_subcommand", lambda self, subcommand: None)
        return run_trainer(["fit", *config_flags([SFT])])


def parse(cli, *files):
    return cli.parser.parse_args(["fit", *config_flags(files)])


def printed(cli, config):
    return yaml.safe_load(cli._subcommand_parsers["fit"].dump(config.fit, skip_none=False))


def given(values, prefix=()):
    """Each value that a file gives, by where it stands."""
    for key, value in values.items() if isinstance(values, dict) else enumerate(values):
        if value and (isinstance(value, dict) or (isinstance(value, list) and isinstance(value[0], dict))):
            yield from given(value, (*prefix, key))
        else:
            yield (*prefix, key), value


def value_at(values, path):
    for key in path:
        values = values[key]
    return values


@pytest.mark.parametrize("file", METHODS, ids=name)
def test_a_method_parses_prints_and_instantiates(cli, file):
    if "ReasoningGym" in file.read_text() and find_spec("reasoning_gym") is None:
        pytest.skip("its tasks need the extra 'reasoning'")
    config = parse(cli, file)
    out = printed(cli, config)
    for path, value in given(yaml.safe_load(file.read_text())):
        if path[-1] == "class_path":
            assert value_at(out, path).rsplit(".", 1)[-1] == value.rsplit(".", 1)[-1]
        else:
            assert value_at(out, path) == value, f"{'.'.join(path)} is not what the file says"
    built = cli.parser.instantiate(config).fit
    assert isinstance(built.model, torch.nn.Module)
    assert isinstance(built.data, RowsDataModule)


def test_instantiating_builds_no_network(cli):
    built = cli.parser.instantiate(parse(cli, SFT)).fit
    assert list(built.model.parameters()) == []


def trainer_of(cli, files, **changed):
    """The Trainer that the command line would make of these files."""
    config = parse(cli, *files)
    values = vars(cli.parser.instantiate(config).fit.trainer)
    return Trainer(**{**values, **changed, "logger": False})


@pytest.mark.parametrize("file", OVERLAYS, ids=name)
def test_an_overlay_changes_what_it_names_and_nothing_else(cli, file):
    plain, overlaid = (printed(cli, parse(cli, *files)) for files in ([SFT], [SFT, file]))
    changes = dict(given(yaml.safe_load(file.read_text())))
    for path, value in changes.items():
        assert value_at(overlaid, path) == value
    strategy = {("trainer", "strategy")}
    unnamed = [p for p, _ in given(plain) if p not in changes and p[:2] not in {q[:2] for q in changes} | strategy]
    assert [p for p in unnamed if value_at(overlaid, p) != value_at(plain, p)] == []

    if file.stem == "fsdp" and not torch.cuda.is_available():
        pytest.skip("parsed and printed; Lightning makes no FSDP1 strategy without a GPU")
    if file.stem == "deepspeed" and find_spec("deepspeed") is None:
        pytest.skip("parsed and printed; the strategy needs an extra")
    here = {} if torch.cuda.is_available() else {"accelerator": "cpu", "devices": 1}
    trainer = trainer_of(cli, [SFT, file], **here)
    wanted = changes.get(("trainer", "precision"), "32-true")
    assert trainer.precision == wanted


@pytest.mark.parametrize("file", ENGINES, ids=name)
def test_an_engine_overlay_changes_the_engine_and_nothing_else(cli, file):
    ppo = CONFIGS / "quickstart" / "ppo.yaml"
    plain, overlaid = (printed(cli, parse(cli, *files)) for files in ([ppo], [ppo, file]))
    (sampling,) = yaml.safe_load(file.read_text())["model"]["init_args"].values()
    own, found = sampling.pop("engine"), overlaid["model"]["init_args"]["sampling"]
    engine = found["engine"]
    assert sampling == {}
    assert engine["class_path"].rsplit(".", 1)[-1] == own["class_path"]
    assert engine["init_args"] | own["init_args"] == engine["init_args"]
    found["engine"] = None
    assert overlaid == plain


@pytest.mark.parametrize("file", CHOICES, ids=name)
def test_a_choice_changes_what_it_names_on_top_of_what_its_launch_line_names(cli, file):
    """A loss alone, or the settings of a paper: never the model, its method or the data."""
    launch = LAUNCH.search(header(file))
    words = shlex.split(launch[2])
    stack = [CONFIGS.parent / word for word in words if word.startswith("configs/")]
    assert stack[-1] == file
    assert len(stack) > 1, "the launch line lacks the file that it goes on top of"
    plain, overlaid = (printed(cli, parse(cli, *files)) for files in (stack[:-1], stack))
    changes = dict(given(yaml.safe_load(file.read_text())))
    for path, value in changes.items():
        found = value_at(overlaid, path)
        if path[-1] == "class_path":
            assert found.rsplit(".", 1)[-1] == value.rsplit(".", 1)[-1]
        else:
            assert found == value
    named = {path[:3] for path in changes}  # model.init_args.loss, trainer.accumulate_grad_batches
    assert not any(path[0] == "data" and path[-1] == "class_path" for path in changes)
    if file.parent.name == "losses":  # IPO's gradient is another size, so that it has a learning rate of its own
        assert named - {("model", "init_args", "optimizer")} == {("model", "init_args", "loss")}
        assert ("model", "init_args", "optimizer") not in named or file.stem == "ipo"
    assert value_at(overlaid, ("model", "class_path")) == value_at(plain, ("model", "class_path"))
    assert [p for p, v in given(plain) if p[:3] not in named and value_at(overlaid, p) != v] == []
    built = cli.parser.instantiate(parse(cli, *stack)).fit
    assert isinstance(built.model, torch.nn.Module)


def test_later_files_win(cli):
    base, cpu = CONFIGS / "base.yaml", CONFIGS / "strategy" / "cpu.yaml"
    trainer = trainer_of(cli, [base, SFT, cpu])
    assert (trainer.max_steps, trainer.num_sanity_val_steps) == (500, float("inf"))  # base has 0, sft -1
    assert type(trainer.accelerator).__name__ == "CPUAccelerator"
    ddp = CONFIGS / "strategy" / "ddp.yaml"
    assert parse(cli, base, SFT, ddp, cpu).fit.trainer.accelerator == "cpu"
    assert parse(cli, base, SFT, cpu, ddp).fit.trainer.accelerator == "gpu"


@pytest.mark.parametrize("file", FILES, ids=name)
def test_a_file_says_what_it_is_for(file):
    text = header(file)
    assert not text.startswith("# python"), "a file opens with its purpose"
    launch = LAUNCH.search(text)
    assert launch, "the header lacks a launch line"
    assert f"configs/{name(file)}" in shlex.split(launch[2]), "the launch line names another file"
    assert re.search(r"Hardware: |Run on: ", text), "the header says nothing of hardware"
    assert "Expect: " in text, "the header does not say what to expect"


@pytest.mark.parametrize("file", FILES, ids=name)
def test_every_file_that_a_launch_line_names_exists(file):
    launch = LAUNCH.search(header(file))
    assert launch
    words = shlex.split(launch[2])
    named = [word for word in words if word.startswith("configs/")]
    assert [word for word in named if not (CONFIGS.parent / word).is_file()] == []


@pytest.mark.parametrize("file", OVERLAYS, ids=name)
def test_overlays_never_change_the_method(file):
    paths = [path for path, _ in given(yaml.safe_load(file.read_text()))]
    assert [path for path in paths if path[0] in ("model", "data") and path[-1] == "class_path"] == []


@pytest.mark.parametrize("file", sorted((CONFIGS / "recipes").glob("own_*.yaml")), ids=name)
def test_recipes_for_own_data_are_short(file):
    assert len(file.read_text().splitlines()) <= (15 if is_of_fit(file) else 35)  # a pipeline has four stages


@pytest.mark.parametrize("key", ["--model.init_args.beta", "--trainer.max_stepz", "--nonsense"])
def test_an_unknown_key_ends_with_exit_code_2(key, capsys):
    with pytest.raises(SystemExit) as exit_:
        main(["fit", *config_flags([SFT]), key, "1"])
    assert exit_.value.code == 2
    assert key.rsplit(".", 1)[-1].lstrip("-") in capsys.readouterr().err


def test_another_class_inherits_nothing_from_the_one_before(cli, tmp_path):
    """Adam with the weight decay of the default AdamW, as L2: the policy's weights went to zero without a word."""
    flags = ["--model.init_args.optimizer", "torch.optim.Adam", "--model.init_args.optimizer.init_args.lr", "0.5"]
    config = cli.parser.parse_args(["fit", *config_flags([SFT]), *flags])
    found = printed(cli, config)["model"]["init_args"]["optimizer"]["init_args"]
    assert (found["lr"], found["weight_decay"], found["eps"]) == (0.5, 0.0, 1e-8)

    dpo = CONFIGS / "ground_truth" / "dpo.yaml"  # the file's Adam, where the module's default is AdamW
    assert printed(cli, parse(cli, dpo))["model"]["init_args"]["optimizer"]["init_args"]["weight_decay"] == 0.0

    overlay = tmp_path / "sgd.yaml"
    overlay.write_text("model: {init_args: {optimizer: {class_path: torch.optim.SGD, init_args: {lr: 0.1}}}}")
    found = printed(cli, parse(cli, SFT, overlay))["model"]["init_args"]["optimizer"]["init_args"]
    assert (found["lr"], found["weight_decay"]) == (0.1, 0)


def test_the_same_class_keeps_what_a_later_file_does_not_name(cli):
    before = printed(cli, parse(cli, SFT))["model"]["init_args"]["optimizer"]["init_args"]
    flags = ["--model.init_args.optimizer.init_args.lr", "0.25"]
    config = cli.parser.parse_args(["fit", *config_flags([SFT]), *flags])
    assert printed(cli, config)["model"]["init_args"]["optimizer"]["init_args"] == before | {"lr": 0.25}
