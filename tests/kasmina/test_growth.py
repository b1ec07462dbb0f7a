import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch import nn

import esper
from esper.contracts.enums import SeedState
from esper.runtime.kasmina import growth
from esper.runtime.kasmina.bank import add_seeds
from esper.runtime.kasmina.layer import state_of
from esper.runtime.tezzeret.artifact import KernelFiles
from esper.runtime.tezzeret.build import build_kernel
from esper.runtime.tezzeret.build import load_kernel

OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9),
    "adam": lambda p: torch.optim.Adam(p, lr=0.01),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1),
}


def step(model: nn.Module, x: Tensor, optimizer: torch.optim.Optimizer) -> float:
    optimizer.zero_grad()
    loss = (model(x) - 1.0).square().mean()
    loss.backward()
    optimizer.step()
    return float(loss.detach())


def snapshot(optimizer: torch.optim.Optimizer, parameters: list[nn.Parameter]) -> list[dict[str, Any]]:
    return [{k: copy.deepcopy(v) for k, v in optimizer.state[p].items()} for p in parameters]


def stored_kernel(model: nn.Module, site: str, blueprint: str = "bottleneck", **given: Any) -> KernelFiles:
    contract = growth.site_contract(model, site, blueprint)
    return build_kernel(blueprint, contract, given, seed=3, samples=None, max_parameters=10**6)


GRAFTS = [
    ("mlp", "fc1", "bottleneck"),
    ("mlp", "fc2", "lowrank"),
    ("mlp", "fc1", "widen"),
    ("cnn", "conv1", "bottleneck"),
    ("cnn", "conv2", "bottleneck"),
    ("cnn", "conv2", "lowrank"),
    ("cnn", "head", "bottleneck"),
    ("normed", "fc1", "bottleneck"),
    ("tied", "first", "lowrank"),
]


@pytest.mark.parametrize(("name", "site", "blueprint"), GRAFTS)
def test_grafted_seed_preserves_function_and_learns_within_two_steps(
    zoo: Any, name: str, site: str, blueprint: str
) -> None:
    model, x = zoo.make(name)
    esper.wrap(model, example_inputs=x).eval()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    before = model(x)
    made = esper.graft(model, site, blueprint, optimizer=optimizer)
    assert float((model(x) - before).detach().abs().max()) == 0.0
    assert made.birth_difference == 0.0
    assert made.certificate is not None and made.certificate.passed
    grown = {n: p for n, p in model.named_parameters() if ".kasmina." in n}
    assert tuple(grown) == made.parameter_names
    assert all(n.startswith(f"{site}.kasmina.0.") for n in grown)
    first = {n: p.detach().clone() for n, p in grown.items()}
    moved: set[str] = set()
    for _ in range(2):
        step(model, x, optimizer)
        moved |= {n for n, p in grown.items() if p.grad is not None and bool(p.grad.any())}
    assert moved == set(grown)
    assert all(not torch.equal(first[n], p) for n, p in grown.items())


def test_every_birth_beside_other_seeds_is_exact(zoo: Any) -> None:
    model, x = zoo.make("mlp")
    esper.wrap(model, example_inputs=x)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    for blueprint in ("bottleneck", "bottleneck", "widen", "bottleneck"):
        before = model(x)
        esper.graft(model, "fc1", blueprint, optimizer=optimizer)
        assert torch.equal(model(x), before)
        for _ in range(3):
            step(model, x, optimizer)


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_graft_leaves_the_state_of_old_parameters_alone(zoo: Any, kind: str) -> None:
    model, x = zoo.make("mlp")
    esper.wrap(model, example_inputs=x)
    optimizer = OPTIMIZERS[kind](model.parameters())
    for _ in range(3):
        step(model, x, optimizer)
    old = list(model.parameters())
    before, settings = snapshot(optimizer, old), {k: v for k, v in optimizer.param_groups[0].items() if k != "params"}
    made = esper.graft(model, "fc1", "bottleneck", optimizer=optimizer, rank=3)
    after = snapshot(optimizer, old)
    for left, right in zip(before, after, strict=True):
        assert left.keys() == right.keys()
        assert all(torch.equal(left[k], right[k]) for k in left)
    assert len(optimizer.param_groups) == 1
    assert {k: v for k, v in optimizer.param_groups[0].items() if k != "params"} == settings
    newborn = [dict(model.named_parameters())[name] for name in made.parameter_names]
    assert all(p not in optimizer.state for p in newborn)
    assert all(any(p is q for q in optimizer.param_groups[0]["params"]) for p in newborn)


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_old_parameters_take_the_same_next_step_as_without_the_graft(zoo: Any, kind: str) -> None:
    ends = []
    for grow in (False, True):
        model, x = zoo.make("mlp")
        esper.wrap(model, example_inputs=x)
        optimizer = OPTIMIZERS[kind](model.parameters())
        for _ in range(3):
            step(model, x, optimizer)
        if grow:
            esper.graft(model, "fc2", "bottleneck", optimizer=optimizer)
        step(model, x, optimizer)
        ends.append([p.detach().clone() for n, p in model.named_parameters() if ".kasmina." not in n])
    # The newborn's last weights are zero: it sends no gradient to anything in its first step.
    assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))


