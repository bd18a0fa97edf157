"""Quantized tensors and layers; nothing here knows of models, states or files."""
