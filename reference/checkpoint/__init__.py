"""Checkpoints: which tensors a model has (tensors.py), and one file for each layout they are stored in."""
