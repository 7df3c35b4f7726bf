"""One tree of settings: what it refuses and how, and that YAML carries it there and back."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from likely.config import (
    SETTINGS_OF_TRAINING,
    Config,
    Launch,
    make_config,
    make_training,
    read_yaml,
    template_yaml,
    to_yaml,
)
from likely.errors import ConfigError

NEEDED = {"model": "smollm2-135m", "data": "train.jsonl", "output": "runs/a"}
# People's files and scripts say these names: to rename or drop one breaks them, so this list changes on purpose only.
FIELDS = [
    "model",
    "data",
    "eval_data",
    "eval_share",
    "retain",
    "guard",
    "guard_max_gain",
    "output",
    "format",
    "columns",
    "template",
    "template_date",
    "on_bad_row",
    "on_too_long",
    "epochs",
    "steps",
    "batch_size",
    "order",
    "learning_rate",
    "schedule",
    "warmup",
    "weight_decay",
    "max_grad_norm",
    "tune",
    "lora_rank",
    "lora_alpha",
    "dtype",
    "max_length",
    "pack_tokens",
    "activation_checkpointing",
    "train_on",
    "prompt_weight",
    "normalize",
    "seed",
    "eval_every",
    "patience",
    "num_answers",
    "save_every",
    "keep_checkpoints",
    "skip_nonfinite",
]
# The design promises these; the others are free to go.
FIXED = set(FIELDS) - {"schedule", "warmup", "weight_decay", "max_grad_norm", "lora_alpha"}
DEFAULTS = {
    "epochs": 3.0,
    "batch_size": 8,
    "tune": "lora",
    "lora_rank": 16,
    "dtype": "auto",
    "max_length": None,
    "train_on": "assistant",
    "prompt_weight": 0.0,
    "normalize": "token",
    "seed": 0,
    "weight_decay": 0.0,
}


def refused(values: dict[str, Any], place: str = "config.yaml", line_and_column: str = "") -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        make_config(values, place)
    return assert_one_clear_line(caught.value, place + line_and_column)


def assert_one_clear_line(error: ConfigError, place: str) -> ConfigError:
    assert error.exit_code == 2
    assert error.place == place
    assert str(error).startswith(f"{place}: ")
    assert error.message
    assert len(str(error).splitlines()) == 1
    return error


def written(folder: Path, text: str | bytes) -> Path:
    path = folder / "config.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def unreadable(path: Path, line: int | None) -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        read_yaml(path)
    return assert_one_clear_line(caught.value, f"{path}:{line}" if line else str(path))


# --- the names ---


def test_how_a_training_is_carried_out_stands_beside_the_config_and_is_not_stored() -> None:
    config, launch = make_training(NEEDED | {"resume": "step-7", "batch_size": 3})
    assert (config, launch) == (make_config(NEEDED | {"batch_size": 3}), Launch(resume="step-7"))
    assert not set(Config.model_fields) & set(Launch.model_fields)
    assert "resume" not in to_yaml(config)
    for wrong, told in (({"resum": "newest"}, "did you mean resume?"), ({"batchsize": 1}, "did you mean batch_size?")):
        with pytest.raises(ConfigError, match=re.escape(told)):
            make_training(NEEDED | wrong)
    with pytest.raises(ConfigError, match="resume is 'last'"):
        make_training(NEEDED | {"resume": "last"})


def test_the_names_stay() -> None:
    assert sorted(Config.model_fields) == sorted(FIELDS)
    assert set(Config.model_fields) >= FIXED


def test_there_are_not_too_many_knobs_and_each_says_what_it_does() -> None:
    assert len(Config.model_fields) <= 40
    for key, field in Config.model_fields.items():
        assert field.description, key
        assert "\n" not in field.description, key


def test_defaults() -> None:
    config = make_config(NEEDED)
    assert config.model_dump() | NEEDED | DEFAULTS == config.model_dump()


@pytest.mark.parametrize(
    ("given_values", "rate"),
    [
        ({"tune": "lora"}, 2e-4),
        ({"tune": "full"}, 2e-5),
        ({"learning_rate": 1e-3}, 1e-3),
        ({"tune": "full", "learning_rate": 3}, 3),
    ],
)
def test_the_peak_learning_rate_depends_on_what_is_tuned(given_values: dict[str, Any], rate: float) -> None:
    assert make_config(NEEDED | given_values).peak_learning_rate == rate


def test_a_config_does_not_change() -> None:
    with pytest.raises(ValueError, match="frozen"):
        make_config(NEEDED).seed = 1  # type: ignore[misc]


def test_the_schema_has_every_key() -> None:
    schema = Config.model_json_schema()
    assert list(schema["properties"]) == list(Config.model_fields)
    assert set(schema["required"]) == set(NEEDED)
    assert schema["additionalProperties"] is False


# --- values ---


@pytest.mark.parametrize("key", NEEDED)
def test_a_missing_key(key: str) -> None:
    error = refused({k: v for k, v in NEEDED.items() if k != key})
    assert error.message == f"{key} is missing"
    assert f"--{key}" in error.way_out


@pytest.mark.parametrize(
    ("key", "meant"),
    [
        ("lerning_rate", "learning_rate"),
        ("learning-rate", "learning_rate"),
        ("batchsize", "batch_size"),
        ("epoch", "epochs"),
        ("Seed", "seed"),
        ("lora_r", "lora_rank"),
        ("maxlength", "max_length"),
    ],
)
def test_an_unknown_key_gets_did_you_mean(key: str, meant: str) -> None:
    error = refused(NEEDED | {key: 1})
    assert repr(key) in error.message
    assert error.way_out == f"did you mean {meant}?"


@pytest.mark.parametrize("key", ["zzz", 17, None, "new\nline"])
def test_an_unknown_key_that_is_like_no_other_gets_the_list(key: Any) -> None:
    error = refused(NEEDED | {key: 1})
    assert all(name in error.way_out for name in Config.model_fields)


NUMBERS = [
    "guard_max_gain",
    "eval_share",
    "epochs",
    "learning_rate",
    "warmup",
    "weight_decay",
    "max_grad_norm",
    "lora_alpha",
    "prompt_weight",
]
COUNTS = [
    "patience",
    "steps",
    "batch_size",
    "lora_rank",
    "max_length",
    "pack_tokens",
    "eval_every",
    "save_every",
    "keep_checkpoints",
]
TEXTS = [
    "order",
    "model",
    "data",
    "eval_data",
    "output",
    "schedule",
    "tune",
    "dtype",
    "activation_checkpointing",
    "train_on",
    "normalize",
]
FROM_ZERO = ["seed", "num_answers", "skip_nonfinite"]
TEXTS += ["retain", "guard", "format", "columns", "template", "template_date", "on_bad_row", "on_too_long"]


def test_the_three_kinds_are_all_there_is() -> None:
    assert sorted([*NUMBERS, *COUNTS, *TEXTS, *FROM_ZERO]) == sorted(Config.model_fields)


@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan"), "inf", "nan", ".inf", "1e999"])
@pytest.mark.parametrize("key", NUMBERS)
def test_numbers_are_finite(key: str, value: Any) -> None:
    assert key in refused(NEEDED | {key: value}).message


@pytest.mark.parametrize("value", [True, False])
@pytest.mark.parametrize("key", [*NUMBERS, *COUNTS, *FROM_ZERO, *TEXTS])
def test_yes_and_no_are_neither_numbers_nor_names(key: str, value: bool) -> None:
    # YAML 1.1 reads yes and on as true, and Python counts true as 1.
    assert f"{key} is {value}" in refused(NEEDED | {key: value}).message


@pytest.mark.parametrize("value", ["yes", "", "two", "1,5", "0x10", [1], {"a": 1}])
@pytest.mark.parametrize("key", [*NUMBERS, *COUNTS, *FROM_ZERO])
def test_what_is_not_a_number(key: str, value: Any) -> None:
    assert f"{key} is {value!r}" in refused(NEEDED | {key: value}).message


@pytest.mark.parametrize("value", [0, -1, 1.0, 1.5, "8", "1e3"])
@pytest.mark.parametrize("key", COUNTS)
def test_counts_are_whole_and_positive(key: str, value: Any) -> None:
    assert f"{key} is {value!r}" in refused(NEEDED | {key: value}).message
    needs: dict[str, Any] = {"eval_every": {"eval_data": "e.jsonl"}, "patience": {"eval_data": "e", "eval_every": 1}}
    held_out = needs.get(key, {})
    assert make_config(NEEDED | held_out | {key: 1}).model_dump()[key] == 1


@pytest.mark.parametrize("value", [0, 7, -1.5, ["a"], {}, [1], ["a", 1]])
@pytest.mark.parametrize("key", TEXTS)
def test_texts_are_texts(key: str, value: Any) -> None:
    if key in {"data", "eval_data", "retain", "guard"} and value == ["a"]:
        return  # a list of files; see below
    assert f"{key} is {value!r}" in refused(NEEDED | {key: value}).message


@pytest.mark.parametrize("key", ["data", "eval_data", "retain", "guard"])
def test_a_list_of_files_is_what_commas_separate(tmp_path: Path, key: str) -> None:
    text = f"{key}:\n  - a.jsonl:0.7\n  - b.csv:0.3\n"
    config = make_config(NEEDED | read_yaml(written(tmp_path, text)))
    assert config.model_dump()[key] == "a.jsonl:0.7,b.csv:0.3"


def test_a_date_in_yaml_stands_in_quotes(tmp_path: Path) -> None:
    config = make_config(NEEDED | read_yaml(written(tmp_path, "template_date: '2025-02-03'\n")))
    assert config.template_date == "2025-02-03"


@pytest.mark.parametrize(
    ("key", "bad", "good"),
    [
        ("epochs", [0, -1], [0.5, 1, "1e2"]),
        ("learning_rate", [0, -1e-3], [1e-9, "2e-4", None]),
        ("warmup", [-0.1, 1, 1.5], [0, 0.99]),
        ("weight_decay", [-0.1], [0, 1]),
        ("max_grad_norm", [0, -1], [1e-3, 10**6]),
        ("lora_alpha", [0, -1], [0.5, 32, None]),
        ("prompt_weight", [-0.1, 1.01, 2], [0, 0.5, 1]),
        ("seed", [-1, 0.5, 2**64, 10**30], [0, 2**40, 2**64 - 1]),
        ("schedule", ["linear", "Cosine"], ["cosine", "constant"]),
        ("tune", ["loro", "LoRA", "QLoRA"], ["full", "lora", "qlora"]),
        ("dtype", ["float16", "bf16"], ["auto", "float32", "bfloat16"]),
        ("train_on", ["user", "completion"], ["assistant", "last_assistant", "all"]),
        ("normalize", ["none", "examples"], ["token", "example"]),
        ("format", ["jsonl", "chat", ""], ["auto", "messages", "sharegpt", "alpaca", "text", "tokens"]),
        ("template", ["yes", "none"], ["auto", "chat", "raw"]),
        ("template_date", ["", "today", "2024-02-30", "26 Jul 2024"], ["2024-07-26", "2030-01-01"]),
        ("on_bad_row", ["drop", "warn"], ["error", "skip"]),
        ("on_too_long", ["skip", "truncate"], ["error", "drop", "truncate_left", "truncate_right"]),
    ],
)
def test_ranges_and_choices(key: str, bad: list[Any], good: list[Any]) -> None:
    choices = [c for c in get_args(Config.model_fields[key].annotation) if isinstance(c, str)]
    for value in bad:
        message = refused(NEEDED | {key: value}).message
        assert f"{key} is {value!r}" in message
        assert all(repr(choice) in message for choice in choices)
    for value in good:
        found = make_config(NEEDED | {key: value}).model_dump()[key]
        assert found == (float(value) if key in NUMBERS and value is not None else value)


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"train_on": "all", "prompt_weight": 0.5}, "prompt_weight"),
        ({"tune": "full", "lora_alpha": 32}, "lora_alpha"),
        ({"steps": 5, "epochs": 1}, "steps and epochs"),
    ],
)
def test_settings_without_effect_are_refused(values: dict[str, Any], says: str) -> None:
    assert says in refused(NEEDED | values).message
    for key in values:
        make_config(NEEDED | {k: v for k, v in values.items() if k != key})


def test_a_wrong_flag_needs_no_file_to_be_named() -> None:
    with pytest.raises(ConfigError, match=r"^batch_size is 0: ") as caught:
        make_config(NEEDED | {"batch_size": 0})
    assert caught.value.place == ""


# --- YAML ---


def test_numbers_as_people_write_them_in_yaml(tmp_path: Path) -> None:
    path = written(
        tmp_path,
        "model: m  # a comment\ndata: 'd'\noutput: o\nlearning_rate: 2e-4\nepochs: 3\nprompt_weight: .5\nseed: 7\n",
    )
    assert yaml.safe_load("2e-4") == "2e-4", "YAML 1.1 has become YAML 1.2, and this test lost its point"
    config = make_config(read_yaml(path))
    assert (config.learning_rate, config.epochs, config.prompt_weight, config.seed) == (2e-4, 3.0, 0.5, 7)
    assert type(config.learning_rate) is float


@pytest.mark.parametrize("word", ["yes", "on", "true", "no", "off"])
def test_yes_and_no_in_yaml_are_refused(tmp_path: Path, word: str) -> None:
    path = written(tmp_path, f"model: m\ndata: d\noutput: o\nlearning_rate: {word}\n")
    assert "learning_rate" in refused(read_yaml(path), str(path), ":4:16").message


@pytest.mark.parametrize("word", [".inf", "-.inf", ".nan"])
def test_numbers_in_yaml_are_finite(tmp_path: Path, word: str) -> None:
    path = written(tmp_path, f"model: m\ndata: d\noutput: o\nepochs: {word}\n")
    assert "epochs" in refused(read_yaml(path), str(path), ":4:9").message


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("model: m\ndata: d\n\toutput: o\n", 3),
        ("model: m\ndata: a: b\n", 2),
        ("model: m\n\n\n- data\n", 4),
        ("model: 'm\ndata: d\n", None),
        ("model: [m\n", None),
        ("model: *m\n", 1),
        ("model: m\n---\nmodel: n\n", 2),
        ("? [a]\n: b\n", 1),
        ("model: m\ndata: !!python/object/apply:os.getcwd []\n", 2),  # tags that run code stay closed
    ],
)
def test_broken_yaml_is_named_with_its_line(tmp_path: Path, text: str, line: int | None) -> None:
    path = written(tmp_path, text)
    with pytest.raises(ConfigError) as caught:
        read_yaml(path)
    found = re.fullmatch(re.escape(str(path)) + r":(\d+):\d+", caught.value.place)
    assert found
    # Where something was opened and never closed, the parser may name the opening or the end of the file.
    assert int(found[1]) == line if line else 1 <= int(found[1]) <= text.count("\n") + 1
    assert "broken YAML" in assert_one_clear_line(caught.value, caught.value.place).message


@pytest.mark.parametrize(
    "text",
    [
        "model: m\ndata: 2024-13-45\n",  # looks like a date
        "model: m\nseed: " + "9" * 5000 + "\n",
        "model: m\nseed: !!int seven\n",
        "model: " + "[" * 3000 + "\n",
        "model: a\0b\n",
    ],
    ids=lambda text: text[:30],
)
def test_yaml_that_reads_as_no_value_is_one_line_too(tmp_path: Path, text: str) -> None:
    path = written(tmp_path, text)
    with pytest.raises(ConfigError) as caught:
        read_yaml(path)
    assert caught.value.exit_code == 2
    assert caught.value.place.startswith(str(path))
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize("text", ["", "# only a comment\n", "- model\n- data\n", "smollm2-135m\n", "3\n"])
def test_yaml_that_is_not_a_mapping(tmp_path: Path, text: str) -> None:
    error = unreadable(written(tmp_path, text), None)
    assert "mapping" in error.message
    assert error.way_out


def test_files_that_can_t_be_read(tmp_path: Path) -> None:
    for path in (tmp_path / "missing.yaml", tmp_path, written(tmp_path, b"model: caf\xe9\n")):
        assert unreadable(path, None).way_out


TEXT = st.text(min_size=1, max_size=12).filter(lambda text: text.strip() and "\0" not in text)


def number(low: float, high: float, **bounds: bool) -> st.SearchStrategy[float]:
    return st.floats(low, high, **bounds)  # type: ignore[arg-type]


def optional(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return st.none() | inner


VALUES: dict[str, st.SearchStrategy[Any]] = {
    "model": TEXT | st.sampled_from(["yes", "null", "~", "1e3", "2024-01-01", "0o7", "a: b", "#", "'", " x ", "-"]),
    "data": TEXT,
    "eval_data": optional(TEXT),
    "eval_share": st.just(0.0),
    "retain": optional(TEXT),
    "guard": optional(TEXT),
    "guard_max_gain": st.none(),
    "output": TEXT,
    "epochs": number(0, 1e9, exclude_min=True),
    "steps": optional(st.integers(1, 10**30)),
    "batch_size": st.integers(1, 10**6),
    "learning_rate": optional(number(0, 10, exclude_min=True)),
    "schedule": st.sampled_from(["cosine", "constant"]),
    "warmup": number(0, 1, exclude_max=True),
    "weight_decay": number(0, 1e300),
    "max_grad_norm": number(0, 1e300, exclude_min=True),
    "lora_rank": st.integers(1, 10**6),
    "dtype": st.sampled_from(["auto", "float32", "bfloat16"]),
    "max_length": optional(st.integers(1, 10**9)),
    "pack_tokens": optional(st.integers(1, 10**9)),
    "order": st.sampled_from(["examples", "families"]),
    "activation_checkpointing": st.sampled_from(["auto", "none", "full"]),
    "normalize": st.sampled_from(["token", "example"]),
    "format": st.sampled_from(["auto", "messages", "tokens"]),
    "columns": optional(TEXT),
    "template": st.sampled_from(["auto", "chat", "raw"]),
    "template_date": st.dates().map(str),
    "on_bad_row": st.sampled_from(["error", "skip"]),
    "on_too_long": st.sampled_from(["error", "drop", "truncate_left"]),
    "seed": st.integers(0, 2**64 - 1),
    "eval_every": optional(st.integers(1, 10**9)),
    "patience": optional(st.integers(1, 10**9)),
    "save_every": optional(st.integers(1, 10**9)),
    "num_answers": st.integers(0, 10**9),
    "keep_checkpoints": st.integers(1, 10**9),
    "skip_nonfinite": st.integers(0, 10**9),
}
COUPLED = st.sampled_from(
    [
        {"tune": "full", "lora_alpha": None, "train_on": "all", "prompt_weight": 1.0},
        {"tune": "lora", "lora_alpha": 2e-4, "train_on": "assistant", "prompt_weight": 0.1},
        {"tune": "lora", "lora_alpha": None, "train_on": "last_assistant", "prompt_weight": 5e-324},
    ]
)


@given(st.fixed_dictionaries(VALUES), COUPLED)
@settings(
    max_examples=40,
    deadline=None,
    derandomize=True,
    phases=[Phase.explicit, Phase.generate, Phase.shrink],
    suppress_health_check=[HealthCheck.too_slow],
)
def test_a_config_survives_its_yaml(
    tmp_path_factory: pytest.TempPathFactory, values: dict[str, Any], coupled: dict[str, Any]
) -> None:
    if values["steps"] is not None:  # one of the two says how long to train
        values.pop("epochs")
    if values["eval_data"] is None:
        values["eval_every"] = None
    if values["eval_every"] is None:
        values["patience"] = None
    config = make_config(values | coupled)
    assert set(Config.model_fields) <= set(values | coupled | {"epochs": 3.0})
    path = tmp_path_factory.getbasetemp() / "round_trip.yaml"
    path.write_text(to_yaml(config), encoding="utf-8")
    again = make_config(read_yaml(path))
    assert again == config
    assert again.model_dump() == config.model_dump() == {"epochs": 3.0} | values | coupled


def test_the_template_holds_the_defaults_and_only_them(tmp_path: Path) -> None:
    template = template_yaml()
    bare = read_yaml(written(tmp_path, template))
    assert bare == dict.fromkeys(NEEDED, "CHANGE_ME")

    opened = re.sub(rf"^# ((?:{'|'.join(SETTINGS_OF_TRAINING)}):)", r"\1", template, flags=re.MULTILINE)
    values = read_yaml(written(tmp_path, opened))
    assert list(values) == list(SETTINGS_OF_TRAINING)
    assert make_training(values) == make_training(bare)
    for key, field in SETTINGS_OF_TRAINING.items():
        assert str(field.description) in template
        for choice in (c for c in get_args(field.annotation) if isinstance(c, str)):
            assert choice in template, key


def test_a_yaml_tag_that_cannot_be_built_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("model: !!timestamp foo\n", encoding="utf-8")
    with pytest.raises(ConfigError, match="broken YAML"):
        read_yaml(tmp_path / "c.yaml")
