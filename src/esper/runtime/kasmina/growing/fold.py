"""Folding what was grown into the weights of its host, where the algebra allows: no block, no extra latency.

`lowrank` is a sum of weights: W += alpha B A. `scale_shift` scales them. `widen` is a longer hidden layer: A and a are
appended to the first layer, alpha B to the second, and to the BatchNorms between what the block's own have learnt.
Sums are only folded in float32 or wider (bfloat16 loses 12-23 % of a small delta); what is appended is exact in any.
Everything else stays a plain module beside its host, and the plan says why. Heads beside an `nn.MultiheadAttention`
stay, because torch ties the width of its heads to `embed_dim`.
"""

from torch import nn

from esper.runtime.kasmina.bank import Slot
from esper.runtime.kasmina.growing.folding.changes import Fold
from esper.runtime.kasmina.growing.folding.scales import plan_scale
from esper.runtime.kasmina.growing.folding.sums import plan_sum
from esper.runtime.kasmina.growing.folding.units import plan_units
from esper.runtime.kasmina.growing.optimizer import Optimizers
from esper.runtime.kasmina.layer import state_of
from esper.runtime.kasmina.wrapping.hosts import kind_named
from esper.runtime.tezzeret.build import KernelModule
from esper.runtime.tezzeret.ir import INPUT

_MATRICES = (["linear", "linear"], ["conv1d", "conv1d"], ["conv2d", "conv2d"], ["embedding", "linear"])


def plan_fold(
    model: nn.Module,
    module: nn.Module,
    slot: Slot,
    optimizer: Optimizers | None,
    *,
    alone: bool = False,
) -> Fold | str:
    """How a slot's kernel becomes part of its host, or why it cannot. Nothing is changed.

    `alone` asks as if no other block shared the width between the two layers of a pair.
    """
    kernel = slot.kernel
    if not isinstance(kernel, KernelModule):
        return "it is no kernel of Tezzeret's"
    nodes = kernel.manifest.graph.nodes
    if len(nodes) == 1 and nodes[0].op == "subtract" and nodes[0].inputs == (INPUT, INPUT):
        return Fold(())
    chain = kernel.chain()
    operations = None if chain is None else [op for _, op, _ in chain]
    if slot.output_site not in (None, state_of(module).name):
        if chain is None:
            return "its kernel is not a chain of operations"
        return plan_units(model, module, slot, chain, optimizer, alone=alone)
    if chain is not None and operations in _MATRICES and slot.reads == "input":
        return plan_sum(model, module, slot, chain[0][2], chain[-1][2])
    if chain is not None and operations == ["affine"] and slot.reads == "output":
        return plan_scale(model, module, slot, chain[0][2], optimizer)
    if any(node.op == "self_attention" for node in nodes) and kind_named(state_of(module).kind).form == "attention":
        return "nn.MultiheadAttention ties the width of its heads to embed_dim: more heads are a module of their own"
    bent = next((node for node in nodes if node.op not in _LINEAR), None)
    if bent is None:
        return f"its operations ({', '.join(node.op for node in nodes)}) are not one weight of its host"
    return f"{bent.attributes.get('name', bent.op)} stands between its input and its output"


_LINEAR = ("linear", "conv1d", "conv2d", "embedding", "affine")
