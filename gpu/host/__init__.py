"""The host device: CUDA sources compiled with g++, each CUDA thread a fiber."""
