"""Scores of models on the same inputs, their statistics, and reports and figures of them."""
