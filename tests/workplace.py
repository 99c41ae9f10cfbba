"""A folder in which every printed command can be typed: the repository's configs, small models and small data."""

import gzip
import json
import os
import re
import shlex
import sys
from pathlib import Path

import yaml

from rlhf_lightning.cli import main
from tests import tiny_qwen3
from tests.printed import ROOT

COLORS = ("red", "blue", "green", "old", "new", "round", "flat", "tiny")
NOUNS = ("kite", "ball", "egg", "box", "hat", "cup", "dog", "car", "pen", "map", "bed", "jar", "key", "bag", "toy")
THINGS = [f"{color} {noun}" for color in COLORS for noun in NOUNS]
DEMONSTRATIONS = [{"prompt": f"Who owns the {thing}?", "completion": f" Anna owns the {thing}."} for thing in THINGS]
PAIRS = [
    {"prompt": f"Who owns the {thing}?", "chosen": f" Anna owns the {thing}.", "rejected": " No."} for thing in THINGS
]
PROMPTS = [
    {"prompt": f"Who owns the {thing}?", "solution": "4", "answer": "4", "test_list": ["assert True"]}
    for thing in THINGS
]
LABELS = [{"prompt": row["prompt"], "completion": row["chosen"], "label": n % 2 == 0} for n, row in enumerate(PAIRS)]
ALPACA = [
    {
        "instruction": f"Say who owns the {thing}.",
        "input": "",
        "output": "Anna.",
        "chosen": "Anna, I think.",
        "rejected": "?",
    }
    for thing in THINGS
]
HH = [
    {
        name: f"\n\nHuman: Who owns the {thing}?\n\nAssistant: {said}"
        for name, said in (("chosen", "Anna."), ("rejected", "?"))
    }
    for thing in THINGS
]
GSM8K = [
    {"question": f"{n} and {n}?", "answer": f"The sum is {n} + {n}.\nIt is {2 * n}.\n#### {2 * n}"}
    for n in range(2, 102)
]


def reply(text, role="assistant", rank=None, replies=()):
    return {"role": role, "text": text, "rank": rank, "replies": list(replies), "deleted": False, "lang": "en"}


TREES = [
    {"prompt": reply(f"Who owns the {thing}?", "prompter", None, [reply("Anna.", rank=0), reply("No.", rank=1)])}
    for thing in THINGS
]
# What the printed names of files stand for; in the recipes for real data it depends on the recipe.
FILES = {
    "demos.jsonl": DEMONSTRATIONS,
    "DATA.jsonl": DEMONSTRATIONS,
    "pairs.jsonl": PAIRS,
    "PAIRS.jsonl": PAIRS,
    "prompts.jsonl": PROMPTS,
    "PROMPTS.jsonl": PROMPTS,
    "labels.jsonl": LABELS,
    "FILE.jsonl": PROMPTS,
    "FILE.jsonl.gz": HH,
}
RECIPE_FILES = {
    "kto_demo": ("FILE.json", LABELS),
    "polite": ("FILE.json", ALPACA),
    "gsm8k": ("FILE.jsonl", GSM8K),
    "oasst": ("FILE.jsonl", TREES),
    "tinystories": ("FILE.txt", "\n\n".join(f"One day Anna saw a {thing}." for thing in THINGS)),
    "sentiment": ("FILE.jsonl", PROMPTS),
    "stories": ("FILE.jsonl", PROMPTS),
}
QUICK = {
    "fit": "--trainer.max_steps 1 --trainer.limit_val_batches 1 --data.split.limit 48 --wandb disabled --overwrite true "
    "--trainer.enable_progress_bar false",
    "sample": "--prompts.limit 4 --n 2 --overwrite true",
    "ground-truth": "--problems 0 --trainer.max_steps 2 --overwrite true",
    "fixed-points": "",
    "pipeline": "--output runs/pipeline --options '{trainer.max_steps: 1, trainer.limit_val_batches: 1, data.split.limit: 48}' "
    "--evaluation.init_args.prompts 4 --evaluation.init_args.best_of_prompts 4 --evaluation.init_args.best_of_samples 2",
    "export": "",
}
# The exit code 1 of these says that figures are not those on record, as after a shortened training.
MEASURING = ("ground-truth", "fixed-points")
RUN_PATH = re.compile(r"runs/[\w./-]+")


