"""LoRA in a transformer, by peft: low-rank matrices beside its weights, which alone are trained."""

import importlib
import json
import os
from pathlib import Path
from typing import Any

import torch


def base_of(adapter_config: str | os.PathLike[str]) -> str:
    """The model that a saved adapter belongs to, by name or folder."""
    base: str = json.loads(Path(adapter_config).read_text("utf8"))["base_model_name_or_path"]
    return base


def add(model: Any, rank: int, seed: int) -> None:
    """Freeze a model of transformers, and give all its linear layers matrices to train.

    They add nothing at first: one of each pair is zero. Those of a pooler are left out, because
    nothing that is computed from tokens passes through it.
    """
    peft = require_peft()
    pooler = [
        name
        for name, module in model.named_modules()
        if name.partition(".")[0] == "pooler" and isinstance(module, torch.nn.Linear)
    ]
    config = peft.LoraConfig(
        task_type="FEATURE_EXTRACTION",
        r=rank,
        lora_alpha=2 * rank,
        target_modules="all-linear",
        exclude_modules=pooler or None,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model.add_adapter(config)
    # A set, by then: a run should write the same file every time.
    config.target_modules = sorted(config.target_modules)


def load(model: Any, folder: str) -> int:
    """Freeze a model of transformers, give it a saved adapter to train on, and say its rank."""
    require_peft()
    model.load_adapter(folder, is_trainable=True)
    config = model.peft_config["default"]
    if config.peft_type != "LORA":
        raise ValueError(f"{folder} holds an adapter of kind {config.peft_type}, expected LORA")
    config.target_modules = sorted(config.target_modules)
    rank: int = config.r
    return rank


def in_half(model: Any) -> None:
    """Keep the frozen weights of linear layers in bfloat16, and all others in float32.

    In bfloat16 autocast the vectors stay the same to the bit: it rounds those weights at every
    call. Embeddings and norms it leaves as they are.
    """
    conv1d = importlib.import_module("transformers.pytorch_utils").Conv1D
    for module in model.modules():
        linear = isinstance(module, torch.nn.Linear | conv1d)
        for weight in module.parameters(recurse=False):
            half = linear and not weight.requires_grad
            weight.data = weight.data.to(torch.bfloat16 if half else torch.float32)
        for buffer in module.buffers(recurse=False):
            if buffer.is_floating_point():
                buffer.data = buffer.data.float()


def is_trained(name: str) -> bool:
    """Whether the parameter of that name belongs to an adapter."""
    return "lora_" in name


def require_peft() -> Any:
    """The package peft; ImportError says how to install it."""
    try:
        return importlib.import_module("peft")
    except ImportError as error:
        raise ImportError('LoRA needs the package peft: pip install "ngame[lora]"') from error
