"""Errors over a command line name the complete key, quote the value as typed, and suggest the nearest key."""

import pytest

from rlhf_lightning.commands.parser import keys_as_typed, users_mistakes
from rlhf_lightning.commands.typed_keys import nearest
from rlhf_lightning.errors import UserError
from tests.integration.test_bad_input import SFT, WORLD, refused
from tests.parsers import trainer_parsers

DPO = [
    "fit",
    "--model",
    "DPOModule",
    "--model.policy.path",
    "x",
    "--data",
    "PreferenceDataModule",
    "--data.source",
    "x",
]
GRPO = ["fit", "--model", "GRPOModule", "--model.policy.path", "x", "--data", "PromptDataModule", "--data.source", "x"]
GRPO += ["--model.reward"]
FIT = [*SFT, *WORLD]
SAMPLE = ["sample", "--policy.path", "x", "--prompts.source", "HHHWorld", "--reward", "GoldReward", "--output", "o"]


@pytest.fixture
def error_of(capsys):
    """The error over a command line that is refused while it is parsed."""
    parser, commands = trainer_parsers()

    def error(*args):
        if args[0] not in commands:
            return refused(capsys, *args)
        with pytest.raises(UserError) as refusal, keys_as_typed(commands[args[0]], args[1:]):
            parser.parse_args(list(args))
        return f"error: {refusal.value}"

    return error


@pytest.mark.parametrize("command", ["fit", "validate", "test", "predict"])
def test_a_key_of_a_nested_class_is_named_from_its_root(error_of, command):
    args = [command, *SFT[1:], *WORLD]
    said = error_of(*args, "--model.sampling.temprature=0.5")
    assert said == "error: --model.sampling.temprature is not a key; did you mean --model.sampling.temperature?"


def test_the_commands_say_so(capsys):
    said = refused(capsys, *SFT, *WORLD, "--model.sampling.temprature", "0.5")
    assert said == "error: --model.sampling.temprature is not a key; did you mean --model.sampling.temperature?"


@pytest.mark.parametrize(
    ("args", "said"),
    [
        ([*FIT, "--data.splt", "1"], "--data.splt is not a key; did you mean --data.split?"),
        (
            [*FIT, "--data.split.validaton", "1"],
            "--data.split.validaton is not a key; did you mean --data.split.validation?",
        ),
        (
            [*FIT, "--model.policy.adapter.rnk", "4"],
            "--model.policy.adapter.rnk is not a key; did you mean --model.policy.adapter.rank?",
        ),
        (
            [*FIT, "--model.policy.adapter", "{rnk: 4}"],
            "--model.policy.adapter.rnk is not a key; did you mean --model.policy.adapter.rank?",
        ),
        (
            [*FIT, "--model.optimizer", "AdamW", "--model.optimizer.learning_rate", "1"],
            "--model.optimizer.learning_rate is not a key; did you mean --model.optimizer.lr?",
        ),
        (
            [*FIT, "--model.temperature", "1"],
            "--model.temperature is not a key; did you mean --model.sampling.temperature?",
        ),
        ([*FIT, "--modle.sampling", "{}"], "--modle.sampling is not a key; did you mean --model.sampling?"),
        (
            [*FIT, "--model.schedule.kind", "x"],
            "--model.schedule.kind is not a key; model.schedule has warmup, decay, final, options, scheduler, interval, "
            "monitor",
        ),
        (
            [*FIT, "--model.sampling.stop_string", "x"],
            "--model.sampling.stop_string is not a key; did you mean --model.sampling.stop_strings?",
        ),
        (
            [*FIT, "--model.sampling.engine", "TransformersEngine", "--model.sampling.engine.continuos", "true"],
            "--model.sampling.engine.continuos is not a key; did you mean --model.sampling.engine.continuous_batching?",
        ),
        (
            [*DPO, "--model.loss", "DPOLoss", "--model.loss.bta=1"],
            "--model.loss.bta is not a key; did you mean --model.loss.beta?",
        ),
        (
            [*GRPO, "WeightedRewards", "--model.reward.rewards", "[{class_path: FunctionReward, init_args: {fnction: x}}]"],
            "--model.reward.rewards.0.init_args.fnction is not a key; did you mean "
            "--model.reward.rewards.0.init_args.function?",
        ),
        (
            [*FIT, "--trainer.callbacks+=EarlyStopping", "--trainer.callbacks.monitr", "x"],
            "--trainer.callbacks.monitr is not a key; did you mean --trainer.callbacks.monitor?",
        ),
        ([*SAMPLE, "--sampling.temprature", "1"], "--sampling.temprature is not a key; did you mean --sampling.temperature?"),
        (["chat", "--model", "x", "--temprature", "1"], "--temprature is not a key; did you mean --temperature?"),
        (["export", "--rn", "x"], "--rn is not a key; did you mean --run?"),
        (["ground-truth", *GRPO[1:5], "--model.smpling", "3"], "--model.smpling is not a key; did you mean --model.sampling?"),
    ],
    ids=lambda value: value[:40] if isinstance(value, str) else "",
)  # fmt: skip
def test_an_unknown_key_is_named_in_full_with_the_nearest(error_of, args, said):
    assert error_of(*args) == f"error: {said}"


