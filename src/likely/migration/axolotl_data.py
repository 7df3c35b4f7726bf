"""Axolotl: what its ``datasets`` say."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from likely.migration.foreign import Foreign

FORMATS = {"alpaca": "alpaca", "completion": "text", "chat_template": "messages", "input_output": None}


def read_data(job: Foreign) -> None:
    """Data sets, the shape and columns of their rows, and what is held out."""
    names, formats = _data_sets(job, "datasets")
    job.carry("data", ",".join(names) or "CHANGE_ME", "datasets")
    if not names:
        job.differs("datasets", "nothing names the data: set data to a file or a data set of the hub")
    if len(formats) == 1 and None not in formats:
        job.carry("format", formats.pop())
    if job.value("test_datasets"):
        held_out, _ = _data_sets(job, "test_datasets")
        job.carry("eval_data", ",".join(held_out), "test_datasets")
        job.not_needed(["val_set_size"], "held-out data are given")
        return
    share = job.number("val_set_size", 0.0) or 0.0
    if share >= 1:
        job.differs("val_set_size", "a number of rows there; eval_share is a share of them")
    elif share or job.line("val_set_size"):
        job.carry("eval_share", share)
        if share:
            job.differs("val_set_size", "families of like rows stay together on one side of the split here")
    else:
        job.differs("val_set_size", "there every row is trained on; here a share is held out, unless eval_share is 0")


def _data_sets(job: Foreign, key: str) -> tuple[list[str], set[str | None]]:
    """Names of data as ours, and the formats of their rows, None for one that only a look at the rows tells."""
    given = job.value(key, [])
    if not isinstance(given, list) or not all(isinstance(part, dict) for part in given):
        raise job.wrong(key, "write a list of mappings with path")
    names: list[str] = []
    formats: set[str | None] = set()
    columns: dict[str, str | None] = {}
    for number, part in enumerate(given):
        names += _names_of(job, part, f"{key}.{number}")
        formats.add(_format_of(job, f"{key}.{number}", part))
        columns[f"{key}.{number}"] = _column_of(part)
        _whose_tokens(job, f"{key}.{number}", part)
        carried = {"path", "name", "split", "data_files", "type", "field_messages", "message_property_mappings",
                   "message_field_role", "message_field_content", "roles_to_train", "train_on_eos", "ds_type",
                   "chat_template", "field", "conversation"}  # fmt: skip
        for extra in part:
            if extra not in carried and part[extra] not in (None, False, ""):
                job.lacks(f"{key}.{number}.{extra}", "see likely train --help for what can be said of rows")
    _carry_columns(job, columns)
    return names, formats


def _column_of(part: dict[str, Any]) -> str | None:
    """Where a data set's text or messages stand, if not in the column of that name."""
    word = str(part.get("type")).partition(":")[0].partition(".")[0]
    if word == "completion" and part.get("field") not in (None, "text"):
        return f"text={part['field']}"
    if word == "chat_template" and not _is_sharegpt(part) and part.get("field_messages") not in (None, "messages"):
        return f"messages={part['field_messages']}"
    return None


def _is_sharegpt(part: dict[str, Any]) -> bool:
    return _role_of(part) == "from" and part.get("field_messages") == "conversations"


def _role_of(part: dict[str, Any]) -> Any:
    mapping = part.get("message_property_mappings") or {}
    return (
        mapping.get("role", "role")
        if isinstance(mapping, dict) and "role" in mapping
        else part.get("message_field_role", "role")
    )


def _carry_columns(job: Foreign, columns: dict[str, str | None]) -> None:
    """One map for all data here, one for each data set there."""
    wanted = {column for column in columns.values() if column}
    if not wanted:
        return
    if len(set(columns.values())) == 1 and job.settings.get("columns", *wanted) in wanted:
        job.carry("columns", wanted.pop())
        return
    for place, column in columns.items():
        if column:
            job.differs(
                place, f"its rows want columns {column}, and others do not: name the columns alike in the files"
            )


def _names_of(job: Foreign, part: dict[str, Any], place: str) -> list[str]:
    path, files = str(part.get("path", "CHANGE_ME")), part.get("data_files") or []
    files = files if isinstance(files, list) else [files]
    if not all(isinstance(file, str) for file in files):
        raise job.wrong(f"{place}.data_files", "write a file, or a list of them")
    if not files:
        return [job.hub_name(path, part.get("name"), part.get("split"), f"{place}.split", f"{place}.path")]
    if path not in {"json", "csv", "parquet", "text", "arrow"}:
        if path.count("/") == 1 and not path.startswith((".", "/", "~")) and not Path(path).is_dir():
            job.differs(f"{place}.data_files", "files of a data set on the hub: download them, and set data to them")
            return ["CHANGE_ME"]
        files = [f"{path}/{file}" for file in files]
    return [job.hub_name(file, None, None, "", f"{place}.data_files") for file in files]


def _format_of(job: Foreign, place: str, part: dict[str, Any]) -> str | None:
    kind = part.get("type")
    if isinstance(kind, dict):
        job.differs(
            f"{place}.type",
            "a prompt of its own there; here columns names the columns of a row",
        )
        return None
    word = str(kind).partition(":")[0].partition(".")[0] if kind else ""
    if word == "chat_template":
        if part.get("chat_template") not in (None, "tokenizer_default"):
            job.differs(f"{place}.chat_template", "the template is the one that the tokenizer brings")
        if _is_sharegpt(part):
            return "sharegpt"
        if _role_of(part) != "role":
            job.lacks(f"{place}.message_property_mappings", "a message has role and content, or from and value")
        return "messages"
    if word == "alpaca":
        job.differs(f"{place}.type", "rows go through the chat template here, and into alpaca's own prompt there")
    elif word == "sharegpt":
        return "sharegpt"
    elif word != "completion":
        job.differs(f"{place}.type", "every row is looked at for its shape here; likely check shows what is trained")
    return FORMATS.get(word)


def _whose_tokens(job: Foreign, place: str, part: dict[str, Any]) -> None:
    roles = part.get("roles_to_train")
    if roles not in (None, ["assistant"], ["gpt"]):
        job.lacks(f"{place}.roles_to_train", "answers are trained, or with train_on all every token")
    if part.get("train_on_eos") not in (None, "turn"):
        job.differs(f"{place}.train_on_eos", "the end of every turn that is trained is trained with it")
