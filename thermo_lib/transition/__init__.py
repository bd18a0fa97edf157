"""Training of quantization parameters for path KL and for the outputs of layers and blocks."""
