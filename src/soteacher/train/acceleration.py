"""How a network is run faster without computing anything else: the layout of its numbers, and compilation.

What ``auto`` chooses follows from the network and the length of its training by a stated rule and not from a stopwatch:
a run that is killed, resumed or repeated must choose the same again, or its last bits would differ.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Generator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd  # pyright: ignore[reportPrivateUsage] the one class of all convolutions

from soteacher.errors import InputError
from soteacher.train.config import SGDConfig, TrainingConfig

STEPS_WORTH_COMPILING = 50_000
"""Compiling for the first time takes as long as some 1,000 to 13,000 steps save, by ``benchmarks/start.py``."""
COMPILED_CODE = "~/.cache/soteacher/compiled"
"""Where compiled code stays for the next run, unless ``TORCHINDUCTOR_CACHE_DIR`` says otherwise."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Acceleration:
    """What was chosen for a network."""

    channels_last: bool
    """Whether images and weights lie in memory with the channels last."""
    compiled: bool
    """Whether the network goes through ``torch.compile``."""
    graphs: bool
    """Whether the compiled code is replayed as CUDA graphs."""


def choose_acceleration(config: TrainingConfig, network: nn.Module, *, num_examples: int, device: str) -> Acceleration:
    """Return how a network is to be run: as its settings say, and by these rules where they say ``auto``.

    * ``channels_last``: networks with convolutions, none of them grouped; those of ShuffleNets and MobileNets are
      slower that way on a CPU. On a GPU only in ``bf16-mixed``, for whose arithmetic units that layout is made.
    * ``compile``: where a C++ compiler is there, the training has at least 50,000 steps and the optimiser wants one
      gradient; on a CPU only networks with convolutions, none of them grouped, which take minutes to compile.

    Args:
        config: how the network is trained.
        network: the network.
        num_examples: of the training set.
        device: ``cpu`` or ``cuda``.
    """
    convolutions = [module for module in network.modules() if isinstance(module, _ConvNd)]
    whole = bool(convolutions) and all(module.groups == 1 for module in convolutions)
    channels_last, compiled = config.channels_last, config.compile
    if channels_last == "auto":
        channels_last = whole if device == "cpu" else bool(convolutions) and config.precision == "bf16-mixed"
    if compiled == "auto":
        steps = config.epochs_run() * -(-num_examples // config.batch_size)
        two_gradients = isinstance(config.optimizer, SGDConfig) and config.optimizer.momentum_difference > 0
        worth = steps >= STEPS_WORTH_COMPILING and not two_gradients and (whole or device != "cpu")
        compiled = worth and has_compiler()
    return Acceleration(channels_last=channels_last, compiled=compiled, graphs=compiled and device == "cuda")


def has_compiler() -> bool:
    """Return whether there is a C++ compiler, which PyTorch's own compiler needs."""
    _keep_compiled_code()
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except InvalidCxxCompiler:
        return False
    return True


@final
class Compiled(nn.Module):
    """A network in one mode whose whole batches go through ``torch.compile``; others take the ordinary way.

    The smaller batch at an epoch's end is not worth code of its own, and a network in the other mode neither.

    Args:
        network: what is compiled.
        batch_size: batches of a multiple of so many examples are whole.
        frozen: a network in evaluation mode whose weights never change: they become constants, and batch normalisation
            is folded into the convolutions before it. Otherwise a network in training.
        required: whether a network that cannot be compiled is an error; otherwise it takes the ordinary way.
        graphs: whether the compiled code is replayed as CUDA graphs, for a network on a GPU. What it returns is then
            written over in the next step.
    """

    def __init__(
        self, network: nn.Module, *, batch_size: int, frozen: bool, required: bool, graphs: bool = False
    ) -> None:
        super().__init__()
        self.network = network
        self._batch_size, self._frozen, self._required = batch_size, frozen, required
        _keep_compiled_code()
        mode = "reduce-overhead" if graphs else "default"
        # In a list, so that it is no submodule: the weights would be there twice.
        self._compiled: list[Any] = [torch.compile(network, dynamic=False, mode=mode)]
        self._seen: set[tuple[torch.Size, torch.dtype]] = set()

    def forward(self, images: Tensor) -> Any:
        """Return what the network returns.

        Raises:
            InputError: it cannot be compiled, and must.
        """
        another_use = self.training == self._frozen or torch.is_grad_enabled() == self._frozen
        if another_use or len(images) % self._batch_size:
            return self.network(images)
        kind = images.shape, images.dtype
        if kind in self._seen:
            return self._compiled[0](images)
        self._seen.add(kind)
        # Takes a second, so not before it is needed.
        from torch._dynamo.exc import BackendCompilerFailed, TorchDynamoException

        try:
            with _compiling(frozen=self._frozen):
                return self._compiled[0](images)
        except TorchDynamoException as error:  # before anything has run
            cause = error.inner_exception if isinstance(error, BackendCompilerFailed) else error
            reason = str(cause).strip().partition("\n")[0]
            if self._required:
                raise InputError(f"the network cannot be compiled: {reason}; set training.compile to false") from error
            warnings.warn(f"the network is not compiled: {reason}", stacklevel=2)
        self._compiled[0] = self.network
        return self.network(images)


def _keep_compiled_code() -> None:
    """Say where compiled code is to lie: before anything of PyTorch's compiler is there, which takes its own folder."""
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(Path(COMPILED_CODE).expanduser()))


@contextmanager
def _compiling(*, frozen: bool) -> Generator[None, None, None]:
    """Set the compiler up for a moment."""
    import torch._dynamo.config as tracing
    import torch._functorch.config as differentiating
    import torch._inductor.config as generating

    with ExitStack() as changes:
        # A process may train many networks, and all enter by the same function: past the limit PyTorch goes on slowly.
        changes.enter_context(tracing.patch(recompile_limit=2**16, accumulated_recompile_limit=2**16))
        # The way back is made at once as well, or a failure would come up in the middle of a step.
        changes.enter_context(differentiating.patch(force_non_lazy_backward_lowering=True))
        # Read while the code is made, not when it runs. Dropout is to draw what it draws in a network not compiled.
        # Weights in oneDNN's own order cannot be kept with the code, which every process would make anew; nor are they
        # any faster.
        own = {"freezing": frozen, "fallback_random": True, "cpp.weight_prepack": not frozen}
        changes.enter_context(generating.patch(own))
        yield
