"""Reward modelling: the second stage."""

import logging
import math
from collections.abc import Iterator
from functools import partial
from itertools import islice
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor
from torch.optim import Optimizer

from rlhf_lightning.batches import PreferenceBatch, RankingBatch, UnpairedBatch
from rlhf_lightning.data.module import RowsDataModule
from rlhf_lightning.data.sources import Kind
from rlhf_lightning.errors import UserError
from rlhf_lightning.functional.calibration import COLDEST, HOTTEST, first_half, held_out_calibration
from rlhf_lightning.functional.ensembles import disagreement
from rlhf_lightning.functional.ranking import expected_calibration_error
from rlhf_lightning.losses import BradleyTerryLoss, LabelledLoss, ListLoss, RankingLoss
from rlhf_lightning.losses.checks import require_interface
from rlhf_lightning.models.ensemble import Ensemble, ScalarEnsemble, build_reward_model, members_of
from rlhf_lightning.models.scalar_head import ScalarModel
from rlhf_lightning.models.spec import Model, as_spec
from rlhf_lightning.modules.batch_checks import reads
from rlhf_lightning.modules.guard import StepGuard, with_router_loss
from rlhf_lightning.modules.half_precision import prepare_precision
from rlhf_lightning.modules.handoff import check_context, shard_if_asked, training_tokenizer
from rlhf_lightning.modules.master_weights import build_optimizer
from rlhf_lightning.modules.metrics import Means, log_evaluation, log_step
from rlhf_lightning.modules.optimization import OptimizerFactory, Schedule, scheduled, trained_parameters
from rlhf_lightning.modules.ranks import over_ranks
from rlhf_lightning.modules.reward_batches import (
    Counted,
    RewardBatch,
    diagnostics,
    differences,
    pair_hashes,
    shown,
    size,
    summed_loss,
)
from rlhf_lightning.modules.showing import Sample

log = logging.getLogger(__name__)

NAMES = ("loss", "accuracy", "kendall_tau", "margin", "disagreement", "min_reward", "mean_reward", "max_reward")
MEASURED = 2048  # responses: enough to know the mean to 2 % of the spread
READ: tuple[tuple[type, str, tuple[Kind, ...]], ...] = (
    (RankingLoss, "PreferenceDataModule or RankingDataModule", ("preferences", "rankings")),
    (ListLoss, "RankingDataModule (which reads pairs too)", ("rankings",)),
    (LabelledLoss, "UnpairedDataModule", ("unpaired",)),
)


def score_means() -> Means:
    """Least and greatest are over all that was counted; TRL's are means over batches, which depend on the batch size."""
    return Means(NAMES, totals=["num_tokens"], lowest=["min_reward"], highest=["max_reward"])


