"""Parameters that depend on the timestep: time groups, smoothing, its score, activation ranges."""
