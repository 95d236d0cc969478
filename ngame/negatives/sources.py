"""Where negatives come from. Every source offers vectors together with the ids of what they are."""

import copy
import math
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import chain
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch.nn.parallel import DataParallel, DistributedDataParallel

from ngame.arrays import as_count, as_ids, refuse_class
from ngame.negatives.schedule import Number, value_at
from ngame.transfer import sent

EMPTY = -1
"""Id of a place that holds nothing: always left out. Pads lists of unequal length."""
ANONYMOUS = -2
"""Id of something without an id, such as a generated text: no filter by id applies to it."""

Ids = npt.NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Candidates:
    """What a source offers a batch: vectors, and the ids of what they are vectors of.

    The ids let every filter act on every source, and keep a queue's older copy of a row's own
    positive from being its negative. A source is whatever makes one of these: the batch itself, a
    draw, a queue, lists of mined negatives, a generator, or the point itself as its own negative
    (SimKGC: ids [b, 1], vectors [b, 1, d]).

    Parameters
    ----------
    ids : integer array of shape [c], shared by all rows of the batch; or [b, c], each row's own
        -1 (`EMPTY`) marks a place that holds nothing, -2 (`ANONYMOUS`) a thing without an id.
    vectors : float tensor of shape [c, d] or [b, c, d]
        Scores are dot products: give vectors of unit length for cosines.
    weight : float
        Multiplies the logits (SimKGC multiplies those of earlier batches by 0.5).
    shift : float tensor of shape [c] or [b, c], optional
        Is added to the logits: the log-q correction of a draw, ``-Drawn.log_q``.
    rows : integer array of shape [c], optional
        Of mined negatives that all rows share: the row of the batch that each was mined for.

    Raises
    ------
    ValueError
        The shapes do not agree.
    """

    ids: Ids
    vectors: torch.Tensor
    weight: float = 1.0
    shift: torch.Tensor | None = None
    rows: Ids | None = None

    def __post_init__(self) -> None:
        given: Any = self.ids
        given = given.cpu().numpy() if isinstance(given, torch.Tensor) else np.asarray(given)
        ids = as_ids(given.reshape(-1), "ids").reshape(given.shape)
        object.__setattr__(self, "ids", ids)
        if ids.ndim not in (1, 2) or ids.shape != tuple(self.vectors.shape[:-1]):
            raise ValueError(
                f"ids has shape {ids.shape}, vectors {tuple(self.vectors.shape)}, "
                "expected [c] and [c, d], or [b, c] and [b, c, d]"
            )
        if self.shift is not None and tuple(self.shift.shape) != ids.shape:
            raise ValueError(f"shift has shape {tuple(self.shift.shape)}, ids {ids.shape}")
        if self.rows is not None and (ids.ndim == 2 or np.shape(self.rows) != ids.shape):
            raise ValueError(f"rows has shape {np.shape(self.rows)}, ids {ids.shape}")

    def __len__(self) -> int:
        """How many each row is offered."""
        return int(self.ids.shape[-1])

    @property
    def shared(self) -> bool:
        """Whether all rows of the batch are offered the same."""
        return self.ids.ndim == 1

    def take(self, rows: slice) -> "Candidates":
        """What these rows of the batch are offered."""
        if self.shared:
            return self
        shift = None if self.shift is None else self.shift[rows]
        return Candidates(self.ids[rows], self.vectors[rows], self.weight, shift)

    def scores(self, anchors: torch.Tensor) -> torch.Tensor:
        """Dot products with the rows of the batch, float [b, d] to [b, c]."""
        if self.shared:
            return anchors @ self.vectors.T
        return torch.einsum("bd,bcd->bc", anchors, self.vectors)

    def mined_for(self, rows: Ids) -> npt.NDArray[np.bool_]:
        """Which were mined for each of these rows of the batch, bool [b, c] or [b, 1]."""
        if self.rows is None:
            return np.full((len(rows), 1), not self.shared)
        return np.asarray(self.rows == rows[:, None])


class Drawn(NamedTuple):
    """Ids of a draw, ascending and distinct, int64 [m]; how probable each was, float32 [m]."""

    ids: Ids
    log_q: npt.NDArray[np.float32]


