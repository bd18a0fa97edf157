"""The workbench: choose how a model is quantized, and see at once what that does (``notebooks/workbench.ipynb``)."""
