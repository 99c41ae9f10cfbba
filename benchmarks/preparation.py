"""CPU seconds from rows to tokenized rows, beside what the tokenizer and the chat template need by themselves.

    python benchmarks/preparation.py [--rows 8000] [--kinds demonstrations pairs ...]

Each kind of rows is prepared in a process of its own, three times with an empty cache; the fastest counts. ``tokenizer`` is
one call of the fast tokenizer on exactly the texts of the rows, ``template`` the compiled Jinja template alone on exactly the
conversations that are rendered, both without garbage collection. ``hash`` is of the result: two versions that print the same
one made the same rows. To compare with another version, run this file with its folder in PYTHONPATH.
"""

import argparse
import gc
import logging
import multiprocessing
import os
import resource
import tempfile
from collections.abc import Callable
from itertools import chain
from typing import Any

if __name__ == "__main__":  # before the libraries read them
    os.environ |= {"OMP_NUM_THREADS": "1", "RAYON_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}

from datasets import Dataset, DatasetDict, disable_progress_bars
from transformers.utils.chat_template_utils import _compile_jinja_template

from rlhf_lightning.data import chat
from rlhf_lightning.data.cache import CACHE_VARIABLE, dataset_hash
from rlhf_lightning.data.demonstrations import DemonstrationDataModule
from rlhf_lightning.data.literal import parts
from rlhf_lightning.data.module import RowsDataModule
from rlhf_lightning.data.preferences import PreferenceDataModule
from rlhf_lightning.data.prompts import PromptDataModule
from rlhf_lightning.data.rankings import RankingDataModule
from rlhf_lightning.data.sources import DatasetSource
from rlhf_lightning.data.splits import Split, load_splits
from rlhf_lightning.data.stepwise import StepwiseDataModule
from rlhf_lightning.data.unpaired import UnpairedDataModule
from rlhf_lightning.worlds import HHHWorld
from rlhf_lightning.worlds.sums import SEPARATOR, SumsWorld

REPEATS = 3
TURNS = 3  # questions of a conversation


class Rows(DatasetSource):
    """Rows in memory with the tokenizer of their world."""

    def __init__(self, rows: Dataset, tokenizer: Any) -> None:
        super().__init__(DatasetDict({"train": rows}))
        self.own = tokenizer

    def tokenizer(self) -> Any:
        return self.own


def world_rows(kind: Any, count: int) -> Rows:
    """Rows of the world of questions and answers: messages."""
    world = HHHWorld(**{kind: count}, held_out=1)
    return Rows(world.load(kind)["train"], world.tokenizer())


def conversations(count: int) -> Rows:
    """Conversations of several turns."""
    rows = world_rows("demonstrations", TURNS * count)
    turns = [[*row["prompt"], *row["completion"]] for row in rows.dataset["train"]]
    merged = [list(chain.from_iterable(turns[start : start + TURNS])) for start in range(0, len(turns), TURNS)]
    return Rows(Dataset.from_dict({"messages": merged}), rows.own)


def texts(count: int) -> Rows:
    """Prompts and completions as plain text."""
    rows = world_rows("demonstrations", count)
    columns = {name: [part[0]["content"] for part in rows.dataset["train"][name]] for name in ("prompt", "completion")}
    return Rows(Dataset.from_dict(columns), rows.own)


def solutions(count: int) -> Rows:
    """Solutions with a label a step, plain text."""
    world = SumsWorld(solutions=count, held_out=1)
    return Rows(world.load("stepwise")["train"], world.tokenizer())


KINDS: dict[str, tuple[Callable[[int], Rows], type[RowsDataModule], dict[str, Any]]] = {
    "demonstrations": (lambda n: world_rows("demonstrations", n), DemonstrationDataModule, {}),
    "pairs": (lambda n: world_rows("preferences", n), PreferenceDataModule, {}),
    "rankings": (lambda n: world_rows("rankings", n), RankingDataModule, {}),
    "unpaired": (lambda n: world_rows("unpaired", n), UnpairedDataModule, {}),
    "prompts": (lambda n: world_rows("prompts", n), PromptDataModule, {}),
    "conversations": (conversations, DemonstrationDataModule, {"mask": "assistant"}),
    "texts": (texts, DemonstrationDataModule, {}),
    "solutions": (solutions, StepwiseDataModule, {"separator": SEPARATOR}),
}


def cpu_seconds(function: Callable[[], Any]) -> float:
    """CPU seconds of a call, user and system."""
    before = resource.getrusage(resource.RUSAGE_SELF)
    function()
    after = resource.getrusage(resource.RUSAGE_SELF)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def fastest(function: Callable[[], Any]) -> float:
    """The least CPU seconds of several calls."""
    return min(cpu_seconds(function) for _ in range(REPEATS))


def prepared(make: Callable[[], RowsDataModule]) -> RowsDataModule:
    """A data module that has prepared its rows, with an empty cache."""
    with tempfile.TemporaryDirectory() as folder:
        os.environ[CACHE_VARIABLE] = folder
        module = make()
        module.prepare_data()
    return module


def alone(module: RowsDataModule) -> tuple[float, float]:
    """CPU seconds of the tokenizer, and of the chat template, on what they are called with for these rows."""
    tokenizer, plan = module.tokenizer, module.tokenization()().plan
    rows = load_splits(module.source, module.kind, None, module.split)["train"]
    rendered: list[tuple[Any, dict[str, Any]]] = []
    render = chat.Renderer._render

    def recording(renderer: Any, messages: Any, **settings: Any) -> Any:
        given = {"add_generation_prompt": settings.get("add_generation_prompt", False), "tools": None}
        rendered.append(([renderer._speakable(message) for message in messages], given | renderer._variables))
        return render(renderer, messages, **settings)

    chat.Renderer._render = recording
    try:
        planned: list[Any] = [plan(row) for row in rows]
    finally:
        chat.Renderer._render = render
    plans = [pieces for made in planned for pieces in (made if isinstance(made[0], list) else [made])]
    tokenized = [text for pieces in plans for piece in pieces for text in parts(piece.text)]
    template = _compile_jinja_template(tokenizer.chat_template)
    gc.collect()
    gc.disable()  # they are measured at their best
    return (
        fastest(lambda: tokenizer(tokenized, add_special_tokens=False, verbose=False).input_ids),
        fastest(lambda: [template.render(messages=messages, **given) for messages, given in rendered]),
    )


def measure(kind: str, count: int) -> None:
    """Print the line of one kind."""
    load, module_class, settings = KINDS[kind]
    rows = load(count)

    def make() -> RowsDataModule:
        return module_class(rows, split=Split(validation=0), **settings)

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    modules: list[RowsDataModule] = []
    total = fastest(lambda: modules.append(prepared(make)))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    tokenizer, template = alone(modules[0])
    print(
        f"{kind:15}{count / total:11.0f}{total:8.2f}{tokenizer:11.2f}{total / tokenizer:7.1f}x{template:10.2f}"
        f"{total / (tokenizer + template):7.1f}x{(peak - before) / 1024:10.0f}  {dataset_hash(modules[0].rows['train'])[:12]}",
        flush=True,
    )


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=8000, help="rows of each kind")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS), help="kinds of rows")
    arguments = parser.parse_args()
    logging.disable(logging.WARNING)
    disable_progress_bars()
    heads = (("rows", -15), ("rows/CPU s", 11), ("CPU s", 8), ("tokenizer", 11), ("ratio", 8), ("template", 10))
    heads += (("of both", 8), ("peak MB", 10))
    print("".join(f"{name:{'<' if width < 0 else '>'}{abs(width)}}" for name, width in heads) + "  hash")
    for kind in arguments.kinds:  # forked, so that imports are paid once
        process = multiprocessing.get_context("fork").Process(target=measure, args=(kind, arguments.rows))
        process.start()
        process.join()
        if process.exitcode:
            raise SystemExit(process.exitcode)


if __name__ == "__main__":
    main()
