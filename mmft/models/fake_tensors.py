"""Models without contents: built from a config on the meta device, run on fake tensors, and what of them lives at
once.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoConfig, AutoModelForImageTextToText

from mmft.config import ModelConfig
from mmft.models.lora import add_adapter
from mmft.models.processors import load_processor
from mmft.models.value_adapter import add_value_adapter
from mmft.types import UserError


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of tensors that are made while it is open: `now` alive, and at `peak`. `known` were there
    before.
    """

    def __init__(self, known: Iterable[Tensor] = ()) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._seen = weakref.WeakSet(tensor.untyped_storage() for tensor in known)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(output):
            if isinstance(tensor, Tensor):
                self._see(tensor.untyped_storage())
        return output

    def _see(self, storage: torch.UntypedStorage) -> None:
        if storage in self._seen:
            return
        self._seen.add(storage)
        size = storage.nbytes()
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._drop, size)

    def _drop(self, size: int) -> None:
        self.now -= size

    def start(self) -> int:
        """What is alive now; the peak is counted anew from here."""
        self.peak = self.now
        return self.now


class FakeTensors:
    """A fake mode and the log of torch's, which would print a traceback of each operation that it cannot do."""

    def __init__(self) -> None:
        self.mode = FakeTensorMode(allow_non_fake_inputs=True)

    @contextmanager
    def counting(self, known: Iterable[Tensor]) -> Iterator[LiveBytes]:
        """Tensors made while this is open are fake, and counted; those of `known` were there before."""
        live, log = LiveBytes(known), logging.getLogger("torch._subclasses.fake_tensor")
        level = log.level
        log.setLevel(logging.CRITICAL)
        try:
            with self.mode, live:
                yield live
        finally:
            log.setLevel(level)

    def materialise(self, model: nn.Module, device: torch.device) -> None:
        """Weights of the meta device become fake ones of `device`, with a gradient where they train; tied ones stay
        one.
        """
        made: dict[int, tuple[Tensor, Tensor]] = {}

        def fake(tensor: Tensor) -> Tensor:
            if id(tensor) not in made:  # the tensor is held, so that its id stays its own
                made[id(tensor)] = tensor, torch.empty(tensor.shape, dtype=tensor.dtype, device=device)
            return made[id(tensor)][1]

        with self.mode:
            model._apply(fake)
            for parameter in model.parameters():
                parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None


def empty_policy(config: ModelConfig, dtype: torch.dtype, critic: str) -> tuple[Any, Any]:
    """The model that `load_policy` would give, on the meta device, and its processor."""
    path, trust = config.resolved_path(), config.trust_remote_code
    if path.startswith(("/", ".", "~")) and not Path(path).is_dir():
        raise UserError(f"model.path: {config.path!r}: no such folder")
    try:
        processor = load_processor(path, trust)
        loaded = AutoConfig.from_pretrained(path, trust_remote_code=trust)
        with torch.device("meta"):
            model: Any = AutoModelForImageTextToText.from_config(loaded, dtype=dtype, trust_remote_code=trust)
    except UserError:
        raise
    except (OSError, ValueError, ImportError, RuntimeError) as error:
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"model.path: {config.path!r} cannot be loaded: {first}") from error
    model.eval()
    with torch.device("meta"):
        if config.lora is not None:
            model = add_adapter(model, config.lora)
        if critic == "adapter":
            add_value_adapter(model)
    return model, processor


def size_of(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
