"""Reward modelling: the second stage."""

import math
from functools import partial
from itertools import islice
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor
from torch.optim import Optimizer

from rlhf_lightning.batches import PreferenceBatch
from rlhf_lightning.data.preferences import PreferenceDataModule
from rlhf_lightning.errors import UserError
from rlhf_lightning.functional.ranking import expected_calibration_error, preference_accuracy
from rlhf_lightning.losses import BradleyTerryLoss, RankingLoss
from rlhf_lightning.models.loading import load_scalar_model
from rlhf_lightning.models.scalar_head import ScalarModel
from rlhf_lightning.models.spec import ModelSpec
from rlhf_lightning.modules.guard import StepGuard
from rlhf_lightning.modules.handoff import check_context, shard_if_asked, training_tokenizer
from rlhf_lightning.modules.metrics import Means, log_evaluation, log_step
from rlhf_lightning.modules.optimization import OptimizerFactory, Schedule, scheduled, trained_parameters
from rlhf_lightning.modules.showing import Sample

NAMES = ("loss", "accuracy", "margin", "min_reward", "mean_reward", "max_reward")
MEASURED = 2048  # responses: enough to know the mean to 2 % of the spread


def score_means() -> Means:
    """Least and greatest are over all that was counted; TRL's are means over batches, which depend on the batch size."""
    return Means(NAMES, totals=["num_tokens"], lowest=["min_reward"], highest=["max_reward"])


