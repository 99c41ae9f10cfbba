"""Process reward modelling: a verdict on every step of a solution, not on its end alone."""

from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor
from torch.optim import Optimizer

from rlhf_lightning.batches import StepwiseBatch
from rlhf_lightning.data.stepwise import SEPARATOR, StepwiseDataModule
from rlhf_lightning.errors import UserError
from rlhf_lightning.functional.process import aggregate_steps, first_error_f1, first_errors
from rlhf_lightning.losses.checks import require_interface
from rlhf_lightning.losses.process import StepBCELoss, StepLoss
from rlhf_lightning.models.loading import load_scalar_model
from rlhf_lightning.models.scalar_head import ScalarModel
from rlhf_lightning.models.spec import Model, as_spec
from rlhf_lightning.modules.batch_checks import reads
from rlhf_lightning.modules.guard import StepGuard, with_router_loss
from rlhf_lightning.modules.half_precision import prepare_precision
from rlhf_lightning.modules.handoff import check_context, shard_if_asked, training_tokenizer
from rlhf_lightning.modules.master_weights import build_optimizer
from rlhf_lightning.modules.metrics import Means, log_evaluation, log_step
from rlhf_lightning.modules.optimization import OptimizerFactory, Schedule, scheduled, trained_parameters
from rlhf_lightning.modules.showing import Sample

FOUND = ("first_error/on_erroneous", "first_error/on_correct")
NAMES = ("loss", "accuracy", "mean_score", "mean_label", *FOUND)


