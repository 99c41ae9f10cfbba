"""EOS, BOS and PAD are ids like any other: what counts, and where a text ends, is known from lengths.

That one BOS and one EOS are there, and that the prompt's ids begin the whole, is tests/unit/data/test_encoding.py's
(trl#4481, #4908, axolotl#1616).
"""

import pytest
import torch

from rlhf_lightning.data.collate import PreferenceCollator, PromptCollator, SequenceCollator
from rlhf_lightning.data.tokenization import encode_pair
from rlhf_lightning.errors import UserError
from rlhf_lightning.models.actor_critic import ActorCritic
from rlhf_lightning.models.loading import load_causal_lm, load_scalar_model
from rlhf_lightning.models.policy import PolicyNetwork
from rlhf_lightning.models.scalar_head import ScalarModel
from rlhf_lightning.models.spec import ModelSpec
from rlhf_lightning.rewards.reward import Samples
from rlhf_lightning.rewards.reward_model import RewardModelReward
from tests.invariance import subjects
from tests.invariance.rearrangements import EOS, PLAIN
from tests.invariance.subjects import ARCHITECTURES, SUBJECTS, run, scalar_folder, widened

TURNS_END_WITH_EOS = "{% for m in messages %}{{ m.content + ' <eos> ' }}{% endfor %}"
CHAT = [
    {"role": "user", "content": "a b"},
    {"role": "assistant", "content": "c"},
    {"role": "user", "content": "d e f"},
]


@pytest.fixture
def chat_tokenizer():
    tokenizer = subjects.tokenizer.__wrapped__()
    tokenizer.chat_template = TURNS_END_WITH_EOS
    return tokenizer


@pytest.fixture(params=ARCHITECTURES)
def scalar(request, chat_tokenizer):
    network = load_scalar_model(ModelSpec(architecture=ARCHITECTURES[request.param]), chat_tokenizer, new_head=True)
    widened(network, 3)
    return network


def test_a_chat_is_scored_at_its_last_token_though_every_turn_ends_with_eos(scalar, chat_tokenizer):
    """trl#6952: with the first EOS taken for the end, the score came from inside the prompt and the answer did not matter."""
    reward = RewardModelReward("none")
    reward.tokenizer, reward.model, reward.device = chat_tokenizer, ScalarModel(scalar), "cpu"
    answers, expected = ["g h", "g", "h g"], []
    for answer in answers:
        prompt, response = encode_pair(chat_tokenizer, CHAT, [{"role": "assistant", "content": answer}])
        ids = prompt + response
        assert ids.count(EOS) == 4
        with torch.no_grad():
            hidden = scalar.base_model(input_ids=torch.tensor([ids])).last_hidden_state
            expected.append(scalar.score(hidden)[0, -1, 0])
    samples = Samples([CHAT] * 3, answers, [[]] * 3, [False] * 3)
    with torch.no_grad():
        scores = reward.score(samples)
    torch.testing.assert_close(scores, torch.stack(expected), rtol=1e-5, atol=1e-6)
    assert scores.std() > 0.01


def test_a_critic_reads_before_each_token_though_the_prompt_holds_eos(scalar, chat_tokenizer):
    """verl#1758: the critic's mask was off by one."""
    policy = PolicyNetwork(load_causal_lm(ModelSpec(architecture=ARCHITECTURES["rotary"]), chat_tokenizer))
    prompt, response = encode_pair(chat_tokenizer, CHAT, [{"role": "assistant", "content": "g h"}])
    ids = torch.tensor([[EOS, EOS, *prompt, *response, EOS]])  # padded on both sides
    columns = torch.arange(ids.shape[1])
    attention = (columns >= 2) & (columns < ids.shape[1] - 1)
    responses = attention & (columns >= 2 + len(prompt))
    values = ActorCritic(policy, ScalarModel(scalar))(ids, attention[None], responses[None]).values
    hidden = scalar.base_model(input_ids=ids[:, 2:-1]).last_hidden_state
    expected = scalar.score(hidden)[0, len(prompt) - 1 : -1, 0]
    assert len(expected) == len(response) == 3
    torch.testing.assert_close(values[responses[None, 1:]], expected, rtol=1e-5, atol=1e-6)


def test_where_the_pad_id_is_eos_every_eos_is_still_learnt_and_attended_to():
    """trl#3200, #6357: collators that masked by id took the EOS off the labels, and the model never stopped."""
    rows = range(len(subjects.CHOSEN))
    ends = [len(prompt) + len(chosen) - 1 for prompt, chosen in zip(subjects.PROMPTS, subjects.CHOSEN, strict=True)]
    sequences = SequenceCollator(EOS)((subjects.DEMONSTRATIONS, 1.0))
    pairs = PreferenceCollator(EOS)((subjects.PREFERENCES, 1.0))
    for batch in (sequences, pairs):
        assert batch.input_ids[rows, ends].eq(EOS).all()
        assert batch.response_mask[rows, ends].all()
        assert batch.attention_mask[: len(rows)].sum(1).tolist() == [end + 1 for end in ends]
    assert sequences.response_mask.sum(1).tolist() == [len(chosen) for chosen in subjects.CHOSEN]
    prompts = PromptCollator(EOS)((subjects.PROMPT_ROWS, 1.0))
    assert prompts.attention_mask.sum(1).tolist() == [len(prompt) for prompt in subjects.PROMPTS]


def test_a_step_without_a_token_to_learn_stops_the_run(tmp_path, monkeypatch):
    """trl#6668: an all-masked batch reported a loss of 0.0 and training went on; trl#3927 made such batches."""
    monkeypatch.chdir(tmp_path)
    rows = subjects.DEMONSTRATIONS | {"response_mask": [[0] * len(ids) for ids in subjects.DEMONSTRATIONS["input_ids"]]}
    monkeypatch.setitem(subjects.COLUMNS, SUBJECTS["sft"].method.rows, rows)
    monkeypatch.setitem(subjects.WEIGHTS, SUBJECTS["sft"].method.rows, [0.0] * len(rows["input_ids"]))
    with pytest.raises(UserError, match="loss nan"):
        run(SUBJECTS["sft"], "rotary", scalar_folder(tmp_path, "rotary"), PLAIN)