class Workplace:
    """Runs commands in a folder, and before each the printed ones that make what it reads.

    Attributes:
        path: The folder.
    """

    def __init__(self, path, printed):
        self.path = Path(path)
        (self.path / "configs").symlink_to(ROOT / "configs")
        (self.path / ".venv").symlink_to(sys.prefix)  # the commands of a fresh clone begin with .venv/bin/python
        tiny_qwen3.make(self.path / "MODEL")
        tiny_qwen3.make(self.path / "my-model")
        (self.path / "my-model/chat_template.jinja").unlink()  # a base model: its tokenizer has no chat template
        for name, rows in FILES.items():
            self.write(name, rows)
        self.makers = {}
        # A command that a file prints for itself comes before one that stacks another file on top of it.
        for command in sorted(printed, key=lambda one: one.file not in ("README.md", *self.configs(one.arguments)[:1])):
            for folder in self.outputs(command.arguments):
                self.makers.setdefault(folder, (command, ()))
        again = ("--seed_everything", "1", "--trainer.default_root_dir", "runs/polite/reward_1")
        self.makers["runs/polite/reward_1"] = (self.makers["runs/polite/reward"][0], again)  # as polite_best_of_16 says

    def write(self, name, rows):
        text = rows if isinstance(rows, str) else "".join(json.dumps(row) + "\n" for row in rows)
        if name.endswith(".json"):
            text = json.dumps(rows)
        data = gzip.compress(text.encode()) if name.endswith(".gz") else text.encode()
        (self.path / name).write_bytes(data)

    @staticmethod
    def configs(arguments):
        return [word for word in arguments if word.startswith("configs/")]

    def outputs(self, arguments):
        """The folder that a command with its configs and no other place makes."""
        if "--trainer.default_root_dir" in arguments or arguments[0] not in ("fit", "sample"):
            return []
        configs = [yaml.safe_load((ROOT / file).read_text()) for file in self.configs(arguments)]
        made = [config.get("output") or (config.get("trainer") or {}).get("default_root_dir") for config in configs]
        return [folder for folder in made if folder][-1:]

    def needs(self, arguments):
        """The folders of other runs that a command reads."""
        text = " ".join([*arguments[1:], *((ROOT / file).read_text() for file in self.configs(arguments))])
        text = "\n".join(line.split("#")[0] for line in text.splitlines())
        own = self.outputs(arguments)
        named = {
            re.sub(r"/(export|samples\.jsonl)$", "", path) for path in RUN_PATH.findall(text) if path.count("/") > 1
        }
        given = {path for path in named if (self.path / path).exists()}
        return sorted(path for path in named - given if path in self.makers and path not in own)

    def make(self, folder):
        """Run the printed command that makes a folder."""
        command, flags = self.makers[folder]
        self.run(command, *flags)

    def run(self, command, *more):
        """Run a printed command as it is printed, with flags appended that make it short.

        Args:
            command: The command.
            more: Further flags.
        """
        arguments = command.arguments
        for folder in self.needs(arguments):
            self.make(folder)
        for start, (name, rows) in RECIPE_FILES.items():
            if any(f"recipes/{start}" in file for file in self.configs(arguments)):
                self.write(name, rows)
        flags = [*shlex.split(QUICK[arguments[0]]), *self.flags(arguments), *more]
        before = Path.cwd()
        os.chdir(self.path)
        try:
            main([*arguments, *flags])
        except SystemExit as stop:
            if stop.code not in (0, None) and not (stop.code == 1 and arguments[0] in MEASURING):
                raise AssertionError(f"exit code {stop.code}: {shlex.join([*arguments, *flags])}") from stop
        finally:
            os.chdir(before)

    def flags(self, arguments):
        """What a command that is printed for other hardware or a model of the hub needs to run here."""
        files, flags = self.configs(arguments), []
        texts = [(ROOT / file).read_text() for file in files]
        if arguments[0] != "fit":
            return flags
        if any("recipes/" in file for file in files):
            flags += ["--data.batch_size", "8"]
        if any("recipes/rules" in file for file in files):
            flags += ["--model.sampling.max_new_tokens", "8"]
        if any("strategy/" in file for file in files):
            flags += ["--trainer.accelerator", "cpu", "--trainer.precision", "32-true"]
        trained = "network" if any("    network:" in text or "{network:" in text for text in texts) else "policy"
        if any("Qwen/" in text or "EleutherAI/" in text for text in texts):
            flags += [f"--model.{trained}.path", "MODEL"]
        kinds = {"Preference": "PAIRS.jsonl", "Demonstration": "DATA.jsonl", "Unpaired": "labels.jsonl"}
        kinds["Prompt"] = "PROMPTS.jsonl"
        if "--data.source" not in arguments and any("HubSource" in text or "path/to" in text for text in texts):
            found = re.findall(r"class_path: (\w+)DataModule", " ".join(texts))
            if found and found[-1] in kinds:
                flags += ["--data.source", kinds[found[-1]]]
        return flags
