"""Parameters that are used outside their module's forward, where accelerate has them elsewhere until then."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn


def parameter_of(module: nn.Module, name: str = "weight") -> Tensor:
    """Return a module's parameter for use outside its forward.

    With ``device_map`` and too little memory accelerate keeps weights on the CPU or on disk, an empty tensor
    in their place, and its hook brings them for the time of the module's own forward. The mixer takes the
    weights of convolutions and feature map as arguments, and no forward of theirs runs.

    Args:
        module: The module.
        name: Its parameter.

    Returns:
        The parameter, on the device where the module computes.
    """
    hook: Any = module.__dict__.get("_hf_hook")
    if hook is not None:
        hook.pre_forward(module)
    parameter: Tensor = getattr(module, name)
    if hook is not None:
        hook.post_forward(module, None)
    return parameter
