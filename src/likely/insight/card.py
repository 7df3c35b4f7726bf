"""The model card of a run: README.md with metadata that the Hugging Face hub reads.

A card is published, so it names hub ids, hashes and counts, and no folder of the machine that it was written on.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from huggingface_hub import EvalResult, ModelCardData

from likely.insight.pictures import readable
from likely.insight.report import LIMITS, Report

# As training loaded a base in four bits (likely.model.quantized): on the weights of the files it is another model.
FOUR_BITS = """\
four_bits = BitsAndBytesConfig(
    load_in_4bit=True,
    bnb_4bit_quant_type="nf4",
    bnb_4bit_use_double_quant=True,
    bnb_4bit_compute_dtype=torch.float32,
)"""
NO_BASE = "base"  # the folder that the snippet looks for where the base has no name on the hub


def model_card(report: Report, published: Mapping[str, Any]) -> str:
    """README.md of a run.

    Args:
        published: of :func:`likely.provenance.published`.
    """
    parts = [
        f"---\n{_metadata(report, published)}\n---",
        f"# {_text(_name(published))}",
        f"**{report.verdict}**",
        _results(report),
        _use(published),
        _supervision(report, published),
        _settings(published),
        _limits(report),
        _licence(published),
    ]
    return "\n\n".join(filter(None, parts)) + "\n"


def _name(published: Mapping[str, Any]) -> str:
    data = ", ".join(published["data"][:3]) + (" and more" if len(published["data"]) > 3 else "")
    return f"{published['base_name']} fine-tuned on {data}"


def _metadata(report: Report, published: Mapping[str, Any]) -> str:
    """The front matter, without its fences."""
    results = []
    held_out = _line(", ".join(published["eval_data"]) or "rows held out of the training data", 200)
    if report.tuned:
        figures = {
            "nll": ("NLL, nats per token", report.tuned.nll),
            "perplexity": ("Perplexity", report.tuned.perplexity),
            "bits_per_byte": ("Bits per byte", report.tuned.bits_per_byte),
            "accuracy": ("Token accuracy", report.tuned.token_accuracy),
        }
        results = [
            EvalResult(
                task_type="text-generation",
                dataset_type=(published["datasets"] or ["local"])[0],
                dataset_name=held_out,
                metric_type=kind,
                metric_name=name,
                metric_value=round(value, 6),
            )
            for kind, (name, value) in figures.items()
            if value is not None
        ]
    card = ModelCardData(
        license=published["licence"],
        base_model=published["base"],
        base_model_relation="adapter" if published["adapter"] else "finetune",
        library_name="peft" if published["adapter"] else "transformers",
        pipeline_tag="text-generation",
        tags=["likely", "sft", "supervised-fine-tuning", *(["lora"] if published["adapter"] else [])],
        datasets=published["datasets"] or None,
        model_name=_line(_name(published), 200) if results else None,
        eval_results=results or None,
    )
    return str(card.to_yaml()).strip()


def _line(value: str, limit: int = 300) -> str:
    """One line: a line of its own could end the metadata."""
    return re.sub(r"\s+", " ", readable(value, limit))


def _text(value: str) -> str:
    """Plain text in Markdown: nothing in it is a link, a picture, a tag or the end of a table's cell."""
    return re.sub(r"([\\`*_{}\[\]<>#|!&~])", r"\\\1", _line(value))


def _code(value: str) -> str:
    return "`" + _line(value).replace("`", "'").replace("|", "\\|") + "`"


