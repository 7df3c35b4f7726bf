"""A guess at the language of a text, light enough for every row of a large file."""

from __future__ import annotations

import re

_SCRIPTS = {
    "Cyrillic": "\u0400-\u052f",
    "Greek": "\u0370-\u03ff\u1f00-\u1fff",
    "Hebrew": "\u0590-\u05ff",
    "Arabic": "\u0600-\u06ff\u0750-\u077f",
    "Devanagari": "\u0900-\u097f",
    "Bengali": "\u0980-\u09ff",
    "Tamil": "\u0b80-\u0bff",
    "Thai": "\u0e00-\u0e7f",
    "Korean": "\u1100-\u11ff\uac00-\ud7af",
    "Japanese": "\u3040-\u30ff",
    "Chinese": "\u4e00-\u9fff\u3400-\u4dbf",
}
_SCRIPT_PATTERNS = {name: re.compile(f"[{ranges}]") for name, ranges in _SCRIPTS.items()}
_LATIN = re.compile("[A-Za-z\u00c0-\u024f\u1e00-\u1eff]")
_MARKS = ".,;:!?()\"'\u00bf\u00a1\u00ab\u00bb"
# Some of the commonest function words of each language.
_FUNCTION_WORDS = {
    name: frozenset(words.split())
    for name, words in {
        "English": "the and of to is that it for was with you are this have not be they what which",
        "German": "der die und das ist nicht ein eine zu mit den auf sich von auch wird sie ich dem",
        "French": "le les et des est une dans que pour qui pas sur il vous sont avec du je",
        "Spanish": "el los y las es por una con para del se su lo como pero más está",
        "Italian": "il di che è per un non sono gli della con le da nel questo anche",
        "Portuguese": "o os e do da que não uma em para com é dos mais como você",
        "Dutch": "het een van en dat niet zijn voor met op te aan er ook wordt",
        "Polish": "w i nie na się jest że do to z jak są od czy przez",
        "Turkish": "ve bir bu için ile da de olarak çok daha gibi olan",
    }.items()
}
UNCLEAR = "unclear"
LANGUAGES = (UNCLEAR, *_FUNCTION_WORDS, *_SCRIPTS)


def language_of(text: str, longest: int = 1000) -> str:
    """One of LANGUAGES, by script and, in Latin script, by function words, from the first ``longest`` characters;
    "unclear" for text that is short, mixed or of another language."""
    text = text[:longest]
    if not text.isascii():
        counts = {name: len(pattern.findall(text)) for name, pattern in _SCRIPT_PATTERNS.items()}
        if counts["Japanese"]:  # it is written with Chinese characters too
            counts["Japanese"] += counts.pop("Chinese")
        best = max(counts, key=lambda name: counts[name])
        if counts[best] > len(_LATIN.findall(text)):
            return best
    words = text.lower().split()
    if len(words) < 8:
        return UNCLEAR
    distinct = {word.strip(_MARKS) for word in words}
    votes = {name: len(distinct & known) for name, known in _FUNCTION_WORDS.items()}
    first, second = sorted(votes, key=lambda name: votes[name], reverse=True)[:2]
    return first if votes[first] >= votes[second] + 2 else UNCLEAR
