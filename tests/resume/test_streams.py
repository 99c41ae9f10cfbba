"""A run over a stream that was killed and goes on is, bit for bit, the run that was not, and skips without tokenizing."""

import json

import pytest
import torch

from rlhf_lightning.worlds import HHHWorld
from tests.resume.runs import differences
from tests.resume.test_killed import killed

# Twelve batches an epoch, as elsewhere: windows of 16 rows are four batches. A run of two epochs, which ends in the third.
SIZES = {"sft": ("demonstrations", 12), "ppo": ("prompts", 104)}


@pytest.fixture(scope="session")
def streamed(crew):
    """Gives the flags that put a stream in the place of the world: three files of 48 rows, and one of validation rows."""

    def flags(method):
        kind, steps = SIZES[method]
        splits = HHHWorld(held_out=8, **{kind: 48}).load(kind)
        folder = crew.folder / f"stream-{kind}"
        if not folder.exists():
            folder.mkdir()
            rows = splits["train"].to_list()
            for name, some in {"a": rows[:10], "b": rows[10:11], "c": rows[11:]}.items():
                (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, some)))
            (crew.folder / f"held-{kind}.jsonl").write_text("\n".join(map(json.dumps, splits["validation"].to_list())))
        source = {
            "class_path": "StreamSource",
            "init_args": {
                "path": f"{folder}/*.jsonl",
                "validation_path": str(crew.folder / f"held-{kind}.jsonl"),
                "window_rows": 16,
            },
        }
        end = ("--trainer.max_epochs", "-1", "--trainer.max_steps", str(steps + steps // 4))
        return ("--data.source", json.dumps(source), "--data.tokenizer", str(crew.base / "policy"), *end)

    return flags


@pytest.mark.parametrize("method", ["sft", pytest.param("ppo", marks=pytest.mark.slow)])
def test_killed_once(crew, whole, streamed, method):
    """In the second epoch, in the midst of a window."""
    more = streamed(method)
    folder = killed(crew, method, f"{method}-stream", ("batch", 19), more=more)
    assert differences(whole(method, *more), folder) == []
    checkpoint = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)
    (state,) = (value for key, value in checkpoint.items() if key.endswith("DataModule"))
    assert state["stream"][0] == 2
    assert state["rows"] == 3


@pytest.mark.slow
@pytest.mark.parametrize(
    "deaths",
    [
        [("batch", 2), ("batch", 8), ("batch", 7), ("batch", 2), ("batch", 8)],
        [("validation", 3), ("after validation", 3), ("validation", 2), ("after validation", 2)],
        [("epoch end", 1), ("epoch start", 1), ("epoch end", 1), ("export", 1)],
    ],
    ids=["batches", "validations", "epochs"],
)
def test_killed_again_and_again(crew, whole, streamed, deaths):
    more = streamed("sft")
    folder = killed(crew, "sft", f"sft-stream-{deaths[0][0].replace(' ', '_')}-{deaths[0][1]}", *deaths, more=more)
    assert differences(whole("sft", *more), folder) == []


@pytest.mark.slow
def test_workers_and_ranks(crew, whole, streamed):
    """They have read ahead of the checkpoint, each rank its own."""
    more = streamed("sft")
    folder = killed(crew, "sft", "sft-stream-workers", ("batch", 15), more=(*more, "--data.num_workers", "2"))
    assert differences(whole("sft", *more), folder) == []
    folder = killed(crew, "sft", "sft-stream-ranks", ("batch", 8), more=more, ranks=2)
    assert differences(whole("sft", *more, ranks=2), folder) == []