class RewardModelModule(LightningModule):
    """A scalar score whose differences explain the preferences (Ouyang et al. 2022, eq. 1)."""

    def __init__(
        self,
        network: ModelSpec,
        loss: RankingLoss = BradleyTerryLoss(),  # noqa: B008  (frozen)
        optimizer: OptimizerFactory = lambda params: torch.optim.AdamW(params, lr=1e-5),
        schedule: Schedule = Schedule(),  # noqa: B008  (frozen)
        normalise: bool = True,
    ) -> None:
        """Remember what to build; networks are built in ``configure_model``.

        Args:
            network: Where to start: usually the SFT policy, whose head gives way to a scalar one.
            loss: On the scores of a pair.
            optimizer: Makes the optimizer of the parameters.
            schedule: Of the learning rate, in optimizer steps.
            normalise: After each epoch, measure the scores of training responses, and keep the shift and scale that give
                them mean 0 and standard deviation 1 with the weights.
        """
        super().__init__()
        self.network_spec, self.loss, self.normalise = network, loss, normalise
        self.optimizer_factory, self.schedule = optimizer, schedule
        self.model_path = network.path
        self.network: ScalarModel | None = None
        self.train_means, self.eval_means = score_means(), score_means()
        self.guard = StepGuard()
        self._eval_differences: list[Tensor] = []

    def configure_model(self) -> None:
        """Load or build the network, once."""
        if self.network is None:
            self.tokenizer = training_tokenizer(self, self.network_spec.path)
            self.network = ScalarModel(load_scalar_model(self.network_spec, self.tokenizer, new_head=True))
            check_context(self, self.network.network)
            shard_if_asked(self, self.network)

    def forward(self, batch: PreferenceBatch) -> tuple[Tensor, Tensor]:
        """Raw scores of chosen and rejected responses, (pairs,) each, in one forward."""
        assert self.network is not None
        inputs = batch.input_ids, batch.attention_mask, batch.response_mask
        chosen, rejected = self.network(*inputs, normalised=False).chunk(2)
        return chosen, rejected

    def training_step(self, batch: PreferenceBatch, batch_idx: int) -> Tensor:
        chosen, rejected = self(batch)
        loss = self.loss.pairs(chosen, rejected, batch.margin)
        self.train_means.update(self._counted(batch, loss, chosen, rejected))
        return self.guard.saw(batch, loss.sum() / batch.normalizer)

    def _counted(
        self, batch: PreferenceBatch, loss: Tensor, chosen: Tensor, rejected: Tensor
    ) -> dict[str, tuple[Tensor, Tensor | int]]:
        pairs, scores = len(chosen), torch.cat([chosen, rejected])
        return {
            "loss": (loss.sum(), pairs),
            "accuracy": (preference_accuracy(chosen, rejected).sum(), pairs),
            "margin": ((chosen - rejected).sum(), pairs),
            "min_reward": (scores.min(), 1),
            "mean_reward": (scores.sum(), len(scores)),
            "max_reward": (scores.max(), 1),
            "num_tokens": (batch.attention_mask.sum(), 1),
        }

    def on_fit_start(self) -> None:
        if self.normalise and not isinstance(getattr(self.trainer, "datamodule", None), PreferenceDataModule):
            raise UserError("normalising the scores needs a PreferenceDataModule; give one, or set normalise to false")

    def on_train_epoch_end(self) -> None:
        if self.normalise:
            self._normalise()

    @torch.no_grad()
    def _normalise(self) -> None:
        """Mean and spread of the raw scores over the first ``MEASURED`` responses of a random order, all ranks together.

        Every rank takes as many batches, however many rows are in its own: under FSDP2 one would wait for the other.
        """
        moments = torch.zeros(3, dtype=torch.float32, device=self.device)  # count, sum, sum of squares
        datamodule: Any = self.trainer.datamodule  # type: ignore[attr-defined]
        most = math.ceil(MEASURED / (2 * datamodule.batch_size * self.trainer.world_size))
        for batch in islice(datamodule.loader("train", shuffle=True), most):
            scores = torch.cat(self(self.transfer_batch_to_device(batch, self.device, 0)))
            moments += torch.stack([torch.ones_like(scores).sum(), scores.sum(), scores.square().sum()])
        count, total, squares = self.trainer.strategy.reduce(moments, reduce_op="sum").tolist()
        mean = total / count
        assert self.network is not None
        self.network.normalise(mean, max(squares / count - mean**2, 1e-12) ** 0.5)

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        log_step(self, optimizer, progress=("loss", "accuracy"))

    def show(self, batch: PreferenceBatch, count: int) -> list[Sample]:
        """A few pairs, chosen before rejected, with their scores."""
        assert self.network is not None
        both = self.network(batch.input_ids, batch.attention_mask).chunk(2)
        scores = torch.stack(both, dim=1).flatten()[: 2 * count].tolist()
        pairs = len(batch.margin)
        samples = []
        for row, score in enumerate(scores):
            line = row // 2 + pairs * (row % 2)
            ids, response = batch.input_ids[line], batch.response_mask[line]
            prompt_ids = ids[batch.attention_mask[line] & ~response]
            texts = self.tokenizer.batch_decode([prompt_ids.tolist(), ids[response].tolist()], skip_special_tokens=True)
            samples.append(Sample(texts[0], f"{('chosen', 'rejected')[row % 2]}: {texts[1]}", score))
        return samples

    def predict_step(self, batch: PreferenceBatch, batch_idx: int) -> list[Sample]:
        return self.show(batch, len(batch.margin))

    def validation_step(self, batch: PreferenceBatch, batch_idx: int) -> None:
        chosen, rejected = self(batch)
        loss = self.loss.pairs(chosen, rejected, batch.margin)
        self.eval_means.update(self._counted(batch, loss, chosen, rejected))
        self._eval_differences.append((chosen - rejected).detach())

    def on_validation_epoch_end(self) -> None:
        all_sum = partial(self.trainer.strategy.reduce, reduce_op="sum")
        calibration = expected_calibration_error(torch.cat(self._eval_differences), all_sum=all_sum)
        self._eval_differences.clear()
        log_evaluation(self, self.eval_means, calibration_error=calibration)

    test_step, on_test_epoch_end = validation_step, on_validation_epoch_end

    def configure_optimizers(self) -> Any:
        return scheduled(self.optimizer_factory(trained_parameters(self)), self.schedule, self.trainer)
