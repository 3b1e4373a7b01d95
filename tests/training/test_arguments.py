"""Flags and YAML files: the same checks, wherever a value comes from."""

import dataclasses
import re
import typing
from pathlib import Path

import pytest
import yaml

from ddpm_notes_pipeline.core.schedules import BETA_SCHEDULES
from ddpm_notes_pipeline.names import OBJECTIVES, PREDICTION_TYPES, TIMESTEP_SAMPLINGS, WEIGHTINGS
from ddpm_notes_pipeline.training.arguments import (
    DataArguments,
    ModelArguments,
    RunArguments,
    as_config,
    warmup_steps,
)
from ddpm_notes_pipeline.training.parser import OF_TRAIN_UNCONDITIONAL, parse_arguments, parse_evaluation_arguments

ROOT = Path(__file__).resolve().parents[2]
CLASSES = (DataArguments, ModelArguments, RunArguments)
FIELDS = [field for cls in CLASSES for field in dataclasses.fields(cls) if field.init]
TYPES = {name: kind for cls in CLASSES for name, kind in typing.get_type_hints(cls).items()}
TYPES = {field.name: TYPES[field.name] for field in FIELDS}
LISTED = {field.name: field.metadata["choices"] for field in FIELDS if field.metadata["choices"]}  # or by a Literal


@pytest.fixture
def parse(tmp_path):
    """Parse flags, over a file of `config` if given; all settings in one dict."""

    def parse(*flags: object, config: object = None) -> dict:
        line = [str(flag) for flag in flags]
        if config is not None:
            path = tmp_path / "config.yaml"
            path.write_text(config if isinstance(config, str) else yaml.safe_dump(config), encoding="utf-8")
            line = ["--config", str(path), *line]
        parts = parse_arguments(line)
        return {
            field.name: getattr(part, field.name) for part in parts for field in dataclasses.fields(part) if field.init
        }

    return parse


@pytest.fixture
def refused(parse, capsys):
    """The one line that refuses a set of flags."""

    def refused(*flags: object, config: object = None) -> str:
        with pytest.raises(SystemExit) as exit:
            parse(*flags, config=config)
        assert exit.value.code == 2
        printed = capsys.readouterr()
        line, hint = printed.err.splitlines()
        assert printed.out == "" and hint.endswith("--help lists all flags")
        program, label, message = line.partition(": error: ")
        assert program and label
        return message

    return refused


DIGITS = {"dataset_name": "digits"}


def default_of(name: str) -> object:
    field = next(field for field in FIELDS if field.name == name)
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()


def another(name: str, kind: object) -> object:
    """A valid value that is not the default."""
    default = default_of(name)
    parts = [part for part in typing.get_args(kind) if part is not type(None)]
    kind = parts[0] if type(None) in typing.get_args(kind) else kind
    if name in LISTED or typing.get_origin(kind) is typing.Literal:
        return next(choice for choice in LISTED.get(name, typing.get_args(kind)) if choice != default)
    if kind in (list[int], list[float]):
        return [2, 1]
    if kind == list[str]:
        return ["no: 'täg' # 1e-3", "7", "a b"]
    if kind is bool:
        return not default
    if kind is str:
        return "no: 'täg' # 1e-3"  # all that YAML and argparse could misread
    if kind is int:
        return (default or 0) + 7
    assert kind is float, f"{name} has a type that nothing here covers"
    return default / 2 + 1e-7 if default < 1e-2 else default * 0.75


EVERYTHING = {
    name: another(name, kind)
    for name, kind in TYPES.items()
    if name
    not in ("train_data_dir", "lr_warmup_steps", "train_batch_size", "gradient_accumulation_steps", "metric_interval")
    and name != "validation_share"
} | {
    "ddpm_beta_schedule": "log_snr",
    "lr_warmup_steps": 3,
    "train_batch_size": 24,
    "gradient_accumulation_steps": 3,
    "dataloader_num_workers": 1,
}


