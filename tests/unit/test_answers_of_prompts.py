"""Several answers to each of several prompts: each is with its own prompt, scores and columns, however they were batched."""

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from rlhf_lightning.commands.sample import select
from rlhf_lightning.evaluation import answers as answering
from rlhf_lightning.evaluation.answers import Answerer
from rlhf_lightning.evaluation.candidates import Scorer
from rlhf_lightning.evaluation.world import judge, summary
from rlhf_lightning.generation.engine import SamplingParameters
from rlhf_lightning.models.export import export_folder
from rlhf_lightning.models.loading import load_causal_lm
from rlhf_lightning.models.spec import ModelSpec
from rlhf_lightning.rewards.function import FunctionReward
from rlhf_lightning.rollouts.selection import RAFT, RewardWeighted
from rlhf_lightning.worlds import HHHWorld, world_tokenizer

FIELDS = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
GREEDY = SamplingParameters(max_new_tokens=5, temperature=0)
QUESTIONS = ["who owns the kite ?", "how do i cut the bread ?", "what is two plus four ?", "hello", "who is ben ?"]
PROMPTS = [[{"role": "user", "content": question}] for question in QUESTIONS]
NUMBERS = [3, 0, 4, 1, 2]
TIMES = 3


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A policy whose every token matters, and another one as its reference."""
    base = tmp_path_factory.mktemp("base")
    for seed, name in enumerate(("policy", "reference")):
        network = load_causal_lm(ModelSpec(architecture={"model_type": "llama", **FIELDS}), world_tokenizer())
        generator = torch.Generator().manual_seed(seed)
        for parameter in network.parameters():
            if parameter.dim() > 1:
                parameter.data.normal_(std=0.5, generator=generator)
        export_folder(network, world_tokenizer(), base / name)
    return [str(base / name) for name in ("policy", "reference")]


def test_answers_are_in_the_rows_of_their_prompts(folders, monkeypatch):
    """Against every prompt asked alone; batches of four cut the answers to one prompt."""
    monkeypatch.setattr(answering, "BATCH", 4)
    answerer = Answerer(*folders)
    found = answerer.answer(PROMPTS, GREEDY, samples=TIMES, seed=0, columns={"n": NUMBERS})
    alone = [answerer.answer([prompt], GREEDY, samples=1, seed=0) for prompt in PROMPTS]
    assert len({one.texts[0][0] for one in alone}) == len(PROMPTS)
    assert found.texts == [[one.texts[0][0]] * TIMES for one in alone]
    for name in ("kl", "lengths", "truncated"):
        expected = np.repeat(np.concatenate([getattr(one, name) for one in alone]), TIMES, axis=1)
        np.testing.assert_allclose(getattr(found, name), expected, rtol=1e-4, atol=1e-4)
    samples = found.samples()
    assert samples.prompts == [prompt for prompt in PROMPTS for _ in range(TIMES)]
    assert samples.completions == [text for texts in found.texts for text in texts]
    assert samples.columns == {"n": [n for n in NUMBERS for _ in range(TIMES)]}


def test_the_kl_of_an_answer_is_that_of_plain_transformers(folders):
    """The sum over its tokens, the first and EOS among them, of log policy - log reference."""
    found = Answerer(*folders).answer(PROMPTS, GREEDY, samples=1, seed=0)
    tokenizer = AutoTokenizer.from_pretrained(folders[0])
    networks = [AutoModelForCausalLM.from_pretrained(folder) for folder in folders]
    for row, prompt in enumerate(PROMPTS):
        before = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=False)
        answer = tokenizer(found.texts[row][0], add_special_tokens=False).input_ids
        answer += [] if found.truncated[row, 0] else [tokenizer.eos_token_id]
        assert found.lengths[row, 0] == len(answer)
        with torch.no_grad():
            policy, reference = (
                network(torch.tensor([before + answer])).logits[0].double().log_softmax(-1) for network in networks
            )
        at = torch.arange(len(before) - 1, len(before) + len(answer) - 1)
        expected = (policy - reference)[at, answer].sum().item()
        assert found.kl[row, 0] == pytest.approx(expected, abs=1e-4)


def test_candidates_are_scored_with_the_columns_of_their_prompt(folders):
    def score(prompts, completions, n):
        return [
            1e4 * number + 100 * len(prompt[-1]["content"]) + len(completion[0]["content"])
            for number, prompt, completion in zip(n, prompts, completions, strict=True)
        ]

    scorer = Scorer(ModelSpec(path=folders[0]), GREEDY, {"score": FunctionReward(score)}, "cpu")
    found = scorer.answer({"prompt": PROMPTS, "n": NUMBERS}, TIMES, 0)
    assert [row["prompt"] for row in found] == PROMPTS
    for row, prompt, number in zip(found, PROMPTS, NUMBERS, strict=True):
        (alone,) = scorer.answer({"prompt": [prompt], "n": [number]}, 1, 0)
        assert row["samples"] == alone["samples"] * TIMES
        text = alone["samples"][0]["text"]
        assert row["samples"][0]["score"] == 1e4 * number + 100 * len(prompt[0]["content"]) + len(text)


def test_what_is_kept_says_which_prompt_and_sample_it_was():
    """The second prompt has only blank answers, the others some; the third has its best one behind a blank."""
    texts = [["a", " ", "b", "c"], ["", " ", "", " "], ["", "d", "", "e"]]
    scores = [[1.0, 9.0, 3.0, 2.0], [4.0] * 4, [9.0, 1.0, 9.0, 2.0]]
    candidates = [
        {
            "prompt": f"p{i}",
            "samples": [{"text": t, "score": s, "truncated": t == "e"} for t, s in zip(*both, strict=True)],
        }
        for i, both in enumerate(zip(texts, scores, strict=True))
    ]
    kept = select(candidates, RAFT(keep=2), {"seed": 0})
    names = ("prompt", "completion", "completion_truncated", "score", "rank", "prompt_index", "sample", "weight")
    assert [tuple(row[name] for name in names) for row in kept] == [
        ("p0", "b", False, 3.0, 1, 0, 2, 0.5),
        ("p0", "c", False, 2.0, 2, 0, 3, 0.5),
        ("p2", "e", True, 2.0, 1, 2, 3, 0.5),
        ("p2", "d", False, 1.0, 2, 2, 1, 0.5),
    ]
    weighted = select(candidates, RewardWeighted(beta=1.0), {"seed": 0})
    assert [(row["completion"], row["rank"], row["sample"]) for row in weighted] == [
        ("b", 1, 2), ("c", 2, 3), ("a", 3, 0), ("e", 1, 3), ("d", 2, 1),
    ]  # fmt: skip
    assert [row["weight"] for row in weighted] == pytest.approx([0.66524, 0.24473, 0.09003, 0.73106, 0.26894], abs=1e-5)


def test_a_summary_by_kind_takes_the_rows_of_each_kind():
    """Two answers to each prompt, of which the best is the second; only those about harm have no good one."""
    world = HHHWorld(seed=0, held_out=40)
    prompts = list(world.load("prompts")["validation"]["prompt"])
    kinds = [world.gold(prompt, "", truncated=False).kind for prompt in prompts]
    texts = [
        ["", "" if kind == "harm" else world.best_response(prompt)] for prompt, kind in zip(prompts, kinds, strict=True)
    ]
    shape = len(prompts), 2
    zeros = np.zeros(shape)
    found = summary(judge(world, answering.Answers(prompts, texts, zeros.astype(bool), zeros, zeros)), proxy=None)
    assert 1 < kinds.count("harm") < len(kinds) / 2
    means = {kind: value["mean"] for kind, value in found["by_kind"].items()}
    assert means == pytest.approx({kind: -0.8 if kind == "harm" else 0.1 for kind in set(kinds)})
    share = kinds.count("harm") / len(kinds)
    assert found["gold"]["mean"] == pytest.approx(-0.8 * share + 0.1 * (1 - share))
    for kind, value in found["by_kind"].items():
        assert value["high"] - value["low"] == pytest.approx(0, abs=1e-12), kind  # all prompts of a kind are alike
