"""RewardEvaluation on policies that can say one thing only: every figure of the report can be worked out by hand."""

import json

import pytest
import torch

from rlhf_lightning.data.splits import Split
from rlhf_lightning.errors import UserError
from rlhf_lightning.evaluation.evaluation import RewardEvaluation, WorldEvaluation, by_task
from rlhf_lightning.generation.engine import SamplingParameters
from rlhf_lightning.generation.native import NativeEngine
from rlhf_lightning.models.export import export_folder
from rlhf_lightning.models.loading import load_causal_lm, load_scalar_model
from rlhf_lightning.models.spec import ModelSpec
from rlhf_lightning.rewards.composite import WeightedRewards
from rlhf_lightning.rewards.function import FunctionReward
from rlhf_lightning.rewards.maths import MathReward
from rlhf_lightning.rewards.reward_model import RewardModelReward
from rlhf_lightning.rewards.world import GoldReward
from rlhf_lightning.worlds import HHHWorld, world_tokenizer

WIDTH, SURE, LONGEST = 16, 50.0, 3
FIELDS = {"hidden_size": WIDTH, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
SPEC = ModelSpec(architecture={"model_type": "llama", "tie_word_embeddings": False, **FIELDS})
PROMPTS = ["who owns the kite ?", "who owns the dog ?", "who owns the boat ?"]


def emptied(network):
    """Blocks that add nothing: the last hidden state is the normalised embedding of the last token, of ones everywhere."""
    with torch.no_grad():
        network.model.embed_tokens.weight.fill_(1.0)
        for layer in network.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
    return network


def parrot(folder, token: int):
    """A policy that says one token for ever: its logit is 50, all others are 0."""
    tokenizer = world_tokenizer()
    network = emptied(load_causal_lm(SPEC, tokenizer))
    with torch.no_grad():
        network.lm_head.weight.zero_()
        network.lm_head.weight[token] = SURE / WIDTH
    return export_folder(network, tokenizer, folder)


@pytest.fixture(scope="module")
def exports(tmp_path_factory):
    """A policy that ends at once, one that says "kite" until it is cut off, and a reward model that likes endings.

    The reward model's first weight is 0.5, the others 0. The embedding of EOS points along the first axis, which RMSNorm
    brings to the length of WIDTH ** 0.5 = 4: a text that ends scores 2, any other 0.5.
    """
    folder, tokenizer = tmp_path_factory.mktemp("exports"), world_tokenizer()
    judge = emptied(load_scalar_model(SPEC, tokenizer, new_head=True))
    with torch.no_grad():
        judge.model.embed_tokens.weight[tokenizer.eos_token_id] = torch.eye(WIDTH)[0]
        judge.score.weight.zero_()
        judge.score.weight[0, 0] = 0.5
    return {
        "sft": parrot(folder / "sft", tokenizer.eos_token_id),
        "reward": export_folder(judge, tokenizer, folder / "reward"),
        "ppo": parrot(folder / "ppo", tokenizer.convert_tokens_to_ids("kite")),
    }


@pytest.fixture
def source(tmp_path):
    file = tmp_path / "prompts.jsonl"
    rows = [{"prompt": [{"role": "user", "content": text}]} for text in [*PROMPTS, "hello ?"]]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    held_out = tmp_path / "held_out.jsonl"
    held_out.write_text("".join(json.dumps(row) + "\n" for row in rows[:3]))
    from rlhf_lightning.data.sources import FileSource

    return FileSource(str(file), str(held_out))


def words(completions):
    return [float(len(messages[-1]["content"].split())) for messages in completions]


def evaluated(source, exports, reward, **more):
    return RewardEvaluation(source, reward, samples=2, max_new_tokens=LONGEST, **more).run(exports, seed=0)


def always(value):
    return {"mean": value, "low": value, "high": value}


def test_lengths_divergence_scores_and_wins_are_those_worked_out_by_hand(source, exports):
    report = evaluated(source, exports, FunctionReward(words))
    assert list(report["policies"]) == ["sft", "ppo"]  # the reward model is no policy
    assert list(report["comparisons"]) == ["ppo"]
    sft, ppo = (report["policies"][name]["held_out/sampled"] for name in ("sft", "ppo"))
    assert (sft["score"], sft["length"], sft["truncated"]) == (always(0.0), 1.0, 0.0)
    assert (ppo["score"], ppo["length"], ppo["truncated"]) == (always(3.0), 3.0, 1.0)
    assert sft["kl"] == pytest.approx(0, abs=1e-5)
    assert ppo["kl"] == pytest.approx(LONGEST * SURE, rel=1e-5)  # log 1 - log e^-50, three times
    assert report["comparisons"]["ppo"]["held_out/sampled"]["win_rate"] == always(1.0)


class Counting(NativeEngine):
    """Keeps which weights it was given, as an engine with weights of its own has to be."""

    def __init__(self):
        super().__init__()
        self.given, self.now = [], None

    def take_weights(self, network, tokenizer, version):
        self.given.append(version)
        self.now = network

    def generate(self, network, *args, **kwargs):
        assert network is self.now
        return super().generate(network, *args, **kwargs)


def test_answers_are_sampled_as_asked_by_an_engine_that_is_given_the_weights_of_each_policy(source, exports):
    engine = Counting()
    sampling = SamplingParameters(LONGEST, stop_strings="kite", engine=engine)
    report = evaluated(source, exports, FunctionReward(words), sampling=sampling)
    sft, ppo = (report["policies"][name]["held_out/sampled"] for name in ("sft", "ppo"))
    assert (ppo["score"], ppo["length"], ppo["truncated"]) == (always(1.0), 1.0, 0.0)  # one word, the stop string
    assert (sft["score"], sft["length"], sft["truncated"]) == (always(0.0), 1.0, 0.0)
    assert len(set(engine.given)) == 2


def test_an_envelope_of_another_distribution_is_refused():
    with pytest.raises(UserError, match=r"the envelope is computed from samples of the policy itself.*min_p 0.1 drops"):
        WorldEvaluation(envelope_samples=4, sampling=SamplingParameters(min_p=0.1))
    evaluation = WorldEvaluation(envelope_samples=4, sampling=SamplingParameters(9, stop_strings="x"))
    assert evaluation.greedy == SamplingParameters(9, temperature=0, stop_strings="x")


def test_ties_count_one_half(source, exports):
    report = evaluated(source, exports, FunctionReward(lambda prompts: [1.0] * len(prompts)))
    assert report["comparisons"]["ppo"]["held_out/sampled"]["win_rate"] == always(0.5)


def test_a_reward_that_depends_on_the_prompt_is_matched_with_it(source, exports):
    """The scores 0, 1, 2 by prompt for "sft", and 1, 1, 1 for "ppo": one win, one tie and one loss."""

    def by_prompt(prompts, completions):
        rank = {text: float(i) for i, text in enumerate(PROMPTS)}
        mine = [rank[prompt[-1]["content"]] for prompt in prompts]
        return [1.0 if c[-1]["content"] else m for c, m in zip(completions, mine, strict=True)]

    report = evaluated(source, exports, FunctionReward(by_prompt))
    assert report["policies"]["sft"]["held_out/sampled"]["score"]["mean"] == 1.0
    assert report["comparisons"]["ppo"]["held_out/sampled"]["win_rate"]["mean"] == 0.5
    assert [row["answers"]["sft"]["score"] for row in report["samples"]] == [0.0, 1.0, 2.0]


@pytest.mark.parametrize("given", [False, True], ids=["the pipeline's own", "given"])
def test_a_reward_model_scores_the_ends_that_it_likes(source, exports, given):
    reward = RewardModelReward(str(exports["reward"])) if given else None
    report = evaluated(source, exports, reward)
    sft, ppo = (report["policies"][name]["held_out/sampled"]["score"]["mean"] for name in ("sft", "ppo"))
    assert sft == pytest.approx(2.0, rel=1e-4)
    assert ppo == pytest.approx(0.5, rel=1e-4)  # cut off: shown to the reward model without an end
    assert report["comparisons"]["ppo"]["held_out/sampled"]["win_rate"] == always(0.0)


def test_samples_hold_prompt_answer_and_score_side_by_side(source, exports):
    report = evaluated(source, exports, FunctionReward(words))
    assert [row["prompt"] for row in report["samples"]] == PROMPTS
    expected = {"sft": {"text": "", "score": 0.0}, "ppo": {"text": "kite kite kite", "score": 3.0}}
    assert all(row["answers"] == expected for row in report["samples"])


def test_only_so_many_held_out_prompts_are_asked(source, exports):
    report = evaluated(source, exports, FunctionReward(words), prompts=2, split=Split(validation=0))
    asked = [PROMPTS.index(row["prompt"]) for row in report["samples"]]
    assert len(asked) == 2  # drawn by the split's seed, in the order of the source
    assert asked == sorted(set(asked))


def test_no_reward_at_all_is_an_error(source, exports):
    with pytest.raises(UserError, match="no reward"):
        evaluated(source, {name: exports[name] for name in ("sft", "ppo")}, None)


def test_a_reward_that_fails_is_an_error_and_no_zero(source, exports):
    with pytest.raises(UserError, match="nan"):
        evaluated(source, exports, FunctionReward(lambda prompts: [float("nan")] * len(prompts)))


def test_folders_are_told_apart_by_what_they_hold(exports):
    policies, reward_models = by_task(exports)
    assert (list(policies), list(reward_models)) == (["sft", "ppo"], ["reward"])


def test_the_gain_over_the_first_policy_and_how_it_was_measured_are_reported(source, exports):
    report = evaluated(source, exports, FunctionReward(words))
    assert report["comparisons"]["ppo"]["held_out/sampled"]["gain"] == always(3.0)
    assert report["conditions"] == {
        "held_out/sampled": {"prompts": 3, "distinct": 3, "samples": 2, "sampling": "sampled at temperature 1"}
    }
    kl = report["policies"]["ppo"]["held_out/sampled"]["kl_interval"]
    assert (kl["low"], kl["high"]) == pytest.approx((LONGEST * SURE, LONGEST * SURE), rel=1e-5)


def test_other_sampling_is_named_in_the_heading(source, exports):
    sampling = SamplingParameters(LONGEST, temperature=0.5, top_p=0.9)
    report = evaluated(source, exports, FunctionReward(words), sampling=sampling)
    assert report["conditions"]["held_out/sampled"]["sampling"] == "sampled at temperature 0.5, top_p 0.9"


def test_prompts_that_come_more_than_once_do_not_narrow_the_intervals(tmp_path, exports):
    """Ten copies of three prompts know no more than the three: scores 0, 1, 2 by prompt for "sft"."""

    def by_prompt(prompts, completions):
        rank = {text: float(i) for i, text in enumerate(PROMPTS)}
        mine = [rank[prompt[-1]["content"]] for prompt in prompts]
        return [1.0 if c[-1]["content"] else m for c, m in zip(completions, mine, strict=True)]

    from rlhf_lightning.data.sources import FileSource

    found = []
    for copies in (1, 10):
        rows = [{"prompt": [{"role": "user", "content": text}]} for text in PROMPTS] * copies
        train, held_out = tmp_path / f"train_{copies}.jsonl", tmp_path / f"held_out_{copies}.jsonl"
        train.write_text(json.dumps({"prompt": [{"role": "user", "content": "hello ?"}]}) + "\n")
        held_out.write_text("".join(json.dumps(row) + "\n" for row in rows))
        report = evaluated(FileSource(str(train), str(held_out)), exports, FunctionReward(by_prompt))
        compared = report["comparisons"]["ppo"]["held_out/sampled"]
        found.append([report["policies"]["sft"]["held_out/sampled"]["score"], compared["gain"], compared["win_rate"]])
        assert report["conditions"]["held_out/sampled"]["distinct"] == 3
    once, repeated = found
    assert [value["high"] - value["low"] > 0.5 for value in once] == [True, True, True]
    for a, b in zip(once, repeated, strict=True):
        assert a == pytest.approx(b)


def brevity(completions):
    return [-float(len(messages[-1]["content"])) for messages in completions]


def test_the_reward_is_named_by_what_it_is(source, exports):
    def named(reward):
        return evaluated(source, exports, reward, prompts=1)["reward"]

    own = named(None)
    assert (own["figure"], own["name"]) == ("score", "reward model's score")
    assert 'stage "reward"' in own["about"]
    given = named(RewardModelReward(str(exports["reward"])))
    assert given == {"figure": "score", "name": "reward model's score"}  # not known to be what policies were trained on
    assert named(FunctionReward(brevity))["name"] == "reward brevity"
    weighted = WeightedRewards([RewardModelReward(str(exports["reward"])), FunctionReward(brevity)], [1.0, 0.1])
    assert named(weighted)["name"] == "weighted reward (1 x reward_model + 0.1 x brevity)"


def test_a_reward_class_that_is_called_reward_is_not_called_so_twice():
    assert MathReward().title == "MathReward"
    assert GoldReward(HHHWorld()).title == "gold reward"


@pytest.mark.parametrize("split", [{"validation": 0.05}, {"validation": 0.2, "seed": 1}, {}])
def test_a_stage_that_was_trained_on_what_is_held_out_here_is_refused(split):
    evaluation = RewardEvaluation("prompts.jsonl", split=Split(0.2))
    with pytest.raises(UserError, match=r"evaluation.split holds out 0.2 .* stage ppo 0") as error:
        evaluation.check_stage("ppo", {"source": "prompts.jsonl", "split": split})
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("source", "held_out"), [("prompts.jsonl", 0.2), ("prompts.jsonl", 0.5), ("other.jsonl", 0.05)]
)
def test_a_stage_that_held_out_as_much_is_not_refused(source, held_out):
    RewardEvaluation("prompts.jsonl", split=Split(0.2)).check_stage(
        "ppo", {"source": source, "split": {"validation": held_out, "seed": 0}}
    )
