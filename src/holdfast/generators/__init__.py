"""Generators of examples: a GAN, a diffusion model and a VAE for images, and adapters for generators of torch modules
of the user and for pipelines of diffusers.
"""

from holdfast.generators.adapters import GAN, VAE, Diffusers
from holdfast.generators.networks import Diffusion, ImageGAN, ImageVAE

__all__ = ["GAN", "VAE", "Diffusers", "Diffusion", "ImageGAN", "ImageVAE"]
