"""What ``likely check`` found, for people: text for a terminal, and one self-contained HTML page."""

from __future__ import annotations

import re
from typing import Any

import jinja2

from likely.insight.lengths import draw_lengths
from likely.insight.pictures import AFTER, BEFORE, draw_svg

_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
TRAINED = ("\x1b[1;32m", "\x1b[0m")
MARKS = ("\u27e6", "\u27e7")  # white square brackets, which no data is likely to have
ROWS_TOLD = 5


def to_text(result: dict[str, Any], *, colour: bool) -> str:
    """The report for a terminal. Trained text is green where there is colour, and in brackets where there is none."""
    parts = [_shown(example, colour) for example in result["shown"]]
    if "proof" in result:
        parts += [
            _data(result),
            _proof(result["proof"]),
            _held_out(result["eval_proof"]),
            _cost(result["cost"]),
            _audit(result),
        ]
        parts.append(result["verdict"])
    return "\n\n".join(filter(None, parts))


def _shown(example: dict[str, Any], colour: bool) -> str:
    start, stop = TRAINED if colour else MARKS
    trained = sum(piece["tokens"] for piece in example["pieces"] if piece["weight"])
    lines = [f"{example['source']}: {trained} of {example['tokens']} tokens are trained, marked {start}so{stop}"]
    text = ""
    for piece in example["pieces"]:
        shown = printable(piece["text"])
        weight = f"\u00d7{piece['weight']:g}" if piece["weight"] not in (0, 1) else ""
        text += f"{start}{shown}{weight}{stop}" if piece["weight"] else shown
    return "\n".join([*lines, text])


def printable(text: str) -> str:
    """Control characters written out: data must not steer the terminal."""
    return _CONTROL.sub(lambda match: repr(match[0])[1:-1], text)


def _data(result: dict[str, Any]) -> str:
    data = result["data"]
    lines = []
    for file in data["files"]:
        used = f", {file['used']:,} of them in the mix" if data["mixed_by_shares"] else ""
        refused = f", {file['refused']:,} refused" if file["refused"] else ""
        of_file = f"{file['rows']:,} rows{used}{refused}, {file['examples']:,} examples to train on"
        lines.append(f"{printable(file['path'])}: {of_file}")
        if file["shapes"]:
            lines.append("  " + ", ".join(f"{count:,} rows of {shape}" for shape, count in file["shapes"].items()))
        if file["ignored_keys"]:
            keys = ", ".join(map(repr, list(file["ignored_keys"])[:6]))
            lines.append(f"  keys that nothing reads: {printable(keys)}")
        lines += [f"  {count:,} {printable(note)}" for note, count in file["notes"].items()]
    if len(data["files"]) > 1:
        lines.append(f"together: {data['rows']:,} rows, {data['examples']:,} examples to train on")
    own = {note for file in data["files"] for note in file["notes"]}
    for note, count in data["notes"].items():
        if note not in own:
            rows = [printable(row) for row in data["noted"].get(note, [])[:ROWS_TOLD]]
            lines.append(f"  {count:,} {printable(note)}{': ' * bool(rows)}{', '.join(rows)}")
    if result["held_out_rows"]:
        lines.append(f"  {result['held_out_rows']:,} of these rows would be held out, to score the model (eval_share)")
    return "\n".join(lines)


def _proof(proof: dict[str, Any]) -> str:
    over = proof["over_length"]
    lines = ["Proof, over all rows"]
    lines.append(f"  tokens trained {proof['tokens']['trained']:,} of {proof['tokens']['all']:,}")
    lines += [
        f"    {role:<10} {count['trained']:>12,} of {count['tokens']:>12,}"
        for role, count in proof["tokens"]["per_role"].items()
    ]
    share = "-" if proof["stop_share"] is None else f"{proof['stop_share']:.2%}"
    bos = ", ".join(f"{count:,} with {number}" for number, count in proof["examples_by_leading_bos"].items() if count)
    lines += [
        f"  assistant turns whose stop token is trained {share} of {proof['assistant_turns']:,}",
        f"  prompts equal to those of inference, token by token {_equal(proof)}",
        f"  beginning-of-text tokens at the start: {bos or 'no examples'}",
        f"  examples with nothing to train {proof['nothing_to_train']:,}",
        f"  examples over {over['limit']:,} tokens {over['examples']:,} (the longest has {over['longest']:,})",
    ]
    if over["examples"]:
        lines.append(f"    error (default): {over['policies']['error']}")
        for policy in ("drop", "truncate_right", "truncate_left"):
            told = ", ".join(f"{key.replace('_', ' ')} {value:,}" for key, value in over["policies"][policy].items())
            lines.append(f"    {policy}: {told}")
        lines += _listed(over["listed"])
    lines.append(f"  rows refused {proof['refused']['rows']:,}")
    return "\n".join([*lines, *_listed(proof["refused"]["listed"])])


