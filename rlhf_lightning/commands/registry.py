"""The commands and the keys that are ours, named without importing what they need."""

from typing import Any, Literal

# Lightning's, each with the line of the command list.
TRAINER_COMMANDS = {
    "fit": "Train a model: the module, the data and the trainer are named in a config.",
    "validate": "Evaluate a model on the validation data.",
    "test": "Evaluate a model on the test data.",
    "predict": "Write a model's predictions on the prediction data to a file.",
}
# Import paths of functions; the first line of the docstring is the line of the command list.
COMMANDS = {
    "pipeline": "rlhf_lightning.commands.pipeline.pipeline",
    "export": "rlhf_lightning.commands.export.export",
    "chat": "rlhf_lightning.commands.chat.chat",
    "average": "rlhf_lightning.commands.average.average",
    "sample": "rlhf_lightning.commands.sample.sample",
    "fixed-points": "rlhf_lightning.commands.fixed_points.fixed_points",
}
# These take the files and flags of fit, and flags of their own.
FIT_COMMANDS = {"ground-truth": "rlhf_lightning.commands.ground_truth.ground_truth"}
FIT_FLAGS = {"ground-truth": ("problems",)}

# Keys of fit, validate, test and predict that Lightning does not have: flags, and classes with their arguments.
RUN_FLAGS: dict[str, dict[str, Any]] = {
    "wandb": {"type": Literal["offline", "online", "disabled"], "default": "offline", "help": "Where W&B metrics go."},
    "wandb_group": {"type": str | None, "default": None, "help": "W&B group of the run."},
    "wandb_tags": {"type": list[str] | None, "default": None, "help": "W&B tags of the run."},
    "overwrite": {"type": bool, "default": False, "help": "Replace the run that the folder holds."},
}
RUN_CLASSES = {
    "samples": "rlhf_lightning.callbacks.samples.SampleTable",
    "export": "rlhf_lightning.callbacks.export.ExportAtEnd",
    "checkpoint": "rlhf_lightning.callbacks.run_checkpoint.RunCheckpoint",
    "heartbeat": "rlhf_lightning.callbacks.heartbeat.Heartbeat",
}
