"""Every number that the heuristic policy decides with, once, with where it comes from.

"Calibration" is a study in plain PyTorch: digits, digits-cnn and teacher with 5 seeds each, two states of every run,
every (site, blueprint) pair grown from one snapshot on the same batches and compared with its twin after the hold
and at the end; beside them the same tasks with hosts that are large enough.
"""

from esper.runtime.kasmina.health.scores import EVIDENCE_THRESHOLDS
from esper.runtime.kasmina.health.scores import Threshold

THRESHOLDS: dict[str, Threshold] = {
    **EVIDENCE_THRESHOLDS,
    "learning": Threshold(
        0.10,
        "Calibration: the hosts that are too small fall below it at 20 to 30 % of their run (teacher epoch 6 of 30, "
        "digits 15 of 60, digits-cnn 4 of 20); a digits host of width 64 learns faster than that for 60 % of its run. "
        "Grafts at 13 and 25 % of digits end alike, and later ones are judged with less noise.",
    ),
    "overfitting": Threshold(
        1.50,
        "Calibration: validation over training loss is 0.4 to 1.1 from start to end for every host that is too small, "
        "and 4 to 430 for a digits host of width 64, which every graft made worse.",
    ),
    "last_progress": Threshold(
        0.70,
        "Growth in the last 25 to 30 % of a run lost to no growth in every pilot (growth-facts 6.2): newborn "
        "weights need time, and a learning rate below a fifth of its peak gives them none.",
    ),
    "cooldown_holds": Threshold(
        2.0,
        "Hold windows after the end of a graft that did not stay before the same blueprint is tried there again: "
        "the twin has just measured that it does not pay, and a host changes little within one window.",
    ),
}


def threshold(name: str) -> float:
    """The value of one entry; `KeyError` for a name that is not in the table."""
    return THRESHOLDS[name].value
