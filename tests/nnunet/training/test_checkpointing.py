"""How often checkpoints are written; that trainers ask for it is in test_nothing_lost.py."""

import pytest

from nnunet_topomae.nnunet.training import checkpointing


@pytest.mark.parametrize(
    ("seconds_to_write", "save_every", "saved"),
    [
        (0.3, None, [0, 1, 2, 3, 4, 5, 6]),  # 1.5 % of an epoch
        (0.9, None, [0, 3, 6]),  # 4.5 %; 1.5 % of three epochs
        (0.3, 4, [3]),
        (9.0, 2, [1, 3, 5]),
    ],
)
def test_a_checkpoint_is_written_every_epoch_where_that_costs_under_2_percent(
    tmp_path, monkeypatch, seconds_to_write, save_every, saved
):
    now, epochs, num_epochs = [0.0], [], 8

    def writing(checkpoint, file):
        now[0] += seconds_to_write
        file.touch()

    monkeypatch.setattr(checkpointing, "monotonic", lambda: now[0])
    monkeypatch.setattr(checkpointing, "write_checkpoint", writing)
    saving = checkpointing.Saving(save_every)
    for epoch in range(num_epochs - 1):  # nnU-Net writes the last one as checkpoint_final.pth
        now[0] += 20
        if (epoch + 1) % saving.epochs_between(num_epochs) == 0:
            saving.write({}, tmp_path / checkpointing.LATEST)
            epochs.append(epoch)
    assert epochs == saved