def _table(head: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    lines = [head, tuple("---" if i == 0 else "---:" for i in range(len(head))), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _results(report: Report) -> str:
    if not (report.base and report.tuned):
        return ""
    base, tuned = report.base, report.tuned

    def pair(name: str, was: float | None, now: float | None, form: str = ".4f") -> tuple[str, ...]:
        return name, *("-" if value is None else format(value, form) for value in (was, now))

    rows = [
        pair("NLL, nats per token", base.nll, tuned.nll),
        ("95% interval", *(_interval(each.ci95) for each in (base, tuned))),
        pair("perplexity", base.perplexity, tuned.perplexity),
        pair("bits per byte", base.bits_per_byte, tuned.bits_per_byte),
        pair("gold tokens that are the first choice", base.token_accuracy, tuned.token_accuracy, ".2%"),
        pair("NLL of prompt and answer together", base.joint_nll, tuned.joint_nll),
    ]
    if report.exact_match:
        rows.append(("greedy answers equal to the gold answer", *(str(count) for count in report.exact_match)))
    if report.retain and report.retain["base_nll"] is not None:
        rows.append(pair("NLL of text that should not be forgotten", report.retain["base_nll"], report.retain["nll"]))
    if report.guard and report.guard["largest_gain"] is not None:
        gain = f"{report.guard['largest_gain']:+.4f}"
        rows.append(("largest gain of an unwanted response, nats of log-likelihood", "", gain))
    told = f"{tuned.num_examples:,} held-out examples, {tuned.num_tokens:,.10g} supervised tokens by weight."
    return f"## Held-out results\n\n{told}\n\n{_table(('', 'base', 'tuned'), rows)}"


def _interval(pair: tuple[float, float] | None) -> str:
    return "-" if pair is None else f"[{pair[0]:.4f}, {pair[1]:.4f}]"


def _use(published: Mapping[str, Any]) -> str:
    """How to load it, as code that runs beside the folder ``model``."""
    base = published["base"]
    lines, note = [], ""
    classes, in_four_bits = "AutoModelForCausalLM, AutoTokenizer", ""
    if published["four_bits"]:
        lines += ["import torch"]
        classes, in_four_bits = f"{classes}, BitsAndBytesConfig", ", quantization_config=four_bits, dtype=torch.float32"
    if published["adapter"]:
        lines += ["from peft import PeftModel"]
    lines += [f"from transformers import {classes}", ""]
    if published["four_bits"]:
        lines += [FOUR_BITS]
    if published["adapter"]:
        lines += [
            f'base = AutoModelForCausalLM.from_pretrained("{base or NO_BASE}"{in_four_bits})',
            'model = PeftModel.from_pretrained(base, "model")',
        ]
        if base is None:
            note = f"\n\nThe base is not on the hub: `{NO_BASE}` is the folder of its files."
        if published["base_note"]:
            note += f"\n\n{published['base_note']}"
        if published["four_bits"]:
            note += "\n\nThe base was in four bits in training, and is another model without them. Needs bitsandbytes."
        if published["base_sha256"]:
            note += f"\n\nThe base's safetensors have SHA-256 `{published['base_sha256']}`."
    else:
        lines += ['model = AutoModelForCausalLM.from_pretrained("model")']
    lines += ['tokenizer = AutoTokenizer.from_pretrained("model")', ""]
    if published["has_template"]:
        lines += [
            'messages = [{"role": "user", "content": "Hello!"}]',
            "inputs = tokenizer.apply_chat_template(",
            '    messages, add_generation_prompt=True, return_tensors="pt", return_dict=True',
            ")",
        ]
    else:
        lines += ['inputs = tokenizer("Hello!", return_tensors="pt")']
    lines += [
        "answer = model.generate(**inputs, max_new_tokens=64, do_sample=False)",
        'print(tokenizer.decode(answer[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))',
    ]
    return "## Use\n\n```python\n" + "\n".join(lines) + "\n```" + note


def _supervision(report: Report, published: Mapping[str, Any]) -> str:
    roles = [
        (name, f"{row['tokens']:,}", f"{row['supervised']:,}", f"{row['weight']:,.10g}")
        for name, row in published["supervised"].items()
    ]
    keys = ("rows", "examples", "tokens", "supervised_tokens")
    data = [
        (name, *(f"{row[key]:,}" for key in keys), f"{row['weight']:,.10g}") for name, row in report.counted.items()
    ]
    hashes = [(name, f"`{value}`") for name, value in report.hashes.items() if value]
    return "\n\n".join(
        [
            "## Data and supervision",
            f"Training data: {', '.join(map(_code, published['data']))}.",
            _table(("", "rows", "examples", "tokens", "supervised tokens", "summed weight"), data),
            "Tokens of the training data by role:",
            _table(("role", "tokens", "supervised", "summed weight"), roles),
            _table(("SHA-256", ""), hashes),
        ]
    )


def _settings(published: Mapping[str, Any]) -> str:
    rows = [(_code(name), _code(str(value))) for name, value in published["settings"].items()]
    versions = ", ".join(f"{_text(name)} {_text(version)}" for name, version in published["versions"].items())
    return f"## Settings\n\n{_table(('setting', 'value'), rows)}\n\nVersions: {versions}."


def _limits(report: Report) -> str:
    missing = {
        "how much was forgotten (`--retain`)": report.retain is None,
        "what became of unwanted answers (`--guard`)": report.guard is None,
        "freely written answers (`--num-answers`, `likely evaluate --generate`)": not report.answers,
        "anything on held-out data": report.tuned is None,
    }
    lines = [*LIMITS, *(f"Not measured: {what}." for what, is_missing in missing.items() if is_missing)]
    return "## Limits\n\n" + "\n".join(f"- {line}" for line in lines)


def _licence(published: Mapping[str, Any]) -> str:
    if published["licence"]:
        return f"## Licence\n\nThe base model's is `{published['licence']}`."
    return "## Licence\n\nThe base model's licence is not known here; it holds for the tuned model too."
