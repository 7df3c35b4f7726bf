"""``likely export``: write, load it with the tool that will use it, score it there, and only then give it its name."""

from __future__ import annotations

import gc
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from likely import manifest, storage
from likely.config import Config, make_config, read_yaml
from likely.data.cache import load_kept
from likely.data.dataset import Dataset, Request
from likely.data.formats import read_options
from likely.data.packing import default_pack_tokens
from likely.data.render import Renderer, load_tokenizer
from likely.data.split import hold_out
from likely.data.template import ChatTemplate
from likely.errors import ConfigError, LikelyError, ModelError
from likely.exports import fidelity, gguf_file, go_template, hub, modelfile, readers, stored
from likely.exports.sample import Sample, Spoken, take_sample
from likely.insight.evaluate import score_examples
from likely.model import load as models
from likely.model.merge import merged_network, save_merged, stored_dtype
from likely.model.place import Place, choose_max_length, find_model, local_folder
from likely.provenance import versions
from likely.training.checkpoint import require_disk
from likely.training.log import Display
from likely.types import ExampleScore
from likely.verb_settings import ExportSettings

REPORT = "export.json"


@dataclass(frozen=True)
class _Work:
    """What an export needs to know of its run. ``stop_id`` is the token that ends a turn, ``begins`` whether each text
    began with the tokenizer's first token in training, and that token stood nowhere else."""

    run: str
    place: Place
    config: Config
    tokenizer: Any
    renderer: Renderer
    sample: Sample
    asked: ExportSettings
    display: Display

    @property
    def stop_id(self) -> int:
        return self.renderer.end_of_turn.token_id

    @property
    def begins(self) -> bool:
        bos = self.tokenizer.bos_token_id
        rows = [example.token_ids_T.tolist() for example in self.sample.examples]
        return all(ids[0] == bos and ids.count(bos) == 1 for ids in rows)

    @property
    def template(self) -> ChatTemplate:
        return self.renderer.template


def export(run: str, asked: ExportSettings, display: Display) -> dict[str, Any]:
    """Write a run's tuned model for other tools, and prove it there.

    Args:
        run: a run folder, or ``RUN@step-N``.

    Returns:
        The content of export.json: ``{"to", "run", "tool", "rows", "nll": {"run", "export", "difference", "bound",
        "unsigned", "largest"}, "texts", "stored", "stop_tokens", "dtype", "notes", "versions", "pushed"}``.

    Raises:
        ConfigError: the run or the output can't be used as asked.
        ModelError: what was written is not the model that was trained; nothing is left of it.
    """
    final = Path(asked.output)
    token = hub.require_token(asked.push) if asked.push else ""
    _require_free(final)
    work = _prepare(run, asked, display)
    scores = _score(work)
    with storage.disk_errors(final, "the export", "free some disk, or name an --output elsewhere"):
        storage.make_folder(final.absolute().parent, above=True)
        storage.sweep_beside(final.absolute())
        with manifest.put_in_place(final.absolute()) as (unfinished, seal), storage.claimed(unfinished):
            written = _write(work, unfinished)
            gc.collect()  # the written network goes before the one that is read comes
            display.say(f"reading {asked.to} back")
            report = _about_named(final, lambda: _verify(work, unfinished, scores, written))
            storage.create_file(unfinished / REPORT, (json.dumps(report, indent=2, ensure_ascii=False) + "\n").encode())
            seal.close({"kind": "export", "to": asked.to})
    report["pushed"] = hub.push(final, asked.push, token) if asked.push else None
    return report


def _require_free(final: Path) -> None:
    if final.exists() and not (final.is_dir() and not any(final.iterdir())):
        raise ConfigError(
            "there is something there already", place=str(final), way_out="name another --output, or remove it"
        )


