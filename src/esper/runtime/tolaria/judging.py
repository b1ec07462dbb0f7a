"""The verdict on a graft: a paired comparison with its twin, and nothing else."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist
from statistics import fmean
from statistics import stdev

from esper.contracts.enums import Verdict

CONFIDENCE = 0.95

_SMALL_SAMPLE_QUANTILES = (6.3138, 2.9200, 2.3534, 2.1318, 2.0150)
"""Student's t at 0.95 for 1..5 degrees of freedom, where the expansion below is not close enough."""


@dataclass(frozen=True)
class Judgement:
    """Losses are means over the chunks of the judge slice; `gain` is twin minus grown, `lower_bound` its one-sided
    95 % bound, `margin` what that bound must exceed. All are `None` where a loss was not finite."""

    verdict: Verdict
    reason: str
    grown_loss: float | None
    twin_loss: float | None
    gain: float | None
    lower_bound: float | None
    margin: float | None
    chunks: int = 0


def student_quantile(degrees: int) -> float:
    """The 0.95 quantile of Student's t (Abramowitz and Stegun, 26.7.5, four terms); error below 0.001."""
    if degrees <= len(_SMALL_SAMPLE_QUANTILES):
        return _SMALL_SAMPLE_QUANTILES[degrees - 1]
    z: float = NormalDist().inv_cdf(CONFIDENCE)
    terms: tuple[float, ...] = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
    )
    return z + math.fsum(term / degrees ** (power + 1) for power, term in enumerate(terms))


def judge(grown: Sequence[float], twin: Sequence[float], keep_margin: float) -> Judgement:
    """Keep the graft if the lower bound of its paired gain exceeds `keep_margin` times the twin's loss.

    `grown` and `twin` hold the mean losses of the same chunks in the same order. Without a margin, up to half of
    null grafts were kept. A grown loss that is not finite culls; a twin's that is not, keeps.
    """
    if not all(math.isfinite(loss) for loss in grown):
        return Judgement(Verdict.CULL, "the grown model's loss is not finite", None, None, None, None, None, len(grown))
    if not all(math.isfinite(loss) for loss in twin):
        return Judgement(
            Verdict.KEEP, "the twin's loss is not finite", fmean(grown), None, None, None, None, len(grown)
        )
    gains = [without - with_ for with_, without in zip(grown, twin, strict=True)]
    gain, grown_loss, twin_loss = fmean(gains), fmean(grown), fmean(twin)
    margin = keep_margin * abs(twin_loss)
    if len(gains) < 2:
        return Judgement(
            Verdict.CULL, "too few rows to judge on", grown_loss, twin_loss, gain, None, margin, len(gains)
        )
    bound = gain - student_quantile(len(gains) - 1) * stdev(gains) / math.sqrt(len(gains))
    keep = bound > margin
    share = f"{gain / abs(twin_loss):+.1%}" if twin_loss else f"{gain:+.3g}"
    reason = (
        f"loss {grown_loss:.4g} against {twin_loss:.4g} of the twin ({share}); lower bound of the gain {bound:.3g} "
        f"{'exceeds' if keep else 'does not exceed'} {margin:.3g}"
    )
    verdict = Verdict.KEEP if keep else Verdict.CULL
    return Judgement(verdict, reason, grown_loss, twin_loss, gain, bound, margin, len(gains))
