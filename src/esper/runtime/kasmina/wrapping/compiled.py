"""Keeping a compiled model compiled while it grows.

Every structural change is one recompilation of the frame around it, and those are wanted. But the compiler keeps at
most `recompile_limit` (8) graphs of one frame and then runs it uncompiled for ever, which only its log tells. So before
a frame would come to that, its graphs, all but the last of a structure that is gone, are dropped: the next call
compiles once, as after every growth.
"""

import sys
from types import CodeType
from typing import Any

from torch import nn

_ROOM = 2
"""Graphs that one change may still need: the new structure, and its other half in evaluation."""


def make_room_for_recompilation(model: nn.Module) -> int:
    """Drop compiled graphs of frames that are near the compiler's limit; returns of how many frames.

    The frame around a compiled module is shared by all modules that a
    process compiles (but for those with `isolate_recompiles=True`): they compile once more too.
    """
    dynamo: Any = sys.modules.get("torch._dynamo")
    if dynamo is None:
        return 0
    evaluation = dynamo.eval_frame
    limit = int(dynamo.config.recompile_limit)
    full = [code for code in _frames(model, dynamo) if evaluation._get_total_cache_entry_count(code) + _ROOM > limit]
    for code in full:
        evaluation.reset_code(code)
    return len(full)


def _frames(model: nn.Module, dynamo: Any) -> set[CodeType]:
    """The code that the compiler may hold graphs of: the frame that it puts around a module, and every forward."""
    around = dynamo.external_utils.wrap_inline(model.forward).__code__
    forwards = (getattr(type(module).forward, "__code__", None) for module in model.modules())
    return {around, *(code for code in forwards if code is not None)}
