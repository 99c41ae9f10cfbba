"""One reward model whose weights are the mean of several: what they agree on is kept, what each learnt by heart cancels out."""

from pathlib import Path

import torch
from torch import Tensor

from rlhf_lightning.data.tokenizers import load_tokenizer, repair_pad_token, same_tokenizer
from rlhf_lightning.errors import UserError
from rlhf_lightning.models.ensemble import member_folders
from rlhf_lightning.models.export import export_folder
from rlhf_lightning.models.loading import load_scalar_model
from rlhf_lightning.models.scalar_head import ScalarModel
from rlhf_lightning.models.spec import ModelSpec


def average_reward_models(paths: list[str], output: str) -> Path:
    r"""Write the reward model with the weights :math:`\frac{1}{K} \sum_k \theta_k`.

    They must have begun with the same weights, those of the head included (``network.path``: an exported reward model), else
    their mean means nothing; no number tells. Gain and bias are the means of theirs, right to first order; a temperature is not
    handed on, for it is that of other weights.

    Args:
        paths: Exports of ``RewardModelModule`` runs, or one of a run with an ensemble of trunks.
        output: Where to; replaced if it exists.

    Returns:
        The folder.

    Raises:
        UserError: If there are fewer than two, or they differ in architecture or tokenizer.

    Source: Rame et al. 2024 (WARM), https://arxiv.org/abs/2401.12187
    """
    folders = [folder for path in paths for folder in member_folders(path) or [path]]
    if len(folders) < 2:
        raise UserError(f"a mean takes at least two reward models, not {', '.join(folders) or 'none'}")
    tokenizer = load_tokenizer(folders[0])
    repair_pad_token(tokenizer)
    total: dict[str, Tensor] = {}
    for folder in folders:
        other = load_tokenizer(folder)
        repair_pad_token(other)
        if difference := same_tokenizer(tokenizer, other):
            raise UserError(f"{folder} has another tokenizer than {folders[0]}: {difference}")
        model = ScalarModel(load_scalar_model(ModelSpec(path=folder), tokenizer, members=None))
        state = model.state_dict()
        shapes = [{name: tuple(weight.shape) for name, weight in part.items()} for part in (state, total)]
        if total and shapes[0] != shapes[1]:
            raise UserError(f"{folder} has other weights than {folders[0]}: they are no models of one architecture")
        total = {name: total.get(name, 0) + weight.double() for name, weight in state.items()}
    with torch.no_grad():
        model.load_state_dict({name: weight / len(folders) for name, weight in total.items()})
        model.temperature.zero_()
    if hasattr(model.network.config, "reward_temperature"):
        del model.network.config.reward_temperature
    model.describe_normalisation()
    return export_folder(model.network, tokenizer, output)
