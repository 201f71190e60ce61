"""The small model that comes with the package: 1.9 million parameters, trained by examples/recipe.py.

It tells simple stories, adds and subtracts numbers below 100 ("Q: What is 48 plus 76?\\nA:"), and repeats what it has
read. Its texts: stories in the public domain, and an excerpt of TinyStories (CDLA-Sharing-1.0).
"""

from __future__ import annotations

from pathlib import Path


def path() -> Path:
    """Its folder, in Hugging Face's layout, with its tokenizer."""
    return Path(__file__).parent
