"""A reward model as a reward: text goes through its own tokenizer, and padding and order change no score."""

import pytest
import torch
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

from rlhf_lightning.errors import UserError
from rlhf_lightning.models.export import export_folder
from rlhf_lightning.models.loading import load_causal_lm, load_scalar_model
from rlhf_lightning.models.scalar_head import ScalarModel
from rlhf_lightning.models.spec import ModelSpec
from rlhf_lightning.rewards.reward import Samples
from rlhf_lightning.rewards.reward_model import RewardModelReward

GPT2 = {"model_type": "gpt2", "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 64}


@pytest.fixture
def tokenizer():
    names = ["<pad>", "<bos>", "<eos>", "<unk>", *"abcdefgh"]
    backend = Tokenizer(WordLevel({name: i for i, name in enumerate(names)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")


def samples(prompts, completions, truncated):
    return Samples(prompts, completions, [[99]] * len(prompts), truncated)  # the policy's ids are not looked at


@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_scores_are_those_of_each_text_alone_with_eos_only_where_it_ended(tokenizer, tmp_path, batch_size):
    torch.manual_seed(0)
    network = load_scalar_model(ModelSpec(architecture=GPT2), tokenizer, new_head=True)
    for parameter in network.parameters():
        if parameter.dim() > 1:
            parameter.data.normal_(std=0.35)
    model = ScalarModel(network)
    model.normalise(mean=1.0, std=0.5)
    model.describe_normalisation()
    path = str(export_folder(network, tokenizer, tmp_path / "reward"))
    reward = RewardModelReward(path, batch_size=batch_size)
    reward.prepare("cpu")
    # Sorted by length they are in the order 1, 3, 2, 0, which is not its own inverse.
    texts = [("a", " b c d e f", False), ("a b c", " d", False), ("a", " b c d e f", True), ("h g", " f e", False)]
    expected = []
    for prompt, completion, truncated in texts:
        ids = tokenizer(prompt + completion).input_ids + ([] if truncated else [tokenizer.eos_token_id])
        row = torch.tensor([ids])
        with torch.no_grad():
            expected.append(2 * network.score(network.base_model(input_ids=row).last_hidden_state)[0, -1, 0] - 2)
    scores = reward.score(samples(*map(list, zip(*texts, strict=True))))
    torch.testing.assert_close(scores, torch.stack(expected), rtol=1e-5, atol=1e-5)
    assert scores.std() > 0.1


def test_a_policy_in_place_of_a_reward_model_is_refused(tokenizer, tmp_path):
    network = load_causal_lm(ModelSpec(architecture=GPT2), tokenizer)
    reward = RewardModelReward(str(export_folder(network, tokenizer, tmp_path / "policy")))
    with pytest.raises(UserError, match="prepare"):
        reward.score(samples(["a"], ["b"], [False]))
    with pytest.raises(UserError, match="no trained scalar head"):
        reward.prepare("cpu")
