"""The viewer's worker: a process that reads one request a line and answers in lines, until its input ends.

Whatever it takes or loads stays in it, and it can be ended at any moment: what it writes takes its name once it is
whole.
"""

from __future__ import annotations

import gc
import json
import os
import sys
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from queue import Queue
from typing import IO, Any, TypeVar

from likely.config import Config, make_settings, make_training, read_yaml
from likely.errors import LikelyError, is_out_of_memory
from likely.insight.score_file import replacing
from likely.training.log import Display
from likely.verb_settings import CheckSettings, ExplainSettings, LookSettings
from likely.web.index import build_index

Item = TypeVar("Item")
MODELS_KEPT = 2  # a base and a tuned one
POLITE = 10  # added to the nice value: a training on this machine goes first


class Voice(Display):
    """Progress as lines for the server instead of bars."""

    def __init__(self, out: IO[str]) -> None:
        super().__init__(quiet=True)
        self._out = out

    def tell(self, **told: Any) -> None:
        self._out.write(json.dumps(told, allow_nan=False) + "\n")
        self._out.flush()

    def progress(self, title: str, done: int, total: int | None) -> None:
        self.tell(progress={"title": title, "done": done, "total": total})

    def say(self, text: str) -> None:
        self.progress(text[:500], 0, None)

    def track(self, items: Iterable[Item], title: str, total: int) -> Iterator[Item]:
        for done, item in enumerate(items):
            self.progress(title, done, total)
            yield item

    @contextmanager
    def counting(self, title: str) -> Iterator[Callable[[int, float], None]]:
        done = 0

        def advance(number: int, share: float) -> None:
            nonlocal done
            done += number
            self.progress(title, done, max(round(done / share), done) if share else None)

        yield advance


class Work:
    """The kinds of jobs. The models that were used last stay loaded."""

    def __init__(self, voice: Voice) -> None:
        self._voice = voice
        self._models: OrderedDict[str, Any] = OrderedDict()

    @property
    def models(self) -> list[str]:
        return [Path(name).name for name in self._models]

    def do(self, asked: dict[str, Any]) -> dict[str, Any]:
        kinds: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
            "index": self._index,
            "score": self._score,
            "check": self._check,
            "mask": self._mask,
            "example": self._example,
            "token": self._token,
            "lens": self._lens,
            "step": self._lens,
            "generate": self._generate,
        }
        return kinds[asked["kind"]](asked)

    def _load(self, name: str) -> Any:
        """A model by its name; no more than a few are held."""
        from likely.model import load as models  # noqa: PLC0415  (indexes and checks need no torch)

        if name in self._models:
            self._models.move_to_end(name)
        else:
            while len(self._models) >= MODELS_KEPT:
                self._models.popitem(last=False)
                gc.collect()
            self._voice.say(f"loading {Path(name).name}")
            self._models[name] = models.load_model(name, trainable=True)  # by a step
        return self._models[name]

    # --- files ---

    def _index(self, asked: dict[str, Any]) -> dict[str, Any]:
        build_index(Path(asked["scores"]), lambda done, total: self._voice.progress("indexing", done, total))
        return {}

    def _check(self, asked: dict[str, Any]) -> dict[str, Any]:
        from likely import examine  # noqa: PLC0415  (as above)

        config = _config(asked["run"])
        return examine.check(config.data, _check_settings(config, asked), self._voice)

    def _mask(self, asked: dict[str, Any]) -> dict[str, Any]:
        from likely import examine  # noqa: PLC0415  (as above)
        from likely.data.mixture import parse_parts  # noqa: PLC0415

        config = _config(asked["run"])
        parts = parse_parts(config.data)
        show = f"{parts[min(asked['file'], len(parts) - 1)].path}:{asked['line']}"
        return {"shown": examine.check(config.data, _check_settings(config, asked, show=show), self._voice)["shown"]}

    # --- scores ---

    def _score(self, asked: dict[str, Any]) -> dict[str, Any]:
        from likely import look  # noqa: PLC0415  (as above)
        from likely.data.render import Supervision  # noqa: PLC0415

        self._models.clear()  # two more are about to be loaded
        output = Path(asked["output"])
        output.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        config = _config(asked["run"])
        settings = _look_settings(config, asked["tuned"], asked["base"])
        if config.eval_data is not None:
            records = look.score(config.eval_data, settings, self._voice, beside=output)
        else:
            own = Supervision(config.train_on, config.prompt_weight)
            records = look.score_held_out(config.data, config.eval_share or 0.0, own, settings, self._voice)
        with replacing(output) as file:
            for record in records:
                file.write(json.dumps(record, ensure_ascii=False) + "\n")
        return {}

    def _example(self, asked: dict[str, Any]) -> dict[str, Any]:
        from likely.insight.again import score_again  # noqa: PLC0415  (as above)

        return score_again(self._load(asked["model"]), _record(asked))

    def _token(self, asked: dict[str, Any]) -> dict[str, Any]:
        from likely.data.render import load_tokenizer  # noqa: PLC0415  (as above)
        from likely.insight.again import token_card  # noqa: PLC0415
        from likely.model.place import find_model  # noqa: PLC0415

        record = _record(asked)
        tokenizer = load_tokenizer(find_model(asked["tuned"]).tokenizer)
        models = self._load(asked["base"]), self._load(asked["tuned"])
        return token_card(models, tokenizer, record, asked["position"], asked["rivals"])

    # --- a prompt ---

    def _lens(self, asked: dict[str, Any]) -> dict[str, Any]:
        from likely import look  # noqa: PLC0415  (as above)

        values = {"model": asked["tuned"], "base": asked["base"], "prompt": asked["prompt"]}
        values |= {"response": asked["answer"], "rivals": asked["rivals"], "step": asked["kind"] == "step"}
        values["learning_rate"] = asked["learning_rate"]
        return look.explain(make_settings(ExplainSettings, values), load=self._load)

    def _generate(self, asked: dict[str, Any]) -> dict[str, Any]:
        from likely import look  # noqa: PLC0415  (as above)

        return {
            state: look.answer(asked[state], asked["prompt"], asked["max_tokens"], load=self._load)
            for state in ("base", "tuned")
        }


