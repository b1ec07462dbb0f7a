"""The fused evaluation path of `nn.TransformerEncoderLayer`, which never calls the layers inside.

It is left for one encoder layer alone, by the attribute that torch itself asks before taking it (a process-wide
switch would move every other model's outputs by rounding), and taken again afterwards.
"""

from collections.abc import Collection
from typing import Any

from torch import nn

_SWITCHES: tuple[tuple[type[nn.Module], str, Any], ...] = (
    (nn.TransformerEncoderLayer, "activation_relu_or_gelu", 0),
    (nn.TransformerEncoder, "use_nested_tensor", False),
)


def leave_fused_paths(model: nn.Module, sites: Collection[str], saved: dict[str, Any]) -> None:
    """Make every encoder layer that contains one of `sites` call them; give the path back to all others.

    `saved` keeps what torch had set, by module name, from one call to the next.
    """
    for name, module in model.named_modules():
        for kind, attribute, off in _SWITCHES:
            if not isinstance(module, kind):
                continue
            contains = any(site.startswith(f"{name}." if name else "") for site in sites)
            if contains and name not in saved:
                saved[name] = getattr(module, attribute)
                setattr(module, attribute, off)
            elif not contains and name in saved:
                setattr(module, attribute, saved.pop(name))
