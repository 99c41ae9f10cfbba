"""A budget larger than the context: answers end where the context does, in every command that generates."""

import pytest
import torch

from rlhf_lightning.batches import SequenceBatch
from rlhf_lightning.errors import UserError
from rlhf_lightning.evaluation.answers import Answerer
from rlhf_lightning.evaluation.candidates import Scorer
from rlhf_lightning.generation.context import capped, context_of, within_context
from rlhf_lightning.generation.engine import SamplingParameters
from rlhf_lightning.models.export import export_folder
from rlhf_lightning.models.loading import load_causal_lm
from rlhf_lightning.models.policy import PolicyNetwork
from rlhf_lightning.models.spec import ModelSpec
from rlhf_lightning.modules.showing import sampled_responses
from rlhf_lightning.worlds import world_tokenizer

CONTEXT = 32
# Learned positions: what lies beyond the last of them can't be read at all.
GPT2 = {"model_type": "gpt2", "n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": CONTEXT}
LARGE = SamplingParameters(max_new_tokens=256, min_new_tokens=200)
QUESTION = [{"role": "user", "content": "who owns the kite ?"}]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    torch.manual_seed(0)
    tokenizer = world_tokenizer()
    network = load_causal_lm(ModelSpec(architecture=GPT2), tokenizer)
    return str(export_folder(network, tokenizer, tmp_path_factory.mktemp("gpt2") / "export"))


@pytest.fixture
def network(folder):
    return load_causal_lm(ModelSpec(path=folder), world_tokenizer())


@pytest.mark.parametrize(
    ("prompt", "budget", "least", "expected"),
    [(8, 24, 24, (24, 24)), (8, 25, 25, (24, 24)), (8, 25, 3, (24, 3)), (31, 256, 0, (1, 0)), (8, 4, 1, (4, 1))],
)
def test_the_budget_is_what_the_context_leaves(network, prompt, budget, least, expected):
    assert context_of(network) == CONTEXT
    fitting = within_context(SamplingParameters(max_new_tokens=budget, min_new_tokens=least), network, prompt)
    assert (fitting.max_new_tokens, fitting.min_new_tokens) == expected


def test_a_prompt_that_fills_the_context_is_refused(network):
    with pytest.raises(
        UserError, match="a prompt of 32 tokens leaves no room for an answer: the model reads 32 tokens"
    ):
        within_context(LARGE, network, CONTEXT)


def test_a_network_without_a_limit_keeps_the_budget():
    fields = {"model_type": "bloom", "hidden_size": 16, "n_layer": 1, "n_head": 2}  # its positions have no end
    network = load_causal_lm(ModelSpec(architecture=fields), world_tokenizer())
    assert context_of(network) is None
    assert within_context(LARGE, network, 10_000) is LARGE


def test_the_warning_comes_once_a_model(network, caplog):
    for _ in range(3):
        assert capped(LARGE, network, 8, "runs/a").max_new_tokens == 24
    assert [record.getMessage() for record in caplog.records] == [
        "runs/a reads 32 tokens: after a prompt of 8, answers end at 24 tokens instead of max_new_tokens 256"
    ]


def test_evaluations_and_sample_end_answers_there(folder):
    answers = Answerer(folder, folder).answer([QUESTION], LARGE, samples=2, seed=0)
    used = len(world_tokenizer().apply_chat_template(QUESTION, add_generation_prompt=True)["input_ids"])
    assert answers.lengths.tolist() == [[CONTEXT - used] * 2]
    assert answers.truncated.all()
    assert abs(answers.kl).max() < 1e-5
    scorer = Scorer(ModelSpec(path=folder), LARGE, {}, "cpu")
    (candidate,) = scorer.answer({"prompt": [QUESTION]}, 2, 0)
    assert [sample["tokens"] for sample in candidate["samples"]] == [CONTEXT - used] * 2


def test_samples_shown_in_training_end_there(network):
    ids = torch.randint(5, 50, (2, 30))
    mask = torch.zeros(2, 30, dtype=torch.bool)
    mask[:, 20:] = True
    batch = SequenceBatch(ids, torch.ones_like(mask), mask, 1.0)
    found = sampled_responses(PolicyNetwork(network), world_tokenizer(), batch, 2, LARGE)
    assert found.response_mask.sum(1).tolist() == [CONTEXT - 20] * 2