@pytest.mark.parametrize("kind", ["lambda", "onecycle"])
def test_schedulers_go_on_working(zoo: Any, kind: str) -> None:
    model, x = zoo.make("mlp")
    esper.wrap(model, example_inputs=x)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    scheduler: Any = (
        torch.optim.lr_scheduler.LambdaLR(optimizer, lambda n: 1 / (n + 1))
        if kind == "lambda"
        else torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.1, total_steps=20)
    )
    rates = []
    for number in range(8):
        if number == 3:
            esper.graft(model, "fc1", "bottleneck", optimizer=optimizer)
        step(model, x, optimizer)
        scheduler.step()
        rates.append(scheduler.get_last_lr())
    assert all(len(rate) == 1 for rate in rates)
    assert len({rate[0] for rate in rates}) > 4


@pytest.mark.parametrize("kind", OPTIMIZERS)
@pytest.mark.parametrize("blueprint", ["bottleneck", "widen"])
def test_cull_gives_the_host_back_to_the_bit(zoo: Any, kind: str, blueprint: str) -> None:
    model, x = zoo.make("mlp")
    esper.wrap(model, example_inputs=x)
    optimizer = OPTIMIZERS[kind](model.named_parameters())
    step(model, x, optimizer)
    names = list(model.state_dict())
    esper.graft(model, "fc1", blueprint, optimizer=optimizer)
    assert optimizer.param_groups[0]["param_names"][-1] == "fc1.kasmina.0.up.weight"
    step(model, x, optimizer)
    step(model, x, optimizer)
    with esper.dormant(model):
        host = model(x)
    assert not torch.equal(host, model(x))
    esper.cull(model, "fc1", optimizer=optimizer)
    assert torch.equal(model(x), host)
    assert list(model.state_dict()) == names
    assert len(optimizer.state) == len(optimizer.param_groups[0]["params"]) == len(names)
    assert optimizer.param_groups[0]["param_names"] == names
    assert "kasmina" not in model.fc1._modules
    assert not model._forward_hooks and not model._forward_pre_hooks
    assert state_of(model.fc1).slots[0].seed.generation == 1
    step(model, x, optimizer)


def test_dormant_context_nests_and_restores(zoo: Any) -> None:
    model, x = zoo.make("cnn")
    model.eval()
    original = model(x)
    esper.wrap(model)(x)
    esper.graft(model, "conv2", "bottleneck")
    with torch.no_grad():
        model.conv2.kasmina["0"].up.weight.normal_()
    grown = model(x)
    with esper.dormant(model):
        with esper.dormant(model):
            assert torch.equal(model(x), original)
        assert torch.equal(model(x), original)
    assert torch.equal(model(x), grown)
    assert not torch.equal(grown, original)