MODELS = {"pretrained_model_name_or_path", "model_config_name_or_path"}
NOT_STREAMED = {"metric_interval": 7, "validation_share": 0.04}  # not together with --streaming

OF_ONE_LAUNCH = ("overwrite_output_dir", "resume_from_checkpoint")

CHOICES = {
    "ddpm_beta_schedule": BETA_SCHEDULES,
    "prediction_type": PREDICTION_TYPES,
    "objective": OBJECTIVES,
    "loss_weighting": WEIGHTINGS,
    "timestep_sampling": TIMESTEP_SAMPLINGS,
}


@pytest.mark.parametrize("name", CHOICES)
def test_a_flag_has_the_choices_of_what_it_sets(name):
    assert LISTED[name] == CHOICES[name]


# --------------------------------------------------------------------- where a value is from


def test_a_value_means_the_same_on_the_line_and_in_a_file(parse):
    network = {field.name for field in dataclasses.fields(ModelArguments)}
    for left_out in (MODELS, network - {"pretrained_model_name_or_path"}):  # they do not go together
        given = {name: value for name, value in EVERYTHING.items() if name not in left_out}
        line = []
        for name, value in given.items():
            line += [f"--{name}", *map(str, value)] if isinstance(value, list) else [f"--{name}={value}"]
        from_line, from_file = parse(*line), parse(config=given)
        assert from_line == from_file
        assert {name: from_file[name] for name in given} == given
        assert {name: type(from_file[name]) for name in given} == {name: type(value) for name, value in given.items()}


def test_settings_written_as_yaml_are_read_back_unchanged(parse, tmp_path):
    of_the_run = {name: value for name, value in EVERYTHING.items() if name not in OF_ONE_LAUNCH}
    (tmp_path / "first.yaml").write_text(yaml.safe_dump(of_the_run))
    first = parse_arguments(["--config", str(tmp_path / "first.yaml")])
    (tmp_path / "written.yaml").write_text(yaml.safe_dump(as_config(*first), sort_keys=False))
    assert parse_arguments(["--config", str(tmp_path / "written.yaml")]) == first


@pytest.mark.parametrize("name", OF_ONE_LAUNCH)
def test_settings_of_one_launch_are_not_written_as_settings_of_the_run(name):
    """Whoever trains by a published file would otherwise overwrite a folder of theirs."""
    parts = parse_arguments(
        ["--dataset_name", "digits", "--overwrite_output_dir", "--resume_from_checkpoint", "latest"]
    )
    assert name not in as_config(*parts)


def test_defaults_written_as_yaml_are_read_back_unchanged(parse, tmp_path):
    first = parse_arguments(["--train_data_dir", "my images"])
    (tmp_path / "written.yaml").write_text(yaml.safe_dump(as_config(*first)))
    assert parse_arguments(["--config", str(tmp_path / "written.yaml")]) == first


@pytest.mark.parametrize("name", sorted({*EVERYTHING, *NOT_STREAMED} - {"dataset_name", "dataset_config_name"}))
def test_the_line_wins_over_the_file(parse, name):
    value = (EVERYTHING | NOT_STREAMED)[name]
    words = [f"--{name}", *map(str, value)] if isinstance(value, list) else [f"--{name}={value}"]
    default = default_of(name)
    is_choice = name in LISTED or "Literal" in str(TYPES[name])
    other = default if is_choice else {list: [4, 8], str: "other", int: 1}.get(type(value), default)
    fitting = {"max_train_steps": 1000} if name in ("lr_warmup_steps", "streaming") else {"lr_warmup_steps": 1}
    fitting |= {"validation_split": "test"} if name == "metric_interval" else {}
    fitting |= {"label_column": "label"} if name == "classes" else {}
    fitting |= {"ddpm_beta_schedule": "log_snr"} if name == "log_snr_range" else {}
    assert parse(*words, config=DIGITS | fitting | {name: other, "train_batch_size": 24})[name] == value


