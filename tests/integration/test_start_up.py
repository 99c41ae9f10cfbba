"""Help and plain mistakes are answered without an import of torch and Lightning: modules are counted, not seconds."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from rlhf_lightning.commands import registry
from rlhf_lightning.commands.early import Line, answered
from rlhf_lightning.errors import UserError
from tests.integration.test_typed_keys import error_of  # noqa: F401  (fixture)

ROOT = Path(__file__).parents[2]
SFT = ["-c", "configs/quickstart/sft.yaml"]
PPO = ["-c", "configs/quickstart/ppo.yaml"]
DPO = ["-c", "configs/quickstart/dpo.yaml"]
COMMANDS = [*registry.TRAINER_COMMANDS, *registry.COMMANDS, *registry.FIT_COMMANDS]
# What may be imported beside the standard library and this package. Together they take .2 CPU seconds.
LIGHT = {"jsonargparse", "yaml", "_yaml", "docstring_parser", "typeshed_client", "typing_extensions", "attr", "attrs"}
MODULES = 400  # with all of the standard library; torch alone has more than a thousand
PROGRAM = """
import atexit, runpy, sys
atexit.register(lambda: print("MODULES", *sys.modules))
runpy.run_module("rlhf_lightning", run_name="__main__", alter_sys=True)
"""


def started(*args):
    """Run a command line: exit code, what it says, and the modules it has imported at its end."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", PROGRAM, *args]
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment)
    said, _, modules = result.stdout.partition("MODULES ")
    assert "Traceback" not in result.stderr
    return result.returncode, said, result.stderr, modules.split()


def foreign(modules):
    """Top-level packages that are neither of the standard library nor light."""
    top = {name.partition(".")[0] for name in modules}
    site = {name for name in top if name.startswith("_") or name in ("sitecustomize", "usercustomize", "distutils")}
    return top - sys.stdlib_module_names - LIGHT - site - {"rlhf_lightning", "cython_runtime"}


@pytest.fixture(scope="module")
def broken(tmp_path_factory):
    """A config that is not YAML."""
    file = tmp_path_factory.mktemp("start_up") / "broken.yaml"
    file.write_text("trainer:\n  max_steps: [1\nmodel: SFTModule\n")
    return file


@pytest.mark.parametrize(
    ("args", "code", "words"),
    [
        (["--help"], 0, ("usage: ", *COMMANDS)),
        ([], 0, ("usage: ", *COMMANDS)),
        (["fitt"], 2, ("usage: ", "'fitt' is not a command")),
        *(([name, "-c", "none.yaml"], 2, ("-c: File does not exist: ", "none.yaml")) for name in COMMANDS),
        (["fit", "--config=none.yaml", "--trainer.max_steps", "1"], 2, ("none.yaml",)),
        (["fit", "-c", "BROKEN"], 2, ("broken.yaml:3",)),
        (["pipeline", "-c", "BROKEN"], 2, ("broken.yaml:3",)),
        (["fit", *SFT, "--modle.lr", "1"], 2, ("--modle.lr is not a key",)),
        (["fit", *PPO, "--model.reward.pth", "x"], 2, ("--model.reward.pth is not a key", "path")),
        (["fit", *SFT, "--data.splt", "1"], 2, ("--data.splt is not a key; did you mean --data.split?",)),
        (["fit", *SFT, "--trainer.max_steps", "many"], 2, ("--trainer.max_steps: 'many' is not a whole number",)),
        (["fit", *SFT, "--data.source", "none.jsonl"], 2, ("none.jsonl does not exist",)),
        (["chat", "--help"], 0, ("max_new_tokens", "temperature", "Longest answer")),
        (["export", "--help"], 0, ("checkpoint", "trained")),
        (["average", "--help"], 0, ("models",)),
        (["chat"], 2, ("--model is required",)),
        (["chat", "--modle", "x"], 2, ("--modle is not a key; did you mean --model?",)),
    ],
    ids=lambda value: " ".join(value) or "nothing" if isinstance(value, list) else "",
)
def test_it_is_answered_without_heavy_imports(args, code, words, broken):
    got, said, error, modules = started(*[str(broken) if arg == "BROKEN" else arg for arg in args])
    assert got == code
    for word in words:
        assert word in said + error
    assert len(error.splitlines()) == (code == 2)
    assert foreign(modules) == set()
    assert 50 < len(modules) < MODULES


def test_a_command_without_mistakes_is_left_to_the_parser():
    assert not answered(["fit", *SFT])


@pytest.mark.parametrize(
    "args",
    [
        [*SFT, "--modle.lr", "1"],
        [*SFT, "--overwite", "true"],
        [*SFT, "--trainer.max_stepz", "1"],
        [*SFT, "--samples.evry_n_steps", "1"],
        [*SFT, "--model.policy.pth", "x"],
        [*SFT, "--model.optimizer.lrr", "1"],
        [*SFT, "--model.lr", "1"],
        [*SFT, "--data.max_lenght", "1"],
        [*SFT, "--data.source.sed", "1"],
        [*SFT, "--data.split.validaton", "1"],
        [*DPO, "--model.loss.bta", "1"],
        [*PPO, "--model.reward.foo", "1"],
        [*PPO, "--model.rollout_size", "1"],
        [*SFT, "--trainer.max_steps", "many"],
        [*SFT, "--trainer.max_epochs", "1.5"],
        [*SFT, "--trainer.gradient_clip_val", "much"],
        [*PPO, "--model.iterations", "few"],
        [*SFT, "--data.mask", "answer"],
    ],
    ids=lambda args: " ".join(args[2:]),
)
def test_the_early_error_is_the_one_of_the_parser(args, error_of, monkeypatch):  # noqa: F811
    monkeypatch.chdir(ROOT)
    with pytest.raises(UserError) as early:
        Line("fit", args).check()
    assert f"error: {early.value}" == error_of("fit", *args)


@pytest.mark.parametrize(
    "args",
    [
        [*SFT, "--trainer.max_step", "5"],  # a flag may be shortened
        [*SFT, "--trainer.callbacks+=lightning.pytorch.callbacks.EarlyStopping", "--trainer.callbacks.monitor", "x"],
        [*SFT, "--trainer.max_epochs", "null", "--trainer.gradient_clip_val", "1e-3"],
        [*SFT, "--model.policy.architecture.anything", "5"],
        [*SFT, "--model", "own.Module", "--model.key", "5"],
        [*SFT, "--overwrite", "maybe"],
        [*SFT, "--model.optimizer", "torch.optim.Adam", "--model.optimizer.betas", "[0.9, 0.95]"],
        [*SFT, "--data.source", "owner/name"],
        ["--data.source", "none.jsonl", *SFT],  # the file's source wins
        [*SFT, "--trainer.strategy", "ddp", "--trainer.devices", "[0, 1]"],
    ],
    ids=lambda args: " ".join(args),
)
def test_what_may_be_right_is_left_to_the_parser(args, monkeypatch):
    monkeypatch.chdir(ROOT)
    Line("fit", args).check()


def test_a_config_that_is_no_text_is_one_line(tmp_path):
    (tmp_path / "weights.yaml").write_bytes(b"\xff\xfe\x00PK")
    (tmp_path / "deep.yaml").write_text("[" * 100_000)
    with pytest.raises(UserError, match=r"weights.yaml.*UTF-8"):
        answered(["fit", "-c", str(tmp_path / "weights.yaml")])
    with pytest.raises(UserError, match=r"deep.yaml.*nested"):
        answered(["fit", "-c", str(tmp_path / "deep.yaml")])
