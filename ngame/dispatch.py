"""Where work is done: on the GPU if an argument is there, else on the CPU."""

import functools
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

from ngame.arrays import on_gpu

P = ParamSpec("P")
R = TypeVar("R")


def dispatched(function: Callable[P, R]) -> Callable[P, R]:
    """Make a function call its namesake in `ngame.cuda` where an argument is on a CUDA device.

    The namesake takes the same arguments without `threads` and `group`, checks them itself, and
    gives the same results as CUDA tensors.
    """

    @functools.wraps(function)
    def door(*arguments: P.args, **named: P.kwargs) -> R:
        if any(map(on_gpu, arguments)) or any(map(on_gpu, named.values())):
            from ngame import cuda

            on_device: Callable[..., R] = getattr(cuda, function.__name__)
            options: dict[str, Any] = {k: v for k, v in named.items() if k != "threads"}
            if options.get("group", ...) is None:
                del options["group"]
            return on_device(*arguments, **options)
        return function(*arguments, **named)

    return door


def on_host(x: Any) -> Any:
    """A torch tensor on the host, without gradient; other values as they are."""
    return x.detach().cpu() if hasattr(x, "detach") else x


def in_reach(x: Any) -> Any:
    """The same, but tensors on a CUDA device stay there if the GPU core can work on them."""
    if on_gpu(x) and hasattr(x, "detach"):
        from ngame import cuda

        if not cuda.why_not(x.device):
            return x.detach()
    return on_host(x)
