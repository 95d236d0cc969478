"""Both passes of an encoder as CUDA graphs, one pair for each shape of padded texts.

Training is often bound by the host, which launches hundreds of kernels a step. A graph is one
launch.
"""

import gc
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from ngame.transfer import sent

# Texts and lengths are padded to a multiple of this or, above, to four sizes for each power of two.
_STEP = 8
# A graph takes a tenth of a second to make: data with more shapes than this has the others' kernels
# launched one by one.
_MOST_SHAPES = 96
# Batches, or parts of one, that can be between their two passes: each keeps memory of its own. A
# batch of 4,096 short texts has five parts.
_MOST_AT_ONCE = 8
# Passes before the one that is recorded, in which libraries choose their kernels.
_WARM = 3


class Graphs:
    """The graphs of an encoder.

    Parameters
    ----------
    module : torch.nn.Module
        On a GPU. Takes ids, int64 [n, longest], and mask, bool [n, longest]; returns vectors,
        float32 [n, dim], without waiting for the GPU.
    dim : int
    """

    def __init__(self, module: torch.nn.Module, dim: int) -> None:
        self._module, self._dim = module, dim
        self._forget(())

    def _forget(self, recorded: tuple[int, ...]) -> None:
        self._recorded = recorded
        self._places: list[_Place] = []
        # Those of all graphs, since they are read right after a pass; None of weights without use.
        self._gradients: list[torch.Tensor | None] = []

    def __deepcopy__(self, _: Any) -> None:
        """A copy of an encoder has other weights: it is made without graphs."""

    def __reduce__(self) -> Any:
        """Neither are they saved."""
        return type(None), ()

    @property
    def shapes(self) -> int:
        """How many have graphs, counted in each place."""
        return sum(len(place.graphs) for place in self._places)

    def __call__(
        self,
        parts: Sequence[tuple[npt.NDArray[np.int64], npt.NDArray[np.bool_]]],
        longest: int,
    ) -> list[torch.Tensor | None]:
        """Vectors of the parts of a batch, float32 [n, dim], from the ids and mask of each.

        Texts may be padded further up to `longest`. None if too many other batches are between
        their passes, if there are too many shapes, or if nothing is trained.

        Without gradients the same graphs run as with them: so the two passes of `grad_cache` draw
        the same random numbers.
        """
        # Each part in a place of its own, also where no gradients keep it taken.
        held: list[_Between] = []
        return [self._vectors(ids, mask, longest, held) for ids, mask in parts]

    def _vectors(
        self,
        ids: npt.NDArray[np.int64],
        mask: npt.NDArray[np.bool_],
        longest: int,
        held: "list[_Between]",
    ) -> torch.Tensor | None:
        weights = {n: w for n, w in self._module.named_parameters() if w.requires_grad}
        if not weights:
            return None
        # Graphs work on the memory that the weights were in, in the modes that the modules were in.
        addresses = (weight.data_ptr() for weight in weights.values())
        current = (*addresses, *(module.training for module in self._module.modules()))
        if current != self._recorded:
            self._forget(current)
        place = self._free_place(next(iter(weights.values())).device)
        if place is None:
            return None
        count, length = mask.shape
        shape = _rounded(count), max(length, min(_rounded(length), longest))
        graph = place.graphs.get(shape)
        if graph is None:
            if self.shapes >= _MOST_SHAPES:
                return None
            graph = place.graphs[shape] = self._record(place, shape, weights)
        room = [(0, whole - own) for whole, own in zip(shape, mask.shape, strict=True)]
        ids, mask = np.pad(ids, room), np.pad(mask, room)
        mask[count:, 0] = True  # the mean over no token would be NaN
        graph.ids.copy_(sent(torch.from_numpy(ids), graph.ids.device))
        graph.mask.copy_(sent(torch.from_numpy(mask), graph.mask.device))
        held.append(place.taken())
        vectors: torch.Tensor = _Replay.apply(  # type: ignore[no-untyped-call]
            graph, held[-1], *weights.values()
        )
        return vectors[:count]

    def _free_place(self, device: torch.device) -> "_Place | None":
        """The first one that no batch is in: so the parts of a batch find those of the last."""
        for place in self._places:
            if place.free():
                return place
        if len(self._places) == _MOST_AT_ONCE:
            return None
        self._places.append(_Place(device))
        return self._places[-1]

    def _record(
        self, place: "_Place", shape: tuple[int, int], weights: Mapping[str, torch.Tensor]
    ) -> "_Graph":
        vectors = torch.zeros(shape[0], self._dim, device=next(iter(weights.values())).device)
        graph = _Graph(self._module, shape, weights, vectors, self._gradients)
        passes = graph.run_forward, graph.run_backward
        with torch.enable_grad():
            graph.forward, graph.backward = place.recorder.record(*passes)
        return graph


