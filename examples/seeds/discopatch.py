"""DisCoPatch (ICCV 2025, arXiv 2501.08005): a batch's own statistics tell strange images apart.

    python examples/seeds/discopatch.py DATA [SEEDS]

A VAE makes patches, a discriminator tells real ones from those reconstructed and generated. Its
norm takes the mean and variance of 16 patches at a time: those of one image in pure batches, those
of any images in mixed ones. A patch can be less real than those in training, and also more so; an
image is as strange as the mean over its patches is far from usual, while the paper takes the one
side only. The table has the area under the ROC curve, strange images against new ones of the kind
in training; the last row is a Gaussian of fifteen statistics of colours and gradients, untrained.

DATA: a folder with `images64.npz`, uint8 [n, 64, 64, 3] under "train", "test", and one name for
each other kind. Public are, for example, photographs of clothes (the repository
alexeygrigorev/clothing-dataset-small) and of groceries (marcusklasson/GroceryStoreDataset).
"""

import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from common import compare, table
from scipy.ndimage import uniform_filter
from scipy.stats import rankdata
from torch import nn

import ngame

PATCHES, SIDE, BATCH, EPOCHS, LATENT = 16, 16, 256, 2, 32
ARMS = ["pure batches", "mixed batches", "plain statistics"]


def patches(images):
    """The 16 patches of each image, one after the other, float [16 n, 3, 16, 16] from 0 to 1."""
    x = images.reshape(-1, 4, SIDE, 4, SIDE, 3).transpose(0, 1, 3, 5, 2, 4)
    return torch.from_numpy(x.reshape(-1, 3, SIDE, SIDE).astype(np.float32) / 255)


class PatchNorm(nn.Module):
    """Batch norm whose statistics are those of 16 consecutive patches."""

    def __init__(self, channels):
        super().__init__()
        self.weight, self.bias = (
            nn.Parameter(value(channels)) for value in (torch.ones, torch.zeros)
        )

    def forward(self, x):
        groups = x.unflatten(0, (-1, PATCHES)).transpose(1, 2)
        normed = F.instance_norm(groups, weight=self.weight, bias=self.bias)
        return normed.transpose(1, 2).flatten(0, 1)


def discriminator():
    layers = []
    for inner, outer, stride in ((3, 16, 2), (16, 32, 2), (32, 32, 1)):
        layers += [nn.Conv2d(inner, outer, 3, stride, 1), PatchNorm(outer), nn.LeakyReLU(0.2)]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(32 * 16, 1), nn.Flatten(0))