def _about_named(final: Path, verify: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What is wrong with an export is said of the name that it would have had."""
    try:
        return verify()
    except ModelError as error:
        place = f"{final}: {error.place}" if error.place else str(final)
        raise ModelError(
            error.message, place=place, way_out=error.way_out or "nothing was kept; this should be reported"
        ) from error


def _prepare(run: str, asked: ExportSettings, display: Display) -> _Work:
    place = find_model(run)
    folder = Path(run.partition("@")[0])
    if not (folder / "config.yaml").is_file():
        raise ConfigError(
            "no run folder: nothing says which rows its model is verified with",
            place=run,
            way_out="name the folder that likely train made",
        )
    if asked.to == "adapter" and place.adapter is None:
        raise ModelError("all weights were trained, so there is no adapter", place=run, way_out="use --to merged")
    config = make_config(read_yaml(folder / "config.yaml"), str(folder / "config.yaml"))
    tokenizer = load_tokenizer(place.tokenizer)
    renderer = Renderer(tokenizer, template=config.template, template_date=config.template_date)
    origin, dataset = _rows(config, asked.data, renderer, choose_max_length(place, config.max_length), display)
    sample = take_sample(dataset, renderer, origin, asked.rows)
    return _Work(run, place, config, tokenizer, renderer, sample, asked, display)


def _rows(
    config: Config, data: str | None, renderer: Renderer, max_length: int, display: Display
) -> tuple[str, Dataset]:
    """The rows to verify with: those asked for, the run's held-out ones, or the training's where none were held out."""
    options = read_options(config.format, config.columns, config.on_bad_row == "skip", config.seed)

    def read(path: str) -> Dataset:
        return load_kept(Request(path, renderer, max_length, options, config.on_too_long), display.counting)

    if data is not None or config.eval_data is not None:
        path = str(data or config.eval_data)
        return f"{'rows' if data else 'held-out rows'} of {path}", read(path)
    dataset = read(config.data)
    if config.eval_share:
        judge = Request(config.data, renderer, max_length, options, config.on_too_long)
        held_out = hold_out(dataset, config.eval_share, config.seed, judge)[1]
        if held_out is not None:
            return f"held-out rows of {config.data}", held_out
    return f"training rows of {config.data}", dataset


def _score(work: _Work) -> list[ExampleScore]:
    """The run's own likelihoods, by the layers that trained it, in float32."""
    model = models.load_model(work.run)
    longest = max(len(example.token_ids_T) for example in work.sample.examples)
    return score_examples(model, work.sample.examples, default_pack_tokens(longest), work.display.track)


def _write(work: _Work, folder: Path) -> stored.Digests:
    """The digests of what whoever reads it must find."""
    asked, tokenizer = work.asked, work.tokenizer
    if asked.to == "adapter":
        return _copy_adapter(work, folder)
    network = merged_network(work.place)
    numbers = sum(parameter.numel() for parameter in network.parameters())
    require_disk(folder, 4 * numbers, "the export")
    if asked.to == "merged":
        dtype = _dtype(work)
        save_merged(network, tokenizer, folder, dtype=dtype, stop_ids=_stop_ids(work, network))
        return readers.of_folder(network, folder)
    file = folder / modelfile.GGUF
    written = gguf_file.write_gguf(
        file,
        network,
        tokenizer,
        kind=asked.type,
        name=Path(work.config.output).name,
        stop_id=work.stop_id,
        begins=work.begins,
    )
    if asked.to == "ollama":
        bos = tokenizer.bos_token if work.begins else None
        template = go_template.go_template(work.template, bos) if work.renderer.has_template else None
        stop = tokenizer.convert_ids_to_tokens(work.stop_id)
        text = modelfile.write_modelfile(template, [stop])
        (folder / modelfile.NAME).write_text(text, encoding="utf-8")
    return written | stored.of_files(folder, but=file.suffix)


def _stop_ids(work: _Work, network: Any) -> list[int]:
    """The tokens that the base's generation ended at, and the one that ends a turn in training."""
    own = network.generation_config.eos_token_id
    known = own if isinstance(own, list) else [own]
    return sorted({int(i) for i in [*known, work.tokenizer.eos_token_id, work.stop_id] if i is not None})


def _dtype(work: _Work) -> Any:
    """The dtype asked for; else that of the base, or of the run's own files where its base is gone."""
    if work.asked.dtype != "auto":
        return models.choose_compute_dtype(work.asked.dtype, models.best_device())
    try:
        return stored_dtype(local_folder(find_model(work.config.model).weights, with_weights=True))
    except LikelyError:
        return stored_dtype(local_folder(work.place.weights, with_weights=True))


def _copy_adapter(work: _Work, folder: Path) -> stored.Digests:
    """The run's own files, and where generation ends: peft has no place for that."""
    assert work.place.adapter is not None  # noqa: S101
    digests = stored.of_files(Path(work.place.adapter))
    for path in sorted(Path(work.place.adapter).iterdir()):
        if path.name != manifest.NAME and path.is_file():
            storage.create_file(folder / path.name, path.read_bytes())
    stops = sorted({i for i in (work.tokenizer.eos_token_id, work.stop_id) if i is not None})
    settings = folder / "generation_config.json"
    storage.create_file(settings, json.dumps({"eos_token_id": stops}).encode())
    return {**digests, f"the file {settings.name}": storage.hash_file(settings)}


def _verify(work: _Work, folder: Path, scores: Sequence[ExampleScore], written: stored.Digests) -> dict[str, Any]:
    """Load what is in the folder with the tool that will use it, and compare.

    Raises:
        ModelError: it is not the model that was trained.
    """
    asked, sample = work.asked, work.sample
    read = {"merged": readers.read_folder, "adapter": readers.read_adapter}.get(asked.to)
    reading = read(folder) if read else readers.read_gguf(folder / modelfile.GGUF)
    if asked.to == "merged" and reading.dtype != (dtype := str(_dtype(work)).removeprefix("torch.")):
        raise ModelError(f"it was written in {dtype}, and is read as {reading.dtype}")
    bound = fidelity.BOUNDS[reading.dtype if read else asked.type]
    date = work.config.template_date
    fidelity.compare_stops(work.stop_id, reading, work.tokenizer)
    if read:
        fidelity.compare_special(reading, work.tokenizer)
    num_texts = fidelity.compare_tokens(sample, reading, work.tokenizer, date)
    notes = [f"{count} {why}" for why, count in sample.left_out.items()]
    if asked.to == "adapter" and Path(work.place.weights).is_dir():
        notes.append(f"its base is a folder of this machine, {work.place.weights}: take it along, or use --to merged")
    if asked.to == "adapter" and models.trained_on_nf4(work.place):
        notes.append("its base is to be loaded in four bits (nf4, twice quantised), as in training")
    if work.stop_id in reading.told_stop_ids:
        notes.append(
            "the base's own settings don't end answers there: generate with generation_config.json of this folder"
        )
    if asked.to == "ollama":
        num_texts += _verify_modelfile(work, folder, reading, notes)
    if work.renderer.has_template and work.template.writes_date:
        notes.append(f"the chat template writes a date: in training it was {date}")
    likelihood = fidelity.compare_likelihood(sample, scores, reading, bound, work.display.track)
    stored.compare(
        written,
        reading.stored(),
        f"its NLL is {likelihood.difference:+.2g} nats per token apart, where {bound:g} is allowed",
    )
    return {
        "to": asked.to,
        "run": str(Path(work.run.partition("@")[0]).absolute()) + "".join(work.run.partition("@")[1:]),
        "tool": reading.tool,
        "dtype": reading.dtype if read else asked.type,
        "rows": {"from": sample.origin, "num": len(sample.examples)},
        "nll": {**asdict(likelihood), "difference": likelihood.difference},
        "texts": num_texts,
        "stored": len(written),
        "stop_tokens": [work.tokenizer.decode([i]) for i in sorted(reading.stop_ids)],
        "notes": notes,
        "versions": versions(),
    }


def _verify_modelfile(work: _Work, folder: Path, reading: readers.Reading, notes: list[str]) -> int:
    """What Ollama would tell the model, as far as an evaluator of its templates knows.

    Raises:
        ModelError: the Modelfile tells it something else than training did.
    """
    found = modelfile.read_modelfile((folder / modelfile.NAME).read_text(encoding="utf-8"))
    stop = work.tokenizer.convert_ids_to_tokens(work.stop_id)
    if stop not in found.stops:
        raise ModelError(f"it does not stop at {stop!r}, which ends a turn in training", place=modelfile.NAME)
    if not work.renderer.has_template or found.template is None:
        return 0
    template = found.template
    plain = [row for row in work.sample.rows if row.text is None and _is_plain(row)]
    if len(plain) < len(work.sample.rows):
        other = len(work.sample.rows) - len(plain)
        notes.append(
            f"{other} rows have tools, thoughts or white space around their texts, which TEMPLATE does not follow"
        )
    sample = Sample(work.sample.origin, work.sample.examples, plain, {})
    date = work.config.template_date
    return fidelity.compare_tokens(
        sample, reading, work.tokenizer, date, lambda row: go_template.run(template, row.messages[:-1])
    )


def _is_plain(row: Spoken) -> bool:
    """Whether a row's prompt is nothing but words of system, user and assistant."""
    return not row.tools and all(
        set(m) == {"role", "content"}
        and m["role"] in {"system", "user", "assistant"}
        and str(m["content"]) == str(m["content"]).strip()
        for m in row.messages[:-1]
    )
