"""Variational autoencoders of images, each trained on what the decoder before it makes of fresh noise.

The paper masks the reconstruction term of the ELBO where p(x | z) exceeds gamma, and says neither of what p is nor
how a density compares with 0.8. Both readings are here:

    per pixel: p = x xhat + (1 - x)(1 - xhat), the probability of the pixel as the decoder sees it; drop p > gamma;
    per image: drop the share 1 - gamma of each batch's images with the highest log p(x | z) ("dynamic").

Pixels are grey, so a pixel's term is no cross-entropy of a category, and it is plain PyTorch here.
Generation 0 is trained on real images, each later one from scratch on mean images of the last decoder, whose noise is
drawn anew for every batch.
"""

import functools
import gzip
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from scipy.linalg import sqrtm
from sklearn.datasets import load_digits
from sklearn.decomposition import PCA
from sklearn.linear_model import LogisticRegression
from torch import Tensor, nn

from .. import report
from .engine import Experiment, Run

FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")  # of Debian's package dataset-fashion-mnist
ARMS = {
    "ELBO": (None, 1.0),
    "per pixel 0.8": ("pixel", 0.8),
    "per pixel 0.9": ("pixel", 0.9),
    "per image 0.8": ("image", 0.8),
}
SAMPLES = 2000  # generated images that are looked at


class Images(NamedTuple):
    pixels: Tensor  # (n, D) in [0, 1]
    components: PCA
    classifier: LogisticRegression
    mean: np.ndarray  # of the real images' components, and their covariance
    covariance: np.ndarray


def runs(quick: bool, seeds: int) -> list[Run]:
    datasets = ["digits"]
    if not quick and FASHION_MNIST.exists():
        datasets.append("Fashion-MNIST")
    config = dict(latent=10, width=128, epochs=30 if quick else 80, batch=64)
    large = dict(latent=20, width=256, epochs=10, batch=128)
    return [
        Run(
            "vae", data, arm, seed, 4 if quick else 11,
            config if data == "digits" else large, dict(reading=reading, gamma=gamma),
        )
        for data in datasets
        for arm, (reading, gamma) in ARMS.items()
        for seed in range(seeds)
    ]  # fmt: skip


@functools.cache
def load(name: str) -> Images:
    """All 1,797 digits of 8 x 8 pixels, or the first 10,000 images of Fashion-MNIST."""
    if name == "digits":
        pixels, labels = load_digits(return_X_y=True)
        pixels = pixels / 16
    else:
        pixels = _idx(FASHION_MNIST / "train-images-idx3-ubyte.gz", 16)[: 10_000 * 784].reshape(-1, 784) / 255
        labels = _idx(FASHION_MNIST / "train-labels-idx1-ubyte.gz", 8)[:10_000]
    components = PCA(32, random_state=0).fit(pixels)
    features = components.transform(pixels)
    return Images(
        pixels=torch.tensor(pixels, dtype=torch.float32),
        components=components,
        classifier=LogisticRegression(max_iter=2000).fit(features, labels),
        mean=features.mean(0),
        covariance=np.cov(features.T),
    )


def _idx(path: Path, header: int) -> np.ndarray:
    with gzip.open(path) as file:
        return np.frombuffer(file.read(), np.uint8, offset=header)


class Autoencoder(nn.Module):
    def __init__(self, pixels: int, width: int, latent: int):
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(pixels, width), nn.ReLU(), nn.Linear(width, 2 * latent))
        self.decoder = nn.Sequential(nn.Linear(latent, width), nn.ReLU(), nn.Linear(width, pixels))


def begin(run: Run, shared: Path) -> dict:
    return dict(decoder=None, first_encoder=None)


def advance(run: Run, state: dict, generation: int) -> tuple[dict, dict]:
    images, config = load(run.setting), run.config
    random = torch.Generator().manual_seed(1000 * run.seed + generation)
    torch.manual_seed(1000 * run.seed + generation)
    device = report.default_device()

    def autoencoder() -> Autoencoder:
        return Autoencoder(images.pixels.shape[1], config["width"], config["latent"]).to(device)

    def noise(n: int) -> Tensor:
        return torch.randn(n, config["latent"], generator=random).to(device)

    model = autoencoder()
    source = None
    if generation:
        source = autoencoder()
        source.decoder.load_state_dict(state["decoder"])
    optimizer = torch.optim.Adam(model.parameters(), 1e-3, weight_decay=1e-5, fused=True)
    pixels = images.pixels.to(device)
    for _ in range(config["epochs"]):
        kept = []
        for rows in torch.randperm(len(pixels), generator=random).to(device).split(config["batch"]):
            with torch.no_grad():
                x = source.decoder(noise(len(rows))).sigmoid() if source else pixels[rows]
            mean, log_variance = model.encoder(x).chunk(2, -1)
            z = mean + noise(len(rows)) * (log_variance / 2).exp()
            reconstruction, mask = _reconstruction(model.decoder(z), x, run.options["reading"], run.options["gamma"])
            divergence = (mean.square() + log_variance.exp() - 1 - log_variance).sum(-1) / 2
            loss = (reconstruction + divergence).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            kept.append(mask)
    state = state | dict(decoder=model.decoder.state_dict())
    if generation == 0:
        state["first_encoder"] = model.encoder.state_dict()
    model.encoder.load_state_dict(state["first_encoder"])
    with torch.no_grad():
        generated = model.decoder(noise(SAMPLES)).sigmoid()
        spread = model.encoder(generated).chunk(2, -1)[0].std(0).mean()
    figures = dict(
        position=generation,
        masked=1 - torch.cat(kept).double().mean().item(),
        first_encoder_spread=spread.item(),
        **_appearance(generated.cpu().numpy(), images),
    )
    return state, figures


def _reconstruction(logits: Tensor, x: Tensor, reading: str | None, gamma: float) -> tuple[Tensor, Tensor]:
    """Binary cross-entropy of each image (n,), summed over what is kept; and what is, (n, pixels) or (n,)."""
    per_pixel = F.binary_cross_entropy_with_logits(logits, x, reduction="none")
    if reading == "pixel":
        seen = logits.detach().sigmoid()
        kept = x * seen + (1 - x) * (1 - seen) <= gamma
        return torch.where(kept, per_pixel, 0).sum(-1), kept
    per_image = per_pixel.sum(-1)
    if reading is None:
        return per_image, torch.ones_like(per_image, dtype=torch.bool)
    kept = per_image.detach() >= per_image.detach().quantile(1 - gamma)
    return torch.where(kept, per_image, 0), kept


def _appearance(generated: np.ndarray, images: Images) -> dict:
    """How far generated images are from real ones in 32 principal components, and which classes they show."""
    features = images.components.transform(generated)
    covariance = np.cov(features.T)
    root = sqrtm(images.covariance @ covariance).real
    frechet = np.square(features.mean(0) - images.mean).sum() + np.trace(images.covariance + covariance - 2 * root)
    classes = np.bincount(images.classifier.predict(features), minlength=len(images.classifier.classes_))
    shares = classes[classes > 0] / classes.sum()
    return dict(frechet=frechet, class_entropy=-(shares * np.log(shares)).sum(), brightness=generated.mean())


EXPERIMENT = Experiment(begin, advance)