class Vae(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder = nn.Sequential(
            *(nn.Conv2d(3, 16, 4, 2, 1), nn.LeakyReLU(0.2)),
            *(nn.Conv2d(16, 32, 4, 2, 1), nn.LeakyReLU(0.2)),
            *(nn.Flatten(), nn.Linear(32 * 16, 2 * LATENT)),
        )
        self.decoder = nn.Sequential(
            *(nn.Linear(LATENT, 32 * 16), nn.Unflatten(1, (32, 4, 4)), nn.LeakyReLU(0.2)),
            *(nn.ConvTranspose2d(32, 16, 4, 2, 1), nn.LeakyReLU(0.2)),
            *(nn.ConvTranspose2d(16, 3, 4, 2, 1), nn.Sigmoid()),
        )

    def forward(self, x):
        """Reconstructed patches, generated ones, and the divergence of the codes."""
        mean, log_variance = self.encoder(x).chunk(2, dim=1)
        codes = mean + torch.randn_like(mean) * (log_variance / 2).exp()
        divergence = -(1 + log_variance - mean**2 - log_variance.exp()).sum(1).mean() / 2
        return self.decoder(codes), self.decoder(torch.randn_like(mean)), divergence


def train(images, pure, seed):
    torch.manual_seed(seed)
    x = patches(images)
    if pure:
        image = np.arange(len(x)) // PATCHES
        batches = ngame.GroupBatchSampler(image, BATCH, per_group=PATCHES, seed=seed)
    else:
        batches = ngame.ClusterBatchSampler(
            len(x), BATCH, cluster_size=1, drop_last=True, seed=seed
        )
    judge, vae = discriminator(), Vae()
    updates = [torch.optim.Adam(model.parameters(), 1e-3) for model in (judge, vae)]
    says = F.binary_cross_entropy_with_logits
    for epoch in range(EPOCHS):
        batches.set_epoch(epoch)
        for rows in batches:
            real = x[rows]
            rebuilt, generated, divergence = vae(real)
            fooled = sum(says(y, torch.ones_like(y)) for y in map(judge, (rebuilt, generated)))
            loss = F.mse_loss(rebuilt, real) + 1e-4 * divergence + 1e-3 * fooled
            updates[1].zero_grad()
            loss.backward()
            updates[1].step()
            true, *false = (judge(y) for y in (real, rebuilt.detach(), generated.detach()))
            loss = says(true, torch.ones_like(true)) / 2
            loss = loss + sum(says(y, torch.zeros_like(y)) for y in false) / 4
            updates[0].zero_grad()
            loss.backward()
            updates[0].step()
    return judge


@torch.no_grad()
def realness(judge, images, pure, seed):
    """Of each image, how real its patches are, by the mean of the discriminator's logits."""
    x = patches(images)
    order = torch.arange(len(x))
    if not pure:
        order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
    scores = torch.empty(len(x))
    for rows in order.split(BATCH):
        scores[rows] = judge(x[rows])
    return scores.view(-1, PATCHES).mean(1).numpy()


def statistics(images):
    """Of each colour the mean, the deviation, the mean gradients both ways, and the curvature."""
    x = images.astype(np.float32)
    down, right = np.abs(np.diff(x, axis=1)), np.abs(np.diff(x, axis=2))
    curved = np.abs(np.diff(x, 2, axis=1))
    means = [part.mean((1, 2)) for part in (x, down, right, curved)]
    return np.log1p(np.concatenate([*means, x.std((1, 2))], axis=1))


def distances(train_images, images):
    """Mahalanobis distance of each image's statistics from those in training."""
    known = statistics(train_images)
    away = statistics(images) - known.mean(0)
    return np.einsum("nk,kl,nl->n", away, np.linalg.inv(np.cov(known.T)), away)


def auroc(known, strange):
    ranks = rankdata(np.concatenate([known, strange]))[len(known) :]
    return float(ranks.mean() - (len(strange) + 1) / 2) / len(known)


def kinds(images):
    """Images to tell from the test images: blurred and noisy copies of them, and other kinds."""
    test = images["test"]
    noise = np.random.default_rng(0).normal(0, 10, test.shape)
    yield "blur", uniform_filter(test, (0, 2, 2, 0)).astype(np.uint8)
    yield "noise", (test + noise).round().clip(0, 255).astype(np.uint8)
    for name, others in images.items():
        if others.ndim == 4 and name not in ("train", "test"):
            yield name, others


def run(images, arm, seed):
    found = {}
    pure = arm == "pure batches"
    judge = usual = None
    if arm != "plain statistics":
        judge = train(images["train"], pure, seed)
        usual = realness(judge, images["train"], pure, seed).mean()
    for name, strange in kinds(images):
        both = np.concatenate([images["test"], strange])
        if judge is None:
            scores = distances(images["train"], both)
        else:
            scores = np.abs(realness(judge, both, pure, seed) - usual)
        found[name] = auroc(*np.split(scores, [len(images["test"])]))
    return found


def main(folder, seeds=3, arms=ARMS):
    images = dict(np.load(Path(folder) / "images64.npz"))
    print(table(compare(arms, lambda arm, seed: run(images, arm, seed), seeds)))


if __name__ == "__main__":
    main(sys.argv[1], *map(int, sys.argv[2:]))
