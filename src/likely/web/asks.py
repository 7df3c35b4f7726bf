"""What a page may ask of the worker, checked, and made into jobs: ids become paths here and nowhere else."""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from likely.web.access import RefusedError
from likely.web.jobs import Job
from likely.web.runs import Run, Shelf
from likely.web.scores import ScoreSets

MAX_TOLD = 200  # characters of what is wrong, which may be a part of the request
Id = Annotated[str, Field(max_length=64)]
Text = Annotated[str, Field(min_length=1, max_length=100_000)]
Rivals = Annotated[int, Field(ge=0, le=50)]


class _Ask(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class OfRun(_Ask):
    kind: Literal["score", "check"]
    run: Id


class OfMask(_Ask):
    kind: Literal["mask"]
    run: Id
    file: int = Field(0, ge=0, le=10_000)
    line: int = Field(ge=1, le=10**12)


class OfExample(_Ask):
    kind: Literal["example"]
    set: Id
    row: int = Field(ge=0)
    state: Id


class OfToken(_Ask):
    kind: Literal["token"]
    set: Id
    row: int = Field(ge=0)
    position: int = Field(ge=1)
    rivals: Rivals = 5


class OfLens(_Ask):
    kind: Literal["lens", "step"]
    run: Id
    prompt: Text
    answer: Text
    rivals: Rivals = 3
    learning_rate: float = Field(1e-5, gt=0, le=1)


class OfGenerate(_Ask):
    kind: Literal["generate"]
    run: Id
    prompt: Text
    max_tokens: int = Field(64, ge=1, le=512)


ASKS: TypeAdapter[Any] = TypeAdapter(
    Annotated[OfRun | OfMask | OfExample | OfToken | OfLens | OfGenerate, Field(discriminator="kind")]
)


def read_ask(body: bytes) -> Any:
    """A request for a job.

    Raises:
        RefusedError: with what is wrong.
    """
    try:
        return ASKS.validate_python(json.loads(body))
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(str(part) for part in first["loc"][1:]) or "kind"
        raise RefusedError(400, f"{where[:MAX_TOLD]}: {first['msg'][:MAX_TOLD]}") from error
    except (ValueError, RecursionError) as error:
        raise RefusedError(400, "the body is no JSON") from error


def make_job(ask: Any, shelf: Shelf, sets: ScoreSets) -> Job:
    """The job of a request; reads the disk.

    Raises:
        RefusedError: something that it names is not there.
    """
    if isinstance(ask, (OfExample, OfToken)):
        return _on_a_row(ask, sets)
    run = shelf.find(ask.run)
    if run is None:
        raise RefusedError(404, "there is no such run")
    if ask.kind == "score":
        return _score(run, sets)
    if isinstance(ask, (OfRun, OfMask)):
        # A training that is under way keeps its processors.
        gentle = run.entry()["state"] == "running"
        request = {**ask.model_dump(exclude={"kind", "run"}), "run": str(run.folder), "gentle": gentle}
        return Job(ask.kind, request, run=run.id)
    state = run.latest()
    if state is None:
        raise RefusedError(409, "the run has no model yet: its first checkpoint is still to come")
    request = {**ask.model_dump(exclude={"kind", "run"}), "tuned": _model(run, state), "base": _model(run, "base")}
    return Job(ask.kind, request, _key(ask.kind, request, run.stamp(state)))


def can_score(run: Run) -> tuple[bool, str]:
    """Whether the held-out rows of a run can be scored, and the reason."""
    if run.latest() is None:
        return False, "There is no model yet: the first checkpoint is still to come."
    config = run.config or {}
    if not config.get("eval_data") and not config.get("eval_share"):
        return False, "The run has no held-out rows; score a file with likely score, and give it by --scores."
    return True, "Scores the held-out rows under the base model and the tuned one."


def _score(run: Run, sets: ScoreSets) -> Job:
    able, reason = can_score(run)
    if not able:
        raise RefusedError(409, reason)
    output = run.own_scores()

    def finish(_: dict[str, Any]) -> dict[str, Any]:
        return {"set": sets.add(output, run).id}

    models = {"tuned": _model(run, str(run.latest())), "base": _model(run, "base")}
    return Job("score", {"run": str(run.folder), "output": str(output), **models}, finish=finish, run=run.id)


def _on_a_row(ask: OfExample | OfToken, sets: ScoreSets) -> Job:
    found = sets.find(ask.set)
    table, run = found.ready(), found.run
    if ask.row >= table.num_rows:
        raise RefusedError(404, "there is no such row")
    if run is None:
        raise RefusedError(409, "these scores belong to no run, so there is no model to ask")
    request: dict[str, Any] = {"scores": str(found.path), "place": table.place(ask.row)}
    if isinstance(ask, OfExample):
        state = ask.state
        request["model"] = _model(run, state)
    else:
        state = run.latest() or "base"
        request |= {"position": ask.position, "rivals": ask.rivals}
        request |= {"tuned": _model(run, state), "base": _model(run, "base")}
    return Job(ask.kind, request, _key(ask.kind, request, run.stamp(state)))


def _model(run: Run, state: str) -> str:
    model = run.model_of(state)
    if model is None:
        raise RefusedError(404, "there is no such state of the model")
    return model


def _key(kind: str, request: dict[str, Any], stamp: str) -> str:
    return json.dumps([kind, request, stamp], sort_keys=True)
