"""A pipeline without a model, for tests of the page: calls wait for a gate, and images depend on the request."""

import hashlib
import threading
import warnings
from types import SimpleNamespace

from PIL import Image


def digest(*parts) -> bytes:
    """Three bytes that depend on all parts."""
    return hashlib.sha256(repr(parts).encode()).digest()[:3]


class FakePipeline:
    """Calls wait for `gate`, and are recorded by their prompts; some prompts fail."""

    name, sampler, dtype = "fake", "lcm", "float32"

    def __init__(self):
        self.gate, self.started, self.prompts = threading.Event(), threading.Event(), []
        self.model = SimpleNamespace(guidance_embedding_dim=256)
        self.lora_weights, self.tokenizers = {"style": 1.0}, []

    def set_lora_weight(self, name, weight):
        self.lora_weights[name] = weight

    def __call__(self, prompt, **arguments):
        self.started.set()
        assert self.gate.wait(20)
        if prompt:  # the warm-up has none
            self.prompts.append(prompt)
        if prompt == "warn":
            warnings.warn("the prompt was cut", stacklevel=2)
        if prompt == "fail":
            raise RuntimeError("a fault of the device\nwith details")
        if prompt == "too much":
            raise RuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 2000000000 bytes.")
        return SimpleNamespace(images=[self.image(prompt, **arguments)] * arguments["num_images_per_prompt"])

    @staticmethod
    def image(prompt, *, seed, num_inference_steps, height, width, strength=1.0, image=None, **_):
        """One color, by all that an image depends on."""
        start = None if image is None else image.tobytes()
        return Image.new("RGB", (width, height), tuple(digest(prompt, seed, num_inference_steps, strength, start)))
