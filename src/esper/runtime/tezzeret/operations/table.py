"""The allow-list of the kernel IR: every operation by its name.

A new kind of operation is one more entry in its family's table and one more module in `module.MODULES`; nothing
else in the forge knows how many there are. No torch is imported: the orchestrator and the strategist read costs.
"""

from collections.abc import Mapping

from esper.runtime.tezzeret.operations.convolutions import CONVOLUTIONS
from esper.runtime.tezzeret.operations.elementwise import ELEMENTWISE
from esper.runtime.tezzeret.operations.kinds import Operation
from esper.runtime.tezzeret.operations.matrices import MATRICES
from esper.runtime.tezzeret.operations.norms import NORMS
from esper.runtime.tezzeret.operations.pooling import POOLING

OPERATIONS: Mapping[str, Operation] = {**MATRICES, **CONVOLUTIONS, **ELEMENTWISE, **NORMS, **POOLING}
