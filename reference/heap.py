"""Keeping the memory of freed arrays for the next ones.

The C library hands the memory of a large block back to the system when it is freed, and the next block of that size
is then mapped in again page by page, which costs more than the arithmetic that fills it: prompts would take a third
longer. glibc does so from a size on that it raises to that of the largest block, up to 32 MB, that was ever freed.
"""

import numpy as np


def keep_freed_memory() -> None:
    """Allocate and free a block just below glibc's bound; untouched, it takes no memory itself."""
    np.empty(30 << 20, np.uint8)
