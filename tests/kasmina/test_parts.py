import subprocess
import sys
from importlib.metadata import version
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import esper
from esper.contracts.enums import SeedState
from esper.errors import EsperError
from esper.errors import by_name
from esper.runtime.kasmina import growth
from esper.runtime.kasmina.cache import KernelCache
from esper.runtime.kasmina.cache import kernel_cache
from esper.runtime.kasmina.digest import tensor_bytes
from esper.runtime.kasmina.lifecycle import TRANSITIONS
from esper.runtime.kasmina.lifecycle import advance
from esper.runtime.kasmina.wrapping.hosts import HOST_KINDS
from esper.runtime.kasmina.wrapping.hosts import host_kind
from esper.runtime.kasmina.wrapping.hosts import layer_kind
from esper.runtime.kasmina.wrapping.undisturbed import undisturbed
from esper.runtime.tezzeret.artifact import KernelFiles
from esper.runtime.tezzeret.build import build_kernel


@given(st.sampled_from(SeedState), st.sampled_from(SeedState))
def test_only_the_table_moves_a_seed(state: SeedState, to: SeedState) -> None:
    if to in TRANSITIONS[state]:
        assert advance(state, to) is to
    else:
        with pytest.raises(esper.GrowthError, match="what may follow"):
            advance(state, to)


def test_every_state_can_be_reached_and_culled_seeds_are_free_again() -> None:
    reached, frontier = {SeedState.DORMANT}, [SeedState.DORMANT]
    while frontier:
        for following in TRANSITIONS[frontier.pop()] - reached:
            reached.add(following)
            frontier.append(following)
    assert reached == set(SeedState)
    assert TRANSITIONS[SeedState.CULLED] == {SeedState.DORMANT}


def kernels(count: int, rank: int = 4) -> list[KernelFiles]:
    model = esper.wrap(nn.Sequential(nn.Linear(16, 16)), example_inputs=torch.ones(1, 16))
    contract = growth.site_contract(model, "0", "bottleneck")
    return [
        build_kernel("bottleneck", contract, {"rank": rank}, seed=seed, samples=None, max_parameters=10**6)
        for seed in range(count)
    ]


@pytest.mark.fault("G3")
def test_cache_gives_private_copies_and_forgets_the_least_recently_used() -> None:
    first, second, third = kernels(3)
    cache = KernelCache()
    cache.put(first, first.digest)
    size = cache.size_bytes
    assert size >= first.size_bytes
    cache.set_limit(2 * size)
    cache.put(second, second.digest)
    kernel = cache.get(first.digest)
    assert kernel is not None and kernel.digest == first.digest
    with torch.no_grad():
        kernel.up.weight.fill_(7.0)
    again = cache.get(first.digest)
    assert again is not None and not bool(again.up.weight.any())
    assert again.down.weight.requires_grad
    cache.put(third, third.digest)
    assert (first.digest in cache, second.digest in cache, third.digest in cache) == (True, False, True)
    assert cache.size_bytes <= cache.limit
    assert cache.get(second.digest) is None
    assert cache.files(third.digest) == third
    assert (cache.hits, cache.misses, len(cache)) == (2, 1, 2)
    cache.clear()
    assert (len(cache), cache.size_bytes) == (0, 0)


@pytest.mark.fault("G3")
def test_cache_refuses_oversize_and_damage_without_evicting() -> None:
    (small,) = kernels(1)
    (large,) = kernels(1, rank=64)
    cache = KernelCache()
    cache.put(small, small.digest)
    cache.set_limit(cache.size_bytes + 10)
    with pytest.raises(esper.GrowthError, match="cache_size_mb"):
        cache.put(large, large.digest)
    assert small.digest in cache
    damaged = KernelFiles(large.manifest, large.weights[:-1] + b"\x01")
    with pytest.raises(esper.IntegrityError):
        cache.put(damaged, large.digest)
    assert len(cache) == 1


def test_process_has_one_cache_whose_limit_wrap_sets(zoo: Any) -> None:
    esper.wrap(zoo.mlp(), cache_size_mb=3)
    assert kernel_cache() is kernel_cache()
    assert kernel_cache().limit == 3 * 2**20
    (files,) = kernels(1)
    kernel_cache().put(files, files.digest)
    model = esper.wrap(nn.Sequential(nn.Linear(16, 16)), example_inputs=torch.ones(1, 16))
    assert esper.graft(model, "0", "bottleneck", kernel=files.digest).kernel == files.digest


