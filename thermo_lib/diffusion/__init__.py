"""Masked diffusion: sampling, states, a model's inputs, path KL, and training of the reference model."""