@pytest.mark.parametrize("place", ["before", "after"])
def test_the_line_wins_wherever_config_stands(tmp_path, place):
    (tmp_path / "c.yaml").write_text("dataset_name: digits\nlearning_rate: 1e-3\n")
    flags, config = ["--learning_rate", "5e-4"], [f"--config={tmp_path / 'c.yaml'}"]
    _, _, run = parse_arguments(config + flags if place == "after" else flags + config)
    assert run.learning_rate == 5e-4


@pytest.mark.parametrize("flag", ["--train_data_dir", "--train-data-dir"])
@pytest.mark.parametrize("key", ["dataset_name", "dataset-name"])
def test_a_folder_on_the_line_replaces_the_data_set_of_the_file(parse, flag, key):
    """With all that belongs to it; what is done to the images stays."""
    of_set = {
        key: "me/set",
        "dataset_config_name": "big",
        "train_split": "all",
        "image_column": "a",
        "label_column": "b",
        "classes": ["c", "d"],
    }
    found = parse(flag, "pngs", config=of_set | {"resolution": 32, "random_flip": True, "seed": 3})
    assert (found["train_data_dir"], found["dataset_name"], found["dataset_config_name"]) == ("pngs", None, None)
    assert (found["train_split"], found["image_column"], found["label_column"]) == ("train", None, None)
    assert found["classes"] is None
    assert (found["resolution"], found["random_flip"], found["seed"]) == ([32], True, 3)


def test_a_data_set_on_the_line_replaces_the_folder_of_the_file(parse):
    found = parse("--dataset_name=mnist", "--label_column", "label", config={"train_data_dir": "pngs"})
    assert (found["dataset_name"], found["train_data_dir"], found["label_column"]) == ("mnist", None, "label")


def test_another_column_of_the_same_data_set_may_be_named_on_the_line(parse):
    found = parse("--label_column", "label", "--train_split", "test", config=DIGITS)
    assert (found["dataset_name"], found["train_split"], found["label_column"]) == ("digits", "test", "label")


def test_other_classes_on_the_line_are_other_images(parse):
    of_file = DIGITS | {"label_column": "label", "classes": ["3", "7"], "data_fingerprint": "abc"}
    assert parse(config=of_file)["data_fingerprint"] == "abc"
    found = parse("--classes", "1", "2", config=of_file)
    assert (found["classes"], found["data_fingerprint"]) == (["1", "2"], None)


def test_classes_need_a_label_column(refused, capsys):
    says = "--classes is mon item without --label_column, which must say where they are (of a folder: label)"
    assert refused("--train_data_dir", "tiles", "--classes", "mon", "item") == says
    with pytest.raises(SystemExit):
        parse_evaluation_arguments("--model a --train_data_dir tiles --classes mon item".split())
    assert says in capsys.readouterr().err


# -------------------------------------------------------------------- how values are written


@pytest.mark.parametrize("text", ["1e-3", "0.001", ".001", "1.0e-3", "'1e-3'"])
def test_every_spelling_of_a_float_in_yaml_is_read(parse, text):
    """YAML 1.1 reads 1e-3 as a string."""
    assert parse(config=f"dataset_name: digits\nlearning_rate: {text}\n")["learning_rate"] == 1e-3


@pytest.mark.parametrize(
    ("config", "flags", "expected"),
    [
        ("use_ema: false", [], False),
        ("use_ema: no", [], False),
        ("use_ema: true", [], True),
        ("", ["--use_ema", "false"], False),
        ("", ["--use_ema=False"], False),
        ("", ["--no_use_ema"], False),
        ("", ["--use_ema"], True),
        ("", [], True),
        ("use_ema: false", ["--use_ema"], True),
        ("use_ema: true", ["--use_ema", "false"], False),
    ],
)
def test_a_switch_that_is_on_by_default(parse, config, flags, expected):
    assert parse(*flags, config=f"dataset_name: digits\n{config}\n")["use_ema"] is expected


