"""Objectives that a training step minimizes: a paper's algorithm each, in its order, and deterministic in its draws."""
