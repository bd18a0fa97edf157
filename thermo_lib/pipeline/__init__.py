"""From a full-precision model to a quantized one: configuration, phases, storage."""
