"""What this project measured: the smoothing study, other projects' quantizers, full-size models."""
