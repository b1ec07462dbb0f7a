"""The task queues: who serves what. The names stand here and nowhere else."""

ORCHESTRATION = "esper-orchestration"
TRAINER = "esper-trainer"
TAMIYO = "esper-tamiyo"
FORGE = "esper-forge"


def pinned_trainer(host: str, pid: int, nonce: str) -> str:
    """The queue that one trainer process alone serves."""
    return f"{TRAINER}@{host}-{pid}-{nonce}"
