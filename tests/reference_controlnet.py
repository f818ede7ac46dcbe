"""Tiny random ControlNets of diffusers, and images for them."""

import numpy as np
import pytest
import reference_families
from PIL import Image

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

OWN = {"conditioning_embedding_out_channels": (4, 8)}  # two pixels a latent, as the tiny autoencoder
LEFT_OUT = {"sample_size", "up_block_types", "in_channels", "time_cond_proj_dim"}


def build(unet: dict, seed: int = 0, **options):
    """A ControlNetModel for a UNet's config whose last layers, zeros in a new one, are random."""
    torch.manual_seed(seed)
    config = {name: value for name, value in unet.items() if name not in LEFT_OUT}
    return filled(diffusers.ControlNetModel(**config | OWN | options))


def for_unet(unet, folder, seed: int = 0, **options):
    """A ControlNetModel for a UNet2DConditionModel, written to `folder`."""
    torch.manual_seed(seed)
    net = filled(diffusers.ControlNetModel.from_unet(unet, **OWN, load_weights_from_unet=False))
    net.register_to_config(**options)
    net.save_pretrained(folder)
    return net


def filled(net):
    with torch.no_grad():
        for parameter in net.parameters():
            if not parameter.any():
                parameter.normal_(0, 0.3)
    return net.eval()


def image(seed: int = 0, mode: str = "RGB") -> Image.Image:
    """Smooth colors; its size, rounded down to multiples of 2, is SIZE of reference_families."""
    coarse = np.random.default_rng(seed).integers(0, 256, (4, 5, 3), np.uint8)
    return Image.fromarray(coarse).resize((25, 17), Image.Resampling.BICUBIC).convert(mode)


SD1 = reference_families.UNET
XL = reference_families.XL