@pytest.mark.parametrize(
    ("config", "flags", "expected"),
    [
        ("random_flip: true", [], True),
        ("random_flip: yes", [], True),
        ("random_flip: false", [], False),
        ("", ["--random_flip"], True),
        ("", ["--random_flip", "true"], True),
        ("", ["--random-flip"], True),
        ("", [], False),
        ("random_flip: true", ["--random_flip", "false"], False),
    ],
)
def test_a_switch_that_is_off_by_default(parse, config, flags, expected):
    assert parse(*flags, config=f"dataset_name: digits\n{config}\n")["random_flip"] is expected


@pytest.mark.parametrize("text", ["[64, 128]", "\n  - 64\n  - 128"])
def test_lists(parse, text):
    assert parse(config=f"dataset_name: digits\nblock_out_channels: {text}\n")["block_out_channels"] == [64, 128]
    assert parse("--dataset_name", "digits", "--block_out_channels", 64, 128)["block_out_channels"] == [64, 128]


def test_one_number_is_a_list_of_one(parse):
    assert parse(config=DIGITS | {"resolution": 32})["resolution"] == [32]


@pytest.mark.parametrize("text", ["null", "~", ""])
def test_null_is_the_default(parse, text):
    found = parse(config=f"dataset_name: digits\nmax_train_steps: {text}\nlearning_rate: {text}\n")
    assert found["max_train_steps"] is None and found["learning_rate"] == 1e-4


def test_a_mixed_precision_of_no_stays_a_string(parse):
    """YAML 1.1 reads a bare `no` as false; accelerate's files and flags use it as a string."""
    assert parse(config="dataset_name: digits\nmixed_precision: no\n")["mixed_precision"] == "no"


def test_the_launchers_precision_is_the_default(parse, monkeypatch):
    """It was always no: with launch/one_gpu.yaml, which says bf16, training was in float32."""
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    assert parse(config=DIGITS)["mixed_precision"] == RunArguments().mixed_precision == "bf16"
    assert parse(config=DIGITS | {"mixed_precision": "fp16"})["mixed_precision"] == "fp16"
    assert parse("--mixed_precision", "no", config=DIGITS)["mixed_precision"] == "no"
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION")
    assert parse(config=DIGITS)["mixed_precision"] == "no"


def test_a_precision_of_the_launcher_that_training_has_not_is_refused(parse, monkeypatch, capsys):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp8")
    with pytest.raises(SystemExit):
        parse(config=DIGITS)
    assert "--mixed_precision is fp8; it must be one of no, fp16, bf16" in capsys.readouterr().err


def test_dashes_work_like_underscores(parse):
    assert parse("--dataset-name", "digits", config={"learning-rate": 1e-3})["learning_rate"] == 1e-3


@pytest.mark.parametrize("path", sorted((ROOT / "training" / "configs").glob("*.yaml")), ids=lambda path: path.name)
def test_shipped_files_are_read(path):
    data, _, run = parse_arguments(["--config", str(path)])
    assert (data.dataset_name or data.train_data_dir) and run.output_dir != RunArguments.output_dir


# -------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("typo", "meant"),
    [
        ("learning_rat", "learning_rate"),
        ("train_batchsize", "train_batch_size"),
        ("resoluton", "resolution"),
        ("max_train_step", "max_train_steps"),
        ("num_epoch", "num_epochs"),
        ("learning", "learning_rate"),  # no abbreviations
    ],
)
def test_a_typo_is_refused_with_the_nearest_name(refused, typo, meant):
    assert re.search(rf"--{typo} .*did you mean --{meant}\?", refused("--dataset_name", "digits", f"--{typo}", 1))
    assert re.search(rf"--{typo}=1.*did you mean --{meant}\?", refused("--dataset_name", "digits", f"--{typo}=1"))
    assert re.search(rf"'{typo}'.*did you mean '{meant}'\?", refused(config=DIGITS | {typo: 1}))