class _Place:
    """Graphs that share their memory: only one batch can be between its two passes."""

    def __init__(self, device: torch.device) -> None:
        self.recorder = _Recorder(device)
        self.graphs: dict[tuple[int, int], _Graph] = {}
        self._between: Callable[[], _Between | None] = lambda: None

    def free(self) -> bool:
        return self._between() is None

    def taken(self) -> "_Between":
        """What keeps the place from being free, as long as it lives."""
        between = _Between()
        self._between = weakref.ref(between)
        return between


class _Between:
    """Lives while a batch is between its two passes."""


class _Graph:
    """What one shape needs: tensors that stay where they are, and the passes over them."""

    forward: Any
    backward: Any

    def __init__(
        self,
        module: torch.nn.Module,
        shape: tuple[int, int],
        weights: Mapping[str, torch.Tensor],
        gradient: torch.Tensor,
        gradients: list[torch.Tensor | None],
    ) -> None:
        self.ids = torch.zeros(shape, dtype=torch.int64, device=gradient.device)
        self.mask = torch.ones(shape, dtype=torch.bool, device=gradient.device)
        self.gradient, self.gradients = gradient, gradients
        self._module = module
        # The same memory as leaves of their own: autograd ties a leaf to the stream on which it was
        # first used, and a graph is recorded on another one than the training runs on.
        self._weights = {name: w.detach().requires_grad_() for name, w in weights.items()}

    def run_forward(self) -> None:
        """From ids and mask to vectors."""
        given = self.ids, self.mask
        self.vectors = torch.func.functional_call(self._module, self._weights, given)

    def run_backward(self) -> None:
        """From the gradient of the vectors to those of the weights."""
        found = torch.autograd.grad(
            self.vectors, list(self._weights.values()), self.gradient, allow_unused=True
        )
        if not self.gradients:
            self.gradients += [None if g is None else torch.empty_like(g) for g in found]
        torch._foreach_copy_(_used(self.gradients), _used(found))
        self.vectors = self.vectors.detach()


class _Replay(torch.autograd.Function):
    """The vectors of a graph's texts, by its own passes."""

    @staticmethod
    def forward(ctx: Any, graph: _Graph, between: _Between, *_: torch.Tensor) -> torch.Tensor:
        ctx.graph, ctx.between = graph, between
        graph.forward.replay()
        vectors: torch.Tensor = graph.vectors
        return vectors.detach().clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        if ctx.between is None:
            raise RuntimeError(
                "backward ran a second time through vectors of an encoder with graphs=True, "
                "expected once: with graphs=False (encoder.graphs=false) retain_graph works"
            )
        ctx.between = None
        graph = ctx.graph
        graph.gradient.copy_(gradient)
        graph.backward.replay()
        # Copies, since autograd takes what it gets for the weights' own gradients.
        copies = iter(torch._foreach_mul(_used(graph.gradients), 1.0))
        return None, None, *(None if g is None else next(copies) for g in graph.gradients)


def _used(gradients: Sequence[torch.Tensor | None]) -> list[torch.Tensor]:
    return [gradient for gradient in gradients if gradient is not None]


class _Recorder:
    """Makes the graphs of a device."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._memory = torch.cuda.graph_pool_handle()

    def record(self, *passes: Callable[[], None]) -> list[torch.cuda.CUDAGraph]:
        """A graph of each pass; the random numbers of the training stay as they are."""
        now = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(now)
        graphs = []
        with torch.random.fork_rng([self._device]), torch.cuda.stream(self._stream):
            for _ in range(_WARM):
                for run in passes:
                    run()
            for run in passes:
                graph = torch.cuda.CUDAGraph()
                with _no_collection():
                    # Other threads may go on allocating.
                    graph.capture_begin(self._memory, capture_error_mode="thread_local")
                    try:
                        run()
                    finally:
                        graph.capture_end()
                graphs.append(graph)
        now.wait_stream(self._stream)
        return graphs


@contextmanager
def _no_collection() -> Iterator[None]:
    """Without Python's garbage collector: an old encoder's graphs, freed in a capture, end it."""
    collects = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collects:
            gc.enable()


def _rounded(count: int) -> int:
    """The next size."""
    step = max(_STEP, 1 << max(0, (count - 1).bit_length() - 3))
    return -(-count // step) * step
