"""Runs a generated modeling file where Esper cannot be imported: a program of its own, imported by nothing.

    python outside.py MODELING_FILE PROBE_FILE RESULT_FILE

The arguments come from the probe file as `exporting.probe` writes it; the tensors of what the model returns are
written in their order, as a safetensors file of float64 and int64.
"""

import importlib.util
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def main(modeling: str, probe: str, result: str) -> None:
    """Run the file on the probe's arguments and write what it returned."""
    # From here on every import of Esper fails, also one in the file itself.
    sys.modules["esper"] = None  # type: ignore[assignment]
    specification = importlib.util.spec_from_file_location("exported", modeling)
    assert specification is not None and specification.loader is not None
    module: Any = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    tensors = module.read_safetensors(probe)
    structure = _structure(Path(probe).read_bytes())
    args = [_value(item, tensors) for item in structure["args"]]
    keywords = {name: _value(item, tensors) for name, item in structure["keywords"].items() if _holds_tensors(item)}
    with module.torch.no_grad():
        returned = module.load_model()(*args, **keywords)
    Path(result).write_bytes(_packed(list(_tensors(returned, module.torch.Tensor))))


def _structure(data: bytes) -> Any:
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    return json.loads(header["__metadata__"]["esper.probe"])


def _value(form: dict[str, Any], tensors: dict[str, Any]) -> Any:
    ((kind, content),) = form.items()
    if kind == "tensor":
        return tensors[content]
    if kind == "mapping":
        return {key: _value(item, tensors) for key, item in content.items()}
    if kind in ("tuple", "list"):
        items = [_value(item, tensors) for item in content]
        return tuple(items) if kind == "tuple" else items
    return content


def _holds_tensors(form: dict[str, Any]) -> bool:
    ((kind, content),) = form.items()
    inner = content.values() if kind == "mapping" else content if kind in ("tuple", "list") else ()
    return kind == "tensor" or any(_holds_tensors(item) for item in inner)


def _tensors(value: Any, kind: type) -> Iterator[Any]:
    if isinstance(value, kind):
        yield value
    elif isinstance(value, dict | tuple | list):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _tensors(item, kind)


def _packed(tensors: list[Any]) -> bytes:
    header: dict[str, Any] = {}
    body = b""
    for index, tensor in enumerate(tensors):
        name, wide = ("F64", tensor.double()) if tensor.is_floating_point() else ("I64", tensor.long())
        data = wide.contiguous().numpy().tobytes()
        header[str(index)] = {
            "dtype": name,
            "shape": list(tensor.shape),
            "data_offsets": [len(body), len(body) + len(data)],
        }
        body += data
    text = json.dumps(header).encode()
    # Offsets must begin at a multiple of eight.
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + body


if __name__ == "__main__":
    main(*sys.argv[1:4])
