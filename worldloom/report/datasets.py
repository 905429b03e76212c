"""Pictures of recorded datasets."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from worldloom.report.figure import BLUE, ORANGE, new_figure, save_figure


def dataset_picture(
    returns: np.ndarray, lengths: np.ndarray, terminal: np.ndarray, path: str | Path, *, title: str = ""
) -> Path:
    """Histograms of the returns and of the lengths of episodes, and return the path of the PNG.

    Args:
      returns: [E]; those that are not finite are left out.
      lengths: steps [E].
      terminal: bool [E], drawn in another colour among the lengths.
      path: the PNG.
      title: above both.

    Raises ``MissingDependencyError`` if Matplotlib is missing.
    """
    figure, axes = new_figure(1, 2, width=8.0)
    finite = returns[np.isfinite(returns)]
    left, right = axes[0]
    left.hist(finite, bins=min(50, max(10, len(finite) // 4)), color=BLUE)
    left.set_xlabel("return of an episode", fontsize=9)
    left.set_ylabel("episodes", fontsize=9)
    kinds = [lengths[~terminal], lengths[terminal]]
    right.hist(kinds, bins=min(50, max(10, len(lengths) // 4)), color=[BLUE, ORANGE], stacked=True)
    right.legend(["cut", "terminal"], fontsize=8, frameon=False)
    right.set_xlabel("steps of an episode", fontsize=9)
    figure.suptitle(title, fontsize=10)
    return save_figure(figure, path)
