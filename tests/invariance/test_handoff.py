"""A reward model that was trained here is, in PPO, that reward model: every weight, and no new one.

OpenRLHF#643, LlamaFactory#7706, ms-swift#7344: "score.weight newly initialized", and PPO learnt from a random reward.
"""

import pytest
import torch
from safetensors.torch import load_file, save_file

from rlhf_lightning.callbacks.export import export_module
from rlhf_lightning.errors import UserError
from rlhf_lightning.models.loading import load_causal_lm, load_scalar_model
from rlhf_lightning.models.spec import ModelSpec
from rlhf_lightning.rewards.reward_model import RewardModelReward
from tests.invariance.rearrangements import PLAIN
from tests.invariance.subjects import ARCHITECTURES, SUBJECTS, configured, tokenizer


@pytest.fixture(params=ARCHITECTURES)
def trained(request, tmp_path):
    """A reward model with its normalisation, and the folder that it was exported to."""
    module = configured(SUBJECTS["reward model"], request.param, "", PLAIN)
    module.network.normalise(mean=1.5, std=0.5)
    return request.param, module.network, export_module(module, tmp_path / "export")


def test_critic_and_reward_begin_as_the_trained_reward_model(trained):
    architecture, network, folder = trained
    ppo = SUBJECTS["ppo"].build(ARCHITECTURES[architecture], str(folder), PLAIN)
    ppo.configure_model()
    reward = RewardModelReward(str(folder))
    reward.prepare("cpu")
    expected = network.state_dict()
    for loaded in (ppo.actor_critic.critic, reward.model.network):
        weights = loaded.state_dict()
        assert weights.keys() == expected.keys()
        assert [name for name, value in expected.items() if not torch.equal(value, weights[name])] == []
    assert float(expected["gain"]) == 2


@pytest.mark.parametrize("lost", ["score", "layer"])
def test_a_folder_that_lacks_a_weight_is_refused(trained, lost):
    """Its head, or anything else: transformers would fill it with random numbers and say so in a log."""
    architecture, _, folder = trained
    name = lose(folder, lambda name: ("score" in name) == (lost == "score"))
    with pytest.raises(UserError, match=name.replace(".", r"\.")):
        SUBJECTS["ppo"].build(ARCHITECTURES[architecture], str(folder), PLAIN).configure_model()
    with pytest.raises(UserError, match=name.replace(".", r"\.")):
        RewardModelReward(str(folder)).prepare("cpu")


@pytest.mark.parametrize("new_head", [False, True])
def test_a_policy_that_lacks_a_layer_is_refused_by_every_stage(tmp_path, new_head):
    """The head of a reward model may be new when its training begins, and nothing else."""
    folder = export_module(configured(SUBJECTS["dpo"], "rotary", "", PLAIN), tmp_path / "export")
    name = lose(folder, lambda name: "layers.1.mlp" in name)
    spec = ModelSpec(path=str(folder))
    with pytest.raises(UserError, match=name):
        load_scalar_model(spec, tokenizer(), new_head=True) if new_head else load_causal_lm(spec, tokenizer())


def lose(folder, which):
    """Take a weight out of a folder; its name."""
    file = folder / "model.safetensors"
    weights = load_file(file)
    name = next(n for n in weights if which(n) and n.endswith("weight"))
    del weights[name]
    save_file(weights, file, metadata={"format": "pt"})
    return name
