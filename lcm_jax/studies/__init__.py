"""Studies: grids of runs that differ in a few settings, and what they show side by side."""
