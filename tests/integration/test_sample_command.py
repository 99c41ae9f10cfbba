"""``sample``: rows and where they came from, the same after a kill, another method on the same answers, and what is refused."""

import json
import math
import os
import shutil
from itertools import combinations
from pathlib import Path

import pytest
import torch

from rlhf_lightning.cli import COMMANDS, main
from rlhf_lightning.commands.parser import CommandParser
from rlhf_lightning.commands.sample import sample
from rlhf_lightning.data.demonstrations import DemonstrationDataModule
from rlhf_lightning.data.splits import Split, load_splits
from rlhf_lightning.errors import UserError
from rlhf_lightning.evaluation.candidates import PromptRows, Scorer
from rlhf_lightning.generation.engine import SamplingParameters
from rlhf_lightning.models.export import export_folder
from rlhf_lightning.models.loading import load_causal_lm
from rlhf_lightning.models.spec import ModelSpec
from rlhf_lightning.rewards.function import FunctionReward
from rlhf_lightning.rollouts.selection import RAFT, RSO, BestOfN, RewardWeighted
from rlhf_lightning.worlds import HHHWorld, world_tokenizer

torch.set_num_threads(1)  # threads that wait for each other cost more than they give
CONFIGS = Path(__file__).parents[2] / "configs"
PROMPTS, N = 10, 6


def words(completions):
    """How many different words: many values, and ties."""
    return [float(len(set(c[0]["content"].split()))) for c in completions]


def length(completions):
    return [float(len(c[0]["content"])) for c in completions]


@pytest.fixture(scope="module")
def policy(tmp_path_factory):
    from tests.conftest import TINY

    torch.manual_seed(0)
    tokenizer, folder = world_tokenizer(), tmp_path_factory.mktemp("policy")
    return str(export_folder(load_causal_lm(ModelSpec(architecture=TINY), tokenizer), tokenizer, folder / "export"))


@pytest.fixture
def run(policy, tmp_path):
    """``run(name, **changed)``: the folder of a finished command."""

    def finish(name, **changed):
        settings = {
            "policy": ModelSpec(path=policy),
            "prompts": PromptRows(HHHWorld(prompts=PROMPTS, held_out=4)),
            "reward": FunctionReward(words),
            "n": N,
            "sampling": SamplingParameters(max_new_tokens=5),
            "batch_size": 4 * N,  # three batches of prompts, the last one short
        }
        sample(**settings | changed, output=str(tmp_path / name))
        return tmp_path / name

    return finish


def lines(folder, name="samples.jsonl"):
    return [json.loads(line) for line in (folder / name).read_text().splitlines()]


def test_each_row_says_where_it_came_from(run, policy):
    folder = run("best")
    candidates, rows = lines(folder, "candidates.jsonl"), lines(folder)
    prompts = HHHWorld(prompts=PROMPTS, held_out=4).load("prompts")["train"]["prompt"][:]
    assert [candidate["prompt"] for candidate in candidates] == prompts
    for row, candidate in zip(rows, candidates, strict=True):
        answers = candidate["samples"]
        assert len(answers) == N
        assert [a["score"] for a in answers] == [float(len(set(a["text"].split()))) for a in answers]
        best = max(range(N), key=lambda i: answers[i]["score"])  # the first of the best
        assert row == {
            "prompt": candidate["prompt"],
            "completion": [{"role": "assistant", "content": answers[best]["text"]}],
            "completion_truncated": answers[best]["truncated"],
            "weight": 1.0,
            "score": answers[best]["score"],
            "rank": 1,
            "prompt_index": candidates.index(candidate),
            "sample": best,
            "policy": policy,
            "reward": "words",
            "method": "BestOfN",
            "n": N,
            "seed": 0,
            "split_level": 1,
        }
    assert len({a["text"] for candidate in candidates for a in candidate["samples"]}) > 2 * PROMPTS  # they are drawn