@pytest.mark.parametrize(
    ("args", "said"),
    [
        ([*FIT, "--model.sampling.max_new_tokens", "1e3"], "--model.sampling.max_new_tokens: '1e3' is not a whole number"),
        ([*FIT, "--model.sampling.temperature", "0,5"], "--model.sampling.temperature: '0,5' is not a number"),
        ([*FIT, "--model.sampling.temperature=null"], "--model.sampling.temperature: 'null' is not a number"),
        ([*FIT, "--model.sampling.temperature"], "--model.sampling.temperature needs a value"),
        ([*FIT, "--model.optimizer", "AdamW", "--model.optimizer.lr", "fast"], "--model.optimizer.lr: 'fast' is not a number"),
        ([*FIT, "--trainer.max_epochs", "many"], "--trainer.max_epochs: 'many' is not a whole number or null"),
        (
            [*FIT, "--model.policy.dtype", "bf16"],
            "--model.policy.dtype: 'bf16' is not one of float32, bfloat16, float16; did you mean bfloat16?",
        ),
        ([*FIT, "--wandb", "onlin"], "--wandb: 'onlin' is not one of offline, online, disabled; did you mean online?"),
        ([*FIT, "--model.policy.architecture", "nope"], "--model.policy.architecture: 'nope' is not a mapping or null"),
        ([*DPO, "--model.loss", "DPOLos"], "--model.loss: 'DPOLos' is not a class that fits here; did you mean DPOLoss?"),
        ([*DPO, "--model.loss", "dpo"], "--model.loss: 'dpo' is not a class that fits here; did you mean DPOLoss?"),
        (["fit", "--model", "ppo", *WORLD], "--model: 'ppo' is not a class that fits here; did you mean PPOModule?"),
        (
            [*FIT[:-4], "--data", "DemonstrationData"],
            "--data: 'DemonstrationData' is not a class that fits here; did you mean DemonstrationDataModule?",
        ),
        ([*FIT, "--model.optimizer", "adamw"], "--model.optimizer: 'adamw' is not a class that fits here; did you mean AdamW?"),
        (
            [*FIT, "--model.optimizer", "torch.optim.AdmW"],
            "--model.optimizer: 'torch.optim.AdmW' is not a class that fits here; did you mean AdamW?",
        ),
        (
            [*FIT, "--trainer.callbacks", "[{class_path: EarlyStoping}]"],
            "--trainer.callbacks.0.class_path: 'EarlyStoping' is not a class that fits here; did you mean EarlyStopping?",
        ),
        (
            [*SAMPLE[:6], "GoldRewrd", *SAMPLE[7:]],
            "--reward: 'GoldRewrd' is not a class that fits here; did you mean GoldReward?",
        ),
        (
            [*GRPO, "FunctionReward", "--model.advantages", "group_mean"],
            "--model.advantages: 'group_mean' is not a class that fits here; did you mean GroupMean?",
        ),
        ([*GRPO, "GoldReward"], "--model.reward.world is required; give it as a flag or in a config file"),
        (["fit", "--model", "SFTModul", *WORLD], "--model: 'SFTModul' is not a class that fits here; did you mean SFTModule?"),
        (
            [*FIT, "--trainer.callbacks+=EarlyStopping", "--trainer.callbacks.monitor=x", "--trainer.callbacks.patience", "x"],
            "--trainer.callbacks.patience: 'x' is not a whole number",
        ),
        ([*SAMPLE, "--sampling.temperature", "hot"], "--sampling.temperature: 'hot' is not a number"),
        ([*SAMPLE, "--method", "BestOfM"], "--method: 'BestOfM' is not a class that fits here; did you mean BestOfN?"),
        (["chat", "--model", "x", "--top_k", "1.5"], "--top_k: '1.5' is not a whole number"),
        (["chat"], "--model is required; give it as a flag or in a config file"),
        (["fit", *WORLD], "--model is required; give it as a flag or in a config file"),
    ],
    ids=lambda value: value[:40] if isinstance(value, str) else "",
)  # fmt: skip
def test_a_bad_value_is_quoted_as_typed_under_its_full_key(error_of, args, said):
    assert error_of(*args) == f"error: {said}"


