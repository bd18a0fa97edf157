"""Diffusion language models: architectures, tokenizers, loading and saving."""