def test_a_name_that_resembles_none_is_refused_without_a_guess(refused):
    assert "did you mean" not in refused("--dataset_name", "digits", "--xyzzy", 1)
    assert "'xyzzy'" in refused(config=DIGITS | {"xyzzy": 1})


@pytest.mark.parametrize("flag", OF_TRAIN_UNCONDITIONAL)
def test_a_flag_of_diffusers_script_alone_is_refused_with_its_replacement(refused, parse, flag):
    instead = OF_TRAIN_UNCONDITIONAL[flag]
    assert f"(instead of {flag}: {instead})" in refused("--dataset_name", "digits", flag)
    for name in re.findall(r"--(\w+)", instead):
        assert name in parse("--dataset_name", "digits")


def test_a_stray_word_is_refused(refused):
    assert "pngs" in refused("--dataset_name", "digits", "pngs")
    assert "pngs" in refused("--dataset_name", "digits", "--random_flip", "pngs")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("learning_rate", "fast"),
        ("max_train_steps", 10.5),
        ("max_train_steps", "1e3"),
        ("seed", "a"),
        ("use_ema", "maybe"),
        ("prediction_type", "noise"),
        ("objective", "Simple"),
        ("image_mode", "CMYK"),
        ("block_out_channels", ["a"]),
        ("learning_rate", [1e-3, 1e-4]),
        ("learning_rate", True),
    ],
)
def test_a_wrong_type_or_choice_is_refused_alike(refused, name, value):
    words = [f"--{name}", *map(str, value)] if isinstance(value, list) else [f"--{name}", str(value)]
    messages = refused("--dataset_name", "digits", *words), refused(config=DIGITS | {name: value})
    for message in messages:
        assert (name in message or isinstance(value, list)) and str(value if isinstance(value, str) else "") in message


def test_choices_are_listed(refused):
    message = refused(config=DIGITS | {"prediction_type": "noise"})
    assert all(choice in message for choice in ("epsilon", "sample", "v_prediction"))


@pytest.mark.parametrize("text", ["", "digits", "- dataset_name", "1"])
def test_a_file_without_settings_is_refused(refused, text):
    assert "config.yaml" in refused(config=text)


def test_a_file_that_is_no_yaml_is_one_line(refused):
    assert "config.yaml" in refused(config="dataset_name: [digits\nseed: 1\n")


def test_a_nested_setting_is_refused(refused):
    assert "learning_rate" in refused(config=DIGITS | {"learning_rate": {"peak": 1e-3}})


def test_a_file_inside_a_file_is_refused(refused):
    assert "config" in refused(config=DIGITS | {"config": "other.yaml"})


def test_a_missing_file_is_refused(refused):
    assert "nothing.yaml" in refused("--config", "nothing.yaml")


def test_settings_of_both_or_no_source_are_refused(refused):
    assert "exactly one" in refused()
    assert "exactly one" in refused("--dataset_name", "digits", "--train_data_dir", "pngs")
    assert "exactly one" in refused(config={"dataset_name": "digits", "train_data_dir": "pngs"})


