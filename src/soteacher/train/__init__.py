"""Training: the loop, its settings, its state on disk. Knows no method, data set or architecture by name."""