SFT_YAML = "model:\n  class_path: SFTModule\n  init_args:\n    policy: {{path: x}}\n    {}\n"
CALLBACKS = "trainer:\n  callbacks:\n  - class_path: EarlyStopping\n    init_args: {monitor: x}\n"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (
            SFT_YAML.format("sampling: {temprature: 0.5}"),
            "5, model.init_args.sampling.temprature is not a key; did you mean model.init_args.sampling.temperature?",
        ),
        (SFT_YAML.format("sampling: {top_k: 1e1}"), "5, model.init_args.sampling.top_k: '1e1' is not a whole number"),
        (SFT_YAML.format("polcy: 1"), "5, model.init_args.polcy is not a key; did you mean model.init_args.policy?"),
        (
            SFT_YAML.format("sampling: {engine: {class_path: TransformersEngine, init_args: {batching: true}}}"),
            "5, model.init_args.sampling.engine.init_args.batching is not a key; did you mean "
            "model.init_args.sampling.engine.init_args.continuous_batching?",
        ),
        ("modle: 1\n", "1, modle is not a key; did you mean model?"),
        ("trainer: {max_step: 1}\n", "1, trainer.max_step is not a key; did you mean trainer.max_steps?"),
        (
            CALLBACKS + "  - class_path: LearningRateMonitor\n    init_args: {monitor: y}\n",
            "6, trainer.callbacks.1.init_args.monitor is not a key of the class that is given there",
        ),
        (
            CALLBACKS.replace("x}", "x, patience: long}"),
            "4, trainer.callbacks.0.init_args.patience: 'long' is not a whole number",
        ),
        (
            CALLBACKS.replace("EarlyStopping", "lightning.pytorch.callbacks.EarlyStoping"),
            "3, trainer.callbacks.0.class_path: 'lightning.pytorch.callbacks.EarlyStoping' is not a class that fits here; did "
            "you mean EarlyStopping?",
        ),
    ],
)
def test_in_a_config_file_the_file_is_named_too(tmp_path, error_of, text, said):
    file = tmp_path / "run.yaml"
    file.write_text(text)
    command = ["fit", "-c", str(file), *WORLD] if "SFTModule" in text else ["fit", "-c", str(file), *SFT[1:], *WORLD]
    assert error_of(*command) == f"error: {file}:{said}"


def test_a_class_of_another_kind_is_not_taken_for_a_misspelling(error_of):
    said = error_of(*DPO, "--model.loss", "KTOLoss")
    assert "did you mean" not in said
    assert "these do: AOTLoss" in said


def test_a_file_given_as_a_value_is_named_with_its_line(tmp_path, error_of):
    (tmp_path / "loss.yaml").write_text("class_path: DPOLoss\ninit_args:\n  bta: 0.2\n")
    (tmp_path / "model.yaml").write_text(
        "class_path: DPOModule\ninit_args:\n  policy: x\n  loss: {class_path: DPOLss}\n"
    )
    nested = tmp_path / "run.yaml"
    nested.write_text("model: {class_path: DPOModule, init_args: {policy: x, loss: loss.yaml}}\n")
    key = "model.init_args.loss.init_args"
    assert error_of("fit", "-c", str(nested), *DPO[5:]) == (
        f"error: {tmp_path}/loss.yaml:3, {key}.bta is not a key; did you mean {key}.beta?"
    )
    assert error_of("fit", "--model", str(tmp_path / "model.yaml"), *DPO[5:]) == (
        f"error: {tmp_path}/model.yaml:4, model.init_args.loss.class_path: 'DPOLss' is not a class that fits here; did you "
        "mean DPOLoss?"
    )


def built(*args):
    """The error over a command line whose classes are refused when they are instantiated."""
    parser, commands = trainer_parsers()
    typed = commands["fit"], args[1:]
    with pytest.raises(UserError) as refusal, keys_as_typed(*typed), users_mistakes(*typed):
        parser.instantiate_classes(parser.parse_args(list(args)))
    return str(refusal.value)


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (
            [*DPO, "--model.loss", "DPOLoss", "--model.loss.beta=-1"],
            "--model.loss.beta: beta must be positive, not -1.0",
        ),
        (
            [
                *[*DPO, "--model.loss", "MixedLoss", "--model.loss.weights", "[1, 1]"],
                *["--model.loss.losses", "[DPOLoss, {class_path: DPOLoss, init_args: {beta: -2}}]"],
            ],
            "--model.loss.losses.1.init_args.beta: beta must be positive, not -2.0",
        ),
        (
            [*FIT, "--model.sampling.temperature=-1"],
            "--model.sampling.temperature: sampling: temperature must be 0 or more",
        ),
        ([*FIT, "--data.split.validation", "3"], "--data.split.validation: split out of range"),
        ([*FIT, "--model.policy.path", "x"], "--model.policy.path: a model needs either `path`"),
        ([*DPO, "--model.policy.adapter.rank", "0"], "--model.policy.adapter.rank: an adapter needs a rank"),
    ],
    ids=lambda value: value[:40] if isinstance(value, str) else "",
)
def test_the_error_of_a_constructor_names_the_full_key(args, said):
    assert built(*args).startswith(said)


