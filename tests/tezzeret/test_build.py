import math
import subprocess
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from esper.contracts.assets import SiteContract
from esper.errors import BlueprintError
from esper.errors import IntegrityError
from esper.runtime.tezzeret.blueprints.registry import cost
from esper.runtime.tezzeret.build import SiteSamples
from esper.runtime.tezzeret.build import build_kernel
from esper.runtime.tezzeret.build import files_of
from esper.runtime.tezzeret.build import load_kernel
from esper.runtime.tezzeret.ir import parse_graph
from esper.runtime.tezzeret.samples import pack_samples
from esper.runtime.tezzeret.samples import samples_for
from esper.runtime.tezzeret.samples import unpack_samples

BUDGET = 1_000_000
sizes = st.integers(1, 9)


@st.composite
def linear_cases(draw):
    leading = tuple(draw(st.lists(st.integers(1, 3), max_size=2)))
    inputs, outputs = draw(sizes), draw(sizes)
    name = draw(st.sampled_from(["bottleneck", "lowrank", "widen"]))
    site = SiteContract(
        site="a",
        output_site="b" if name == "widen" else "a",
        kind="linear",
        input_shape=(*leading, inputs),
        output_shape=(*leading, outputs),
        dtype=draw(st.sampled_from(["float32", "float64"])),
    )
    return site, name, {"units" if name == "widen" else "rank": draw(st.integers(1, 12))}


@st.composite
def conv2d_cases(draw):
    geometry = {
        "kernel_size": [draw(st.integers(1, 3)), draw(st.integers(1, 3))],
        "stride": [draw(st.integers(1, 2)), draw(st.integers(1, 2))],
        "padding": [draw(st.integers(0, 2)), draw(st.integers(0, 2))],
        "dilation": [draw(st.integers(1, 2)), draw(st.integers(1, 2))],
        "padding_mode": draw(st.sampled_from(["zeros", "reflect", "replicate", "circular"])),
    }
    if draw(st.integers(0, 4)) == 0:
        geometry |= {"padding": "same", "stride": [1, 1]}
    channels, outputs = draw(st.integers(1, 4)), draw(st.integers(1, 4))
    shape = (channels, draw(st.integers(5, 8)), draw(st.integers(5, 8)))
    host = nn.Conv2d(channels, outputs, device="meta", **geometry)
    produced = host(torch.empty((1, *shape), device="meta")).shape[1:]
    site = SiteContract(
        site="c",
        output_site="c",
        kind="conv2d",
        input_shape=shape,
        output_shape=tuple(produced),
        dtype="float32",
        attributes=geometry | {"groups": 1},
    )
    return site, draw(st.sampled_from(["bottleneck", "lowrank"])), {"rank": draw(st.integers(1, 6))}


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
@settings(max_examples=40, deadline=None)
@given(st.one_of(linear_cases(), conv2d_cases()), st.booleans(), st.integers(0, 2**31 - 1))
def test_a_newborn_is_exactly_zero_learns_everywhere_and_costs_what_it_says(case, with_samples, seed):
    site, name, hyperparameters = case
    dtype = getattr(torch, site.dtype)
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn((40, *site.input_shape), generator=generator)
    g = torch.randn((40, *site.output_shape), generator=generator)
    samples = SiteSamples(x, g) if with_samples else None
    files = build_kernel(name, site, hyperparameters, seed=seed, samples=samples, max_parameters=BUDGET)
    assert files == build_kernel(name, site, hyperparameters, seed=seed, samples=samples, max_parameters=BUDGET)
    kernel = load_kernel(files, files.digest)
    delta = kernel(x.to(dtype))
    assert tuple(delta.shape) == (40, *site.output_shape)
    assert delta.dtype == dtype
    assert not delta.detach().any()

    optimizer = torch.optim.AdamW(kernel.parameters(), lr=1e-2)
    learned = set()
    for _ in range(2):
        optimizer.zero_grad()
        kernel(x.to(dtype)).backward(g.to(dtype))
        learned |= {n for n, p in kernel.named_parameters() if p.grad is not None and p.grad.any()}
        optimizer.step()
    assert learned == {n for n, _ in kernel.named_parameters()}

    with FlopCounterMode(display=False) as counter:
        kernel(x[:1].to(dtype))
    assert cost(name, site, hyperparameters) == (
        sum(p.numel() for p in kernel.parameters()),
        counter.get_total_flops(),
    )