OUT_OF_RANGE = [
    *((name, 0) for name in ("train_batch_size", "eval_batch_size", "gradient_accumulation_steps", "num_epochs")),
    *((name, 0) for name in ("max_train_steps", "max_train_samples", "checkpointing_steps", "logging_steps")),
    *((name, 0) for name in ("checkpoints_total_limit", "sample_steps", "num_samples", "layers_per_block")),
    *((name, 0) for name in ("ddpm_num_steps", "ddpm_num_inference_steps", "learning_rate", "snr_gamma")),
    *((name, -1) for name in ("seed", "lr_warmup_steps", "dataloader_num_workers", "adam_weight_decay", "dropout")),
    *((name, 1) for name in ("adam_beta1", "adam_beta2", "dropout", "ema_max_decay")),
    *((name, "nan") for name in ("learning_rate", "max_grad_norm", "dropout", "adam_weight_decay")),
    *((name, "inf") for name in ("learning_rate", "snr_gamma")),
    ("max_grad_norm", 0),
    ("adam_epsilon", -1e-8),
    ("ema_inv_gamma", 0),
    ("ema_power", -1),
    ("resolution", 0),
    ("resolution", [8, 8, 8]),
]


@pytest.mark.parametrize(("name", "value"), OUT_OF_RANGE, ids=lambda part: str(part))
def test_a_number_out_of_range_is_refused_alike(refused, name, value):
    fitting = {"max_train_steps": 1} if name != "max_train_steps" else {}
    config = DIGITS | {"lr_warmup_steps": 0} | fitting | {name: value}
    words = [f"--{name}", *map(str, value)] if isinstance(value, list) else [f"--{name}={value}"]
    rest = [f"--{key}={given}" for key, given in config.items() if key != name]
    messages = refused(*rest, *words), refused(config=config)
    assert messages[0] == messages[1]
    assert f"--{name} is" in messages[0] and "must be" in messages[0] and str(value) in messages[0]


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"train_batch_size": 10, "gradient_accumulation_steps": 4}, "--train_batch_size is 10.*steps 4"),
        ({"ddpm_num_steps": 100, "ddpm_num_inference_steps": 101}, "--ddpm_num_inference_steps is 101.*100"),
        ({"validation_split": "test", "validation_share": 0.1}, "--validation_share and --validation_split are both"),
        ({"streaming": True, "max_train_steps": 9, "validation_share": 0.1}, "--validation_share needs stored images"),
        ({"validation_share": 1.0}, "--validation_share is 1.0; it must be above 0 and below 1"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(refused, settings, named):
    assert re.search(named, refused(config=DIGITS | settings))


def test_a_batch_that_the_processes_of_the_launch_cannot_share_is_refused(refused, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert re.search(
        r"--train_batch_size is 9 .*on 2 process\(es\); .*a multiple of 2",
        refused("--train_batch_size=9", config=DIGITS),
    )


def test_a_typed_warm_up_longer_than_the_run_is_refused(refused):
    line = ("--max_train_steps", 100, "--lr_warmup_steps", 101)
    assert re.search("--lr_warmup_steps is 101.*100", refused(*line, config=DIGITS))


def test_ends_of_a_schedule_that_is_not_used_are_refused_on_the_line_alone(refused, parse):
    message = refused("--log_snr_range", 8, -7, config=DIGITS)
    assert "--log_snr_range goes with --ddpm_beta_schedule log_snr; it is linear" in message
    recipe = DIGITS | {"ddpm_beta_schedule": "log_snr", "log_snr_range": [8, -7]}
    assert parse("--log_snr_range", 9, -7, config=recipe)["log_snr_range"] == [9, -7]
    assert parse("--ddpm_beta_schedule", "linear", config=recipe)["ddpm_beta_schedule"] == "linear"


@pytest.mark.parametrize(("steps", "warmup"), [(12, 1), (99, 9), (100, 100), (20_000, 100)])
def test_a_shortened_recipe_has_its_warm_up_shortened(steps, warmup, tmp_path):
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(DIGITS | {"max_train_steps": 5000, "lr_warmup_steps": 100}))
    *_, run = parse_arguments(["--config", str(tmp_path / "recipe.yaml"), "--max_train_steps", str(steps)])
    assert warmup_steps(run, steps) == warmup


IMAGES_OF_THE_FILE = {"dataset_name": "./mine", "data_fingerprint": "abc", "validation_share": 0.1}


@pytest.mark.parametrize(
    "flags",
    [("--train_data_dir", "pngs"), ("--dataset_name=digits",), ("--resolution", 8), ("--max-train-samples", 5)],
)
def test_flags_that_choose_other_images_drop_the_fingerprint(parse, flags):
    assert parse(*flags, config=IMAGES_OF_THE_FILE)["data_fingerprint"] is None
    assert parse("--learning_rate", 1, config=IMAGES_OF_THE_FILE)["data_fingerprint"] == "abc"


def test_a_split_on_the_line_replaces_the_share_of_the_file(parse):
    found = parse("--validation_split", "test", config=IMAGES_OF_THE_FILE)
    assert (found["validation_split"], found["validation_share"]) == ("test", None)
    assert found["data_fingerprint"] is None  # it is of the images that were left
    without = {"dataset_name": "./mine", "data_fingerprint": "abc", "validation_split": "test"}
    assert parse("--validation_split", "other", config=without)["data_fingerprint"] == "abc"


def test_the_revision_of_a_file_goes_with_the_model_of_the_file(parse, tmp_path):
    """A training run's file names the revision of the model that it started from."""
    of_file = DIGITS | {"pretrained_model_name_or_path": "me/base", "revision": "abc"}
    assert parse(config=of_file)["revision"] == "abc"
    assert parse("--pretrained_model_name_or_path", "me/other", config=of_file)["revision"] is None
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(of_file))
    line = ["--model", "me/mine", "--config", str(tmp_path / "run.yaml")]
    assert parse_evaluation_arguments(line)[1].revision is None
    assert parse_evaluation_arguments([*line, "--revision", "def"])[1].revision == "def"
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(DIGITS | {"revision": "abc"}))
    assert parse_evaluation_arguments(line)[1].revision == "abc"  # of no other model: it is this one's