@pytest.mark.parametrize(("name", "site", "shape"), [("mlp", "fc2", (8, 5)), ("cnn", "conv2", (8, 4, 8, 8))])
def test_wide_pass_equals_the_loop(zoo: Any, name: str, site: str, shape: tuple[int, ...]) -> None:
    model, x = zoo.make(name)
    esper.wrap(model, example_inputs=x)
    for rank in (2, 3, 4):
        esper.graft(model, site, "bottleneck", rank=rank)
    esper.graft(model, site, "lowrank")
    layer = model.get_submodule(site)
    for kernel in layer.kasmina.values():
        nn.init.normal_(kernel.up.weight)
    growth.set_alpha(model, site, 1, 0.25)
    slots = state_of(layer).live
    h = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    layer.double()
    with torch.no_grad():
        host = type(layer).__mro__[1].forward(layer, h)
    wide = add_seeds(host, h, slots)
    loop = host + sum(slot.alpha * slot.kernel(h) for slot in slots)
    torch.testing.assert_close(wide, loop)
    ours = torch.autograd.grad(wide.square().sum(), [h, *layer.kasmina.parameters()])
    theirs = torch.autograd.grad(loop.square().sum(), [h, *layer.kasmina.parameters()])
    for left, right in zip(ours, theirs, strict=True):
        torch.testing.assert_close(left, right)
    assert all(not slot.newborn for slot in slots)


def test_graft_refusals_name_what_is_wrong(zoo: Any) -> None:
    model, x = zoo.make("mlp")
    esper.wrap(model, seeds_per_layer=1)
    with pytest.raises(esper.GrowthError, match="has not been called yet"):
        esper.graft(model, "fc1", "bottleneck")
    model(x)
    before = esper.weights_digest(model)
    with pytest.raises(esper.BlueprintError, match="did you mean 'bottleneck'"):
        esper.graft(model, "fc1", "bottlenek")
    with pytest.raises(esper.BlueprintError, match="did you mean 'rank'"):
        esper.graft(model, "fc1", "bottleneck", rnk=3)
    with pytest.raises(esper.SiteError, match="did you mean"):
        esper.graft(model, "fc11", "bottleneck")
    with pytest.raises(esper.GrowthError, match="seeds 0 to 0"):
        esper.graft(model, "fc1", "bottleneck", seed=1)
    with pytest.raises(esper.GrowthError, match="has relu between"):
        esper.graft(model, "fc1", "widen", activation="tanh")
    with pytest.raises(esper.GrowthError, match="nothing that could be removed"):
        esper.cull(model, "fc1")
    with pytest.raises(esper.GrowthError, match="nothing is on probation"):
        esper.fossilize(model, "fc1")
    with pytest.raises(esper.NotFoundError):
        esper.graft(model, "fc1", "bottleneck", kernel="sha256:" + "0" * 64)
    for blueprint in ("depthwise", "widen"):
        with pytest.raises(esper.GrowthError, match="does not fit 'fc3'") as refused:
            esper.graft(model, "fc3", blueprint)
        assert refused.value.hint is not None
        assert refused.value.hint.startswith("what fits there: bottleneck, depth_block, lowrank")
    with pytest.raises(esper.BlueprintError, match="unknown blueprint"):
        esper.graft(model, "fc1", None)
    with pytest.raises(esper.SiteError, match="is no layer of this model"):
        esper.graft(model, 1, "bottleneck")
    with pytest.raises(esper.GrowthError, match="a int is no kernel"):
        esper.graft(model, "fc1", "bottleneck", kernel=3)
    esper.graft(model, "fc2", "bottleneck")
    with pytest.raises(esper.GrowthError, match="all 1 seeds"):
        esper.graft(model, "fc2", "bottleneck")
    with pytest.raises(esper.GrowthError, match="is taken"):
        esper.graft(model, "fc2", "bottleneck", seed=0)
    esper.cull(model, "fc2")
    assert esper.weights_digest(model) == before


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_nothing_grows_beside_weights_that_are_not_finite(zoo: Any, value: float) -> None:
    model, x = zoo.make("mlp")
    esper.wrap(model, example_inputs=x)
    esper.graft(model, "fc1", "bottleneck")
    status, held = esper.status(model), model.fc2.weight[1, 1].item()
    with torch.no_grad():
        model.fc2.weight[1, 1] = value
    digest = esper.weights_digest(model)
    for site, blueprint in (("fc2", "bottleneck"), ("fc1", "widen")):
        with pytest.raises(esper.GrowthError, match=r"'fc2' has weights that are not finite: weight") as refused:
            esper.graft(model, site, blueprint)
        assert refused.value.code == "ESP-435"
    assert (esper.status(model), esper.weights_digest(model)) == (status, digest)
    with torch.no_grad():
        model.fc2.weight[1, 1] = held
        model.fc1.kasmina.get_submodule("0").up.weight[0, 0] = value
    with pytest.raises(esper.GrowthError, match=r"not finite: kasmina\.0\.up\.weight"):
        esper.fossilize(model)
    assert esper.status(model) == status
    esper.cull(model, "fc1")
    esper.graft(model, "fc2", "bottleneck")


