"""One finished update, the value that `Run.train` yields."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from markupsafe import Markup


@dataclass(frozen=True)
class Update:
    """One finished update of the policy."""

    step: int
    """1, 2, ..."""
    metrics: Mapping[str, float]
    """Metrics of this update; those of the first update of a round include what was logged while samples were
    collected."""
    reward: float = math.nan
    """Mean true reward of the samples of this update's round; NaN if none was scored."""

    def _repr_html_(self) -> str:
        rows = Markup("").join(
            Markup('<tr><td style="text-align: left">{}</td><td>{:.4g}</td></tr>').format(name, value)
            for name, value in ({"reward": self.reward} | dict(self.metrics)).items()
        )
        return Markup('<table><thead><tr><th colspan="2">update {}</th></tr></thead>{}</table>').format(self.step, rows)
