"""Alice: masked reconstruction, and alignment of the same body part in two patients (Jiang et al.)."""

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from nnunet_topomae.methods.alice.landmarks.inspection import inspect
from nnunet_topomae.methods.alice.landmarks.matcher import ACCEPTED, CYCLE, SIMILARITY, TRIES, ByEmbedding
from nnunet_topomae.methods.alice.landmarks.store import IDENTITY_BYTES
from nnunet_topomae.methods.alice.landmarks.training import embed_missing, prepare_landmarks
from nnunet_topomae.methods.alice.matching import Matcher, Position, SameVolume, check_partners
from nnunet_topomae.methods.alice.modules import CASA, FEATURES, Predictor, ProjectionHead
from nnunet_topomae.methods.alice.settings import AliceConfig
from nnunet_topomae.methods.alice.similarity import (
    FIRST_TEMPERATURE,
    cosine_loss,
    dino_loss,
    moved_centre,
    spread,
    target_momentum,
    teacher_temperature,
)
from nnunet_topomae.methods.alice.views import KEY, PairViews, exchanged
from nnunet_topomae.methods.autoencoders import TokenAutoencoder, token_autoencoder_of
from nnunet_topomae.methods.base import Batch, CaseReport, ImageSource
from nnunet_topomae.methods.gathering import gather
from nnunet_topomae.methods.losses import compose, denormalise_patches, masked_mse, normalise_patches
from nnunet_topomae.methods.masked import NormalisedReconstruction
from nnunet_topomae.methods.masking import mask_to_voxels
from nnunet_topomae.methods.moving_average import follow
from nnunet_topomae.networks.vit import visible_indices

_COLLAPSED = 0.01  # spread of cls below which all crops look the same to the encoder
_FEW = 0.5  # share of accepted matches
_SPREAD, _PAIRS = "cls_std", "pairs_"


class Encoded(NamedTuple):
    """What the network makes of 2B crops: first the B queries, then their B keys.

    Attributes:
        prediction: normalised patches, (2B, C, D, H, W).
        cls: average of H, (2B, 256).
        predicted_cls: what is compared with the other crop's ``target_cls``; the predictor's output, or ``cls`` itself.
        target_cls: average of Y, (2B, 256).
        student: S, (2B, N_visible, 256), after the predictor if there is one; None without CASA.
        teacher: T, of the same shape.
        attention: of CASA to every token of H, mean over the visible tokens, (2B, N); None without CASA.
    """

    prediction: Tensor
    cls: Tensor
    predicted_cls: Tensor
    target_cls: Tensor
    student: Tensor | None
    teacher: Tensor | None
    attention: Tensor | None


