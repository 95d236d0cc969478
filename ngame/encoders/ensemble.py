"""Several encoders side by side: what one gets wrong, the others may not."""

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F

from ngame.data.tokens import Tokens
from ngame.encoders.bag import BagEncoder
from ngame.encoders.base import Encoder


class Ensemble(Encoder):
    """Bag encoders of one tokenizer, whose unit vectors are joined to one vector.

    So a cosine is the mean of those by the members. They differ in their initial weights, and stay
    different because training gives each a loss of its own.

    Parameters
    ----------
    members : sequence of BagEncoder
        Of equal width and with the same tokenizer.
    """

    def __init__(self, members: Sequence[BagEncoder]) -> None:
        super().__init__()
        self.members = torch.nn.ModuleList(members)
        self.dim = sum(member.dim for member in members)

    @classmethod
    def of(cls, first: BagEncoder, texts: Sequence[str], count: int, seed: int = 0) -> "Ensemble":
        """An untrained encoder, and more with other initial weights, `count` in all.

        `texts` are those that it was fitted on.
        """
        tokens = first.tokenize(texts)
        members = [first]
        for member in range(1, count):
            seeds = np.random.SeedSequence(seed, spawn_key=(member,))
            members.append(copy.deepcopy(first))
            members[-1].initialize(tokens, int(seeds.generate_state(1)[0]))
        return cls(members)

    @property
    def tokenizer(self) -> Any:
        """That of all members."""
        return self.members[0].tokenizer

    def tokenize(self, texts: Sequence[str]) -> Tokens:
        """Texts to token ids, as `BagEncoder.tokenize`."""
        return cast(BagEncoder, self.members[0]).tokenize(texts)

    def forward(self, tokens: Tokens) -> torch.Tensor:
        """Tokens of n texts to vectors of shape [n, dim]."""
        return _joined([member(tokens) for member in self.members])

    def padded(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """The vectors of `forward`, for padded texts, as `BagEncoder.padded`."""
        return _joined([cast(BagEncoder, member).padded(ids, mask) for member in self.members])

    def save(self, folder: Path) -> None:
        """Write each member into a folder named by its number, as `BagEncoder.save`."""
        for number, member in enumerate(self.members):
            cast(BagEncoder, member).save(folder / str(number))

    @classmethod
    def load(cls, folder: Path) -> "Ensemble":
        """Read what `save` wrote."""
        numbers = sorted(int(path.name) for path in folder.iterdir() if path.name.isdigit())
        return cls([BagEncoder.load(folder / str(number)) for number in numbers])


def split(encoder: torch.nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    """An ensemble's vectors as the unit vectors of its members; of any other encoder x itself."""
    if not isinstance(encoder, Ensemble):
        return [x]
    return [F.normalize(part, dim=1) for part in x.chunk(len(encoder.members), dim=1)]


def _joined(parts: Sequence[torch.Tensor]) -> torch.Tensor:
    return torch.cat([F.normalize(part, dim=1) for part in parts], dim=1)
