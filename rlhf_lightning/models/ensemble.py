"""Several reward models trained in one run: their disagreement says where a score is a guess."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from rlhf_lightning.errors import UserError
from rlhf_lightning.models.export import MEMBER
from rlhf_lightning.models.loading import load_scalar_model
from rlhf_lightning.models.scalar_head import ScalarModel
from rlhf_lightning.models.spec import ModelSpec


@dataclass(frozen=True)
class Ensemble:
    """How many members, and what they have in common.

    Attributes:
        members: Each has a head of its own, drawn apart.
        trunk: "shared": all heads on one trunk, which costs no more than one member. "own": each has a copy of the trunk, or
            one from scratch, drawn apart as well: members that err less alike, for the price of as many models.

    Source: Coste et al. 2023, https://arxiv.org/abs/2310.02743; shared trunks: Ahmed et al. 2024,
    https://arxiv.org/abs/2401.16635
    """

    members: int = 4
    trunk: Literal["shared", "own"] = "shared"

    def __post_init__(self) -> None:
        """Refuse an ensemble of one."""
        if self.members < 2:
            raise UserError(f"an ensemble has at least 2 members, not {self.members}; leave it out for a single model")


class ScalarEnsemble(nn.Module):
    """Scalar models with a trunk each; a forward gives the scores of all of them side by side."""

    def __init__(self, models: Sequence[ScalarModel]) -> None:
        super().__init__()
        for number, model in enumerate(models):  # no ModuleList: FSDP2 shards the blocks of those one by one
            self.add_module(f"{MEMBER}{number}", model)

    @property
    def models(self) -> list[ScalarModel]:
        """The members."""
        return [part for part in self.children() if isinstance(part, ScalarModel)]

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """As :class:`ScalarModel` with several heads: shape (batch, members)."""
        return torch.stack([model(*args, **kwargs) for model in self.models], dim=-1)

    def normalise(self, mean: Tensor, std: Tensor) -> None:
        """As :class:`ScalarModel`; each member by its own, shape (members,)."""
        for model, centre, spread in zip(self.models, mean, std, strict=True):
            model.normalise(centre, spread)

    @property
    def temperature(self) -> Tensor:
        """Of each member. Shape (members,)."""
        return torch.stack([model.temperature for model in self.models])

    def calibrate(self, temperature: Tensor) -> None:
        """As :class:`ScalarModel`; each member by its own, shape (members,)."""
        for model, own in zip(self.models, temperature, strict=True):
            model.calibrate(own)


def members_of(network: ScalarModel | ScalarEnsemble) -> list[ScalarModel]:
    """The scalar models that have a trunk of their own."""
    return network.models if isinstance(network, ScalarEnsemble) else [network]


def build_reward_model(
    spec: ModelSpec, tokenizer: PreTrainedTokenizerBase, ensemble: Ensemble | None
) -> ScalarModel | ScalarEnsemble:
    """A network to be trained, with new heads where the checkpoint has none.

    Args:
        spec: Of the network, or of each member's.
        tokenizer: The one it is trained with.
        ensemble: None for a single model.
    """
    if ensemble is None or ensemble.trunk == "shared":
        count = 1 if ensemble is None else ensemble.members
        return ScalarModel(load_scalar_model(spec, tokenizer, new_head=True, members=count))
    if spec.adapter is not None:
        raise UserError("an ensemble with trunks of their own has no adapter; leave one of the two out")
    return ScalarEnsemble(
        [ScalarModel(load_scalar_model(spec, tokenizer, new_head=True)) for _ in range(ensemble.members)]
    )


def member_folders(folder: str) -> list[str]:
    """The folders of members below an export, in order; none where there is a single network."""
    found = [path for path in Path(folder).glob(f"{MEMBER}*") if path.is_dir()]
    return [str(path) for path in sorted(found, key=lambda path: int(path.name.removeprefix(MEMBER)))]


def load_trained(
    spec: ModelSpec, tokenizer: PreTrainedTokenizerBase, members: int | None = None
) -> ScalarModel | ScalarEnsemble:
    """What a run with an ensemble exported, or a single reward model.

    Args:
        spec: Its ``path`` is the export.
        tokenizer: Of the export.
        members: How many are wanted; None for as many as there are.

    Raises:
        UserError: As :func:`rlhf_lightning.models.loading.load_scalar_model`.
    """
    paths = member_folders(str(spec.path))
    if not paths:
        return ScalarModel(load_scalar_model(spec, tokenizer, members=members))
    return ScalarEnsemble(
        [ScalarModel(load_scalar_model(ModelSpec(path=path, dtype=spec.dtype), tokenizer)) for path in paths]
    )
