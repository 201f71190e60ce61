"""The small model that comes with the package: a million parameters, trained on public-domain books."""

from __future__ import annotations

from pathlib import Path


def path() -> Path:
    """Its folder, in Hugging Face's layout, with its tokenizer."""
    return Path(__file__).parent
