"""GPT-NeoX in NumPy. To read: config.py, model.py (the definition), decode.py (the cache), generate.py (the loop)."""

from neox.reference.checkpoint.load import load
from neox.reference.checkpoint.series import Series, open_series
from neox.reference.config import GPT_NEOX_20B, PYTHIA, Config, parameter_count
from neox.reference.errors import InputError
from neox.reference.generate import CachedDecoder, Request, complete, generate, stream
from neox.reference.heap import keep_freed_memory
from neox.reference.model import Model, forward
from neox.reference.sampling import Sampling
from neox.reference.tokenizer import Tokenizer, load_tokenizer

__all__ = [
    "GPT_NEOX_20B",
    "PYTHIA",
    "CachedDecoder",
    "Config",
    "InputError",
    "Model",
    "Request",
    "Sampling",
    "Series",
    "Tokenizer",
    "complete",
    "forward",
    "generate",
    "load",
    "load_tokenizer",
    "open_series",
    "parameter_count",
    "stream",
]

keep_freed_memory()
