"""Batches larger than the memory that their gradients would need."""

import contextlib
from collections.abc import Callable, Iterator, Sequence

import torch

Encode = Callable[[], torch.Tensor]


def grad_cache(
    loss: Callable[..., torch.Tensor], *columns: Sequence[Encode], scale: float = 1.0
) -> torch.Tensor:
    """Backward pass of a batch that is encoded in chunks (GradCache, Gao et al., 2021).

    Every chunk is encoded without gradients; the loss of all vectors gives each vector's gradient;
    and every chunk is encoded again, with gradients and the random numbers of the first time
    (dropout, ...), to carry it on. The gradients are those of the whole batch, to the rounding, in
    the memory of a chunk, for one more forward pass. What the first pass leaves in a module other
    than gradients, such as the running means of a batch norm, it leaves twice.

    Where the [b, c] scores are too large as well, give the loss its `rows_at_once`.

    Parameters
    ----------
    loss : callable
        Gets one tensor [n, d] a column, in their order, and gives a scalar. Its own parameters get
        their gradients, too.
    columns : sequences of callables
        A column's chunks, each of which encodes some rows and gives a float tensor [m, d].
    scale : float
        Multiplies the gradients: 1 / k where k batches make an update, or a scaler's factor.

    Returns
    -------
    float scalar, the loss without gradient, not scaled

    Examples
    --------
    >>> encoder = torch.nn.Linear(2, 2)
    >>> texts = torch.ones(10, 2).split(4)
    >>> chunks = [lambda text=text: encoder(text) for text in texts]
    >>> value = grad_cache(lambda x: x.square().mean(), chunks)
    >>> encoder.weight.grad.shape, value.requires_grad
    (torch.Size([2, 2]), False)
    """
    states: list[list[tuple[torch.Tensor, list[torch.Tensor]]]] = []
    vectors: list[torch.Tensor] = []
    sizes: list[list[int]] = []
    with torch.no_grad():
        for chunks in columns:
            states.append([])
            encoded = []
            for encode in chunks:
                states[-1].append(_random_state())
                encoded.append(encode())
            sizes.append([len(each) for each in encoded])
            vectors.append(torch.cat(encoded))
    for column in vectors:
        column.requires_grad_()
    with torch.enable_grad():
        value = loss(*vectors)
    (value * scale).backward()  # type: ignore[no-untyped-call]
    for column, chunks, before, counts in zip(vectors, columns, states, sizes, strict=True):
        if column.grad is None:
            continue
        for encode, state, gradient in zip(
            chunks, before, torch.split(column.grad, counts), strict=True
        ):
            with _replayed(state), torch.enable_grad():
                again = encode()
            if again.requires_grad:
                again.backward(gradient)  # type: ignore[no-untyped-call]
    return value.detach()


def _random_state() -> tuple[torch.Tensor, list[torch.Tensor]]:
    """States of torch's generators: the host's, and every GPU's that is in use."""
    in_use = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    gpus = torch.cuda.get_rng_state_all() if in_use else []
    return torch.get_rng_state(), gpus


@contextlib.contextmanager
def _replayed(state: tuple[torch.Tensor, list[torch.Tensor]]) -> Iterator[None]:
    """Random numbers as they were at a state, within the block."""
    host, gpus = state
    with torch.random.fork_rng(devices=range(len(gpus))):
        torch.set_rng_state(host)
        if gpus:
            torch.cuda.set_rng_state_all(gpus)
        yield
