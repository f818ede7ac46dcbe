"""Profiles of the device: a trace beside the programs that ran in it, and the work of each of their operations."""