def test_the_error_of_a_constructor_names_file_and_line(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text(
        "model:\n  class_path: DPOModule\n  init_args:\n    policy: x\n    loss:\n      class_path: DPOLoss\n      init_args:\n"
        "        beta: -1\ntrainer:\n  callbacks:\n  - class_path: EarlyStopping\n    init_args: {monitor: loss, mode: min}\n"
    )
    args = ["fit", "-c", str(file), *DPO[5:]]
    assert built(*args) == f"{file}:8, model.init_args.loss.init_args.beta: beta must be positive, not -1.0"
    file.write_text(file.read_text().replace("beta: -1", "beta: 1").replace("mode: min", "mode: up"))
    assert built(*args).startswith(f"{file}:12, trainer.callbacks.0.init_args.mode: `mode` can be")


def test_a_flag_wins_over_a_file_and_is_the_one_that_is_named(tmp_path, error_of):
    file = tmp_path / "run.yaml"
    file.write_text(SFT_YAML.format("sampling: {temperature: 0.5}"))
    said = error_of("fit", "-c", str(file), *WORLD, "--model.sampling.temperature", "warm")
    assert said == "error: --model.sampling.temperature: 'warm' is not a number"


def test_other_commands_and_their_lists(tmp_path, capsys):
    file = tmp_path / "pipeline.yaml"
    file.write_text("output: o\nstages:\n- {name: a, config: [x.yaml]}\n- {name: b, confg: [x.yaml]}\n")
    said = refused(capsys, "pipeline", "-c", str(file))
    assert said == f"error: {file}:4, stages.1.confg is not a key; did you mean stages.1.config?"


def test_a_file_that_is_no_yaml_is_named_with_its_line(tmp_path, error_of):
    file = tmp_path / "broken.yaml"
    file.write_text("trainer:\n  max_steps: [1\nmodel: x\n")
    assert error_of("fit", "-c", str(file)).startswith(f"error: {file}:3: ")
    assert "none.yaml" in error_of("fit", "-c", "none.yaml")


def test_names_that_only_the_trainer_knows_are_one_line_too(tmp_path, capsys):
    args = [*FIT, "--trainer.default_root_dir", str(tmp_path / "run"), "--trainer.strategy", "fsdp9"]
    said = refused(capsys, *args)
    assert said.startswith("error: trainer: ")
    assert "fsdp9" in said
    assert not (tmp_path / "run").exists()


KEYS = [
    "model",
    "model.sampling",
    "model.sampling.temperature",
    "model.lr",
    "data",
    "data.batch_size",
    "trainer.max_steps",
]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("model.sampling.temprature", "model.sampling.temperature"),
        ("model.temperature", "model.sampling.temperature"),
        ("model.learning_rate", "model.lr"),
        ("batch_size", "data.batch_size"),
        ("trainer.max_step", "trainer.max_steps"),
        ("modl.samplin.temperatur", None),
        ("model.colour", None),
    ],
)
def test_the_nearest_key(name, expected):
    assert nearest(name, KEYS) == expected or (expected is None and nearest(name, KEYS) in (None, KEYS[2]))


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("rows.csv", "prompt,completion\nhello,world\n"),
        ("rows.tsv", "prompt\tcompletion\nhello\tworld\n"),
        ("rows.txt", "one line\nand another\n"),
        ("rows.jsonl", '{"prompt": "hello", "completion": "world"}\n'),
        ("rows.json", '[{"prompt": "hello", "completion": "world"}]\n'),
    ],
)
def test_a_file_of_rows_is_named_and_not_read_as_a_config(tmp_path, name, text):
    (tmp_path / name).write_text(text)
    parser, _ = trainer_parsers()
    data = ["--data", "DemonstrationDataModule", "--data.source", str(tmp_path / name)]
    parsed = parser.parse_args(["fit", *SFT[1:], *data])
    assert parsed.fit.data.init_args.source == str(tmp_path / name)
