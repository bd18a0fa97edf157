"""The corpus of code and the planning tasks."""
