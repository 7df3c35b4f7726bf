"""What looks like a credential: refused where it would be written down, and never repeated in a message."""

from __future__ import annotations

import re

# Tokens of model hubs and providers by their usual prefixes, and the password of a URL.
_CREDENTIAL = re.compile(
    r"\b(?:hf_|sk-|gh[opsu]_|github_pat_|glpat-|xox[abp]-|AKIA)[\w-]{16,}|(?<=://)[^/\s@]+:[^/\s@]+(?=@)"
)


def has_credential(text: str) -> bool:
    return _CREDENTIAL.search(text) is not None


def redact(text: str) -> str:
    """The text with stars for every credential in it."""
    return _CREDENTIAL.sub("***", text)
