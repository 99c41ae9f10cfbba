"""predictions.jsonl says which row of the user's file each line is of, which of its responses, and the score."""

import json

import pytest

from rlhf_lightning.cli import main
from rlhf_lightning.data.demonstrations import DemonstrationDataModule
from rlhf_lightning.data.splits import Split
from rlhf_lightning.rewards.reward import Samples, checked_scores
from rlhf_lightning.rewards.reward_model import RewardModelReward
from rlhf_lightning.worlds import HHHWorld, SumsWorld, world_tokenizer
from tests.integration.test_after_training import command
from tests.resume.runs import make_base

KINDS = {
    "sft": ("demonstrations", "demonstrations"),
    "reward": ("preferences", "preferences"),
    "rankings": ("rankings", "rankings"),
    "process": ("stepwise", "solutions"),
    "dpo": ("preferences", "preferences"),
    "kto": ("unpaired", "unpaired"),
    "ppo": ("prompts", "prompts"),
    "grpo": ("prompts", "prompts"),
    "online_dpo": ("prompts", "prompts"),
}
QUICK = ("reward", "rankings", "process", "ppo")


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return make_base(tmp_path_factory.mktemp("base"))


def predicted(method, base, folder, *more):
    """The rows of a file, and the lines of a prediction that holds a third of them out by their prompts."""
    kind, argument = KINDS[method]
    world = SumsWorld if method == "process" else HHHWorld
    rows = world(held_out=2, **{argument: 30}).load(kind)["train"].to_list()
    file = folder / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    tokenizer = str(base / "policy")
    if method == "process":
        tokenizer = str(folder / "sums")
        SumsWorld().tokenizer().save_pretrained(tokenizer)
    fit = command(method, base, folder / "run")
    words = []
    for key, value in zip(fit[1::2], fit[2::2], strict=True):  # the same without the world and what is fit's alone
        alone = key.startswith(("--data.source", "--model.optimizer", "--checkpoint", "--wandb"))
        words += [] if alone or key == "--trainer.val_check_interval" else [key, value]
    main(["predict", *words, "--data.source", str(file), "--data.split.validation", "0.3", "--data.tokenizer", tokenizer,
          *more])  # fmt: skip
    return rows, [json.loads(line) for line in (folder / "run/predictions.jsonl").read_text().splitlines()]


def prompt_of(row):
    given = row.get("prompt", row.get("messages"))
    return given if isinstance(given, str) else given[-1]["content"]


@pytest.mark.parametrize(
    "method", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in KINDS]
)
def test_each_line_names_its_row(method, base, tmp_path):
    rows, lines = predicted(method, base, tmp_path)
    assert lines
    assert {line["row"] for line in lines} < set(range(30))
    assert [line["row"] for line in lines] != list(range(len(lines)))
    for line in lines:
        assert prompt_of(rows[line["row"]]) in line["prompt"]
        assert isinstance(line["score"], float)
        assert list(line)[:5] == ["row", "side", "prompt", "response", "score"]


def test_chosen_and_rejected_are_columns_and_the_score_is_of_that_response(base, tmp_path):
    rows, lines = predicted("reward", base, tmp_path, "--model.network.path", str(base / "reward"))
    assert [line["side"] for line in lines] == ["chosen", "rejected"] * (len(lines) // 2)
    said = [rows[line["row"]][line["side"]][-1]["content"] for line in lines]
    assert [line["response"] for line in lines] == said
    reward = RewardModelReward(str(base / "reward"))
    reward.prepare("cpu")
    prompts = [rows[line["row"]]["prompt"] for line in lines]
    scores = checked_scores(reward, Samples(prompts, said, [[] for _ in said], [False] * len(said)))
    assert [line["score"] for line in lines] == pytest.approx(scores.tolist(), abs=1e-5)
    assert len(set(scores.tolist())) > 1


def test_a_rank_is_a_column(base, tmp_path):
    rows, lines = predicted("rankings", base, tmp_path)
    for line in lines:
        row = rows[line["row"]]
        ranks = {answer[-1]["content"]: rank for answer, rank in zip(row["completions"], row["ranks"], strict=True)}
        assert line["side"] == f"rank {ranks[line['response']]:g}"


def test_each_step_has_a_score(base, tmp_path):
    rows, lines = predicted("process", base, tmp_path)
    for line in lines:
        ratings = rows[line["row"]]["ratings"]  # behind the first error no step is labelled
        labelled = ratings[: ratings.index(-1) + 1] if -1 in ratings else ratings
        assert len(line["step_scores"]) == len(labelled) > 0
        assert all(0 < score < 1 for score in line["step_scores"])
        assert "[" not in line["response"]


@pytest.mark.parametrize("name", ["validate", "test", "predict"])
def test_nothing_held_out_is_an_error_where_held_out_rows_are_read(base, tmp_path, capsys, name):
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps({"prompt": "who owns the kite ?", "chosen": "the teacher .", "rejected": "no ."}) + "\n")
    with pytest.raises(SystemExit):
        main([name, "--model", "RewardModelModule", "--model.network.path", str(base / "reward"), "--data",
              "PreferenceDataModule", "--data.source", str(file), "--data.split.validation", "0",
              "--trainer.default_root_dir", str(tmp_path / "run"), "--trainer.accelerator", "cpu"])  # fmt: skip
    assert f"no row is held out, and {name} reads those; set data.split.validation" in capsys.readouterr().err


def test_text_that_the_tokenizer_does_not_know_is_warned_about(tmp_path, caplog):
    known, unknown = tmp_path / "known.jsonl", tmp_path / "unknown.jsonl"
    known.write_text(json.dumps({"prompt": "who owns the kite ?", "completion": "the teacher ."}) + "\n")
    unknown.write_text(json.dumps({"prompt": "Wem gehört der Drachen?", "completion": "Der Lehrerin."}) + "\n")
    world_tokenizer().save_pretrained(tmp_path / "words")
    for file in (known, unknown):
        caplog.clear()
        DemonstrationDataModule(str(file), str(tmp_path / "words"), split=Split(validation=0)).setup("fit")
        assert ("does not know this text" in caplog.text) == (file == unknown)
    assert "unknown.jsonl, train: " in caplog.text
