"""A module as a run's config and checkpoint describe it, without a trainer."""

from pathlib import Path
from typing import Any

import yaml
from jsonargparse import ArgumentParser
from lightning.pytorch import LightningDataModule, LightningModule

from rlhf_lightning.commands.imports import check_imports
from rlhf_lightning.data.chat import ensure_chat_template
from rlhf_lightning.data.prompt_format import KEY, record_format
from rlhf_lightning.data.splits import find_tokenizer
from rlhf_lightning.data.template_inputs import set_default_variables


def restored_module(config: Path, checkpoint: dict[str, Any]) -> Any:
    """Build the module that a run's ``config.yaml`` names and load a checkpoint's weights into it.

    Args:
        config: Written by ``fit``.
        checkpoint: As loaded with ``weights_only=True``.

    Returns:
        The module, configured, on the CPU.
    """
    described = yaml.safe_load(config.read_text())
    parser = ArgumentParser()
    parser.add_subclass_arguments(LightningModule, "model")
    parser.add_subclass_arguments(LightningDataModule, "data")
    parsed = parser.parse_object({key: described[key] for key in ("model", "data")})
    check_imports(parsed)
    init = parser.instantiate_classes(parsed)
    module: Any = init.model
    module.tokenizer = find_tokenizer(init.data.tokenizer_path or module.model_path, init.data.source, None)
    # Runs of earlier versions do not record the format: they gave every export a chat template.
    found = checkpoint.get(type(init.data).__qualname__, {}).get(KEY)
    if found is None:
        ensure_chat_template(module.tokenizer)
    else:
        record_format(module.tokenizer, found, init.data.source)
    set_default_variables(module.tokenizer, init.data.chat_template_kwargs)
    module.configure_model()
    module.load_state_dict(checkpoint["state_dict"])
    return module
