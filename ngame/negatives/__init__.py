"""What a batch's points are compared with: sources of negatives, filters, and a loss for both.

A sampler decides who meets in a batch. This room decides what else they meet, what is left out, and
what each comparison weighs. Sources offer vectors with the ids of what they are vectors of
(`Candidates`): the batch itself, labels drawn for all its rows (`SharedRandom`), those of earlier
steps (`NegativeQueue`), mined lists. So every filter acts on every source (`KnownPositives`,
`Guide`, `SelfGuide`, `NearCopies`, which compose by OR), and nothing is compared with its own older
copy. `ContrastiveLoss` takes them in the field's forms; any of its numbers may be a `Schedule`.
Where a score matrix suffices, `batch_labels` and `ngame.loss.decoupled_softmax` do the same.

=================  =============================================================================
what               names
=================  =============================================================================
the loss           `ContrastiveLoss`; `Progressive` weighs its positives; `grad_cache`, for batches
                   larger than memory
labels of a batch  `batch_labels`, which gives `BatchLabels`
what is offered    `Candidates`; the ids `EMPTY` and `ANONYMOUS`
sources            `SharedRandom`, which gives `Drawn`; `NegativeQueue`; `EmaEncoder`; `HardMixer`
filters            `KnownPositives`, `Guide`, `SelfGuide`, `NearCopies`; one of your own is a
                   `Filter`, which gets a `Comparison`
numbers            `Schedule`; `Number` is that or a float; `value_at`
=================  =============================================================================

A step of your own loop: labels drawn at random join those of the batch.

>>> import numpy as np, scipy.sparse as sp, torch
>>> from ngame.negatives import Candidates, ContrastiveLoss, KnownPositives, SharedRandom
>>> from ngame.negatives import batch_labels
>>> labels = sp.csr_matrix(np.eye(100, dtype=np.float32))  # known positives, points by labels
>>> points, texts = torch.nn.Embedding(100, 16), torch.nn.Embedding(100, 16)  # two encoders
>>> drawn = SharedRandom(100, 30, seed=0)
>>> loss = ContrastiveLoss(temperature=0.05, filters=[KnownPositives(labels)])
>>> step, rows = 0, np.array([3, 14, 15])
>>> pool, _, targets = batch_labels(labels, rows, shared=drawn.draw(step).ids)
>>> x, z = (torch.nn.functional.normalize(encoder(torch.from_numpy(ids).long()), dim=1)
...         for encoder, ids in ((points, rows), (texts, pool)))
>>> loss(Candidates(rows, x), Candidates(pool, z), targets, step=step).backward()
>>> len(pool), loss.masked_shares  # beyond each row's own positive, nothing is known
(33, [0.0])
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from ngame.negatives.schedule import Number as Number
from ngame.negatives.schedule import Schedule as Schedule
from ngame.negatives.schedule import value_at as value_at

if TYPE_CHECKING:
    from ngame.negatives.cache import grad_cache as grad_cache
    from ngame.negatives.contrastive import ContrastiveLoss as ContrastiveLoss
    from ngame.negatives.contrastive import Progressive as Progressive
    from ngame.negatives.filters import Comparison as Comparison
    from ngame.negatives.filters import Filter as Filter
    from ngame.negatives.filters import Guide as Guide
    from ngame.negatives.filters import KnownPositives as KnownPositives
    from ngame.negatives.filters import NearCopies as NearCopies
    from ngame.negatives.filters import SelfGuide as SelfGuide
    from ngame.negatives.mixing import HardMixer as HardMixer
    from ngame.negatives.pool import BatchLabels as BatchLabels
    from ngame.negatives.pool import batch_labels as batch_labels
    from ngame.negatives.sources import ANONYMOUS as ANONYMOUS
    from ngame.negatives.sources import EMPTY as EMPTY
    from ngame.negatives.sources import Candidates as Candidates
    from ngame.negatives.sources import Drawn as Drawn
    from ngame.negatives.sources import EmaEncoder as EmaEncoder
    from ngame.negatives.sources import NegativeQueue as NegativeQueue
    from ngame.negatives.sources import SharedRandom as SharedRandom

# Imported when first asked for: a schedule needs no torch.
_LAZY = {
    "ANONYMOUS": "sources",
    "BatchLabels": "pool",
    "Candidates": "sources",
    "Comparison": "filters",
    "ContrastiveLoss": "contrastive",
    "Drawn": "sources",
    "EMPTY": "sources",
    "EmaEncoder": "sources",
    "Filter": "filters",
    "Guide": "filters",
    "HardMixer": "mixing",
    "KnownPositives": "filters",
    "NearCopies": "filters",
    "NegativeQueue": "sources",
    "Progressive": "contrastive",
    "SelfGuide": "filters",
    "SharedRandom": "sources",
    "batch_labels": "pool",
    "grad_cache": "cache",
}

__all__ = sorted([*_LAZY, "Number", "Schedule", "value_at"])


def __dir__() -> list[str]:
    return sorted({*filter(lambda name: name.startswith("__"), globals()), *__all__})


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'ngame.negatives' has no attribute {name!r}")
    value = getattr(import_module(f"ngame.negatives.{_LAZY[name]}"), name)
    globals()[name] = value
    return value
