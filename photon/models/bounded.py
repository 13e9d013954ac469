"""A bound on what is built of a model: it ends at the first part that is too many.

A configuration of a few bytes may ask for any number of layers, each of which takes time and memory even
where tensors have shapes alone.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn
from torch.nn.modules.module import (
    register_module_module_registration_hook,
    register_module_parameter_registration_hook,
)

from photon.errors import PhotonError

#: Modules of a model: the largest of today have a few thousand.
MAX_MODULES = 20_000


@contextmanager
def bounded_model(parameters: int) -> Iterator[None]:
    """Let this thread build no model of many more modules or parameters than these.

    Parameters
    ----------
    parameters
        Numbers in all parameters; one that is made twice, as a tied weight is, may count twice.

    Raises
    ------
    PhotonError
        When a part is made that is too many.
    """
    own, made = threading.get_ident(), {"modules": 0, "parameters": 0}

    def count(what: str, number: int, most: int) -> None:
        if threading.get_ident() != own:
            return
        made[what] += number
        if made[what] > most:
            raise PhotonError(f"model: more than {most:,} {what}; give it fewer layers, or smaller ones")

    def module_made(module: nn.Module, name: str, part: nn.Module | None) -> None:
        count("modules", 1, MAX_MODULES)

    def parameter_made(module: nn.Module, name: str, part: nn.Parameter | None) -> None:
        count("parameters", 0 if part is None else part.numel(), 2 * parameters)

    hooks = [
        register_module_module_registration_hook(module_made),
        register_module_parameter_registration_hook(parameter_made),
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
