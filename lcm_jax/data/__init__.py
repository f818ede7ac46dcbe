"""Captioned images from their sources to batches: records, tokens, cached latents, masks, and their order."""
