"""From prompts to pixels: inputs, the pure function that generates images, checks of arguments and of results."""