class ProcessRewardModule(LightningModule):
    """The probability that each step of a solution is right, read at the separator behind it (Lightman et al. 2023)."""

    def __init__(
        self,
        network: Model,
        loss: StepLoss = StepBCELoss(),  # noqa: B008  (frozen)
        optimizer: OptimizerFactory = lambda params: torch.optim.AdamW(params, lr=1e-5),
        schedule: Schedule = Schedule(),  # noqa: B008  (frozen)
        separator: str = SEPARATOR,
    ) -> None:
        """Remember what to build; networks are built in ``configure_model``.

        Args:
            network: Where to start: usually the SFT policy, whose head gives way to a scalar one.
            loss: On the logit of each labelled step.
            optimizer: Makes the optimizer of the parameters.
            schedule: Of the learning rate, in optimizer steps.
            separator: What stands behind every step; it is exported with the model.
        """
        super().__init__()
        require_interface("loss", loss, StepLoss)
        self.network_spec, self.loss, self.separator = as_spec(network), loss, separator
        self.optimizer_factory, self.schedule = optimizer, schedule
        self.model_path = self.network_spec.path
        self.network: ScalarModel | None = None
        self.train_means, self.eval_means = Means(NAMES, totals=["num_tokens"]), Means(NAMES, totals=["num_tokens"])
        self.guard = StepGuard()

    on_train_batch_start = on_validation_batch_start = on_test_batch_start = on_predict_batch_start = reads(
        StepwiseBatch
    )

    def configure_model(self) -> None:
        """Load or build the network, once."""
        prepare_precision(self)
        if self.network is not None:
            return
        self._check_separator()
        self.tokenizer = training_tokenizer(self, self.network_spec.path)
        self.network = ScalarModel(load_scalar_model(self.network_spec, self.tokenizer, new_head=True))
        config: Any = self.network.network.config
        known = getattr(config, "step_separator", self.separator)
        if known != self.separator:
            raise UserError(
                f"{self.model_path} was trained with the step separator {known!r}; set model.separator to it"
            )
        config.step_separator = self.separator
        check_context(self, self.network.network)
        shard_if_asked(self, self.network)

    def _check_separator(self) -> None:
        """The data's is the module's; a data module that was not told takes it from here."""
        data = getattr(self._trainer, "datamodule", None)
        if isinstance(data, StepwiseDataModule) and data.step_separator != self.separator:
            raise UserError(
                f"the data separates steps by {data.step_separator!r} and the model reads them at {self.separator!r}; set "
                "model.separator, and leave data.separator out"
            )

    def forward(self, batch: StepwiseBatch) -> Tensor:
        """A logit at every token; what stands at the separators is that of the step before. Shape (batch, length)."""
        assert self.network is not None
        return self.network(batch.input_ids, batch.attention_mask, pooled=False, normalised=False)

    def training_step(self, batch: StepwiseBatch, batch_idx: int) -> Tensor:
        loss, counted = self._loss(batch)
        self.train_means.update(counted)
        return self.guard.saw(batch, with_router_loss(self, loss / batch.normalizer))

    def _loss(self, batch: StepwiseBatch) -> tuple[Tensor, dict[str, tuple[Tensor, Tensor | int]]]:
        """Summed loss over the labelled steps, and what it and the diagnostics are means of."""
        table, mask = self(batch), batch.step_mask
        logits, labels = table[mask], batch.labels[mask]
        loss, steps = self.loss.steps(logits, labels).sum(), len(labels)
        found, erroneous = first_errors(table, batch.labels, mask)
        return loss, {
            "loss": (loss, steps),
            "accuracy": (((logits > 0) == (labels > 0.5)).sum(), steps),
            "mean_score": (logits.sigmoid().sum(), steps),
            "mean_label": (labels.sum(), steps),
            FOUND[0]: ((found & erroneous).sum(), erroneous.sum()),
            FOUND[1]: ((found & ~erroneous).sum(), (~erroneous).sum()),
            "num_tokens": (batch.attention_mask.sum(), 1),
        }

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        log_step(self, optimizer, progress=("loss", "accuracy"))

    def show(self, batch: StepwiseBatch, count: int) -> list[Sample]:
        """A few solutions, the probability of each step behind it; the score is that of all of them being right."""
        return [self._marked(batch, row, sample) for row, sample in enumerate(self._samples(batch, count))]

    def _samples(self, batch: StepwiseBatch, count: int) -> list[Sample]:
        table, samples = self(batch)[:count], []
        scores = aggregate_steps(table, batch.step_mask[:count], "product").exp().tolist()
        for row, score in enumerate(scores):
            ids, response = batch.input_ids[row], batch.response_mask[row]
            prompt = self._text(ids[batch.attention_mask[row] & ~response])
            steps = table[row].sigmoid()[batch.step_mask[row]].tolist()
            samples.append(Sample(prompt, self._text(ids[response]), score, step_scores=steps))
        return samples

    def _marked(self, batch: StepwiseBatch, row: int, sample: Sample) -> Sample:
        """The sample with the probability of each step written behind it."""
        ids, columns = batch.input_ids[row], batch.response_mask[row].nonzero().flatten().tolist()
        said, start = "", columns[0]
        ends = batch.step_mask[row].nonzero().flatten().tolist()
        for end, probability in zip(ends, sample.step_scores or [], strict=True):
            said += f"{self._text(ids[start : end + 1])} [{probability:.2f}]\n"
            start = end + 1
        said += self._text(ids[start : columns[-1] + 1])
        return sample._replace(response=said.strip())

    def _text(self, ids: Tensor) -> str:
        return str(self.tokenizer.decode(ids.tolist(), skip_special_tokens=True)).strip()

    def predict_step(self, batch: StepwiseBatch, batch_idx: int) -> list[Sample]:
        return self._samples(batch, len(batch.input_ids))

    def validation_step(self, batch: StepwiseBatch, batch_idx: int) -> None:
        self.eval_means.update(self._loss(batch)[1])

    def on_validation_epoch_end(self) -> None:
        means = self.eval_means.compute()
        both = {"first_error/f1": first_error_f1(*(means[name] for name in FOUND))} if set(FOUND) <= set(means) else {}
        log_evaluation(self, self.eval_means, **both)

    test_step, on_test_epoch_end = validation_step, on_validation_epoch_end

    def configure_optimizers(self) -> Any:
        return scheduled(build_optimizer(self, trained_parameters(self)), self.schedule, self.trainer)