def test_the_manifest_has_the_curve_over_all_subsets_and_what_was_known_beforehand(run):
    folder = run("curve", gold=FunctionReward(length))
    manifest = json.loads((folder / "manifest.json").read_text())
    tables = {
        name: [[answer[name] for answer in candidate["samples"]] for candidate in lines(folder, "candidates.jsonl")]
        for name in ("score", "gold")
    }
    assert [row["n"] for row in manifest["best_of_n"]] == [1, 2, 4]
    for row in manifest["best_of_n"]:
        means = {"score": [], "gold": []}
        for scores, golds in zip(tables["score"], tables["gold"], strict=True):
            for subset in combinations(range(N), row["n"]):
                top = max(scores[i] for i in subset)
                best = [golds[i] for i in subset if scores[i] == top]
                means["gold"].append(sum(best) / len(best))
                means["score"].append(top)
        for name, column in (("reward", "score"), ("gold", "gold")):
            assert row[name]["mean"] == pytest.approx(sum(means[column]) / len(means[column]))
            assert row[name]["low"] <= row[name]["mean"] <= row[name]["high"]
        assert row["kl_bound"] == pytest.approx(math.log(row["n"]) - 1 + 1 / row["n"])
        assert row["win_rate_bound"] == pytest.approx(row["n"] / (row["n"] + 1))
    assert manifest["settings"]["n"] == N
    assert manifest["method"] == {"class": "BestOfN"}


def test_a_run_that_was_killed_ends_as_one_that_was_not(run, monkeypatch):
    whole = run("whole")
    answer, calls = Scorer.answer, []

    def dies(self, *args):
        calls.append(args)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return answer(self, *args)

    monkeypatch.setattr(Scorer, "answer", dies)
    with pytest.raises(KeyboardInterrupt):
        run("killed")
    folder = whole.parent / "killed"
    with (folder / "candidates.jsonl").open("a") as file:
        file.write('{"prompt": "half a li')  # what a kill may leave
    assert not (folder / "samples.jsonl").exists()
    run("killed")
    assert len(calls) == 4  # of three batches, one was drawn again
    for name in ("candidates.jsonl", "samples.jsonl", "manifest.json"):
        assert (folder / name).read_bytes() == (whole / name).read_bytes()


def test_another_method_takes_the_same_answers(run, monkeypatch):
    before = (run("same") / "candidates.jsonl").read_bytes()
    monkeypatch.setattr(Scorer, "answer", None)  # nothing is drawn
    folder = run("same", method=RewardWeighted(beta=2.0))
    assert (folder / "candidates.jsonl").read_bytes() == before
    rows = lines(folder)
    for index in range(PROMPTS):
        mine = [row for row in rows if row["prompt_index"] == index]
        assert sum(row["weight"] for row in mine) == pytest.approx(1)
        assert [row["rank"] for row in mine] == list(range(1, len(mine) + 1))
        for row in mine:
            ratio = math.exp((row["score"] - mine[0]["score"]) / 2.0)
            assert row["weight"] / mine[0]["weight"] == pytest.approx(ratio, rel=1e-6)


def test_the_rows_are_read_with_their_weights(run):
    """And those that were cut off are not taught to end."""
    folder = run("weights", method=RewardWeighted())
    rows = lines(folder)
    data = DemonstrationDataModule(str(folder / "samples.jsonl"), split=Split(validation=0), batch_size=1000)
    data.tokenizer_path = json.loads((folder / "manifest.json").read_text())["settings"]["policy"]["path"]["path"]
    data.prepare_data()
    (batch,) = data.train_dataloader()
    assert len(batch.weights) == len(rows)
    assert batch.weights.sum().item() == pytest.approx(PROMPTS, rel=1e-5)
    tokens = batch.response_mask.sum(dim=1)
    assert batch.normalizer.item() == pytest.approx((batch.weights * tokens).sum().item(), rel=1e-5)
    ends = (batch.input_ids == world_tokenizer().eos_token_id) & batch.response_mask
    assert ends.any(dim=1).sum() == sum(not row["completion_truncated"] for row in rows)
    assert any(row["completion_truncated"] for row in rows)