class SharedRandom:
    """Ids drawn at random each step, whose items all rows of the batch share as negatives.

    They are encoded with the gradient, once a step, beside the batch's own labels (see
    `batch_labels`). Vectors kept from earlier steps do not replace them: labels that are only
    pushed away by stale copies, or not at all, drift.

    A draw is a function of the seed and the step, and of nothing drawn before: a run that is
    resumed at a step goes on with the same draws.

    Parameters
    ----------
    count : int
        Ids are from 0 to count - 1.
    m : int or Schedule
        Ids a step; all of them where there are fewer.
    weights : float array of shape [count], optional
        How often an id is drawn relative to the others, such as ``frequencies ** 0.75``; all
        alike if not given.
    reuse : int
        Steps that share one draw.
    seed : int

    Raises
    ------
    ValueError
        A number is out of range; a weight is negative, infinite or NaN, or none is positive.

    Examples
    --------
    >>> draw = SharedRandom(1000, 4, reuse=2).draw
    >>> len(draw(0).ids), (draw(0).ids == draw(1).ids).all(), (draw(1).ids == draw(2).ids).all()
    (4, np.True_, np.False_)
    """

    def __init__(
        self,
        count: int,
        m: Number,
        *,
        weights: npt.ArrayLike | None = None,
        reuse: int = 1,
        seed: int = 0,
    ) -> None:
        self._count = as_count(count, "count")
        self._reuse = as_count(reuse, "reuse")
        self._seed = as_count(seed, "seed", 0, math.inf)
        self._m = m
        if not value_at(m, 0) >= 0:
            raise ValueError(f"m is {m}, expected at least 0")
        self._sums: npt.NDArray[np.float64] | None = None
        if weights is not None:
            shares = np.asarray(weights, np.float64)
            if shares.shape != (self._count,):
                raise ValueError(f"weights has shape {shares.shape}, expected ({self._count},)")
            if not (np.isfinite(shares).all() and (shares >= 0).all() and shares.any()):
                raise ValueError("weights has a negative or infinite value or NaN, or no positive")
            self._shares = shares / shares.sum()
            self._sums = np.cumsum(self._shares)
            self._possible = int(np.count_nonzero(shares))

    def draw(self, step: int) -> Drawn:
        """The ids of a step, and the logarithm of the probability that each is in a draw.

        Uniform draws are without replacement. With weights, ids are drawn one by one until m
        different ones are there, T draws in all; an id of share p is then there with probability
        ``1 - (1 - p) ** T``, about m p where that is small. Subtracted from the logits, `log_q`
        makes the sum over the draw an estimate of the sum over all (sampled softmax; Bengio and
        Senecal, 2008); it belongs to those of the draw that the batch did not bring along anyway.
        """
        step -= step % self._reuse
        rng = np.random.default_rng(np.random.SeedSequence(self._seed, spawn_key=(step,)))
        m = int(value_at(self._m, step))
        if self._sums is None:
            m = min(m, self._count)
            ids = np.sort(rng.choice(self._count, m, replace=False, shuffle=False))
            return Drawn(
                ids.astype(np.int64), np.full(m, np.log(max(m, 1) / self._count), np.float32)
            )
        m = min(m, self._possible)
        if m == self._possible:
            return Drawn(np.flatnonzero(self._shares), np.zeros(m, np.float32))
        drawn = np.empty(0, np.int64)
        while True:
            places = rng.random(m) * self._sums[-1]
            drawn = np.append(drawn, np.searchsorted(self._sums, places, side="right"))
            first = np.sort(np.unique(drawn, return_index=True)[1])
            if len(first) >= m:
                break
        first = first[:m]
        ids = np.sort(drawn[first])
        tries = int(first[-1]) + 1 if m else 0
        log_q = np.log(-np.expm1(tries * np.log1p(-self._shares[ids])))
        return Drawn(ids, log_q.astype(np.float32))


