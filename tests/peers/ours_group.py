"""Runs our own GRPO module for the same iteration and writes down the same things."""

from dataclasses import fields
from typing import Any

import lightning.pytorch as pl
from datasets import Dataset
from torch import Tensor

from rlhf_lightning.data.collate import PromptCollator
from rlhf_lightning.data.loaders import Placement, make_loader
from rlhf_lightning.generation.engine import SamplingParameters
from rlhf_lightning.generation.transformers_engine import TransformersEngine
from rlhf_lightning.losses import PolicyObjective
from rlhf_lightning.models.spec import ModelSpec
from rlhf_lightning.modules import GRPOModule
from rlhf_lightning.modules.grpo_update import Groups, GRPOUpdate
from rlhf_lightning.modules.optimization import Schedule
from rlhf_lightning.rewards.function import FunctionReward
from rlhf_lightning.rollouts.buffer import Rollout
from rlhf_lightning.rollouts.kl_control import FixedKL
from tests.peers.cases import TEMPERATURE
from tests.peers.dice import loaded_dice
from tests.peers.group_cases import SIZE, Group, reward
from tests.peers.measure import gradients
from tests.peers.ours import Memory, fit, sgd
from tests.peers.problem import PAD, PROMPTS, RESPONSES, WIDTH, network, tokenizer

ROWS = len(RESPONSES["early"])


def build(case: Group, paths: dict[str, str]) -> GRPOModule:
    """The module; its policy has moved away from the reference, as in the middle of a run."""
    placement = "reward_k1" if case.method == "rloo" else "loss_k3_token"
    module = GRPOModule(
        ModelSpec(path=paths["reference"]),
        FunctionReward(reward),
        case.advantages,
        PolicyObjective(case.aggregation, placement, case.loss, case.entropy_coef),  # type: ignore[arg-type]
        FixedKL(case.kl_coef),
        groups=Groups(size=SIZE, mask_truncated=case.mask_truncated),
        # The engine that draws as TRL does: their dice are thrown for both.
        sampling=SamplingParameters(max_new_tokens=WIDTH, temperature=TEMPERATURE, engine=TransformersEngine()),
        update=GRPOUpdate(epochs=2, minibatch_size=ROWS, micro_batch_size=3, max_grad_norm=1e9),
        optimizer=sgd(case.lr),
        schedule=Schedule(decay="constant"),
    )
    module.tokenizer = tokenizer()
    module.configure_model()
    assert module.policy is not None
    module.policy.network.load_state_dict(network(case.architecture, "policy").state_dict())
    return module


class Losses(pl.Callback):
    """Sums what was differentiated."""

    total = 0.0

    def on_before_backward(self, trainer: Any, module: Any, loss: Tensor) -> None:
        self.total += float(loss.detach())


def run(case: Group, paths: dict[str, str]) -> dict[str, Any]:
    """One iteration: rollout, advantages, two passes."""
    module, memory, losses = build(case, paths), Memory(), Losses()
    rollouts: list[Rollout] = []
    passes: list[dict[str, Any]] = []
    learn, step = module._learn, module._step

    def note_rollout(rollout: Rollout) -> bool:
        rollouts.append(rollout)
        return learn(rollout)

    def note_step(minibatch: Rollout, taken: int) -> float:
        before = module.update_means.sums.clone(), module.update_means.counts.clone(), losses.total
        approx_kl = step(minibatch, taken)
        sums, counts = module.update_means.sums - before[0], module.update_means.counts - before[1]
        means = dict(zip(module.update_means.names, (sums / counts).tolist(), strict=True))
        found = gradients(module.policy.network)  # type: ignore[union-attr]
        passes.append({"loss": losses.total - before[2], "means": means, "gradients": found})
        return approx_kl

    module._learn, module._step = note_rollout, note_step  # type: ignore[method-assign]
    with loaded_dice(RESPONSES["early"]):
        fit(module, loader(), memory, callbacks=[losses])
    rollout = {field.name: getattr(rollouts[0], field.name) for field in fields(Rollout)}
    return {"rollout": rollout, "passes": passes, "metrics": memory.metrics}


def loader() -> Any:
    texts = PROMPTS[: ROWS // SIZE]
    ids = [tokenizer()(text)["input_ids"] for text in texts]
    rows = Dataset.from_dict({"prompt_ids": ids, "prompt": texts, "length": list(range(len(ids)))})
    return make_loader(
        rows,
        PromptCollator(PAD),
        batch_size=len(texts),
        shuffle=False,
        seed=0,
        place=Placement(),
        num_workers=0,
        weights=[1] * len(texts),
        bucket_batches=1,
    )
