"""The models in other libraries: transformers and lm-evaluation-harness."""