def test_another_process_builds_the_same_bytes(linear_site, draw_samples, tmp_path):
    samples = draw_samples(linear_site)
    files = build_kernel("bottleneck", linear_site, {}, seed=5, samples=samples, max_parameters=BUDGET)
    (tmp_path / "samples").write_bytes(pack_samples({"s": samples}))
    (tmp_path / "site").write_text(linear_site.model_dump_json())
    code = f"""
import torch
from pathlib import Path
from esper.contracts.assets import SiteContract
from esper.runtime.tezzeret.build import build_kernel
from esper.runtime.tezzeret.build import files_of
from esper.runtime.tezzeret.samples import unpack_samples
torch.set_num_threads(1)
torch.manual_seed(123)
folder = Path({str(tmp_path)!r})
samples = unpack_samples((folder / "samples").read_bytes())["s"]
site = SiteContract.model_validate_json((folder / "site").read_bytes())
print(build_kernel("bottleneck", site, {{}}, seed=5, samples=samples, max_parameters=10**6).digest)
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == files.digest


def test_building_and_loading_draw_no_global_random_number(linear_site, conv2d_site, draw_samples):
    before = torch.random.get_rng_state()
    for site in (linear_site, conv2d_site):
        samples = draw_samples(site)
        files = build_kernel("bottleneck", site, {}, seed=1, samples=samples, max_parameters=BUDGET)
        load_kernel(files, files.digest)
    assert torch.equal(before, torch.random.get_rng_state())


def test_a_seed_and_samples_each_change_the_kernel(linear_site, draw_samples):
    def digest(seed, samples):
        return build_kernel("bottleneck", linear_site, {}, seed=seed, samples=samples, max_parameters=BUDGET).digest

    samples = draw_samples(linear_site)
    found = {digest(0, None), digest(1, None), digest(0, samples), digest(0, draw_samples(linear_site, seed=9))}
    assert len(found) == 4


@pytest.mark.parametrize("kind", ["linear", "conv2d"])
@pytest.mark.parametrize("activation", ["relu", "gelu", "tanh", "silu", "sigmoid"])
def test_aligned_features_explain_more_of_the_residual_than_kaiming_ones(
    kind, activation, linear_site, conv2d_site, draw_samples
):
    site = linear_site if kind == "linear" else conv2d_site
    samples = planted_samples(site)

    def explained(given: SiteSamples | None) -> float:
        files = build_kernel(
            "bottleneck", site, {"rank": 8, "activation": activation}, seed=0, samples=given, max_parameters=BUDGET
        )
        kernel = load_kernel(files, files.digest)
        assert kernel.manifest.initialisation == ("kaiming" if given is None else "residual")
        down, name, _ = kernel.updown()
        act = {"relu": nn.ReLU, "gelu": nn.GELU, "tanh": nn.Tanh, "silu": nn.SiLU, "sigmoid": nn.Sigmoid}[name]()
        with torch.no_grad():
            hidden = act(down(samples.x)).double()
        inputs = samples.x.double()
        if kind == "conv2d":
            hidden = hidden.permute(0, 2, 3, 1)
            inputs = nn.functional.unfold(inputs, 3, padding=1).transpose(1, 2)
        gradient = samples.g.double() if kind == "linear" else samples.g.double().permute(0, 2, 3, 1)
        inputs = inputs.reshape(-1, inputs.shape[-1])
        basis = torch.cat((torch.ones(len(inputs), 1, dtype=torch.float64), inputs), dim=1)
        residual = off(basis, gradient.reshape(len(inputs), -1))
        features = off(basis, hidden.reshape(len(inputs), -1))
        return 1 - float(off(features, residual).square().sum() / residual.square().sum())

    assert explained(samples) > explained(None) + 0.05


def off(basis: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """What a linear function of the basis does not explain."""
    return values - basis @ torch.linalg.lstsq(basis, values, driver="gelsd").solution


def planted_samples(site: SiteContract) -> SiteSamples:
    """The gradient bends along three directions of the input that vary most."""
    generator = torch.Generator().manual_seed(4)
    rows = 1024 if site.kind == "linear" else 24
    x = torch.randn((rows, *site.input_shape), generator=generator)
    flat = x if site.kind == "linear" else nn.functional.unfold(x, 3, padding=1).transpose(1, 2).reshape(-1, 27)
    directions = torch.randn((3, flat.shape[1]), generator=generator) / math.sqrt(flat.shape[1])
    bent = (flat @ directions.T).abs() @ torch.randn((3, site.output_shape[0]), generator=generator)
    if site.kind == "linear":
        return SiteSamples(x, bent)
    return SiteSamples(x, bent.reshape(rows, 8, 8, -1).permute(0, 3, 1, 2))


def test_aligned_rows_make_pre_activations_vary_as_kaiming_ones(linear_site):
    samples = planted_samples(linear_site)

    def spread(given: SiteSamples | None) -> torch.Tensor:
        files = build_kernel("bottleneck", linear_site, {}, seed=0, samples=given, max_parameters=BUDGET)
        down, _, _ = load_kernel(files, files.digest).updown()
        with torch.no_grad():
            return nn.functional.linear(samples.x, down.weight).std(dim=0)

    aligned, kaiming = spread(samples), spread(None)
    assert torch.allclose(aligned, torch.full_like(aligned, math.sqrt(2.0)), rtol=0.05)
    assert 0.7 < float(aligned.mean() / kaiming.mean()) < 1.4


@pytest.mark.parametrize("empty", ["gradient", "input"])
def test_samples_that_say_nothing_leave_kaiming_weights(linear_site, draw_samples, empty):
    drawn = draw_samples(linear_site)
    blank = SiteSamples(drawn.x, drawn.g * 0) if empty == "gradient" else SiteSamples(drawn.x * 0, drawn.g)
    files = build_kernel("bottleneck", linear_site, {}, seed=0, samples=blank, max_parameters=BUDGET)
    assert load_kernel(files, files.digest).manifest.initialisation == "kaiming"


def test_few_rows_of_a_wide_input_still_align(draw_samples):
    site = SiteContract(
        site="w", output_site="w", kind="linear", input_shape=(300,), output_shape=(4,), dtype="float32"
    )
    files = build_kernel("bottleneck", site, {}, seed=0, samples=draw_samples(site, rows=16), max_parameters=BUDGET)
    kernel = load_kernel(files, files.digest)
    assert kernel.manifest.initialisation == "residual"
    assert all(p.isfinite().all() for p in kernel.parameters())


def test_more_units_than_are_aligned_are_filled_up(draw_samples):
    site = SiteContract(site="w", output_site="w", kind="linear", input_shape=(4,), output_shape=(2,), dtype="float32")
    files = build_kernel("bottleneck", site, {"rank": 300}, seed=0, samples=draw_samples(site), max_parameters=BUDGET)
    down, _, _ = load_kernel(files, files.digest).updown()
    assert down.weight.shape == (300, 4)
    assert not down.bias[256:].detach().any()


def test_samples_of_another_site_are_refused(linear_site, draw_samples):
    good = draw_samples(linear_site)
    bad = {
        "ESP-414": [
            SiteSamples(good.x[:, :5], good.g),
            SiteSamples(good.x, good.g[:5]),
            SiteSamples(good.x[:0], good.g[:0]),
        ],
        "ESP-417": [SiteSamples(good.x / 0, good.g), SiteSamples(good.x, good.g.long())],
    }
    for code, cases in bad.items():
        for samples in cases:
            with pytest.raises(BlueprintError) as caught:
                build_kernel("bottleneck", linear_site, {}, seed=0, samples=samples, max_parameters=BUDGET)
            assert caught.value.code == code


def test_a_kernel_over_the_budget_is_refused_before_anything_is_allocated():
    site = SiteContract(
        site="w", output_site="w", kind="linear", input_shape=(2**20,), output_shape=(2**20,), dtype="float32"
    )
    with pytest.raises(BlueprintError) as caught:
        build_kernel("bottleneck", site, {"rank": 65536}, seed=0, samples=None, max_parameters=10_000_000)
    assert caught.value.code == "ESP-416"
    assert "the budget is 10000000" in caught.value.message


def test_a_loaded_kernel_is_private_and_trainable(linear_site):
    files = build_kernel("bottleneck", linear_site, {}, seed=0, samples=None, max_parameters=BUDGET)
    one, two = load_kernel(files, files.digest), load_kernel(files, files.digest)
    assert [name for name, _ in one.named_parameters()] == ["down.weight", "down.bias", "up.weight"]
    assert all(p.requires_grad and p.is_leaf for p in one.parameters())
    storages = {p.untyped_storage().data_ptr() for kernel in (one, two) for p in kernel.parameters()}
    assert len(storages) == 6
    with torch.no_grad():
        one.get_parameter("down.weight").fill_(1.0)
    assert not torch.equal(one.get_parameter("down.weight"), two.get_parameter("down.weight"))
    assert load_kernel(files, files.digest).digest == files.digest == one.digest


def test_updown_shows_the_two_layers_and_the_activation(linear_site, conv2d_site):
    cases = [("bottleneck", linear_site, "relu"), ("lowrank", conv2d_site, "identity")]
    for name, site, activation in cases:
        files = build_kernel(name, site, {}, seed=0, samples=None, max_parameters=BUDGET)
        kernel = load_kernel(files, files.digest)
        down, found, up = kernel.updown()
        assert found == activation
        assert down is kernel.get_submodule("down")
        assert up is kernel.get_submodule("up")


def test_a_kernel_of_another_form_has_no_updown_but_runs(linear_site):
    def linear(node_id: str, source: str, out: int) -> dict[str, object]:
        return {"id": node_id, "op": "linear", "inputs": [source], "attributes": {"out_features": out, "bias": True}}

    document = {
        "inputs": {"x": [12]},
        "nodes": [linear("forward", "x", 3), linear("a-b", "forward", 4), linear("up", "a-b", 7)],
        "outputs": ["up"],
    }
    graph = parse_graph(document)
    files = files_of(graph, linear_site, seed=0, samples=None, blueprint="bottleneck", hyperparameters={})
    kernel = load_kernel(files, files.digest)
    assert kernel.updown() is None
    assert not kernel(torch.randn(2, 12)).detach().any()
    assert {name for name, _ in kernel.named_parameters()} == {
        f"{node}.{tensor}" for node in ("forward", "a-b", "up") for tensor in ("weight", "bias")
    }


def test_the_default_device_and_dtype_of_the_user_do_not_matter(linear_site, draw_samples):
    samples = draw_samples(linear_site)
    plain = build_kernel("bottleneck", linear_site, {}, seed=0, samples=samples, max_parameters=BUDGET)
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device("meta"):
            other = build_kernel("bottleneck", linear_site, {}, seed=0, samples=samples, max_parameters=BUDGET)
            kernel = load_kernel(other, other.digest)
    finally:
        torch.set_default_dtype(torch.float32)
    assert other == plain
    assert {p.dtype for p in kernel.parameters()} == {torch.float32}
    assert {p.device.type for p in kernel.parameters()} == {"cpu"}


def test_samples_travel_as_bytes(linear_site, pair_site, draw_samples):
    first, second = draw_samples(linear_site), draw_samples(linear_site, seed=1)
    data = pack_samples({"fc2": second, "fc1": first})
    assert data == pack_samples({"fc1": first, "fc2": second})
    found = unpack_samples(data)
    assert torch.equal(found["fc1"].x, first.x)
    pair = samples_for(pair_site, found)
    assert pair is not None
    assert torch.equal(pair.x, first.x)
    assert torch.equal(pair.g, second.g)
    assert samples_for(pair_site, {"fc1": first}) is None
    for damaged in (data[:-1], b"", b"\x80\x04cos\nsystem\n"):
        with pytest.raises(IntegrityError) as caught:
            unpack_samples(damaged)
        assert caught.value.code == "ESP-403"