class RewardModelModule(LightningModule):
    """A scalar score whose differences explain the preferences (Ouyang et al. 2022, eq. 1)."""

    def __init__(
        self,
        network: Model,
        loss: RankingLoss | ListLoss | LabelledLoss = BradleyTerryLoss(),  # noqa: B008  (frozen)
        optimizer: OptimizerFactory = lambda params: torch.optim.AdamW(params, lr=1e-5),
        schedule: Schedule = Schedule(),  # noqa: B008  (frozen)
        normalise: bool = True,
        ensemble: Ensemble | None = None,
        calibrate: bool = False,
    ) -> None:
        """Remember what to build; networks are built in ``configure_model``.

        Args:
            network: Where to start: usually the SFT policy, whose head gives way to a scalar one; an encoder too.
            loss: On the scores of pairs, of rankings, or of single labelled responses.
            optimizer: Makes the optimizer of the parameters.
            schedule: Of the learning rate, in optimizer steps.
            normalise: After each epoch, measure the scores of training responses, and keep the shift and scale that give
                them mean 0 and standard deviation 1 with the weights.
            ensemble: Train several members at once, each on the whole loss; None for one.
            calibrate: After each epoch, find the temperature at which score differences are log-odds, and keep it with the
                weights. It is fitted to the held-out rows of one half of the prompts; the calibration error before and after
                is measured on those of the other half.
        """
        super().__init__()
        require_interface("loss", loss, RankingLoss, ListLoss, LabelledLoss)
        self.network_spec, self.loss, self.normalise, self.calibrate = as_spec(network), loss, normalise, calibrate
        self.optimizer_factory, self.schedule, self.ensemble = optimizer, schedule, ensemble
        self.model_path = self.network_spec.path
        self.network: ScalarModel | ScalarEnsemble | None = None
        self.train_means, self.eval_means = score_means(), score_means()
        self.guard = StepGuard()
        self.measured_at: int | None = None
        self.measure_due = False
        self._eval_differences: list[Tensor] = []

    on_train_batch_start = on_validation_batch_start = on_test_batch_start = on_predict_batch_start = reads(
        PreferenceBatch, RankingBatch, UnpairedBatch
    )

    def configure_model(self) -> None:
        """Load or build the network, once."""
        prepare_precision(self)
        if self.network is None:
            self.tokenizer = training_tokenizer(self, self.network_spec.path)
            self.network = build_reward_model(self.network_spec, self.tokenizer, self.ensemble)
            for member in members_of(self.network):
                check_context(self, member.network)
            shard_if_asked(self, self.network)

    def forward(self, batch: RewardBatch) -> Tensor:
        """Raw scores of all responses in one forward. Shape (responses,), of an ensemble (responses, members)."""
        assert self.network is not None
        rows = (
            len(batch.label) if isinstance(batch, UnpairedBatch) else None
        )  # behind these it has what KTO alone needs
        inputs = (x[:rows] for x in (batch.input_ids, batch.attention_mask, batch.response_mask))
        return self.network(*inputs, normalised=False)

    def training_step(self, batch: RewardBatch, batch_idx: int) -> Tensor:
        loss, counted = self._loss(batch, self(batch))
        self.train_means.update(counted)
        return self.guard.saw(batch, with_router_loss(self, loss / batch.normalizer))

    def _loss(self, batch: RewardBatch, scores: Tensor) -> tuple[Tensor, Counted]:
        """Summed loss, over members too, so that each learns as it would alone; and what is counted, of their mean score."""
        members = scores.unbind(-1) if scores.dim() == 2 else (scores,)
        loss = torch.stack([summed_loss(self.loss, batch, own) for own in members]).sum()
        counted = diagnostics(batch, scores.mean(dim=-1) if scores.dim() == 2 else scores)
        counted["loss"] = (loss / len(members), size(batch))
        counted["num_tokens"] = (batch.attention_mask[: len(scores)].sum(), 1)
        if len(members) > 1:
            spread = disagreement(torch.stack([differences(batch, own) for own in members], dim=-1))
            counted["disagreement"] = (spread.sum(), len(spread))
        return loss, counted

    def on_fit_start(self) -> None:
        datamodule: Any = getattr(self.trainer, "datamodule", None)
        if not isinstance(datamodule, RowsDataModule):
            if self.normalise or self.calibrate:
                raise UserError(
                    "normalising or calibrating the scores needs a PreferenceDataModule, or another of ours; give one, or set "
                    "normalise and calibrate to false"
                )
            return
        for kind, readers, read in READ:
            if isinstance(self.loss, kind) and datamodule.kind not in read:
                raise UserError(f"{type(self.loss).__name__} reads {readers}, not {type(datamodule).__name__}")
        held_out = len(datamodule.rows.get("validation", []))
        if self.calibrate and held_out < 2:
            raise UserError(
                f"calibrate needs held-out rows, one half to fit to and one to measure on, and there are {held_out}; set "
                "data.split.validation above 0, or calibrate to false"
            )

    def on_train_epoch_end(self) -> None:
        if self.unmeasured:
            self.measure_scores()

    @property
    def unmeasured(self) -> bool:
        """Whether normalisation and calibration are wanted and not those of the present weights."""
        return (self.normalise or self.calibrate) and self.measured_at != self.trainer.global_step

    @torch.no_grad()
    def measure_scores(self) -> None:
        """Normalise and calibrate as configured; every rank must call. The weights stay as they are."""
        if self.normalise:
            self._normalise()
        if self.calibrate:
            self._calibrate()
        self.measured_at, self.measure_due = self.trainer.global_step, False

    def on_train_start(self) -> None:
        if self.measure_due:  # the run was killed between the end of an epoch and the end of its measurement
            self.measure_scores()

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["measured_at"] = None if self.unmeasured else self.trainer.global_step
        checkpoint["measure_due"] = self.measure_due

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.measured_at, self.measure_due = checkpoint.get("measured_at"), checkpoint.get("measure_due", False)

    def _scored(self, name: str, batches: int | None = None) -> Iterator[tuple[RewardBatch, Tensor]]:
        """Batches of a split with their raw scores; all ranks read equally many, because FSDP2 gathers weights in each."""
        datamodule: Any = self.trainer.datamodule  # type: ignore[attr-defined]
        for batch in islice(datamodule.scored_batches(name), batches):
            there = self.transfer_batch_to_device(batch, self.device, 0)
            yield there, self(there)

    def _normalise(self) -> None:
        """Mean and spread of the raw scores over the first ``MEASURED`` responses of a random order, all ranks together."""
        datamodule: Any = self.trainer.datamodule  # type: ignore[attr-defined]
        most = math.ceil(MEASURED / (2 * datamodule.batch_size * self.trainer.world_size))
        moments: Tensor | int = 0  # count, sum, sum of squares, of each member
        for _, scores in self._scored("train", most):
            # In float64: squares of scores near 1000 leave float32 deviations below .2 no digit.
            own = scores.double()[:, None] if scores.dim() == 1 else scores.double()
            moments = moments + torch.stack([torch.ones_like(own).sum(0), own.sum(0), own.square().sum(0)])
        count, total, squares = self.trainer.strategy.reduce(moments, reduce_op="sum")
        mean = total / count
        assert self.network is not None
        self.network.normalise(mean, (squares / count - mean**2).clamp(min=1e-12).sqrt())

    def _calibrate(self) -> None:
        """The temperature of each member, fitted to one half of the held-out pairs; the other half shows what it changes.

        A hash of the prompt decides which half a pair is in, so that neither the order of the rows nor the number of ranks
        matters, and no prompt is in both. Where all pairs have one prompt, the better response is hashed too.
        """
        assert self.network is not None
        found = [(self._leads(batch, scores).cpu(), pair_hashes(batch)) for batch, scores in self._scored("validation")]
        leads, hashes = (torch.cat(parts) for parts in zip(*found, strict=True))
        lead, keys = (torch.cat(parts) for parts in zip(*over_ranks(self.trainer, (leads, hashes)), strict=True))
        prompts = keys[:, 0].unique()
        fitted = first_half(keys[:, 0] if len(prompts) > 1 else keys[:, 1])
        if not 0 < fitted.sum() < len(fitted):
            raise UserError(
                f"calibrate needs held-out pairs to fit a temperature to and others to measure it on, and {len(lead)} can't be "
                "divided; raise data.split.validation, or set calibrate to false"
            )
        temperature, before, after = held_out_calibration(lead, fitted)
        self.network.calibrate(temperature.to(self.device))
        counts = {"fitted": int(fitted.sum()), "measured": int((~fitted).sum())}
        if self.trainer.is_global_zero:
            log.info(
                "temperature %s, fitted to %d held-out pairs (one half of the prompts, by a hash of the prompt); calibration "
                "error on the other %d: %.4f without, %.4f with it",
                temperature.tolist(),
                counts["fitted"],
                counts["measured"],
                before,
                after,
            )
            if not bool(((temperature > 2 * COLDEST) & (temperature < HOTTEST / 2)).all()):
                log.warning(
                    "a temperature is at the end of its range [%g, %g]: on the pairs that it was fitted to the scores order "
                    "nothing wrongly, or no more than half rightly; calibrated scores mean nothing before there are more pairs",
                    COLDEST,
                    HOTTEST,
                )
        for logger in self.loggers:
            values = {"temperature": float(temperature.mean()), "before": before, "after": after, **counts}
            logger.log_metrics({f"calibration/{name}": x for name, x in values.items()}, step=self.global_step)

    @staticmethod
    def _leads(batch: RewardBatch, scores: Tensor) -> Tensor:
        """Of each member, by how much the better response leads. Shape (pairs, members)."""
        members = scores.unbind(-1) if scores.dim() == 2 else (scores,)
        return torch.stack([differences(batch, own) for own in members], dim=-1).detach()

    def _calibration_error(self, lead: Tensor) -> Tensor:
        """Over all ranks, the mean of the members'. Leads of shape (pairs, members)."""
        all_sum = partial(self.trainer.strategy.reduce, reduce_op="sum")
        return torch.stack([expected_calibration_error(own, all_sum=all_sum) for own in lead.unbind(-1)]).mean()

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        log_step(self, optimizer, progress=("loss", "accuracy"))

    def show(self, batch: RewardBatch, count: int) -> list[Sample]:
        """A few responses with their scores; of pairs the chosen before the rejected one."""
        assert self.network is not None
        lines = shown(batch, count)
        places = torch.tensor([place for place, _, _ in lines], device=batch.input_ids.device)
        ids, attention, response = (x[places] for x in (batch.input_ids, batch.attention_mask, batch.response_mask))
        scores = self.network(ids, attention)
        scores = scores.mean(dim=-1) if scores.dim() == 2 else scores
        samples = []
        for line, ((_, side, row), score) in enumerate(zip(lines, scores.tolist(), strict=True)):
            before = response[line].cumsum(dim=0) == 0  # a response may hold turns that are not the assistant's
            parts = [ids[line][attention[line] & own].tolist() for own in (before, ~before)]
            texts = self.tokenizer.batch_decode(parts, skip_special_tokens=True)
            samples.append(Sample(texts[0], texts[1], score, side=side, row=row))
        return samples

    def predict_step(self, batch: RewardBatch, batch_idx: int) -> list[Sample]:
        return self.show(batch, size(batch))

    def validation_step(self, batch: RewardBatch, batch_idx: int) -> None:
        scores = self(batch)
        self.eval_means.update(self._loss(batch, scores)[1])
        self._eval_differences.append(self._leads(batch, scores))

    def on_validation_epoch_end(self) -> None:
        lead = torch.cat(self._eval_differences)
        self._eval_differences.clear()
        pairs = self.trainer.strategy.reduce(torch.tensor(len(lead), device=self.device), reduce_op="sum")
        error = {"calibration_error": self._calibration_error(lead)} if pairs > 0 else {}  # of ties alone there is none
        log_evaluation(self, self.eval_means, **error)

    test_step, on_test_epoch_end = validation_step, on_validation_epoch_end

    def configure_optimizers(self) -> Any:
        return scheduled(build_optimizer(self, trained_parameters(self)), self.schedule, self.trainer)
