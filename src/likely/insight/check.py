"""The facts of data -> what training on it would do, and what a careful reader would change first."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from likely.data.audit import KINDS
from likely.data.duplicates import groups_of, hash_of, near_pairs, similarity
from likely.data.language import LANGUAGES
from likely.data.survey import MOST_LISTED, Facts
from likely.types import ROLES

FAR = 6.0  # robust standard deviations
RARE = 0.01  # share of rows
FEWEST = 50  # rows below which nothing is called rare or far


@dataclass(frozen=True)
class Table:
    """Rows of one kind of finding. ``rows`` are (file:line, detail), at most MOST_LISTED of ``count``."""

    kind: str
    count: int
    advice: str
    rows: tuple[tuple[str, str], ...]

    def to_dict(self) -> dict[str, Any]:
        rows = [{"source": source, "detail": detail} for source, detail in self.rows]
        return {"count": self.count, "advice": self.advice, "rows": rows}


def prove(facts: Facts, max_length: int) -> dict[str, Any]:
    """The proof of what is trained, over all rows; counts are of tokens where not said otherwise. ``per_role`` are
    those of the examples that something is learnt from, as in ``run.json`` of a training; with ``left_out``, those of
    the others, they are all."""
    length, trained = facts.array("length_M"), facts.array("trained_M")
    bos = np.bincount(np.minimum(facts.array("bos_M"), 2), minlength=3).tolist()
    roles = {
        role: {"tokens": int(tokens), "trained": int(supervised), "weight": float(weight)}
        for role, (tokens, supervised, weight) in zip(ROLES, facts.tokens, strict=True)
        if tokens
    }
    return {
        "tokens": {
            "all": int(length.sum()),
            "trained": int(trained.sum()),
            "left_out": int(length[trained == 0].sum()),
            "per_role": roles,
        },
        "assistant_turns": facts.turns,
        "stop_tokens_trained": facts.stops,
        "stop_share": facts.stops / facts.turns if facts.turns else None,
        "prompts_equal_to_inference": facts.prompts,
        "rows_whose_prompt_differs": facts.counts["prompt differs"],
        "examples_by_leading_bos": {"0": bos[0], "1": bos[1], "2 or more": bos[2]},
        "refused": {"rows": facts.counts["refused"], "listed": facts.refused},
        "nothing_to_train": int((trained == 0).sum()),
        "over_length": over_length(facts, max_length),
    }


def over_length(facts: Facts, max_length: int) -> dict[str, Any]:
    """How many examples are too long and what each policy would do with them."""
    length, trained = facts.array("length_M"), facts.array("trained_M")
    over = (length > max_length) & (trained > 0)
    rows = facts.array("row_of_M")[over]
    keep_start, keep_end = facts.array("keep_start_M")[over], facts.array("keep_end_M")[over]
    num_over, lost = int(over.sum()), int(trained[over].sum())
    return {
        "limit": max_length,
        "longest": int(length.max(initial=0)),
        "examples": num_over,
        "policies": {
            "error": f"training is refused ({num_over} examples)" if num_over else "nothing to refuse",
            "drop": {"examples_left": int((trained > 0).sum()) - num_over, "trained_tokens_lost": lost},
            "truncate_right": {
                "trained_tokens_lost": lost - int(keep_start.sum()),
                "stop_tokens_lost": int(facts.array("no_stop_M")[over].sum()),
                "left_without_training": int((keep_start == 0).sum()),
            },
            "truncate_left": {
                "trained_tokens_lost": lost - int(keep_end.sum()),
                "stop_tokens_lost": 0,
                "left_without_training": int((keep_end == 0).sum()),
            },
        },
        "listed": {
            facts.source(rows[i]): f"{int(length[over][i])} tokens"
            for i in np.argsort(-length[over], kind="stable")[:MOST_LISTED]
        },
    }


def wrongs(proof: dict[str, Any], *, on_bad_row: str = "error", on_too_long: str = "error") -> list[str]:
    """Why training would be wrong or is refused; empty where it may go on. What the user chose to leave out or to cut
    is no reason."""
    found = refusals(proof, on_bad_row, on_too_long)
    if proof["stop_tokens_trained"] != proof["assistant_turns"]:
        found.append(f"{proof['assistant_turns'] - proof['stop_tokens_trained']} turns are trained without their end")
    if not proof["tokens"]["trained"]:
        found.append("nothing is trained")
    return found


def refusals(proof: dict[str, Any], on_bad_row: str, on_too_long: str) -> list[str]:
    """Rows that a training refuses."""
    found = []
    if proof["refused"]["rows"] and on_bad_row == "error":
        found.append(f"{proof['refused']['rows']} rows are refused")
    over = proof["over_length"]
    if over["examples"] and on_too_long == "error":
        found.append(f"{over['examples']} examples are over the limit of {over['limit']} tokens")
    return found


def first_refused(proofs: Sequence[dict[str, Any]], on_bad_row: str, on_too_long: str) -> str | None:
    """The first row, as ``file:line``, that a training refuses."""
    for proof in proofs:
        refused = proof["refused"]["listed"] if on_bad_row == "error" else {}
        over = proof["over_length"]["listed"] if on_too_long == "error" else {}
        for listed in (refused, over):
            if listed:
                file, line = min((file, int(line)) for file, _, line in (row.rpartition(":") for row in listed))
                return f"{file}:{line}"
    return None


def left_out(proof: dict[str, Any], *, on_too_long: str) -> list[str]:
    """What is not trained on as it stands because the user said so."""
    found = []
    if proof["refused"]["rows"]:
        found.append(f"{proof['refused']['rows']} refused rows are left out")
    if proof["nothing_to_train"]:
        found.append(f"{proof['nothing_to_train']} examples have nothing to train")
    over = proof["over_length"]
    cut = over["policies"].get(on_too_long)
    if over["examples"] and isinstance(cut, dict):
        fate = "dropped" if on_too_long == "drop" else "cut"
        done = f"{over['examples']} examples over {over['limit']} tokens are {fate}"
        lost = [f"{cut['trained_tokens_lost']} trained tokens"]
        if cut.get("stop_tokens_lost"):
            lost.append(f"{cut['stop_tokens_lost']} stop tokens")
        found.append(f"{done}, which loses {' and '.join(lost)}")
    return found


def verdict(wrong: list[str], tables: dict[str, Table], changed: list[str] | None = None) -> str:
    """One sentence: may training go on, with what left out or cut, and what should be looked at first."""
    if wrong:
        return f"Training would be wrong: {'; '.join(wrong)}."
    noted = ", ".join(f"{table.count} {table.kind}" for table in tables.values() if table.count)
    rows = f"{'; '.join(changed)}. Every other row" if changed else "Every row"
    return f"{rows} can be trained on exactly as shown. Worth a look: {noted or 'nothing'}."


def audit(facts: Facts, held_out: Facts | None = None) -> dict[str, Table]:
    """Every table of the audit, the most important first; empty ones too, so that zero can be seen. None where no row
    could be read."""
    if not len(facts.array("line_R")):
        return {}
    tables = [
        *(_overlap(facts, held_out) if held_out is not None else ()),
        _several_answers(facts),
        *_duplicates(facts),
        *(_found(facts, kind) for kind in KINDS),
        _languages(facts),
        _sizes(facts),
    ]
    return {table.kind: table for table in tables}


def likelihood_floor(facts: Facts) -> dict[str, float]:
    """What no model can go below on this data: where one context has several next tokens, with weights w of W in all,
    their likelihood is at best that of drawing them in proportion, ``sum w log(W / w)`` nats (Gibbs' inequality)."""
    nats, weight = _next_token_entropy(facts), float(facts.tokens[:, 2].sum())
    return {"nats": nats, "nats_per_token": nats / weight if weight else 0.0}


def _next_token_entropy(facts: Facts) -> float:
    """In nats, of the pieces that :mod:`likely.data.taught` makes of the rendered examples."""
    weight_F = facts.array("weight_F")
    if not len(weight_F):
        return 0.0
    _, context, pair = _contexts(facts.array("context_F"), facts.array("said_F"))
    pair_weight = np.bincount(pair, weights=weight_F)
    context_weight = np.bincount(context, weights=weight_F)
    return float((weight_F * np.log(context_weight[context] / pair_weight[pair])).sum())


def _contexts(contexts: Any, said: Any) -> tuple[Any, Any, Any]:
    """For each of some things said in some contexts: how many different things are said in its context, the context's
    number, the pair's number."""
    context = np.unique(contexts, return_inverse=True)[1]
    number = np.unique(said, return_inverse=True)[1]
    pair_keys, pair = np.unique(context.astype(np.int64) * (len(number) + 1) + number, return_inverse=True)
    different = np.bincount(pair_keys // (len(number) + 1), minlength=int(context.max(initial=-1)) + 1)
    return different[context] if len(context) else different, context, pair


def _several_answers(facts: Facts) -> Table:
    different_K, context, _ = _contexts(facts.array("context_K"), facts.array("said_K"))
    several = np.flatnonzero(different_K > 1)
    own = facts.array("row_of_K")[several] if len(several) else several
    order = np.lexsort((own, context[several], -different_K[several]))[:MOST_LISTED] if len(several) else several
    rows = [(facts.source(own[i]), f"one of {int(different_K[several[i]])} answers to this context") for i in order]
    return Table(
        "same prompt, different answers",
        len(several),
        "keep them if all are right; each can only get its share of the probability",
        tuple(rows),
    )


def _duplicates(facts: Facts) -> tuple[Table, Table]:
    whole = facts.array("whole_R")
    _, first, inverse = np.unique(whole, return_index=True, return_inverse=True)
    repeats = np.flatnonzero(first[inverse] != np.arange(len(whole))) if len(whole) else whole.astype(np.int64)
    exact = tuple(
        (facts.source(i), f"the same as {facts.named(first[inverse[i]])}") for i in repeats[:MOST_LISTED].tolist()
    )
    distinct = np.sort(first)  # each row once, in order
    sign = facts.array("row_sign_R")[distinct] if len(distinct) else np.empty((0, 128), np.uint16)
    groups = groups_of(near_pairs(sign), len(sign))
    _, leader = np.unique(groups, return_index=True)
    near = np.flatnonzero(leader[groups] != np.arange(len(groups))) if len(groups) else groups
    rows = []
    for i in near[:MOST_LISTED]:
        other = leader[groups[i]]
        like = facts.named(distinct[other])
        rows.append((facts.source(distinct[i]), f"like {like}{_share(sign[i], sign[other])}"))
    return (
        Table("exact duplicates", len(repeats), "remove them, unless the repetition is meant as a weight", exact),
        Table("near duplicates", len(near), "look whether they teach anything new", tuple(rows)),
    )


def _share(a: Any, b: Any) -> str:
    return f", about {float(similarity(a, b)):.0%} of three-word runs in common"


def _overlap(facts: Facts, held_out: Facts) -> list[Table]:
    tables = []
    for what in ("row", "prompt", "answer"):
        same, like, without = _same_rows(facts, held_out, what)
        rows = [
            (held_out.source(i), f"the same as training {facts.named(j)}")
            for i, j in zip(same[:MOST_LISTED].tolist(), like[:MOST_LISTED].tolist(), strict=True)
        ]
        advice = "remove them from one of the two: the held-out score would measure memory"
        tables.append(Table(f"held-out {what} in training data", len(same), advice, tuple(rows)))
        near = _near_overlap(facts, held_out, f"{what}_sign_R", {*same.tolist(), *without.tolist()})
        near_rows = [
            (held_out.source(i), f"like training {facts.named(j)}{share}") for i, j, share in near[:MOST_LISTED]
        ]
        tables.append(Table(f"held-out {what} nearly in training data", len(near), "look at them", tuple(near_rows)))
    return tables


def _same_rows(facts: Facts, held_out: Facts, what: str) -> tuple[Any, Any, Any]:
    """Held-out rows whose row, prompt or answer is that of a training row; these; and held-out rows that have none.

    A row is known by its last example, which tells all of it: other settings may train on fewer of its turns."""
    if what == "row":
        ours, rows = facts.array("ids_M"), facts.array("row_of_M")
        theirs, own = held_out.array("ids_M"), held_out.array("row_of_M")
        last = np.flatnonzero(np.append(own[1:] != own[:-1], True)) if len(own) else own
        theirs, own = theirs[last], own[last]
    else:
        ours, theirs = facts.array(f"{what}_R"), held_out.array(f"{what}_R")
        rows, own = np.arange(len(ours)), np.arange(len(theirs))
    keys, first = np.unique(ours, return_index=True)
    at = np.searchsorted(keys, theirs).clip(max=max(len(keys) - 1, 0))
    same = np.flatnonzero(keys[at] == theirs) if len(keys) else at[:0]
    # Rows of bare text have no prompt to share, and those that can't be rendered no answer.
    nothing = {"row": None, "prompt": hash_of(""), "answer": 0}[what]
    without = np.flatnonzero(theirs == nothing) if nothing is not None else same[:0]
    same = np.setdiff1d(same, without)
    return own[same], rows[first[at[same]]], own[without]


def _near_overlap(facts: Facts, held_out: Facts, name: str, known: set[int]) -> list[tuple[int, int, str]]:
    """Held-out rows that are near a training row and not the same as one: (row there, row here, how near)."""
    ours, theirs = facts.array(name), held_out.array(name)
    if not len(ours) or not len(theirs):
        return []
    both = np.concatenate([theirs, ours])
    pairs = near_pairs(both)
    groups = groups_of(pairs, len(both))
    nearest: dict[int, int] = {}
    for i, j in pairs[(pairs[:, 0] < len(theirs)) & (pairs[:, 1] >= len(theirs))].tolist():
        nearest.setdefault(i, j - len(theirs))
    ours_by_group: dict[int, int] = {}
    for j, group in enumerate(groups[len(theirs) :].tolist()):
        ours_by_group.setdefault(group, j)
    found = []
    for i, group in enumerate(groups[: len(theirs)].tolist()):
        other = nearest.get(i, ours_by_group.get(group))
        if other is not None and i not in known:
            found.append((i, other, _share(theirs[i], ours[other])))
    return found


def _found(facts: Facts, kind: str) -> Table:
    return Table(kind, facts.counts[kind], KINDS[kind], tuple(facts.found.get(kind, {}).items()))


def _languages(facts: Facts) -> Table:
    language_R = facts.array("language_R")
    counts = np.bincount(language_R, minlength=len(LANGUAGES))
    clear = counts[1:].sum()
    rare = np.flatnonzero((counts > 0) & (counts < RARE * clear)) if clear >= FEWEST else np.empty(0, np.int64)
    rows = np.flatnonzero(np.isin(language_R, rare[rare > 0]))
    main = LANGUAGES[1 + int(counts[1:].argmax())] if clear else LANGUAGES[0]
    listed = tuple(
        (facts.source(i), f"the answer looks {LANGUAGES[language_R[i]]}; most are {main}") for i in rows[:MOST_LISTED]
    )
    return Table("language outliers", len(rows), "a guess by script and function words: look at them", listed)


def _sizes(facts: Facts) -> Table:
    size_R = facts.array("size_R")
    rows = np.empty(0, np.int64)
    if len(size_R) >= FEWEST:
        log_R = np.log1p(size_R)
        # Of a normal distribution, 1.4826 times the median deviation is the standard deviation; 0.1 is 10% of length.
        spread = max(1.4826 * float(np.median(np.abs(log_R - np.median(log_R)))), 0.1)
        far_R = np.abs(log_R - np.median(log_R)) / spread
        rows = np.flatnonzero(far_R > FAR)
        rows = rows[np.argsort(-far_R[rows], kind="stable")]
    middle = int(np.median(size_R)) if len(size_R) else 0
    listed = tuple(
        (facts.source(i), f"{int(size_R[i])} characters; the median is {middle}") for i in rows[:MOST_LISTED]
    )
    return Table("length outliers", len(rows), "look whether the answer was cut off or ran on", listed)
