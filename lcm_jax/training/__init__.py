"""One pure train step, the mesh it runs on, its checkpoints, and the loop that holds every effect."""
