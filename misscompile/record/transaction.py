"""All or nothing: what a verb changes on modules is put back if it raises."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Collection, Iterable, Iterator
from typing import Any

from torch import nn

from misscompile.record.state import STATE, OwnerState
from misscompile.record.walk import unique_parameters


@contextlib.contextmanager
def transaction(modules: Collection[nn.Module], touched: Iterable[nn.Module] = ()) -> Iterator[list[nn.Parameter]]:
    """Put records, classes, parameters and `requires_grad` flags back as they were if the body raises.

    Args:
        modules: those of the model. The records among them are kept, and the flags of all.
        touched: modules that will get a record.

    Yields:
        The parameters of `modules` as they are before the body, each once.
    """
    changing = dict.fromkeys([*touched, *(module for module in modules if STATE in vars(module))])
    saved = [(m, type(m), vars(m).copy(), m._parameters.copy(), m._buffers.copy(), _copy_state(m)) for m in changing]
    held = unique_parameters(modules)
    flags = [parameter.requires_grad for parameter in held]
    try:
        yield held
    except BaseException:
        for module, kind, members, parameters, buffers, state in saved:
            module.__class__ = kind
            vars(module).clear()
            vars(module).update(members)
            module._parameters.clear()
            module._parameters.update(parameters)
            module._buffers.clear()
            module._buffers.update(buffers)
            if state is not None:
                vars(module)[STATE] = state
        for parameter, flag in zip(held, flags, strict=True):
            parameter.requires_grad = flag
        raise


def _copy_state(module: nn.Module) -> OwnerState | None:
    state: OwnerState | None = vars(module).get(STATE)
    if state is None:
        return None
    fields: dict[str, Any] = {n: copy.copy(v) if isinstance(v, dict) else v for n, v in vars(state).items()}
    return OwnerState(**fields)