def _listed(rows: dict[str, str]) -> list[str]:
    return [f"    {printable(row)}: {printable(why)}" for row, why in list(rows.items())[:ROWS_TOLD]]


def _held_out(proof: dict[str, Any] | None) -> str:
    """What is wrong with the rows that a model would be judged by."""
    if not proof or not (proof["refused"]["rows"] or proof["over_length"]["examples"]):
        return ""
    over = proof["over_length"]
    lines = [f"Held-out data: {proof['refused']['rows']:,} rows refused", *_listed(proof["refused"]["listed"])]
    lines.append(f"  examples over {over['limit']:,} tokens {over['examples']:,}")
    return "\n".join([*lines, *_listed(over["listed"])])


def _equal(proof: dict[str, Any]) -> str:
    """How many prompts were compared and were equal; a row where one is not is refused."""
    different = proof["rows_whose_prompt_differs"]
    told = f"all {proof['prompts_equal_to_inference']:,}" if proof["prompts_equal_to_inference"] else "-"
    return f"{told}, but for {different:,} refused rows" if different else told


def _cost(cost: dict[str, Any]) -> str:
    if not cost:
        return ""
    sampled = "all of an epoch" if cost["sampled_steps"] * cost["batch_size"] >= cost["examples"] else "sampled"
    first = f"Training: {cost['steps']:,} steps of {cost['batch_size']} examples"
    per_step = f"tokens per step {cost['tokens_per_step']:,.0f}, distinct {cost['distinct_tokens_per_step']:,.0f}"
    ratio = f"sharing ratio {cost['sharing_ratio']:.2f} ({cost['sampled_steps']} steps, {sampled})"
    lines = [f"{first}, {cost['tokens_per_epoch']:,} tokens an epoch", f"  {per_step}: {ratio}"]
    guess = cost["estimate"]
    if guess:
        per_step = f"{guess['seconds']:,.0f} s ({guess['seconds_per_step']:.3g} s a step)"
        lines.append(f"  on this machine's processors about {per_step} and {guess['peak_gb']:.1f} GB, {guess['dtype']}")
    if cost["plan"]:
        lines += _plan(cost["plan"])
    return "\n".join(lines)


def _plan(plan: dict[str, Any]) -> list[str]:
    seconds, cluster = plan["seconds"], plan["cluster"]
    again = ", layers computed twice" if plan["checkpointing"] == "full" else ""
    parts = ", ".join(f"{name} {value:.1f}" for name, value in plan["gigabytes"].items())
    step = f"{plan['seconds_per_step']:.3g} s a step (compute {seconds['compute']:.3g}"
    step += f", exchange {seconds['communication']:.3g}, update {seconds['update']:.3g})"
    slowest = f"the slowest GPU computes {plan['imbalance']:.2f} of the mean"
    return [
        f"  on {cluster['gpus']:,} GPUs, {plan['layout']}{again}: {step}; {slowest}",
        f"    {plan['gigabytes_of_a_gpu']:.1f} GB of each GPU's {cluster['memory'] / 1e9:.0f}: {parts}",
        f"    a checkpoint has {plan['checkpoint_gigabytes']:.1f} GB, {plan['checkpoint_seconds']:.1f} s",
        *(f"    {note}" for note in plan["notes"]),
    ]


def _audit(result: dict[str, Any]) -> str:
    if not result["audit"]:
        return ""
    lines = ["Audit"]
    for kind, table in result["audit"].items():
        lines.append(f"  {kind:<40} {table['count']:>9,}" + (f"  {table['advice']}" if table["count"] else ""))
        lines += [f"    {row['source']}: {printable(row['detail'])}" for row in table["rows"][:ROWS_TOLD]]
    if result["floor"]["nats"]:
        lines.append(
            f"  No model can get the training NLL below {result['floor']['nats_per_token']:.4f} nats per token here."
        )
    return "\n".join(lines)


def to_html(result: dict[str, Any]) -> str:
    """The page; it needs nothing from any network."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("likely.insight", "templates"), autoescape=True, undefined=jinja2.StrictUndefined
    )
    return environment.get_template("check.html.j2").render(
        result=result,
        equal=_equal(result["proof"]),
        lengths=draw_svg(draw_lengths, result["lengths"]),
        before=BEFORE,
        after=AFTER,
    )