def test_answers_end_where_the_context_does_and_a_warning_says_so(run, caplog):
    run("long", sampling=SamplingParameters(max_new_tokens=128))
    (warning,) = [record.getMessage() for record in caplog.records if "reads 128 tokens" in record.getMessage()]
    assert "instead of max_new_tokens 128" in warning


@pytest.mark.parametrize(
    ("changed", "words_"),
    [
        ({"n": 3}, r"\(another n, prompts_a_batch\); give another --output"),
        ({"reward": FunctionReward(length)}, r"another reward"),
        ({"seed": 1}, r"another seed"),
    ],
)
def test_a_folder_with_other_samples_is_left_alone(run, changed, words_):
    before = (run("mine") / "candidates.jsonl").read_bytes()
    with pytest.raises(UserError, match=words_):
        run("mine", **changed)
    assert (run("mine") / "candidates.jsonl").read_bytes() == before
    assert (run("mine", overwrite=True, **changed) / "candidates.jsonl").read_bytes() != before


def test_a_policy_that_was_trained_again_is_another_one(run, policy, tmp_path):
    """In the same folder, with files of the same size."""
    copy = shutil.copytree(policy, tmp_path / "copy")
    run("mine", policy=ModelSpec(path=str(copy)))
    os.utime(copy / "model.safetensors", ns=(0, 10**18))
    with pytest.raises(UserError, match="another policy"):
        run("mine", policy=ModelSpec(path=str(copy)))


@pytest.mark.parametrize(
    ("changed", "words_"),
    [
        ({"policy": ModelSpec(architecture={"model_type": "llama"})}, "policy.path"),
        ({"n": 0}, "at least 1"),
        ({"sampling": SamplingParameters(temperature=0)}, "temperature 0"),
        ({"method": RAFT(least=99.0)}, "keeps no answer to any of 10 prompts"),
        ({"prompts": PromptRows(HHHWorld(prompts=2), limit=1)}, None),
        ({"prompts": PromptRows("nowhere.jsonl")}, "nowhere.jsonl"),
    ],
)
def test_what_cannot_be_done_is_refused(run, changed, words_):
    if words_ is None:
        assert len(lines(run("one", **changed))) == 1
        return
    with pytest.raises(UserError, match=words_):
        run("refused", **changed)


def test_a_folder_with_something_else_in_it_is_left_alone(run, tmp_path):
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="is not empty"):
        run("other")


def test_from_the_command_line(policy, tmp_path, capsys):
    args = ["sample", "--policy.path", policy, "--prompts.source", "HHHWorld", "--prompts.source.prompts", "3"]
    args += ["--prompts.limit", "2", "--reward", "GoldReward", "--reward.world", "HHHWorld", "--method", "RAFT"]
    args += ["--method.keep", "2", "--n", "4", "--sampling.max_new_tokens", "4", "--output", str(tmp_path / "out")]
    main(args)
    rows = lines(tmp_path / "out")
    assert {row["weight"] for row in rows} <= {0.5, 1.0}
    assert {row["reward"] for row in rows} == {"gold"}
    assert "best of n" in capsys.readouterr().out


def sample_configs():
    return sorted(
        file
        for file in CONFIGS.rglob("*.yaml")
        if f"rlhf_lightning sample --config configs/{file.relative_to(CONFIGS)}" in file.read_text()
    )


@pytest.mark.parametrize("file", sample_configs(), ids=lambda file: str(file.relative_to(CONFIGS)))
def test_every_config_of_the_command_parses_and_instantiates(file):
    parser = CommandParser()
    parser.add_argument("-c", "--config", action="config")
    parser.add_function_arguments(COMMANDS["sample"], fail_untyped=True, sub_configs=True)
    made = parser.instantiate_classes(parser.parse_args(["-c", str(file)]))
    assert isinstance(made.prompts, PromptRows)
    assert made.method is not None


