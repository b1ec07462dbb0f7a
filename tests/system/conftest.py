"""One real stack for the whole layer: supervisor, dev server, orchestrator, trainers, forge and strategist."""

from checked_runs import every_run_is_judged as every_run_is_judged
from stack_fixture import stack as stack