class NegativeQueue:
    """The vectors of the last steps, first in, first out, each with its id (MoCo, CVPR 2020).

    It starts empty, and takes batches of any size. Its vectors have no gradient and age: let an
    `EmaEncoder` make them, or keep the queue to a step or two (pre-batch negatives of SimKGC:
    ``queue.offer(weight=0.5)``). Push after the loss of the step.

    Parameters
    ----------
    capacity : int
        Vectors it holds at most.
    dim : int
        Width of the vectors; an attribute, too.
    device : torch.device or str

    Examples
    --------
    >>> queue = NegativeQueue(3, 2)
    >>> queue.push([7, 8], torch.eye(2))
    >>> queue.push([9, 7], torch.ones(2, 2))
    >>> queue.offer().ids.tolist()
    [8, 9, 7]
    """

    def __init__(self, capacity: int, dim: int, *, device: torch.device | str = "cpu") -> None:
        self.dim = as_count(dim, "dim")
        self._ids = np.full(as_count(capacity, "capacity"), EMPTY, np.int64)
        self._vectors = torch.zeros(capacity, self.dim, device=device)
        self._pushed = 0

    def __len__(self) -> int:
        """Number of vectors it holds."""
        return min(self._pushed, len(self._ids))

    def push(self, ids: Any, vectors: torch.Tensor) -> None:
        """Add vectors, int [m] and float [m, d]; the oldest make room.

        Raises
        ------
        ValueError
            The shapes do not agree.
        """
        ids = as_ids(ids.cpu().numpy() if isinstance(ids, torch.Tensor) else ids, "ids")
        expected = (len(ids), self._vectors.shape[1])
        if tuple(vectors.shape) != expected:
            raise ValueError(f"vectors has shape {tuple(vectors.shape)}, expected {expected}")
        last = len(self._ids)
        skipped = max(len(ids) - last, 0)
        places = (self._pushed + skipped + np.arange(len(ids) - skipped)) % last
        self._ids[places] = ids[skipped:]
        own = self._vectors
        own.index_copy_(0, self._sent(places), vectors.detach()[skipped:].to(own))
        self._pushed += len(ids)

    def offer(self, *, weight: float = 1.0) -> Candidates:
        """All that it holds, the oldest first; a later push does not change what was offered."""
        order = (self._pushed - len(self) + np.arange(len(self))) % len(self._ids)
        return Candidates(self._ids[order], self._vectors[self._sent(order)], weight)

    def _sent(self, places: Ids) -> torch.Tensor:
        """Places, where the vectors are: a GPU would be waited for to index by those of a host."""
        return sent(torch.from_numpy(places), self._vectors.device)

    def state_dict(self) -> dict[str, Any]:
        """What a restart needs: copies of `ids` and `vectors`, and `pushed`.

        The copies are tensors, so that plain ``torch.load`` reads them.
        """
        return {
            "ids": torch.tensor(self._ids),
            "vectors": self._vectors.clone(),
            "pushed": self._pushed,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what `state_dict` gave, as tensors or arrays.

        Raises
        ------
        ValueError
            A key is missing, or the state is that of another capacity or width.
        """
        for name, here in self.state_dict().items():
            if name not in state:
                raise ValueError(f"state lacks {name}")
            if np.shape(state[name]) != np.shape(here):
                raise ValueError(
                    f"state has {name} of shape {tuple(np.shape(state[name]))}, "
                    f"this queue {tuple(np.shape(here))}"
                )
        self._ids[:] = torch.as_tensor(state["ids"]).cpu().numpy()
        self._vectors.copy_(torch.as_tensor(state["vectors"]))
        self._pushed = int(state["pushed"])


class EmaEncoder(torch.nn.Module):
    """A copy of an encoder that follows it slowly: the key encoder of MoCo (CVPR 2020).

    Its parameters become ``momentum * own + (1 - momentum) * the encoder's`` at every `update`,
    and have no gradient; buffers are copied. It is in evaluation mode, unless you change that.

    Parameters
    ----------
    encoder : torch.nn.Module
        Copied as it is now.
    momentum : float or Schedule, from 0 to 1

    Raises
    ------
    TypeError
        `encoder` is no module, such as a function.
    ValueError
        The momentum is out of range.
    """

    def __init__(self, encoder: torch.nn.Module, momentum: Number = 0.999) -> None:
        super().__init__()
        _check_module(encoder)
        if not 0 <= value_at(momentum, 0) <= 1:
            raise ValueError(f"momentum is {momentum}, expected from 0 to 1")
        self.encoder = copy.deepcopy(encoder).requires_grad_(False).eval()
        self.momentum = momentum

    @torch.no_grad()
    def update(self, encoder: torch.nn.Module, step: int = 0) -> None:
        """Follow the encoder by one step; call it after each update of its parameters.

        It may be wrapped: in `DataParallel`, `DistributedDataParallel`, by `torch.compile`.

        Raises
        ------
        TypeError
            The encoder is no module.
        ValueError
            The encoder is another than the one that was copied, by its names or shapes; nothing
            was changed.
        """
        _check_module(encoder)
        momentum = value_at(self.momentum, step)
        own, theirs = _tensors(self.encoder), _tensors(encoder)
        if missing := own.keys() - theirs.keys():
            raise ValueError(
                f"encoder lacks {', '.join(sorted(missing))}: expected the one that was copied"
            )
        for name, tensor in own.items():
            if tensor.shape != theirs[name].shape:
                raise ValueError(
                    f"{name} of encoder has shape {list(theirs[name].shape)}, the copy's has "
                    f"{list(tensor.shape)}: expected the encoder that was copied"
                )
        for name, tensor in own.items():
            if isinstance(tensor, torch.nn.Parameter):
                tensor.lerp_(theirs[name].to(tensor), 1 - momentum)
            else:
                tensor.copy_(theirs[name])

    @torch.no_grad()
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the copy gives, without a gradient."""
        return self.encoder(*args, **kwargs)


def _check_module(encoder: Any) -> None:
    refuse_class(encoder, "encoder")
    if not isinstance(encoder, torch.nn.Module):
        raise TypeError(f"encoder is a {type(encoder).__name__}, expected a torch.nn.Module")


def _tensors(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Parameters and buffers by the names that they have in the module without its wrappers."""
    while isinstance(
        module := getattr(module, "_orig_mod", module),  # of torch.compile
        (DataParallel, DistributedDataParallel),
    ):
        module = module.module
    named = chain(module.named_parameters(), module.named_buffers())
    return {name.replace("_orig_mod.", ""): tensor for name, tensor in named}  # of its parts