@pytest.mark.fault("A8", "A11")
def test_stored_kernels_are_grafted_and_foreign_or_broken_ones_refused(zoo: Any) -> None:
    model, x = zoo.make("mlp")
    esper.wrap(model, example_inputs=x)
    files = stored_kernel(model, "fc1", rank=4)
    made = esper.graft(model, "fc1", "bottleneck", kernel=files)
    assert made.kernel == files.digest
    kernel = load_kernel(files, files.digest)
    with pytest.raises(esper.GrowthError, match="does not fit 'fc3'"):
        growth.attach(model, "fc3", kernel)
    with pytest.raises(esper.GrowthError, match="not a 'lowrank'"):
        esper.graft(model, "fc1", "lowrank", kernel=files)
    with pytest.raises(esper.GrowthError, match="leave them out"):
        esper.graft(model, "fc1", "bottleneck", kernel=files, rank=2)
    nn.init.normal_(kernel.up.weight)
    with pytest.raises(esper.GrowthError, match="would change the output") as caught:
        growth.attach(model, "fc1", kernel)
    assert caught.value.code == "ESP-436"
    before = model(x)
    trained = esper.graft(model, "fc1", "bottleneck", kernel=kernel)
    assert trained.alpha == 0.0
    assert torch.equal(model(x), before)
    growth.set_alpha(model, "fc1", trained.seed, 0.5)
    assert not torch.equal(model(x), before)
    broken = load_kernel(files, files.digest)
    with torch.no_grad():
        broken.down.weight[0, 0] = float("nan")
    with pytest.raises(esper.GrowthError, match=r"not finite: down\.weight") as caught:
        growth.attach(model, "fc1", broken)
    assert caught.value.code == "ESP-435"


def test_equal_models_grow_equal_weights_and_no_generator_is_touched(zoo: Any) -> None:
    digests = set()
    for _ in range(2):
        model, x = zoo.make("mlp")
        esper.wrap(model, example_inputs=x)
        before = torch.get_rng_state()
        esper.graft(model, "fc1", "bottleneck")
        assert torch.equal(torch.get_rng_state(), before)
        digests.add(esper.weights_digest(model))
    assert len(digests) == 1


def test_states_follow_the_lifecycle_table(zoo: Any) -> None:
    model, x = zoo.make("mlp")
    esper.wrap(model, example_inputs=x)
    assert growth.set_state(model, "fc1", 2, SeedState.GERMINATED).state is SeedState.GERMINATED
    with pytest.raises(esper.GrowthError, match="attach one"):
        growth.set_state(model, "fc1", 2, SeedState.TRAINING)
    growth.set_state(model, "fc1", 2, SeedState.CULLED)
    assert growth.set_state(model, "fc1", 2, SeedState.DORMANT).generation == 1
    esper.graft(model, "fc1", "lowrank", seed=2)
    with pytest.raises(esper.GrowthError, match="use cull"):
        growth.set_state(model, "fc1", 2, SeedState.CULLED)
    with pytest.raises(esper.GrowthError, match="cannot become fossilized"):
        growth.set_state(model, "fc1", 2, SeedState.FOSSILIZED)
    assert growth.set_state(model, "fc1", 2, SeedState.GRAFTING).state is SeedState.GRAFTING
    with pytest.raises(esper.GrowthError, match="from 0 to 1"):
        growth.set_alpha(model, "fc1", 2, 1.5)
    with pytest.raises(esper.GrowthError, match="has no alpha"):
        growth.set_alpha(model, "fc1", 0, 0.5)


