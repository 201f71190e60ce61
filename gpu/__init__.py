"""GPT-NeoX in CUDA. So far: the device seam (device.py) and the first kernels (ops.py, kernels/)."""