def _record(asked: dict[str, Any]) -> dict[str, Any]:
    from likely.insight.score_reading import record_at  # noqa: PLC0415  (as above)

    return record_at(Path(asked["scores"]), asked["place"])


def _config(run: str) -> Config:
    path = Path(run) / "config.yaml"
    return make_training(read_yaml(path), str(path))[0]


def _shared(config: Config, kind: Any) -> dict[str, Any]:
    """The settings of a training that another verb has too, but those that are as nobody gave them."""
    own, fields = config.model_dump(), kind.model_fields
    return {key: own[key] for key in fields if key in own and own[key] not in (None, fields[key].default)}


def _check_settings(config: Config, asked: dict[str, Any], show: str | None = None) -> CheckSettings:
    values = _shared(config, CheckSettings)
    if config.eval_data is not None:
        values.pop("eval_share", None)
    if show is not None:
        values["show"] = show
    if asked["gentle"] or show is not None:
        values["processes"] = 1
    return make_settings(CheckSettings, values)


def _look_settings(config: Config, model: str, base: str) -> LookSettings:
    return make_settings(LookSettings, {**_shared(config, LookSettings), "model": model, "base": base})


def _explain(error: Exception) -> str:
    if isinstance(error, LikelyError):
        return str(error)
    if is_out_of_memory(error):
        return "out of memory; close other programs, or look at a smaller model"
    if isinstance(error, OSError):
        return f"{error.filename}: {error.strerror}" if error.filename else str(error)
    return f"a bug of ours ({type(error).__name__}: {str(error)[:200]})"


def main() -> None:
    """Answer requests in order. A second thread reads them, so that the end of the input ends the process at once."""
    out = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what libraries print is no answer
    with suppress(OSError):
        os.nice(POLITE)
    voice = Voice(out)
    work = Work(voice)
    requests: Queue[str] = Queue()

    def read() -> None:
        for line in sys.stdin:
            requests.put(line)
        os._exit(0)

    threading.Thread(target=read, daemon=True, name="requests").start()
    while True:
        asked = json.loads(requests.get())
        try:
            found: dict[str, Any] = {"result": work.do(asked)}
        except Exception as error:
            found = {"error": _explain(error)}
        voice.tell(models=work.models, **found)


if __name__ == "__main__":
    main()
