"""The pairs of layers between which units can be added, as one forward showed them."""

from collections.abc import Mapping

from torch import nn

from esper.runtime.kasmina.growing.between import FORMS
from esper.runtime.kasmina.growing.between import MAX_PARTS
from esper.runtime.kasmina.growing.between import Pair
from esper.runtime.kasmina.growing.between import PairsFound
from esper.runtime.kasmina.growing.between import Step
from esper.runtime.kasmina.growing.between import pair_between
from esper.runtime.kasmina.growing.folding.obstacles import pair_obstacle
from esper.runtime.kasmina.layer import state_of
from esper.runtime.kasmina.wrapping.hosts import kind_named
from esper.runtime.kasmina.wrapping.morphable import sites_of
from esper.runtime.kasmina.wrapping.observation import Call
from esper.runtime.kasmina.wrapping.observation import Node
from esper.runtime.kasmina.wrapping.observation import Observation


def pairs_seen(model: nn.Module, seen: Observation, makers: Mapping[Node, list[Call]]) -> PairsFound:
    """The pairs whose hidden units nothing else read, and why other layers begin none. `makers` are the calls that
    returned each node's result."""
    sites = sites_of(model)
    modules = dict(model.named_modules())
    norms = _norms(model)
    count: dict[str, int] = {}
    for call in seen.calls:
        count[call.site] = count.get(call.site, 0) + 1
    found: dict[str, list[Pair | str]] = {}
    for call in seen.calls:
        if not _may_pair(sites[call.site]):
            continue
        chain = _chain_before(call, sites, seen, makers, norms)
        if chain is None:
            continue
        maker, steps, obstacle = chain
        pair: Pair | str
        if obstacle is not None:
            pair = obstacle
        else:
            pair = pair_between(steps, sites[maker.site], sites[call.site], len(maker.output_shape), modules)
        found.setdefault(maker.site, []).append(pair)
    pairs: dict[str, Pair] = {}
    refusals = {name: "no layer of its kind follows that alone reads its units" for name in count}
    for first, results in found.items():
        reason = next((result for result in results if isinstance(result, str)), None)
        if reason is None:
            kept = [result for result in results if isinstance(result, Pair)]
            reason = _together(first, kept, count, seen, norms)
            reason = reason or pair_obstacle(model, sites[first], sites[kept[0].second], kept[0].norms)
            pairs[first] = kept[0]
        if reason is None:
            del refusals[first]
        else:
            pairs.pop(first, None)
            refusals[first] = reason
    return PairsFound(pairs, refusals)


def _together(
    first: str, pairs: list[Pair], count: Mapping[str, int], seen: Observation, norms: Mapping[int, str]
) -> str | None:
    """Every call of either layer and of the norms must belong to the pair: another user of one of them would see the
    new units."""
    pair = pairs[0]
    if any(other != pair for other in pairs) or first == pair.second:
        return "more than one layer follows it"
    if not len(pairs) == count[first] == count[pair.second]:
        return f"it and '{pair.second}' are not always called together"
    for norm in pair.norms:
        called = sum(any(norms.get(key) == norm for key in ids) for ids in seen.norm_calls)
        if called != len(pairs):
            return f"'{norm}' is called {called} times, it and '{pair.second}' {len(pairs)}"
    return None


def _chain_before(
    call: Call,
    sites: Mapping[str, nn.Module],
    seen: Observation,
    makers: Mapping[Node, list[Call]],
    norms: Mapping[int, str],
) -> tuple[Call, list[Step], str | None] | None:
    """The nearest layer before a call that leads to nothing else, the steps between the two, and why they cannot be
    a pair where that shows; None where the way back does not lead to one layer."""
    steps: list[Step] = []
    passed: list[Node] = []
    node = call.input_node
    alone = True
    while node is not None and len(steps) <= 2 * MAX_PARTS:
        passed.append(node)
        alone = alone and seen.readers.get(node) == 1
        first = next((maker for maker in makers.get(node, ()) if _may_pair(sites[maker.site])), None)
        if first is not None:
            steps.reverse()
            obstacle = None if alone else "what it returns, or what is made of that, is read in more than one place"
            if obstacle is None:
                between = {norm for step in steps if (norm := step.norm) is not None}
                obstacle = _border(passed, {first.site, call.site} | between, seen, sites)
            return first, steps, obstacle
        made = seen.made.get(node)
        if made is None or len(made.below) != 1:
            return None
        norm = None
        if made.function == "batch_norm":
            given = [*made.args, *made.kwargs.values()]
            norm = next((norms[value] for value in given if isinstance(value, int) and value in norms), None)
        steps.append(Step(made.function, made.args, made.kwargs, norm))
        (node,) = made.below
    return None


def _border(passed: list[Node], within: set[str], seen: Observation, sites: Mapping[str, nn.Module]) -> str | None:
    """The units must not enter or leave a block beside which something could be grown: it would have their width."""
    for call in seen.calls:
        crosses = call.site not in within and any(node in passed for node in (*call.inputs, *call.outputs))
        if crosses and kind_named(state_of(sites[call.site]).kind).form == "block":
            return f"the units behind it enter or leave '{call.site}', where something could be grown"
    return None


def _may_pair(module: nn.Module) -> bool:
    return kind_named(state_of(module).kind).form in FORMS


def _norms(model: nn.Module) -> dict[int, str]:
    """The BatchNorm that each of its tensors belongs to, by the tensor's id; ones that share a tensor are left out."""
    owners: dict[int, list[str]] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            for tensor in (module.weight, module.bias, module.running_mean, module.running_var):
                if tensor is not None:
                    owners.setdefault(id(tensor), []).append(name)
    return {key: names[0] for key, names in owners.items() if len(names) == 1}