@pytest.mark.parametrize("name", ["dropout", "block_out_channels", "variance_type", "ddpm_num_steps"])
@pytest.mark.parametrize("source", ["pretrained_model_name_or_path", "model_config_name_or_path"])
def test_a_typed_flag_of_the_network_that_a_model_overrides_is_warned_of(parse, recwarn, source, name):
    """In a file it is left unused: one recipe serves the first run and those that go on from it."""
    values = {"dropout": 0.1, "block_out_channels": 8, "variance_type": "learned_range", "ddpm_num_steps": 1000}
    config = DIGITS | {source: "me/base"}
    parse(config=config | {name: values[name]})
    assert not recwarn
    parse(f"--{name}", values[name], config=config)
    of_the_schedule = name in ("variance_type", "ddpm_num_steps")
    if source == "model_config_name_or_path" and of_the_schedule:  # a network has none
        assert not recwarn
    else:
        assert [str(one.message) for one in recwarn] == [f"--{name} without effect: --{source} has its own"]


# -------------------------------------------------------------------- help


def test_help_explains_every_flag(capsys):
    with pytest.raises(SystemExit) as exit:
        parse_arguments(["--help"])
    assert exit.value.code == 0
    text = capsys.readouterr().out
    for field in FIELDS:
        entry = re.search(rf"^  --{field.name}\b.*?(?=^  --|\Z)", text, re.MULTILINE | re.DOTALL)
        assert entry, field.name
        first_words = " ".join(field.metadata["help"].split()[:3])
        assert len(field.metadata["help"]) > 10 and first_words in " ".join(entry.group().split()), field.name
    assert "--config" in text and "None)" not in text
    assert re.search(r"--no_use_ema, --no-use-ema\s+Turn --use_ema off\.\n", text)


def test_the_flags_that_the_makefile_shows_exist(parse):
    shown = re.findall(r'make train ARGS="(.*?)"', (ROOT / "Makefile").read_text(encoding="utf-8"))
    assert shown
    for flags in shown:
        parse("--dataset_name=digits", "--lr_warmup_steps=0", *flags.split())
