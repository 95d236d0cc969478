"""Label vectors trained against all labels at once, in bfloat16."""

import torch
import torch.nn.functional as F

from ngame.loss import MASKED, CooIndex
from ngame.ranks import Ranks

# Scores in memory at once: float32, a few copies. On a CPU they stay near its cache: a step is a
# quarter shorter than with as many as on a GPU, where each operation has its price.
_SCORES = 1 << 24
_SCORES_ON_CPU = 1 << 20
# Floats of scores and unit vectors that a step keeps from the sums to the gradient, 128 MB; where
# there are more, they are computed again.
_KEPT = 1 << 25


class AllLabels(torch.nn.Module):
    """A unit vector for every label; each step compares the points of a batch with all of them.

    No negatives are chosen: every label that is not a known positive is one. The loss is
    `ngame.loss.decoupled_softmax` of the cosines. It and its gradient are computed a chunk of
    labels at a time, and the chunk is updated at once, as in Renee (Jain et al., MLSys 2023); so a
    gradient of all vectors is never in memory, nor are the scores of all labels, unless they are
    few. Vectors are bfloat16, rounded up or down at random in proportion, so that small steps are
    not lost (as in ELMO, 2025). Beside them there is one number a label: the sum of its squared
    gradients, by whose root a step is divided (row-wise AdaGrad). In all that is 2 d + 4 bytes a
    label. Several ranks have some of the labels each.

    Parameters
    ----------
    vectors : float tensor of shape [L, d]
        Where to start from, such as the encoder's vectors of the labels: those of this rank.
    temperature : float
        Divides the cosines.
    ranks : Ranks
        The processes among which the labels are dealt.
    """

    vectors: torch.Tensor
    squares: torch.Tensor

    def __init__(
        self, vectors: torch.Tensor, temperature: float = 0.05, ranks: Ranks | None = None
    ) -> None:
        super().__init__()
        self.temperature, self._ranks = temperature, ranks or Ranks()
        self.register_buffer("vectors", F.normalize(vectors.detach().float(), dim=1).bfloat16())
        self.register_buffer("squares", torch.zeros(len(vectors), device=vectors.device))

    def step(
        self, x: torch.Tensor, known: CooIndex, targets: CooIndex, rate: float, seed: int
    ) -> torch.Tensor:
        """Move the vectors for a batch; returns its loss, which has a gradient for `x`.

        Of several ranks each returns its labels' part of the loss and of the gradient.

        Parameters
        ----------
        x : float32 tensor of shape [b, d]
            Unit vectors of points, the same on all ranks.
        known, targets : positions in [b, L]
            Known positives, and those of them to train on, among this rank's labels. If they are on
            a GPU, the step waits for it; if they are on the host, it does not.
        rate : float
            Learning rate: the length of a vector's first step.
        seed : int
            Of the rounding.
        """
        # The temperature is in the points, so that no pass over the scores divides by it.
        points, temperature = x.detach() / self.temperature, self.temperature
        ranks = self._ranks
        most = _SCORES_ON_CPU if x.device.type == "cpu" else _SCORES
        size = max(1, most // max(*points.shape, 1))
        firsts = range(0, max(1, len(self.vectors)), size)
        _, known_in = _by_chunk(known, firsts, x.device)
        targets, targets_in = _by_chunk(targets, firsts, x.device)
        kept: list[tuple[torch.Tensor, torch.Tensor]] = []
        keep = len(self.vectors) * sum(points.shape) <= _KEPT

        def scored(chunk: int) -> tuple[torch.Tensor, torch.Tensor]:
            """Unit vectors of a chunk, and the points' scores, those of known positives masked."""
            first = firsts[chunk]
            unit = F.normalize(self.vectors[first : first + size].float(), dim=1)
            scores = points @ unit.T
            known = known_in[chunk].rows, known_in[chunk].columns
            return unit, scores.index_put_(known, scores.new_full((), MASKED))

        # Of each point, the logarithm of the sum over its negatives; nearly 0 where it has none.
        total = torch.full((len(points),), MASKED, device=points.device)
        for chunk in range(len(firsts)):
            unit, scores = scored(chunk)
            total = torch.logaddexp(total, scores.logsumexp(dim=1))
            if keep:
                kept.append((unit, scores))
        total = ranks.all_rows(total[None], [1] * ranks.size).logsumexp(dim=0)
        own = F.normalize(self.vectors[targets.columns].float(), dim=1)
        excess = total[targets.rows] - (points[targets.rows] * own).sum(dim=1)
        counts = torch.zeros(len(points), device=points.device)
        ranks.sum(counts.index_add_(0, targets.rows, torch.ones_like(excess)))
        weights = 1 / (counts[targets.rows] * torch.count_nonzero(counts))
        loss = (F.softplus(excess) * weights).sum()
        # A target's score rises by `pull`; those of all negatives of its point fall by as much.
        pull = torch.sigmoid(excess) * weights
        push = ranks.sum(torch.zeros_like(total).index_add_(0, targets.rows, pull))
        generator = torch.Generator(points.device).manual_seed(seed)
        gradient = torch.zeros_like(points)
        pulls = torch.split(pull, [len(own.rows) for own in targets_in])
        for chunk, first in enumerate(firsts):
            unit, scores = kept[chunk] if keep else scored(chunk)
            slopes = scores.sub_(total[:, None]).exp_().mul_(push[:, None])
            ranked = targets_in[chunk].rows, targets_in[chunk].columns
            slopes.index_put_(ranked, -pulls[chunk], accumulate=True)
            gradient += slopes @ unit
            squares = self.squares[first : first + size]
            moved = _step(unit, slopes.T @ points, squares, rate)
            self.vectors[first : first + size] = _rounded(moved, generator)
        # Autograd sees the product of `x` and its gradient; the value is the loss.
        product = (x * gradient).sum() / temperature
        return loss + (product - product.detach())


def _by_chunk(
    index: CooIndex, firsts: range, device: torch.device
) -> tuple[CooIndex, list[CooIndex]]:
    """The positions by column, on a device, and those in every chunk, counted from its first."""
    order = index.columns.argsort(stable=True)
    rows, columns = index.rows[order], index.columns[order]
    ends = [len(columns)]
    if len(firsts) > 1:
        bounds = torch.tensor(firsts[1:], device=columns.device)
        ends = [*torch.searchsorted(columns, bounds).tolist(), *ends]
    whole = CooIndex(rows, columns, index.shape).to(device)
    begins = [0, *ends[:-1]]
    return whole, [
        CooIndex(whole.rows[begin:end], whole.columns[begin:end] - first)
        for first, begin, end in zip(firsts, begins, ends, strict=True)
    ]


def _step(
    unit: torch.Tensor, gradient: torch.Tensor, squares: torch.Tensor, rate: float
) -> torch.Tensor:
    """Unit vectors after a step along the sphere; adds to `squares`."""
    gradient -= (gradient * unit).sum(dim=1, keepdim=True) * unit
    squares += gradient.square().sum(dim=1)
    scale = rate / squares.sqrt().clamp_min(1e-30)
    return F.normalize(unit - scale[:, None] * gradient, dim=1)


def _rounded(x: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Float32 to bfloat16, up with the probability that makes the mean right."""
    noise = torch.randint(1 << 16, x.shape, generator=generator, dtype=torch.int32, device=x.device)
    # The lower half of the bits is what bfloat16 lacks.
    return ((x.view(torch.int32) + noise) & -(1 << 16)).view(torch.float32).bfloat16()