def test_status_prints_a_readable_table(zoo: Any) -> None:
    model, x = zoo.make("mlp")
    hosts = sum(p.numel() for p in model.parameters())
    esper.wrap(model, seeds_per_layer=2)
    assert "not called yet" in str(esper.status(model))
    model(x)
    made = esper.graft(model, "fc2", "bottleneck", rank=3)
    found = esper.status(model)
    assert found.host_parameters == hosts
    assert found.grown_parameters == made.parameters == 5 * 3 + 3 + 3 * 5
    assert found.generation == 1
    seed = found.sites[1].seeds[0]
    assert (seed.state, seed.blueprint, seed.kernel) == (SeedState.TRAINING, "bottleneck", made.kernel)
    lines = str(found).splitlines()
    assert lines[0].split() == ["site", "kind", "seed", "state", "blueprint", "parameters", "kernel"]
    assert any("fc2" in line and "training" in line and made.kernel[7:19] in line for line in lines)
    assert lines[-1] == f"{hosts} host parameters, 33 grown, generation 1"


def test_fused_encoder_path_is_left_only_where_something_is_grown() -> None:
    encoder = nn.TransformerEncoder(
        nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True), 2, enable_nested_tensor=True
    )
    model = nn.Sequential()
    model.encoder = encoder
    model.eval()
    x = torch.randn(3, 5, 8)
    with torch.no_grad():
        fused = model(x)
    esper.wrap(model, example_inputs=x)
    names = [site.name for site in esper.status(model).sites]
    inside = ("self_attn", "linear1", "linear2", "norm1", "norm2")
    assert names == [f"encoder.layers.{i}.{part}" for i in (0, 1) for part in inside]
    with torch.no_grad():
        assert torch.equal(model(x), fused)
        esper.graft(model, "encoder.layers.1.linear1", "bottleneck")
        torch.testing.assert_close(model(x), fused)
        born = model(x)
        nn.init.normal_(encoder.layers[1].linear1.kasmina["0"].up.weight)
        assert not torch.allclose(model(x), born)
        assert encoder.layers[0].activation_relu_or_gelu == 1
        with esper.dormant(model):
            assert torch.equal(model(x), fused)
        grown = model(x)
        plain = esper.unwrap(copy.deepcopy(model))
        torch.testing.assert_close(plain(x), grown)
        esper.cull(model, "encoder.layers.1.linear1")
        assert torch.equal(model(x), fused)


def test_a_nan_in_an_old_seed_does_not_stop_others_from_being_culled(zoo: Any) -> None:
    model, x = zoo.make("mlp")
    esper.wrap(model, example_inputs=x)
    with esper.dormant(model):
        host = model(x)
    esper.graft(model, "fc1", "bottleneck")
    with torch.no_grad():
        model.fc1.kasmina["0"].up.weight.fill_(float("nan"))
    assert bool(model(x).isnan().any())
    esper.cull(model, "fc1")
    assert torch.equal(model(x), host)


def test_layers_of_a_users_own_class_grow_too() -> None:
    class Scaled(nn.Linear):
        def forward(self, input: Tensor, scale: float = 2.0) -> Tensor:
            return scale * super().forward(input)

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = Scaled(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(input=x, scale=3.0)

    x = torch.randn(5, 4)
    model = Net()
    expected = model(x)
    esper.wrap(model)
    assert torch.equal(model(x), expected)
    esper.graft(model, "layer", "lowrank")
    assert torch.equal(model(x), expected)
    esper.fossilize(model)
    assert not esper.status(model).sites[0].seeds[0].folded
    with torch.no_grad():
        model.layer.kasmina["0"].up.weight.fill_(0.1)
    grown = model(x)
    torch.testing.assert_close(esper.unwrap(model)(x), grown)


def test_sequences_and_unbatched_inputs_grow(zoo: Any) -> None:
    model = esper.wrap(zoo.mlp(), example_inputs=torch.randn(2, 7, 6))
    before = model(torch.randn(3, 7, 6, generator=torch.Generator().manual_seed(0)))
    esper.graft(model, "fc1", "bottleneck")
    esper.graft(model, "fc1", "widen")
    assert torch.equal(model(torch.randn(3, 7, 6, generator=torch.Generator().manual_seed(0))), before)
    single = esper.wrap(zoo.mlp(), example_inputs=torch.randn(6))
    esper.graft(single, "fc2", "bottleneck")
    assert single(torch.randn(6)).shape == (3,)