@pytest.mark.parametrize("padding", [0, (2, 1), "same"])
@pytest.mark.parametrize("mode", ["zeros", "reflect", "circular"])
def test_convolution_rows_are_the_matrix_product_that_it_is(padding: Any, mode: str) -> None:
    layer = nn.Conv2d(3, 5, (3, 2), padding=padding, dilation=(1, 2), padding_mode=mode)
    kind = host_kind(layer)
    assert kind is not None
    x = torch.randn(2, 3, 6, 7)
    rows = kind.input_rows(layer, x) @ layer.weight.flatten(1).T + layer.bias
    torch.testing.assert_close(rows, kind.output_rows(layer, layer(x)))
    torch.testing.assert_close(rows[: rows.shape[0] // 2], kind.output_rows(layer, layer(x[0])))


def test_host_kinds_are_one_table() -> None:
    assert len({kind.name for kind in HOST_KINDS}) == len(HOST_KINDS)
    assert [kind.form for kind in HOST_KINDS if kind.argument is None] == ["block"]
    assert layer_kind(nn.LSTM(2, 2)) is None
    assert host_kind(nn.ModuleList()) is None


def test_muon_and_lbfgs_are_refused_by_name_with_the_way_out(zoo: Any) -> None:
    model = esper.wrap(nn.Sequential(nn.Linear(6, 6, bias=False)), example_inputs=torch.ones(1, 6))
    muon = torch.optim.Muon(model.parameters())
    with pytest.raises(esper.GrowthError, match=r"0.kasmina.0.down.bias.*second optimizer") as caught:
        esper.graft(model, "0", "bottleneck", optimizer=muon)
    assert caught.value.code == "ESP-433"
    assert esper.status(model).grown_parameters == 0
    esper.graft(model, "0", "lowrank", optimizer=muon)
    model(torch.ones(2, 6)).sum().backward()
    muon.step()
    with pytest.raises(esper.GrowthError, match="LBFGS"):
        esper.graft(model, "0", "lowrank", optimizer=torch.optim.LBFGS(model.parameters()))
    with pytest.raises(esper.GrowthError, match=r"no torch\.optim\.Optimizer"):
        esper.graft(model, "0", "lowrank", optimizer="sgd")  # type: ignore[arg-type]


@pytest.mark.parametrize("dampening", [0.0, 0.5])
@pytest.mark.parametrize("started", [True, False])
def test_fused_momentum_takes_newborns(zoo: Any, dampening: float, started: bool) -> None:
    ends = []
    for fused in (False, True):
        model, x = zoo.make("mlp")
        esper.wrap(model, example_inputs=x)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, dampening=dampening, fused=fused)
        for number in range(4):
            if number == (2 if started else 0):
                esper.graft(model, "fc1", "bottleneck", optimizer=optimizer, rank=3)
            optimizer.zero_grad()
            model(x).square().mean().backward()
            optimizer.step()
        ends.append(model(x).detach())
        esper.cull(model, "fc1", optimizer=optimizer)
        assert len(optimizer.param_groups) == 1
    torch.testing.assert_close(*ends)


def test_newborns_of_a_host_that_is_not_trained_find_a_group(zoo: Any) -> None:
    model, x = zoo.make("mlp")
    esper.wrap(model, example_inputs=x)
    only = torch.optim.SGD(model.fc3.parameters(), lr=0.1)
    esper.graft(model, "fc1", "lowrank", optimizer=only)
    assert len(only.param_groups) == 1
    several = torch.optim.SGD([{"params": [model.fc3.weight], "lr": 0.2}, {"params": [model.fc3.bias]}], lr=0.1)
    esper.graft(model, "fc2", "lowrank", optimizer=several)
    assert [group["lr"] for group in several.param_groups] == [0.2, 0.1, 0.1]
    esper.graft(model, "fc3", "lowrank", optimizer=several)
    assert len(several.param_groups[0]["params"]) == 3
    esper.cull(model, "fc2", optimizer=several)
    assert len(several.param_groups) == 2


def test_names_in_an_optimizer_keep_their_prefix(zoo: Any) -> None:
    model, x = zoo.make("mlp")
    esper.wrap(model, example_inputs=x)
    optimizer = torch.optim.AdamW([(f"net.{n}", p) for n, p in model.named_parameters()], lr=0.1)
    esper.graft(model, "fc2", "lowrank", optimizer=optimizer)
    assert optimizer.param_groups[0]["param_names"][-1] == "net.fc2.kasmina.0.up.weight"


def test_undisturbed_restores_when_the_body_fails(zoo: Any) -> None:
    model, x = zoo.make("cnn")
    before, random = esper.weights_digest(model), torch.get_rng_state()
    with pytest.raises(ValueError, match="broken"), undisturbed(model):
        model.eval()
        model.train()(x).sum().backward()
        model.norm.running_mean = torch.zeros(4)
        raise ValueError("broken")
    assert esper.weights_digest(model) == before
    assert torch.equal(torch.get_rng_state(), random)
    assert all(p.grad is None for p in model.parameters())


def test_weights_digest_is_the_documented_sum() -> None:
    import hashlib
    import struct

    model = nn.Module()
    model.b = nn.Parameter(torch.tensor([1.5, -2.0]))
    model.register_buffer("a", torch.tensor(3, dtype=torch.int64))
    text = b"a\nint64\n\n" + struct.pack("<q", 3) + b"b\nfloat32\n2\n" + struct.pack("<2f", 1.5, -2.0)
    assert esper.weights_digest(model) == f"sha256:{hashlib.sha256(text).hexdigest()}"
    assert tensor_bytes(torch.ones(2, 2, dtype=torch.bfloat16).T) == b"\x80\x3f" * 4


def test_face_is_lazy_and_complete() -> None:
    code = (
        "import sys, esper; assert 'torch' not in sys.modules; esper.EsperError; assert 'torch' not in sys.modules;"
        "esper.wrap; esper.Task; [getattr(esper, name) for name in esper.__all__];"
        "found = {'temporalio', 'sqlalchemy', 'boto3', 'torch_geometric'} & set(sys.modules); assert not found, found"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert esper.__version__ == version("esper-morphogenetic")
    errors = {name for name in esper.__all__ if isinstance(getattr(esper, name), type)} & set(esper.__all__)
    kinds = [EsperError]
    while kinds:
        kind = kinds.pop()
        kinds.extend(kind.__subclasses__())
        assert kind.__name__ in errors
        assert by_name(kind.__name__) is kind
