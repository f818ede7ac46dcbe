"""Metrics of generated images, and reports of them."""
