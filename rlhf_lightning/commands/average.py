"""Several reward models as one."""

from rlhf_lightning.models.averaging import average_reward_models


def average(models: list[str], output: str) -> None:
    """Average the weights of reward models that began alike (WARM), into a Hugging Face folder.

    Args:
        models: Exports of reward model runs, two or more; or one of a run with an ensemble of trunks.
        output: Where to.
    """
    print(average_reward_models(models, output))