def test_there_is_a_config_of_each_method():
    text = "".join(file.read_text() for file in sample_configs())
    for method in ("RAFT", "RSO", "RewardWeighted"):
        assert f"class_path: {method}" in text
    assert len(sample_configs()) >= 4


@pytest.fixture(scope="module")
def prompts_file(tmp_path_factory):
    """A user's own file, in columns of its own."""
    path = tmp_path_factory.mktemp("prompts") / "prompts.jsonl"
    questions = HHHWorld(prompts=60, held_out=4).load("prompts")["train"]["prompt"][:]
    path.write_text("\n".join(json.dumps({"question": question}) for question in questions))
    return str(path)


SLOW = [pytest.param(method, marks=pytest.mark.slow) for method in (RAFT(keep=2), RSO(), RewardWeighted())]


@pytest.mark.parametrize("method", [BestOfN(), *SLOW], ids=lambda method: type(method).__name__)
def test_rows_sampled_from_a_file_are_trained_on_and_validated(run, policy, prompts_file, tmp_path, method, caplog):
    """The prompts are of the training part, where the same hash would put all of them again."""
    prompts = PromptRows(prompts_file, columns={"prompt": "question"})
    rows = lines(run("sampled", prompts=prompts, method=method, n=4, batch_size=400))
    assert {row["split_level"] for row in rows} == {1}
    folder = str(tmp_path / "sft")
    own = [f"--config={CONFIGS}/recipes/own_sft.yaml", "--model.policy.path", policy, "--data.batch_size", "16"]
    own += ["--data.source", str(tmp_path / "sampled" / "samples.jsonl"), "--trainer.accelerator", "cpu"]
    main(["fit", *own, "--trainer.default_root_dir", folder, "--trainer.max_epochs", "1"])
    main(
        [
            "validate",
            *own,
            "--ckpt_path",
            f"{folder}/checkpoints/last.ckpt",
            "--trainer.default_root_dir",
            f"{folder}/validate",
        ]
    )
    data = DemonstrationDataModule(str(tmp_path / "sampled" / "samples.jsonl"), policy)
    data.prepare_data()
    trained, held_out = (len(data.rows[name]) for name in ("train", "validation"))
    assert held_out >= 1
    assert trained + held_out == len(rows)


def test_rows_sampled_from_sampled_prompts_are_divided_anew(run, prompts_file, tmp_path):
    run("once", prompts=PromptRows(prompts_file, columns={"prompt": "question"}), n=1, batch_size=400)
    again = PromptRows(str(tmp_path / "once" / "samples.jsonl"), split=Split(validation=0.2))
    assert {row["split_level"] for row in lines(run("twice", prompts=again, n=1, batch_size=400))} == {2}
    for name in ("once", "twice"):
        parts = load_splits(str(tmp_path / name / "samples.jsonl"), "demonstrations", None, Split(validation=0.2))
        assert 1 <= len(parts["validation"]) < len(parts["train"])


@pytest.mark.parametrize(
    "method", [BestOfN(), RAFT(keep=2), RSO(), RewardWeighted()], ids=lambda method: type(method).__name__
)
def test_some_of_the_rows_of_every_method_are_held_out(run, prompts_file, tmp_path, method):
    run("rows", prompts=PromptRows(prompts_file, columns={"prompt": "question"}), method=method, n=2, batch_size=400)
    parts = load_splits(str(tmp_path / "rows" / "samples.jsonl"), "demonstrations", None, Split())
    assert 1 <= len(parts["validation"]) < len(parts["train"])


def test_a_limit_of_prompts_is_drawn(prompts_file):
    rows = PromptRows(prompts_file, limit=10, columns={"prompt": "question"}).load()["prompt"][:]
    whole = PromptRows(prompts_file, columns={"prompt": "question"}).load()["prompt"][:]
    assert len(rows) == 10
    assert rows != whole[:10]
    assert all(row in whole for row in rows)
