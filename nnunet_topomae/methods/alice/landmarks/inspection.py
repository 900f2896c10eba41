"""How good the matches of a landmark network are: figures for the log, and pictures to look at."""

from collections.abc import Callable

import numpy as np

from nnunet_topomae.methods.alice.landmarks.matcher import ACCEPTED, CYCLE, SIMILARITY, TRIES, ByEmbedding
from nnunet_topomae.methods.alice.matching import body, draw_partner
from nnunet_topomae.methods.base import ImageSource
from nnunet_topomae.reporting.figures import MatchedPoints, save_matches

PICTURES = "matches.png"
_PAIRS, _PICTURED = 48, 6
_SEED = 12345


def inspect(matcher: ByEmbedding, images: ImageSource, log: Callable[[str], None]) -> None:
    """Draw pairs as a training would, and log how many matches are accepted; write ``matches.png``.

    The picture shows places of the body wherever they lie, while the middles of large crops are always near that of the
    body.

    Args:
        matcher: with a trained network.
        images: pairs are about ``identifiers``; partners are from ``partners``.
        log: writes a line into the training's log.
    """
    rng = np.random.default_rng(_SEED)
    cases = [images.identifiers[int(n)] for n in rng.integers(len(images.identifiers), size=_PAIRS)]
    qualities = [matcher.pair(images, case, rng).quality for case in cases]
    sums = {name: sum(quality[name] for quality in qualities) for name in matcher.qualities}
    file = matcher.store(images).folder / PICTURES
    save_matches([_picture(matcher, images, case, rng) for case in cases[:_PICTURED]], images.spacing, file)
    log(
        f"{sums[ACCEPTED] / sums[TRIES]:.0%} of the matches of the landmark network are accepted; mean similarity "
        f"{sums[SIMILARITY] / _PAIRS:.2f}, mean cycle error {sums[CYCLE] / _PAIRS:.1f} mm; look at {file}"
    )


def _picture(matcher: ByEmbedding, images: ImageSource, case: str, rng: np.random.Generator) -> MatchedPoints:
    """A random place of the body of a case, and where it was found in another one."""
    store, other = matcher.store(images), draw_partner(images, case, rng)
    volumes = [np.asarray(images.load(each)[:]) for each in (case, other)]
    place = rng.choice(np.argwhere(body(volumes[0][0]))).astype(float)
    matches = matcher.match(store, images, (case, other), store.embedding(case), place[None])
    accepted = "accepted" if matcher.accepts(store, matches)[0] else "not accepted"
    title = (
        f"{case} in {other}: {accepted}, similarity {matches.similarity[0]:.2f}, "
        f"cycle error {matches.cycle[0] * store.spacing:.1f} mm"
    )
    return MatchedPoints(title, (volumes[0], volumes[1]), (place.tolist(), matches.points[0].tolist()))