class Alice(NormalisedReconstruction):
    """Pre-trains the encoder of a network; all other parts stay as they are. L = l_r + l_dv + l_st (section 4.2).

    Args:
        network: with a ViT or a hybrid encoder, as :func:`token_autoencoder_of` knows them.
        config: the plans' ``pretraining`` block.
        crop_size: voxels per axis.

    Raises:
        ValueError: for another network.
    """

    config_class = AliceConfig
    config: AliceConfig
    headings = {"alice": "reconstruction"}  # noqa: RUF012 - a constant
    autoencoder: TokenAutoencoder
    landmarks: Tensor
    centres: Tensor
    temperature: Tensor

    def __init__(self, network: nn.Module, config: AliceConfig, crop_size: Sequence[int]):
        autoencoder = token_autoencoder_of(network)
        if autoencoder is None:
            raise ValueError(
                f"Alice pre-trains a ViT or a hybrid encoder, but the plans name {type(network).__name__}, which has "
                f"neither; plan the dataset with nnUNetv2_topomae plan_and_preprocess -pl AliceUNETRPlanner or "
                f"-pl AliceHybridPlanner"
            )
        super().__init__(network, config, crop_size, autoencoder)
        width = autoencoder.token_width
        self.to_width = nn.Linear(autoencoder.width, width)
        self.head = ProjectionHead(width, config.head_width)
        has_predictor, compares_cls = config.similarity == "cosine", config.l_dv or not config.casa
        self.cls_predictor = Predictor() if has_predictor and compares_cls else nn.Identity()
        if config.casa:
            self.casa = CASA(width)
            self.casa_predictor = Predictor() if has_predictor else nn.Identity()
        self.target = copy.deepcopy(nn.ModuleDict(self._followed)).requires_grad_(False)
        if config.matcher == "embedding":
            self.register_buffer("landmarks", torch.zeros(IDENTITY_BYTES, dtype=torch.uint8))
        self.register_buffer("centres", torch.zeros(2, FEATURES))  # of cls and of CASA's tokens
        self.register_buffer("temperature", torch.tensor(FIRST_TEMPERATURE))

    @property
    def _followed(self) -> dict[str, nn.Module]:
        """What the target is a moving average of."""
        encoder, tokens = self.autoencoder.encoder_of(self), self.autoencoder.tokens
        return {"encoder": encoder, "tokens": tokens, "head": self.head}

    def views(self) -> PairViews:
        """Crops of the same body part in two volumes, and two views of each."""
        return PairViews(self.crop_size, self.mask_grid, self.config.mask_ratio, self._matcher())

    def _matcher(self) -> Matcher:
        if self.config.matcher == "same_volume":
            return SameVolume(self.crop_size)
        if self.config.matcher == "position":
            return Position(self.crop_size)
        return self._by_embedding()

    def _by_embedding(self) -> ByEmbedding:
        return ByEmbedding(self.crop_size, self.config.landmarks, self.landmarks.cpu())

    def prepare(self, images: ImageSource, device: torch.device, log: Callable[[str], None]) -> None:
        """Train the landmark network, if the matcher needs one that is not there; see :meth:`PretextTask.prepare`.

        Raises:
            ValueError: if the matcher needs another image, and there is only one to train on.
        """
        if self.config.matcher != "same_volume":
            check_partners(images.identifiers)  # those that are trained on; partners may be validation cases
        if self.config.matcher == "embedding":
            store = prepare_landmarks(images, self.config.landmarks, device, log)
            self.landmarks.copy_(torch.tensor(list(store.identity()), dtype=torch.uint8))
            inspect(self._by_embedding(), images, log)

    def catch_up(self, images: ImageSource, device: torch.device, log: Callable[[str], None]) -> None:
        """Embed images that were added since the training began; see :meth:`PretextTask.catch_up`."""
        if self.config.matcher == "embedding":
            embed_missing(self._by_embedding().store(images), images, device, log)

    def choose(self, batch: Batch, progress: float) -> Batch:
        """With ``mask_source: anatomask``, a teacher chooses both masks; see :meth:`MaskedReconstruction.choose`."""
        of_keys = super().choose(exchanged(batch), progress)["mask"]
        return {**super().choose(batch, progress), f"{KEY}mask": of_keys}

    def forward(self, batch: Batch) -> Encoded:
        """See :meth:`PretextTask.forward`; the online encoder sees visible patches only, the target encoder all."""
        crop, mask, whole = (torch.cat([batch[name], batch[f"{KEY}{name}"]]) for name in ("crop", "mask", "target"))
        visible = visible_indices(mask, self.num_visible)
        tokens = self.autoencoder.tokens(self._followed["encoder"], crop, visible)
        decoded = self.autoencoder.decoder.decode(tokens, visible)
        projected = self.head(self.to_width(decoded))
        with torch.no_grad():
            targets = self.target["head"](self.target["tokens"](self.target["encoder"], whole, None))
        student = teacher = attention = None
        if self.config.casa:
            found, weights = self.casa(tokens, projected)
            student, attention = self.casa_predictor(found), weights.detach().mean(dim=1)
            with torch.no_grad():
                teacher, _ = self.casa(tokens, targets)
        cls = projected.mean(dim=1)
        return Encoded(
            self.autoencoder.decoder.predict(decoded),
            cls,
            self.cls_predictor(cls),
            targets.mean(dim=1),
            student,
            teacher,
            attention,
        )

    def loss_terms(self, output: Encoded, batch: Batch) -> dict[str, Tensor]:
        """``l_r``, ``l_dv`` and ``l_st``, their sum, and how much cls differs; see :meth:`PretextTask.loss_terms`."""
        cls, targets = output.predicted_cls, output.target_cls
        terms = {"l_r": self._reconstruction_error(output, batch)}
        if self.config.l_dv:
            terms["l_dv"] = self._both(cls, of_partners(targets), 0, batch.get(ACCEPTED))
        if output.student is not None and output.teacher is not None:
            terms["l_st"] = self._both(output.student, output.teacher, 1)
        else:
            terms["l_st"] = self._both(cls, targets, 0)
        total = torch.stack(list(terms.values())).sum()
        return {"total": total, **terms, _SPREAD: spread(output.cls), **_quality(batch)}

    def _reconstruction_error(self, output: Encoded, batch: Batch) -> Tensor:
        """l_r: the error of hidden patches, normalised, of queries and of keys (equation 1)."""
        errors = [
            masked_mse(prediction, normalise_patches(half["crop"], self.patch_size), self.hidden_voxels(half))
            for prediction, half in zip(output.prediction.chunk(2), (batch, exchanged(batch)), strict=True)
        ]
        return torch.stack(errors).sum()

    def _both(self, student: Tensor, teacher: Tensor, kind: int, counted: Tensor | None = None) -> Tensor:
        """l_s of queries plus l_s of keys (equations 2 and 5).

        Args:
            student: (2B, ..., 256).
            teacher: the same shape.
            kind: 0 for cls, 1 for CASA's tokens.
            counted: (B,), 0 for pairs that do not count.
        """
        if self.config.similarity == "cosine":
            values = cosine_loss(student, teacher)
        else:
            values = dino_loss(student, teacher, self.centres[kind], self.temperature)
        if counted is None:
            return 2 * values.mean()
        whole = gather(counted)  # of all processes, over which the loss is averaged
        return (values * counted.repeat(2)).sum() / (whole.sum().clamp(min=1) * len(counted) / len(whole))

    def after_step(self, output: Encoded, batch: Batch, progress: float) -> None:
        """Let the target follow, and move the centres; see :meth:`PretextTask.after_step`."""
        super().after_step(output, batch, progress)
        momentum = target_momentum(self.config.momentum, progress)
        follow(self.target, nn.ModuleDict(self._followed), momentum)
        self.temperature.fill_(teacher_temperature(progress))
        self.centres[0] = moved_centre(self.centres[0], gather(output.target_cls))
        if output.teacher is not None:
            self.centres[1] = moved_centre(self.centres[1], gather(output.teacher))

    def warnings(self, terms: Mapping[str, float]) -> Sequence[str]:
        """Whether cls has collapsed, and whether few matches are accepted; see :meth:`PretextTask.warnings`."""
        said = []
        if terms.get(f"{_PAIRS}{ACCEPTED}", 1) < _FEW:
            said.append(
                f"only {terms[f'{_PAIRS}{ACCEPTED}']:.0%} of the matches are accepted: look at matches.png beside the "
                "landmark network; if they are right, lower pretraining.landmarks.min_similarity or raise max_cycle; "
                "if not, raise pretraining.landmarks.iterations, or set pretraining.matcher to position"
            )
        if terms.get(_SPREAD, 1) < _COLLAPSED:
            said.append(
                f"all crops look the same to the encoder ({_SPREAD} {terms[_SPREAD]:.2g}), so l_dv and l_st teach "
                "nothing: lower pretraining.base_lr, raise the batch size, or set pretraining.similarity to dino"
            )
        return said

    def normalised(self, output: Encoded) -> Tensor:
        """What is predicted of the queries; see :meth:`NormalisedReconstruction.normalised`."""
        return output.prediction.chunk(2)[0]

    def shown(self, output: Encoded, batch: Batch) -> CaseReport:
        """The query as every masked method shows it, what CASA attends to in it, and the key."""
        report = super().shown(output, batch)
        keys = exchanged(batch)
        hidden = self.hidden_voxels(keys)
        reconstruction = denormalise_patches(output.prediction.chunk(2)[1], keys["crop"], self.patch_size)
        columns = {
            "same part, other volume": keys["crop"],
            "masked (other volume)": keys["crop"].masked_fill(hidden, torch.nan),
            "reconstruction (other volume)": compose(keys["crop"], reconstruction, hidden),
        }
        if output.attention is not None:
            columns = {"attention of CASA": self._attention(output.attention[:1], batch["crop"]), **columns}
        volumes = {heading: volume[0].cpu().numpy() for heading, volume in columns.items()}
        return CaseReport({**report.columns, **volumes}, report.metrics, report.diagrams)

    def _attention(self, attention: Tensor, crop: Tensor) -> Tensor:
        """Attention as a volume like the crop, whose least is the crop's darkest value and whose most its brightest."""
        weights = mask_to_voxels(attention.unflatten(1, self.mask_grid), self.patch_size)
        scaled = (weights - weights.min()) / (weights.max() - weights.min()).clamp(min=torch.finfo().tiny)
        return (crop.min() + scaled * (crop.max() - crop.min())).expand_as(crop)


def _quality(batch: Batch) -> dict[str, Tensor]:
    """Share of the matches that were accepted, and the similarity and the cycle error of the pairs."""
    if TRIES not in batch:
        return {}
    shares = {ACCEPTED: batch[ACCEPTED].sum() / batch[TRIES].sum()}
    return {f"{_PAIRS}{n}": v for n, v in {**shares, **{n: batch[n].mean() for n in (SIMILARITY, CYCLE)}}.items()}


def of_partners(halves: Tensor) -> Tensor:
    """(2B, ...) with its halves exchanged, so that each crop has what belongs to the other one."""
    first, second = halves.chunk(2)
    return torch.cat([second, first])
