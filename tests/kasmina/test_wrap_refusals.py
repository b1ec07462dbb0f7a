from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch import nn

import esper


class NeedsKeyword(nn.Linear):
    def __init_subclass__(cls, *, colour: str) -> None:
        super().__init_subclass__()


class SuperOfOwnClass(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return super(self.__class__, self).forward(input)


class Bypassing(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.used = nn.Linear(4, 4)
        self.read = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(self.used(x), self.read.weight)


def replaced_forward() -> nn.Module:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
    model[0].forward = nn.Linear.forward.__get__(model[0])  # type: ignore[method-assign]
    return model


def with_attribute() -> nn.Module:
    model = nn.Sequential(nn.Linear(4, 4))
    model[0].kasmina = "taken"
    return model


def with_list() -> nn.Module:
    model = nn.Sequential()
    model.parts = nn.ModuleList([nn.Linear(4, 4)])
    return model


def distributed() -> nn.Module:
    class FSDPModule(nn.Module):
        __module__ = "torch.distributed.fsdp"

    wrapper = FSDPModule()
    wrapper.inner = nn.Linear(4, 4)
    return wrapper


@pytest.mark.parametrize(
    ("make", "arguments", "told"),
    [
        (lambda: esper.wrap(nn.Sequential(nn.Linear(4, 4))), {}, "already wrapped"),
        (lambda: nn.Sequential(esper.wrap(nn.Sequential(nn.Linear(4, 4)))), {}, "'0' is already wrapped"),
        (lambda: nn.Linear(4, 4), {}, "torch.nn.Sequential"),
        (lambda: nn.Sequential(nn.LazyLinear(4)), {}, "not initialised"),
        (lambda: nn.Sequential(nn.ReLU()), {}, "no supported layer"),
        (lambda: torch.jit.trace(nn.Sequential(nn.Linear(4, 4)), torch.ones(1, 4)), {}, "scripted"),
        (distributed, {}, "FSDPModule"),
        (lambda: torch.compile(nn.Sequential(nn.Linear(4, 4)), backend="eager"), {}, "OptimizedModule"),
        (lambda: nn.DataParallel(nn.Sequential(nn.Linear(4, 4))), {}, "DataParallel"),
        (lambda: nn.Sequential(SuperOfOwnClass(4, 4)), {}, "super\\(self.__class__"),
        (lambda: nn.Sequential(NeedsKeyword(4, 4)), {}, "colour"),
        (lambda: nn.Sequential(nn.MultiheadAttention(4, 2)), {"target_layers": ["0.out_proj"]}, "bypassed"),
        (lambda: nn.MultiheadAttention(4, 2), {}, "torch.nn.Sequential"),
        (replaced_forward, {"target_layers": ["0"]}, "bypassed"),
        (with_attribute, {"target_layers": ["0"]}, "attribute 'kasmina'"),
        (lambda: nn.Sequential(nn.Linear(4, 4)), {"target_layers": ["o"]}, "matches no layer"),
        (with_list, {"target_layers": ["parts"]}, "not supported: ModuleList"),
        (lambda: nn.Sequential(nn.Linear(4, 4)), {"target_layers": [nn.Conv2d]}, "candidates: 0"),
        (lambda: nn.Sequential(nn.Linear(4, 4)), {"target_layers": [3]}, "neither a layer class nor a glob"),
        (lambda: nn.Sequential(nn.Linear(4, 4)), {"exclude": ["*"]}, "no supported layer"),
        (lambda: "net", {}, "no torch.nn.Module"),
        (Bypassing, {"target_layers": ["read"], "example_inputs": torch.ones(1, 4)}, "not called"),
    ],
)
@pytest.mark.filterwarnings("ignore::Warning")
def test_wrap_refuses_by_name_and_changes_nothing(
    make: Callable[[], Any], arguments: dict[str, Any], told: str
) -> None:
    model = make()
    modules = list(model.modules()) if isinstance(model, nn.Module) else []
    classes = [type(module) for module in modules]
    with pytest.raises(esper.SiteError, match=told) as caught:
        esper.wrap(model, **arguments)
    assert caught.value.code == "ESP-314"
    assert [type(module) for module in modules] == classes


def test_near_names_are_offered() -> None:
    model = nn.Sequential()
    model.encoder = nn.Linear(4, 4)
    with pytest.raises(esper.SiteError, match="did you mean 'encoder'"):
        esper.wrap(model, ["encodr"])
    esper.wrap(model)
    with pytest.raises(esper.SiteError, match="did you mean 'encoder'"):
        esper.graft(model, "encoder1", "bottleneck")
    with pytest.raises(esper.SiteError, match="not a wrapped model"):
        esper.status(nn.Linear(2, 2))


@pytest.mark.parametrize("number", [0, -1, 65, True, 1.5])
def test_numbers_out_of_range_are_refused(number: Any) -> None:
    with pytest.raises(esper.ConfigurationError, match="seeds_per_layer") as caught:
        esper.wrap(nn.Sequential(nn.Linear(2, 2)), seeds_per_layer=number)
    assert caught.value.code == "ESP-204"


def test_auto_leaves_out_layers_whose_forward_is_bypassed() -> None:
    model = esper.wrap(Bypassing(), example_inputs=torch.ones(1, 4))
    assert [site.name for site in esper.status(model).sites] == ["used"]
    assert type(model.read) is nn.Linear
    attention = nn.Sequential()
    attention.attention = nn.MultiheadAttention(4, 2)
    attention.out = nn.Linear(4, 4)
    esper.wrap(attention)
    assert [site.name for site in esper.status(attention).sites] == ["attention", "out"]


def test_globs_classes_and_exclusions_choose_the_sites(zoo: Any) -> None:
    def sites(**arguments: Any) -> list[str]:
        return [site.name for site in esper.status(esper.wrap(zoo.cnn(), **arguments)).sites]

    assert sites() == ["conv1", "norm", "conv2", "head"]
    assert sites(target_layers=[nn.Conv2d]) == ["conv1", "conv2"]
    assert sites(target_layers=["*2", "head"]) == ["conv2", "head"]
    assert sites(exclude=[nn.Linear]) == ["conv1", "norm", "conv2"]
    assert sites(exclude=["conv?"]) == ["norm", "head"]


def test_failing_example_inputs_leave_the_model_as_it_was(zoo: Any) -> None:
    model, _ = zoo.make("cnn")
    before = esper.weights_digest(model)
    with pytest.raises(RuntimeError):
        esper.wrap(model, example_inputs=torch.ones(1, 7, 8, 8))
    assert not isinstance(model, esper.MorphableModel)
    assert type(model.conv1) is nn.Conv2d
    assert esper.weights_digest(model) == before


def test_shared_layer_is_one_site_under_its_first_name() -> None:
    model = nn.Sequential()
    model.first = nn.Linear(4, 4)
    model.again = model.first
    esper.wrap(model)
    assert [site.name for site in esper.status(model).sites] == ["first"]
    model(torch.ones(1, 4))
    assert esper.graft(model, "again", "lowrank").site == "first"


def test_auto_may_stand_among_other_targets():
    model = nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 4), nn.ReLU()), nn.Linear(4, 2))
    esper.wrap(model, ["auto", "1"], example_inputs=torch.randn(2, 4))
    assert [(site.name, site.kind) for site in esper.status(model).sites] == [
        ("0", "linear"),
        ("1", "block"),
        ("1.0", "linear"),
        ("2", "linear"),
    ]


def test_named_site_that_is_never_called_is_refused_beside_auto():
    model = nn.Sequential(nn.Linear(4, 4))
    model.idle = nn.Sequential(nn.Identity())
    model.forward = lambda x: model[0](x)
    with pytest.raises(esper.SiteError, match="'idle' cannot be a site"):
        esper.wrap(model, ["auto", "idle"], example_inputs=torch.randn(2, 4))
