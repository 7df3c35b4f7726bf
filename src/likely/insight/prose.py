"""What verbs say to people: results as plain text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

NAMES = {
    "nll": "NLL of the answers, nats per token",
    "perplexity": "perplexity",
    "bits_per_byte": "bits per byte of the answers",
    "token_accuracy": "gold tokens that are the first choice",
    "calibration_error": "calibration error of the first choice",
    "joint_nll": "NLL of prompt and answer together",
    "prompt_nll": "NLL of the prompts alone",
}
MAX_ROWS = 10


def pulls_table(told: dict[str, Any]) -> str:
    lines = [f"{'token':>18} {'p':>8}  p - onehot   after"]
    for pull in told["pulls"]:
        text = pull["text"] + (" (gold)" if pull["gold"] else "")
        lines.append(f"{text:>18} {pull['probability']:8.4f}   {pull['gradient']:+9.4f} {pull['after']:7.4f}")
    return "\n".join([*lines, "", told["words"], *filter(None, [told["better"]])])


def explanation(result: dict[str, Any]) -> str:
    lines = [f"After: {result['context']!r}", ""]
    for token in result["tokens"]:
        lines.append(f"{token['text']!r}")
        for state in ("A", "B"):
            belief = token[state]
            if belief:
                rivals = ", ".join(f"{text!r} {p:.2%}" for text, p in belief["rivals"])
                lines.append(
                    f"  {state}  {belief['probability']:8.3%}  rank {belief['rank']:<6} NLL {belief['nll']:7.4f}"
                    f"  entropy {belief['entropy']:6.3f}  rivals {rivals}, everything else {belief['rest']:.2%}"
                )
        if token["step"]:
            told = token["step"]
            lines.append(
                f"  one step: log-probability {told['predicted']:+.4f} predicted, {told['measured']:+.4f} measured"
            )
    lines += [
        "",
        "The first answer token:",
        lens_table(result["first_token"], "A" if "A" in result["nll"] else None, "B"),
    ]
    return "\n".join([*lines, "", result["verdict"]])


def lens_table(lens: dict[str, Any], before: str | None, after: str) -> str:
    """The rows of a lens; one state alone where there is nothing ``before``."""
    if before is None:
        lines = [f"{'next token':>18} {after:>8}   p - onehot"]
        for row in lens["rows"]:
            text = repr(row["text"])[1:-1] + (" (gold)" if row["gold"] else "")
            lines.append(f"{text:>18} {row['after']:8.2%}      {row['gradient_after']:+.4f}")
        return "\n".join(lines)
    lines = [f"{'next token':>18} {before:>8} {after:>8}   p - onehot: {before:>6} {after:>9}"]
    for row in lens["rows"]:
        text = repr(row["text"])[1:-1] + (" (gold)" if row["gold"] else "")
        lines.append(
            f"{text:>18} {row['before']:8.2%} {row['after']:8.2%}"
            f"          {row['gradient_before']:+9.4f} {row['gradient_after']:+9.4f}"
        )
    return "\n".join(lines)


def evaluation_text(result: dict[str, Any], model: str, base: str | None) -> str:
    """The tables of ``likely evaluate``."""
    lines = [f"{model}: {result['num_examples']} examples, {result['num_tokens']:g} supervised tokens", ""]
    lines += _measures(result["measures"], base)
    lines += _slices(result["slices"], base)
    if result["delta"]:
        delta = result["delta"]
        lines += [
            "",
            f"change {delta['nll']:+.4f}{_interval(delta['ci95'], '+')}, better on {delta['share_better']:.0%}",
        ]
    gap = result["gap_closed"]
    if gap:
        lines.append(
            f"of the gap to the likelihood floor of these rows, {gap['floor']:.4f}, {gap['share']:.1%} is closed"
        )
    lines += _generation(result["generation"])
    lines += _retain(result["retain"])
    lines += _guard(result["guard"])
    return "\n".join(lines)


def _interval(ci95: Any, sign: str = "") -> str:
    return "" if ci95 is None else f" [{ci95[0]:{sign}.4f}, {ci95[1]:{sign}.4f}]"


def _figure(value: float | None, sign: str = "") -> str:
    return "-" if value is None else f"{value:{sign}.4f}"


def _measures(measures: dict[str, Any], base: str | None) -> list[str]:
    head = f"{'':38} {'model':>9}" + (f" {'base':>9} {'change':>9}  95% interval" if base else "  95% interval")
    lines = [head]
    for key, row in measures.items():
        line = f"{NAMES[key]:38} {_figure(row['value']):>9}"
        if base:
            line += f" {_figure(row['base']):>9} {_figure(row['change'], '+'):>9} {_interval(row['change_ci95'], '+')}"
        else:
            line += f" {_interval(row['ci95'])}"
        lines.append(line.rstrip())
    return lines


def _slices(slices: dict[str, Any], base: str | None) -> list[str]:
    lines = []
    for kind, rows in slices.items():
        if len(rows) < 2:
            continue
        lines += ["", f"by {kind:35} {'NLL':>9}" + (f" {'base':>9} {'change':>9}  95% interval" if base else "")]
        for row in rows:
            name = f"  {row['name']} ({row['num_tokens']:g} tokens)"
            line = f"{name:38} {row['nll']:9.4f}"
            if base:
                line += f" {row['base_nll']:9.4f} {row['change']:+9.4f} {_interval(row['change_ci95'], '+')}"
            lines.append(line)
    return lines


def _generation(generation: dict[str, Any]) -> list[str]:
    own, base = generation["tuned"], generation["base"]
    if not own:
        return []
    intervals = generation["ci95"]
    lines = ["", f"greedy answers to {own['num']} prompts"]
    for key, value in own.items():
        if key == "num":
            continue
        line = f"  {key:16} {_figure(value):>9} {_interval(intervals['tuned'].get(key))}"
        if base:
            change = intervals["change"].get(key)
            line += f"   base {_figure(base[key]):>9}"
            if change and change["value"] is not None:
                line += f"   change {change['value']:+.4f}{_interval(change['ci95'], '+')}"
        lines.append(line.rstrip())
    if own["chrf"] is None or own["rouge1"] is None:
        lines.append("  chrF, BLEU and ROUGE need pip install 'likely[metrics]'")
    return lines


def _retain(retain: dict[str, Any] | None) -> list[str]:
    if retain is None:
        return []
    line = f"retained text, {retain['num_examples']} rows of {retain['path']}: NLL {retain['nll']:.4f}"
    if retain["change"] is not None:
        low_high = _interval(retain["change_ci95"], "+")
        line += f", base {retain['base_nll']:.4f}, forgotten {retain['change']:+.4f}{low_high}"
    return ["", line]


def _guard(guard: dict[str, Any] | None) -> list[str]:
    if guard is None:
        return []
    lines = ["", f"guard, {guard['num_rows']} rows of {guard['path']}; log P of the whole unwanted response, in nats"]
    rows = sorted(guard["rows"], key=lambda row: -(row["gain"] if row["gain"] is not None else row["unwanted"]))
    for row in rows[:MAX_ROWS]:
        line = f"  {row['source']}  unwanted {row['unwanted']:.3f}"
        if row["odds"] is not None:
            line += f", wanted over unwanted {row['odds']:+.3f}"
        if row["gain"] is not None:
            was = "" if row["base_odds"] is None else f" and {row['base_odds']:+.3f}"
            line += f"; base {row['base_unwanted']:.3f}{was}; gain {row['gain']:+.3f}"
        lines.append(line + (" TOO MUCH" if row["broken"] else ""))
    if len(rows) > MAX_ROWS:
        lines.append(f"  and {len(rows) - MAX_ROWS} rows that gained less")
    return lines


def run_text(report: dict[str, Any], folder: Path) -> str:
    """What a training ends with."""
    lines = []
    if report["lens"]:
        lines += [f"\nAfter: {report['lens']['context']!r}", lens_table(report["lens"], "base", "tuned")]
    if report["exact_match"]:
        match = report["exact_match"]
        lines.append(f"\ngreedy answers equal to the gold answer: {match['base']} -> {match['tuned']} of {match['of']}")
    lines += _retain(report.get("retain")) + _guard(report.get("guard"))
    lines += [f"\n{report['verdict']}", f"model: {folder / 'model'}   report: {folder / 'report.html'}"]
    return "\n".join(lines)


def export_text(report: dict[str, Any], folder: str) -> str:
    """What was written, and what the tool that will use it made of it."""
    nll = report["nll"]
    lines = [
        f"{folder}: verified with {report['tool']} on {report['rows']['num']} {report['rows']['from']}",
        f"  NLL {nll['export']:.6f} nats per token; the run's is {nll['run']:.6f}: {abs(nll['difference']):.1e} apart",
        f"  ({nll['bound']:g} is allowed for {report['dtype']}), and single tokens {nll['unsigned']:.1e} in the mean",
        f"  {report['texts']} texts have the tokens of training; answers end at {', '.join(report['stop_tokens'])}",
        *(f"  note: {note}" for note in report["notes"]),
    ]
    return "\n".join([*lines, f"pushed: {report['pushed']}"] if report["pushed"] else lines)
