"""Whatever touches the disk: whole or not at all."""
