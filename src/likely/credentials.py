"""What looks like a credential: refused where it would be written down, and never repeated in a message."""

from __future__ import annotations

import re

# Tokens of model hubs and providers by their usual prefixes, and the password of a URL.
_CREDENTIAL = re.compile(
    r"(?:(?<![A-Za-z0-9])(?:hf_|sk-|gh[opsur]_|github_pat_|glpat-|npm_|pypi-|xox[abp]-|AKIA|AIza))[\w-]{16,}"
    r"|(?<=://)[^/\s@]+(?=@)"
)


def has_credential(text: str) -> bool:
    return _CREDENTIAL.search(text) is not None


def redact(text: str) -> str:
    """The text with stars for every credential in it."""
    return _CREDENTIAL.sub("***", text)
