"""Sparse attention for video diffusion transformers in Diffusers."""
