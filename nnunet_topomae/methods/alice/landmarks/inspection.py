"""How good the matches of a landmark network are: figures for the log, and pictures to look at."""

from collections.abc import Callable

import numpy as np

from nnunet_topomae.methods.alice.landmarks.matcher import ACCEPTED, CYCLE, SIMILARITY, TRIES, ByEmbedding
from nnunet_topomae.methods.alice.matching import Pair
from nnunet_topomae.methods.base import ImageSource
from nnunet_topomae.reporting.figures import MatchedPoints, save_matches

PICTURES = "matches.png"
_PAIRS, _PICTURED = 48, 6
_SEED = 12345


def inspect(matcher: ByEmbedding, images: ImageSource, log: Callable[[str], None]) -> None:
    """Draw pairs as a training would; log how many matches are accepted, and write ``matches.png``.

    Args:
        matcher: with a trained network.
        images: pairs are about ``identifiers``; partners are from ``partners``.
        log: writes a line into the training's log.
    """
    rng = np.random.default_rng(_SEED)
    cases = [images.identifiers[int(n)] for n in rng.integers(len(images.identifiers), size=_PAIRS)]
    pairs = [matcher.pair(images, case, rng) for case in cases]
    sums = {name: sum(pair.quality[name] for pair in pairs) for name in matcher.qualities}
    file = matcher.store(images).folder / PICTURES
    save_matches([_picture(pair, matcher, images) for pair in pairs[:_PICTURED]], images.spacing, file)
    log(
        f"{sums[ACCEPTED] / sums[TRIES]:.0%} of the matches of the landmark network are accepted; mean similarity of "
        f"{len(pairs)} pairs {sums[SIMILARITY] / len(pairs):.2f}, mean cycle error {sums[CYCLE] / len(pairs):.1f} mm; "
        f"look at {file}"
    )


def _picture(pair: Pair, matcher: ByEmbedding, images: ImageSource) -> MatchedPoints:
    query, key = (np.asarray(images.load(case)[:]) for case, _ in (pair.query, pair.key))
    points = [np.array(start) + matcher.half for _, start in (pair.query, pair.key)]
    title = (
        f"{pair.query[0]}, {pair.key[0]}: {pair.quality[SIMILARITY]:.2f}, {pair.quality[CYCLE]:.1f} mm"
        f"{'' if pair.quality[ACCEPTED] else ' (not accepted)'}"
    )
    return MatchedPoints(title, (query, key), (points[0].tolist(), points[1].tolist()))
