"""Copies by the vectors of an encoder such as SSCD: the training tile whose vector points the same way."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from eval.copying.copies import Matches
from eval.stats.arrays import Floats, Grey
from eval.tiles.encoders import Encoder, unit


def matcher(encoder: Encoder, centre: Floats) -> Callable[[Grey, Grey], Matches]:
    """Return what finds the reference of each query by the cosine of vectors less ``centre``, (D,).

    Slices resemble each other in what makes them slices; less the mean of the real ones, the rest is compared
    (Pizzi et al. 2022, section 5.4).
    """

    def find(queries: Grey, references: Grey) -> Matches:
        asked, known = (unit(unit(encoder.images(tiles)) - centre) for tiles in (queries, references))
        cosines = asked @ known.T
        index = cosines.argmax(axis=1).astype(np.int64)
        none = np.zeros((len(queries), 2), dtype=np.int64)
        return Matches(similarity=cosines.max(axis=1), index=index, symmetry=none[:, 0], offset=none)

    return find
