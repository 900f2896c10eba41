"""``nnUNetv2_train ... -tr CropContrastPretrainer``: the trainer of the worked example."""

from crop_contrast import CropContrast

from nnunet_topomae.nnunet.training.pretraining import Pretrainer


class CropContrastPretrainer(Pretrainer):
    """Pre-trains the encoder of a U-Net by contrasting crops."""

    task_class = CropContrast
