"""Finds the same body part in another volume by the embeddings of the landmark network."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from torch import Tensor

from nnunet_topomae.methods.alice.landmarks.search import Matches, find
from nnunet_topomae.methods.alice.landmarks.settings import LandmarkConfig
from nnunet_topomae.methods.alice.landmarks.store import Embedding, LandmarkStore
from nnunet_topomae.methods.alice.matching import Matcher, Pair, Start, draw_partner
from nnunet_topomae.methods.base import ImageSource

ACCEPTED, TRIES, SIMILARITY, CYCLE = "accepted", "tries", "similarity", "cycle_mm"
_CANDIDATES = 8  # places that are looked for in one other image
_PARTNERS = 12  # other images that are tried
_CYCLE_VOXELS = 4


class ByEmbedding(Matcher):
    """The middle of the second crop is the place that is most similar to the middle of the first.

    A match whose similarity is too low, or from which the way back does not lead to where the way there began, is not
    accepted: another place is looked for in its stead, and after eight places another image. If nothing has been
    accepted in twelve images, the most similar match is taken, with an ``accepted`` of 0.

    Args:
        crop_size: voxels per axis.
        config: which matches are accepted.
        identity: of the landmark network, bytes as a tensor, as its store tells them.
    """

    qualities = (ACCEPTED, TRIES, SIMILARITY, CYCLE)

    def __init__(self, crop_size: Sequence[int], config: LandmarkConfig, identity: Tensor):
        super().__init__(crop_size)
        self.config, self.identity = config, identity
        self._store: LandmarkStore | None = None

    def store(self, images: ImageSource) -> LandmarkStore:
        """The folder of the landmark network; checked once in each process."""
        if self._store is None:
            self._store = LandmarkStore.opened(images.cache, bytes(self.identity.tolist()))
        return self._store

    def pair(self, images: ImageSource, case: str, rng: np.random.Generator) -> Pair:
        """See :meth:`Matcher.pair`."""
        store, query = self.store(images), self.store(images).embedding(case)
        best: Pair | None = None
        for tried in range(0, _PARTNERS * _CANDIDATES, _CANDIDATES):
            other = draw_partner(images, case, rng)
            starts = self._starts(images, case, query, rng)
            matches = self.match(store, images, (case, other), query, np.array(starts) + self.half)
            accepted = self.accepts(store, matches)
            chosen = int(np.argmax(accepted if accepted.any() else matches.similarity))
            quality = {
                ACCEPTED: float(accepted[chosen]),
                TRIES: tried + (chosen + 1 if accepted[chosen] else len(starts)),
                SIMILARITY: float(matches.similarity[chosen]),
                CYCLE: float(matches.cycle[chosen]) * store.spacing,
            }
            pair = Pair((case, starts[chosen]), (other, self.start_around(matches.points[chosen])), quality)
            if accepted[chosen]:
                return pair
            if best is None or quality[SIMILARITY] > best.quality[SIMILARITY]:
                best = pair
        assert best is not None
        return best._replace(quality={**best.quality, TRIES: _PARTNERS * _CANDIDATES})

    def match(
        self,
        store: LandmarkStore,
        images: ImageSource,
        cases: tuple[str, str],
        query: Embedding,
        points: npt.NDArray[np.floating],
    ) -> Matches:
        """Find voxels of one image in another, (P, 3) in voxels of the preprocessed images."""
        key = store.embedding(cases[1])
        scales = [
            np.array(embedding.body.shape) / np.array(images.load(case).shape[1:])
            for case, embedding in zip(cases, (query, key), strict=True)
        ]
        matches = find(query, key, (points + 0.5) * scales[0] - 0.5)
        return matches._replace(points=(matches.points + 0.5) / scales[1] - 0.5)

    def accepts(self, store: LandmarkStore, matches: Matches) -> npt.NDArray[np.bool_]:
        """Which matches are similar enough and lead back to where they came from, (P,)."""
        largest = self.config.max_cycle or _CYCLE_VOXELS * store.spacing
        return (matches.similarity >= self.config.min_similarity) & (matches.cycle * store.spacing <= largest)

    def _starts(self, images: ImageSource, case: str, query: Embedding, rng: np.random.Generator) -> list[Start]:
        """Eight crops inside the volume; of those that were drawn, such whose middle lies in the body."""
        drawn = [self.random_start(images, case, rng) for _ in range(4 * _CANDIDATES)]
        scale = np.array(query.body.shape) / np.array(images.load(case).shape[1:])
        middles = ((np.array(drawn) + self.half + 0.5) * scale - 0.5).round().astype(int)
        inside = query.body[tuple(middles.clip(0, np.array(query.body.shape) - 1).T)]
        order = np.argsort(~inside, kind="stable")
        return [drawn[n] for n in order[:_CANDIDATES]]
