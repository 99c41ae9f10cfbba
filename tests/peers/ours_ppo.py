"""Runs our own PPO module for the same iteration and writes down the same things."""

from dataclasses import fields
from typing import Any

from datasets import Dataset
from torch import Tensor

from rlhf_lightning.data.collate import PromptCollator
from rlhf_lightning.data.loaders import Placement, make_loader
from rlhf_lightning.generation.engine import SamplingParameters
from rlhf_lightning.generation.transformers_engine import TransformersEngine
from rlhf_lightning.losses import PPOLoss
from rlhf_lightning.models.spec import ModelSpec
from rlhf_lightning.modules import PPOModule
from rlhf_lightning.modules.optimization import Schedule
from rlhf_lightning.modules.ppo import PPOUpdate
from rlhf_lightning.rewards.reward_model import RewardModelReward
from rlhf_lightning.rollouts.advantages import GAE
from rlhf_lightning.rollouts.buffer import Rollout
from rlhf_lightning.rollouts.kl_control import FixedKL
from tests.peers import cases
from tests.peers.dice import loaded_dice
from tests.peers.measure import gradients
from tests.peers.ours import Memory, fit, sgd
from tests.peers.problem import PAD, PROMPTS, RESPONSES, WIDTH, network, tokenizer


def build(case: cases.Online, paths: dict[str, str]) -> PPOModule:
    """The module; its policy has moved away from the reference, as in the middle of a run."""
    module = PPOModule(
        ModelSpec(path=paths["reference"]),
        ModelSpec(path=paths["critic"]),
        RewardModelReward(paths["reward"]),
        kl=FixedKL(cases.KL_COEF),
        # The engine that draws as TRL does: their dice are thrown for both.
        sampling=SamplingParameters(max_new_tokens=WIDTH, temperature=cases.TEMPERATURE, engine=TransformersEngine()),
        loss=PPOLoss(clip_range=cases.CLIP, value_clip_range=cases.VALUE_CLIP, value_coef=cases.VALUE_COEF),
        advantages=GAE(
            gae_lambda=case.gae_lambda,
            missing_eos_penalty=cases.MISSING_EOS_PENALTY,
            whiten_rewards=case.whiten_rewards,
        ),
        update=PPOUpdate(epochs=2, minibatch_size=len(PROMPTS), micro_batch_size=3, max_grad_norm=1e9),
        optimizer=sgd(cases.LR),
        schedule=Schedule(decay="constant"),
    )
    module.tokenizer = tokenizer()
    module.configure_model()
    module.actor_critic.policy.network.load_state_dict(network(case.architecture, "policy").state_dict())
    return module


def run(case: cases.Online, paths: dict[str, str]) -> dict[str, Any]:
    """One iteration: rollout, advantages, two passes."""
    module, memory = build(case, paths), Memory()
    rollouts: list[Rollout] = []
    passes: list[dict[str, Any]] = []
    learn, step = module._learn, module._step

    def note_rollout(rollout: Rollout, *more: Any) -> Any:
        rollouts.append(rollout)
        return learn(rollout, *more)

    def note_step(*minibatch: Any) -> Any:
        before = module.update_means.sums.clone(), module.update_means.counts.clone()
        approx_kl = step(*minibatch)
        sums, counts = module.update_means.sums - before[0], module.update_means.counts - before[1]
        means = dict(zip(module.update_means.names, (sums / counts).tolist(), strict=True))
        networks = {"policy": module.actor_critic.policy.network, "critic": module.actor_critic.critic.network}
        found = {role: gradients(network) for role, network in networks.items()}
        passes.append({"means": means, "gradients": found})
        return approx_kl

    module._learn, module._step = note_rollout, note_step
    with loaded_dice(RESPONSES[case.responses]):
        fit(module, loader(), memory)
    rollout = {field.name: getattr(rollouts[0], field.name) for field in fields(Rollout)}
    return {"rollout": rollout, "passes": passes, "metrics": memory.metrics}


def loader() -> Any:
    ids = [tokenizer()(text)["input_ids"] for text in PROMPTS]
    rows = Dataset.from_dict({"prompt_ids": ids, "prompt": PROMPTS, "length": list(range(len(ids)))})
    return make_loader(
        rows,
        PromptCollator(PAD),
        batch_size=len(PROMPTS),
        shuffle=False,
        seed=0,
        place=Placement(),
        num_workers=0,
        weights=[1] * len(PROMPTS),
        bucket_batches=1,
    )


def tail_values(module: PPOModule, rollout: dict[str, Tensor]) -> Tensor:
    """What the critic says of a finished response: the value read at its last token. Shape (batch,), with gradient."""
    values = module.actor_critic.critic(rollout["input_ids"], rollout["attention_mask"], pooled=False)
    last = rollout["sequence_mask"].long().cumsum(1).argmax(1)
    return values.gather(1, last[:, None]).squeeze(1)
