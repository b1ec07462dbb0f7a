"""Loading is strict: whatever is wrong with a saved model is refused by name, and the base stays as it was."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from hypothesis import HealthCheck
from hypothesis import given
from hypothesis import settings
from hypothesis import strategies
from torch import nn

import esper
from esper.runtime.kasmina.digest import tensors_digest
from esper.runtime.kasmina.keeping.weights_file import described
from esper.runtime.tezzeret.artifact import digest_of
from esper.runtime.tezzeret.ir import canonical_json

GROWTH, WEIGHTS = "growth.json", "model.safetensors"
Tensors = dict[str, torch.Tensor]


class Net(nn.Module):
    """Buffers of several kinds, a tied weight, a layer reached by two names, a tensor without dimensions."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.conv2 = nn.Conv2d(4, 4, 3, padding=1)
        self.first = nn.Linear(4, 4)
        self.again = self.first
        self.second = nn.Linear(4, 4)
        self.second.weight = self.first.weight
        self.head = nn.Linear(4, 3)
        self.register_buffer("seen", torch.tensor(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.conv2(torch.relu(self.norm(self.conv(x)))).mean((2, 3))
        return self.head(self.again(torch.relu(self.second(torch.relu(self.first(x))))))


GRAFTS = (("conv", "bottleneck"), ("first", "bottleneck"), ("head", "lowrank"))


def grown(grafts: tuple[tuple[str, str], ...] = GRAFTS) -> tuple[nn.Module, torch.Tensor]:
    torch.manual_seed(0)
    model, x = Net(), torch.randn(2, 2, 5, 5)
    esper.wrap(model, example_inputs=x)
    for site, blueprint in grafts:
        made = esper.graft(model, site, blueprint)
        for parameter in model.get_submodule(f"{site}.kasmina.{made.seed}").parameters():
            nn.init.normal_(parameter, std=0.2)
    return model, x


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    esper.save(grown()[0], folder)
    return folder


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    for name in (GROWTH, WEIGHTS):
        (tmp_path / name).write_bytes((saved / name).read_bytes())
    return tmp_path


def refused(folder: Path) -> esper.IntegrityError:
    """Loads onto a base that must be left exactly as it is."""
    torch.manual_seed(9)
    base = Net()
    before = esper.weights_digest(base)
    parameters = list(base.parameters())
    with pytest.raises(esper.IntegrityError) as caught:
        esper.load(folder, base)
    assert not isinstance(base, esper.MorphableModel)
    assert not any(isinstance(module, esper.KasminaLayer) for module in base.modules())
    assert all(left is right for left, right in zip(parameters, base.parameters(), strict=True))
    assert esper.weights_digest(base) == before
    return caught.value


def header_of(data: bytes) -> tuple[int, dict[str, Any]]:
    start = 8 + int.from_bytes(data[:8], "little")
    return start, json.loads(data[8:start])


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=strategies.data())
def test_any_flipped_bit_of_a_tensor_is_refused_with_its_name(saved: Path, folder: Path, data: Any) -> None:
    intact = (saved / WEIGHTS).read_bytes()
    start, entries = header_of(intact)
    place = data.draw(strategies.integers(0, (len(intact) - start) * 8 - 1))
    damaged = bytearray(intact)
    damaged[start + place // 8] ^= 1 << place % 8
    (folder / WEIGHTS).write_bytes(bytes(damaged))
    name = next(n for n, e in entries.items() if e["data_offsets"][0] <= place // 8 < e["data_offsets"][1])
    error = refused(folder)
    assert (error.code, error.exit_code) == ("ESP-401", 4)
    assert f"the tensor '{name}' has other values" in error.message


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(file=strategies.sampled_from([GROWTH, WEIGHTS]), data=strategies.data())
def test_any_changed_byte_and_any_cut_is_refused(saved: Path, folder: Path, file: str, data: Any) -> None:
    for name in (GROWTH, WEIGHTS):
        (folder / name).write_bytes((saved / name).read_bytes())
    intact = (saved / file).read_bytes()
    if data.draw(strategies.booleans()):
        damaged = intact[: data.draw(strategies.integers(0, len(intact) - 1))]
    else:
        place = data.draw(strategies.integers(0, len(intact) - 1))
        damaged = intact[:place] + bytes([intact[place] ^ data.draw(strategies.integers(1, 255))]) + intact[place + 1 :]
    (folder / file).write_bytes(damaged)
    error = refused(folder)
    assert error.code in ("ESP-401", "ESP-407")
    assert str(folder / file) in error.message


def test_a_cut_file_names_the_tensor_it_ends_in(folder: Path) -> None:
    data = (folder / WEIGHTS).read_bytes()
    start, entries = header_of(data)
    first, last = entries["conv.weight"]["data_offsets"]
    (folder / WEIGHTS).write_bytes(data[: start + (first + last) // 2])
    error = refused(folder)
    assert error.code == "ESP-407"
    assert "ends inside of the tensor 'conv.weight'" in error.message


def packed(entries: list[tuple[str, str, list[int], bytes]]) -> bytes:
    """A safetensors file with its tensors in this very order."""
    header: dict[str, Any] = {}
    body = b""
    for name, dtype, shape, data in entries:
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [len(body), len(body) + len(data)]}
        body += data
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + body


def entries_of(data: bytes) -> list[tuple[str, str, list[int], bytes]]:
    start, header = header_of(data)
    return [
        (name, e["dtype"], e["shape"], data[start + e["data_offsets"][0] : start + e["data_offsets"][1]])
        for name, e in sorted(header.items(), key=lambda item: item[1]["data_offsets"])
    ]


def test_reordered_tensors_are_refused(folder: Path) -> None:
    entries = entries_of((folder / WEIGHTS).read_bytes())
    assert packed(entries) == (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(packed(entries[::-1]))
    assert "its header was changed, all tensors are whole" in refused(folder).message


def test_exchanged_contents_are_refused_by_name(folder: Path) -> None:
    entries = entries_of((folder / WEIGHTS).read_bytes())
    alike = [index for index, entry in enumerate(entries) if entry[2] == [4] and entry[1] == "F32"][:2]
    left, right = (entries[index] for index in alike)
    entries[alike[0]], entries[alike[1]] = (*left[:3], right[3]), (*right[:3], left[3])
    (folder / WEIGHTS).write_bytes(packed(entries))
    assert f"the tensor '{left[0]}' has other values" in refused(folder).message


CHANGES: dict[str, tuple[Callable[[Tensors], Any], str]] = {
    "missing": (lambda t: t.pop("head.bias"), "lacks the tensor 'head.bias'"),
    "extra": (lambda t: t.update(more=torch.zeros(1)), "also has the tensor 'more'"),
    "shape": (lambda t: t.update({"head.bias": torch.zeros(4)}), "'head.bias' is F32 (4,), must be F32 (3,)"),
    "dtype": (lambda t: t.update({"head.bias": torch.zeros(3).double()}), "'head.bias' is F64 (3,), must be F32"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_changed_tensors_are_refused_by_name(folder: Path, change: str) -> None:
    mutate, told = CHANGES[change]
    tensors = safetensors.torch.load((folder / WEIGHTS).read_bytes())
    mutate(tensors)
    (folder / WEIGHTS).write_bytes(safetensors.torch.save(tensors))
    assert told in refused(folder).message


def forged(folder: Path, tensors: Tensors | None = None, change: Callable[[Any], None] = lambda body: None) -> None:
    """Both files anew, with digests that are right: only the contract is left to find what is wrong."""
    body = json.loads((folder / GROWTH).read_bytes())
    del body["digest"]
    if tensors is not None:
        weights = safetensors.torch.save(tensors)
        (folder / WEIGHTS).write_bytes(weights)
        body["weights"] = {"digest": digest_of(weights), "size_bytes": len(weights)}
        body["tensors"] = {name: tensor.model_dump(mode="json") for name, tensor in described(tensors).items()}
        every = tensors | {name: tensors[source] for name, source in body["tied"].items() if source in tensors}
        body["weights_digest"] = tensors_digest(every)
    change(body)
    body["digest"] = digest_of(canonical_json(body))
    (folder / GROWTH).write_bytes(canonical_json(body))


@pytest.mark.parametrize(
    ("mutate", "told"),
    [
        (lambda t: t.pop("head.bias"), "lacks head.bias"),
        (lambda t: t.pop("conv.kasmina.0.up.weight"), "lacks conv.kasmina.0.up.weight"),
        (lambda t: t.update(more=torch.zeros(1)), "also has more"),
        (lambda t: t.update({"conv.kasmina.0.more": torch.zeros(1)}), "also has conv.kasmina.0.more"),
        (lambda t: t.update({"head.bias": torch.zeros(4)}), "'head.bias' is float32 (4,)"),
        (
            lambda t: t.update({"conv.kasmina.0.up.weight": torch.zeros(1)}),
            "'conv.kasmina.0.up.weight' is float32 (1,)",
        ),
        (lambda t: t.update({"norm.running_mean": torch.zeros(4).half()}), "'norm.running_mean' is float16 (4,)"),
        (lambda t: t.update(seen=torch.tensor(3.0)), "'seen' is float32 ()"),
    ],
)
def test_forged_tensors_with_right_digests_are_refused_by_name(
    folder: Path, mutate: Callable[[Tensors], Any], told: str
) -> None:
    tensors = safetensors.torch.load((folder / WEIGHTS).read_bytes())
    mutate(tensors)
    forged(folder, tensors)
    error = refused(folder)
    assert error.code == "ESP-408"
    assert told in error.message


def test_a_tie_to_a_tensor_that_is_not_there_is_refused(folder: Path) -> None:
    def change(body: Any) -> None:
        body["tied"] = dict.fromkeys(body["tied"], "nothing")

    forged(folder, change=change)
    assert "lacks the tensor 'nothing'" in refused(folder).message


def other_manifest(site: Any, seed: Any) -> None:
    seed["kernel_manifest"] = seed["kernel_manifest"].replace("bottleneck", "bottlenecc")


STRUCTURES: dict[str, tuple[Callable[[Any, Any], None], str]] = {
    "manifest": (other_manifest, "ESP-404"),
    "kind": (lambda site, seed: site.update(kind="conv1d"), "ESP-408"),
    "seeds": (lambda site, seed: site.update(seeds=site["seeds"][:-1]), "ESP-408"),
    "site": (lambda site, seed: site.update(site="conv.more"), "ESP-408"),
    "shape": (lambda site, seed: site.update(parameter_shapes={"weight": [4, 4]}), "ESP-408"),
}


@pytest.mark.parametrize("change", STRUCTURES)
def test_a_forged_structure_is_refused_and_the_base_unwrapped(folder: Path, change: str) -> None:
    mutate, code = STRUCTURES[change]

    def both(body: Any) -> None:
        mutate(body["growth"]["sites"][0], body["growth"]["sites"][0]["seeds"][0])

    forged(folder, change=both)
    assert refused(folder).code == code


def test_layers_of_two_names_ties_and_buffers_come_back_whole(saved: Path) -> None:
    model, x = grown()
    model.eval()
    torch.manual_seed(9)
    back = esper.load(saved, Net()).eval()
    assert back.again is back.first
    assert back.second.weight is back.first.weight
    assert torch.equal(back(x), model(x))
    assert int(back.seen) == 3
    assert esper.weights_digest(back) == esper.weights_digest(model)


@pytest.mark.parametrize(
    "grafts",
    [
        (("conv", "widen"),),
        (("conv2", "scale_shift"), ("first", "norm_gate")),
        (("conv2", "se_gate"), ("conv2", "bottleneck")),
        (("conv2", "depth_block"), ("conv2", "lowrank")),
    ],
)
@pytest.mark.parametrize("fossil", [False, True])
def test_kernels_with_buffers_and_output_reading_ones_are_saved_whole(
    tmp_path: Path, grafts: tuple[tuple[str, str], ...], fossil: bool
) -> None:
    model, x = grown(grafts)
    model(x)
    if fossil:
        esper.fossilize(model)
    model.eval()
    esper.save(model, tmp_path)
    back = esper.load(tmp_path, Net()).eval()
    assert torch.equal(back(x), model(x))
    assert esper.weights_digest(back) == esper.weights_digest(model)
    assert esper.status(back) == esper.status(model)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_every_dtype_comes_back_to_the_bit(tmp_path: Path, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2)).to(dtype), torch.randn(3, 4, dtype=dtype)
    esper.wrap(model, example_inputs=x)
    esper.graft(model, "0", "bottleneck")
    esper.save(model, tmp_path)
    back = esper.load(tmp_path, nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2)).to(dtype))
    assert torch.equal(back(x), model(x))
    assert {parameter.dtype for parameter in back.parameters()} == {dtype}


def test_equal_models_are_saved_as_equal_bytes(tmp_path: Path) -> None:
    for name in ("a", "b"):
        esper.save(grown()[0], tmp_path / name)
    for name in (GROWTH, WEIGHTS):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
