"""GPT-NeoX in CUDA. To read: kernels/, ops.py (their launchers), model.py, decode.py; device.py is what runs them."""

from neox.gpu.decode import CachedDecoder, SamplingDecoder
from neox.gpu.device import open_device
from neox.gpu.generate import decoder_for, generate, stream
from neox.gpu.load import load, to_device
from neox.gpu.model import Model, forward

__all__ = [
    "CachedDecoder",
    "Model",
    "SamplingDecoder",
    "decoder_for",
    "forward",
    "generate",
    "load",
    "open_device",
    "stream",
    "to_device",
]
