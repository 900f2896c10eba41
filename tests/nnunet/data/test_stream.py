import multiprocessing
import os
import re
import signal
import time
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from batchgeneratorsv2.transforms.base.basic_transform import BasicTransform
from processes import pipe, process
from torch.utils.data import Dataset

from nnunet_topomae.methods.topomae.keypoints import crop_keypoints
from nnunet_topomae.methods.topomae.views import KeypointViews
from nnunet_topomae.nnunet.data.stream import (
    AugmentedItems,
    Batches,
    CaseError,
    CaseImages,
    ItemStream,
    StreamSampler,
)


class Cases:
    """Stands in for preprocessed cases; reading a label is an error."""

    source_folder = "folder"

    def __init__(self, **volumes):
        self.volumes, self.identifiers = volumes, list(volumes)

    def load_image(self, case):
        return self.volumes[case]


class Labelled(Cases):
    """Preprocessed cases with labels."""

    def load_case(self, case):
        return self.volumes[case], np.zeros((1, 8, 9, 10)), None, {}


def ramp(shape):
    """A volume whose voxels know where they are."""
    return np.arange(np.prod(shape), dtype=np.float32).reshape(1, *shape) + 1


def crops(cases, crop_size=(4, 6, 8), seed=(0,), mirror=False):
    images = CaseImages(cases, (1.0, 2.0, 3.0), Path("unused"))
    return ItemStream(KeypointViews(crop_size, (2, 2, 2), 0.5), images, seed, mirror=mirror)


def test_crops_depend_on_seed_and_number_alone():
    cases = Cases(a=ramp((8, 9, 10)), b=ramp((7, 9, 12)))
    first, again, other = crops(cases, mirror=True)[5], crops(cases, mirror=True)[5], crops(cases, seed=(1,))[5]
    assert first["case"] == again["case"]
    for key in ("crop", "mask", "keypoints", "extent"):
        assert torch.equal(first[key], again[key])
    assert not torch.equal(first["crop"], other["crop"])
    assert int(first["mask"].sum()) == 4


@pytest.mark.parametrize("mirror", [False, True])
def test_keypoints_say_where_the_crop_lies(mirror):
    """The voxels of a crop are looked up in the volume, mirrored or not, and must lie where the key points say."""
    volume = ramp((9, 11, 13))
    seen = set()
    for index in range(40):
        item = crops(Cases(a=volume), mirror=mirror)[index]
        crop = item["crop"][0].numpy()
        corner, opposite = (np.argwhere(volume[0] == v)[0] for v in (crop[0, 0, 0], crop[-1, -1, -1]))
        flipped = [int(axis) for axis in range(3) if corner[axis] > opposite[axis]]
        seen.add(tuple(flipped))
        world = np.flip(volume[0], flipped)
        start = np.argwhere(world == crop[0, 0, 0])[0]
        np.testing.assert_array_equal(item["keypoints"], crop_keypoints(start, (4, 6, 8), (9, 11, 13)))
    assert len(seen) == (8 if mirror else 1)


def test_volume_smaller_than_the_crop_is_centred_and_padded_with_zero():
    item = crops(Cases(a=ramp((2, 6, 9))))[0]
    assert item["crop"].shape == (1, 4, 6, 8)
    assert (item["crop"][0, 0] == 0).all()
    assert (item["crop"][0, 1:3] > 0).all()
    assert (item["crop"][0, 3] == 0).all()
    assert item["keypoints"].abs().max() <= 1
    assert item["extent"].tolist() == [4.0, 12.0, 27.0]


def test_stream_goes_on_where_it_was_left_and_is_shared_by_processes():
    assert list(islice(StreamSampler(start=6), 3)) == [6, 7, 8]
    assert list(islice(StreamSampler(start=6, rank=1, world_size=2), 3)) == [7, 9, 11]
    assert list(islice(StreamSampler(period=3), 7)) == [0, 1, 2, 0, 1, 2, 0]


@pytest.mark.parametrize("workers", ["0", "2"])
def test_batches_do_not_depend_on_the_number_of_processes(monkeypatch, workers):
    monkeypatch.setenv("nnUNet_n_proc_DA", workers)
    dataset = crops(Cases(a=ramp((8, 9, 10))), mirror=True)
    batch = next(Batches(dataset, StreamSampler(4), 2))
    assert torch.equal(batch["crop"], torch.stack([dataset[4]["crop"], dataset[5]["crop"]]))
    assert batch["mask"].shape == (2, 2, 2, 2)


@pytest.mark.parametrize(("allowed", "training", "validation"), [(0, 0, 0), (1, 1, 1), (2, 2, 1)])
def test_validation_gets_half_as_many_processes(monkeypatch, allowed, training, validation):
    monkeypatch.setenv("nnUNet_n_proc_DA", str(allowed))
    dataset = crops(Cases(a=ramp((8, 9, 10))), mirror=True)
    for validates, expected in ((False, training), (True, validation)):
        before = set(multiprocessing.active_children())
        batches = Batches(dataset, StreamSampler(), 2, validation=validates)
        assert len(set(multiprocessing.active_children()) - before) == expected
        del batches


class Failing(Dataset):
    """A stream whose item 3, of the case named third, cannot be made."""

    def __init__(self, fail):
        self.fail = fail

    def __getitem__(self, index):
        return self.fail() if index == 3 else {"crop": torch.ones(1), "case": "other"}

    def cases_of(self, index):
        return ["third" if index == 3 else "other"]


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def sleep():
    time.sleep(10**6)


def fail_to_read():
    raise CaseError("case third cannot be read")


def take_batches(fail, timeout, sender):
    """Take batches until that fails, and send the message of the error."""
    multiprocessing.set_start_method("fork", force=True)  # as in a training; here it would be that of this process
    os.environ["nnUNet_n_proc_DA"] = "2"
    batches = Batches(Failing(fail), StreamSampler(), 1, timeout=timeout)
    try:
        list(islice(batches, 9))
    except ValueError as error:
        sender.send(str(error))
    except RuntimeError as error:  # PyTorch raises it wherever the program is when a process dies
        sender.send(str(batches.explained(error)))


@pytest.mark.parametrize(
    ("fail", "timeout", "message"),
    [
        (die, 600, r"prepares batches died \(.*\) while it read case third;"),
        (sleep, 15, r"prepares batches did not answer for 15 s while it read case .*third.*;"),
        (fail_to_read, 600, "^case third cannot be read$"),
    ],
)
def test_a_process_that_fails_is_noticed_and_its_case_is_named(fail, timeout, message):
    receiver, sender = pipe()
    training = process(take_batches, fail, timeout, sender)
    training.start()
    sender.close()
    assert re.search(message, receiver.recv())
    training.join()


def test_the_time_out_of_a_network_is_not_blamed_on_the_disk():
    error = RuntimeError("NCCL error: remote process exited, Connection timed out")
    assert Batches(Failing(fail_to_read), StreamSampler(1), 1).explained(error) is error


def test_signals_to_all_processes_do_not_end_those_that_prepare_batches(monkeypatch):
    monkeypatch.setenv("nnUNet_n_proc_DA", "1")
    others = multiprocessing.active_children()
    batches = Batches(Failing(fail_to_read), StreamSampler(4), 1)
    next(batches)
    for worker in set(multiprocessing.active_children()).difference(others):
        for number in (signal.SIGTERM, signal.SIGUSR1):
            os.kill(worker.pid, number)
    for _ in range(20):  # more than the process may have made before the signals came
        next(batches)


def test_no_case_is_an_error():
    with pytest.raises(ValueError, match="no case to draw crops from"):
        crops(Cases())


class Torn:
    """An image whose shape can be read, but not its voxels."""

    shape, dtype = (1, 8, 9, 10), np.dtype(np.float32)

    def __getitem__(self, _):
        raise RuntimeError("chunk 3 is damaged")


class Vanished(Cases):
    """Cases whose files were deleted."""

    def load_image(self, case):
        raise FileNotFoundError("no such file")


class WithPartner(KeypointViews):
    """Loads the partner first, then fails as ``error`` says."""

    error: Exception | None = None

    def draw(self, images, case, rng, mirror):
        images.load("partner")[:]
        if self.error:
            raise self.error
        return super().draw(images, case, rng, mirror)


def with_partner(case, partner, error=None):
    images = CaseImages(Cases(a=case), (1, 1, 1), Path("unused"), others=Cases(partner=partner))
    views = WithPartner((4, 4, 4), (2, 2, 2), 0.5)
    views.error = error
    return ItemStream(views, images, (0,), mirror=True)


MEND = "preprocess it again, or delete its files there and go on with --c"
SOUND = ramp((8, 9, 10))


@pytest.mark.parametrize(
    ("stream", "sentence"),
    [
        (
            lambda: with_partner(SOUND, Torn()),
            f"case partner in folder cannot be read: RuntimeError: chunk 3 is damaged; {MEND}",
        ),
        (
            lambda: with_partner(Torn(), SOUND),
            f"case a in folder cannot be read: RuntimeError: chunk 3 is damaged; {MEND}",
        ),
        (
            lambda: crops(Vanished(a=SOUND)),
            f"case a in folder cannot be read: FileNotFoundError: no such file; {MEND}",
        ),
        (
            lambda: with_partner(SOUND, SOUND * np.nan, ValueError("not finite")),
            f"case partner in folder now holds NaN or inf, which it did not at the start; {MEND}",
        ),
        (
            lambda: with_partner(SOUND, SOUND, ValueError("too few patches")),
            "case a in folder, whose files can be read, gives no crop: ValueError: too few patches",
        ),
        (
            lambda: with_partner(SOUND, SOUND, OSError("the cache is gone")),
            "case a in folder, whose files can be read, gives no crop: OSError: the cache is gone",
        ),
    ],
)
def test_only_cases_whose_files_are_ill_are_to_be_deleted(stream, sentence):
    with pytest.raises(CaseError) as error:
        stream()[0]
    assert str(error.value) == sentence


class MakesNaN(KeypointViews):
    """Makes NaN of every image."""

    def draw(self, images, case, rng, mirror):
        return {name: tensor * torch.nan for name, tensor in super().draw(images, case, rng, mirror).items()}


MADE = "whose files can be read, gives no crop: ValueError: what was made of its image holds NaN or inf"
SPOILED = f"case a in folder now holds NaN or inf, which it did not at the start; {MEND}"


@pytest.mark.parametrize(("image", "sentence"), [(SOUND, f"case a in folder, {MADE}"), (SOUND * np.nan, SPOILED)])
def test_what_a_method_makes_of_a_sound_image_is_not_blamed_on_files(image, sentence):
    images = CaseImages(Cases(a=image), (1, 1, 1), Path("unused"))
    with pytest.raises(CaseError) as error:
        ItemStream(MakesNaN((4, 4, 4), (2, 2, 2), 0.5), images, (0,), mirror=True)[0]
    assert str(error.value) == sentence


def augmented(image, augment):
    """Items of a loader that stands in for nnU-Net's, whose transforms do as ``augment``."""

    class Loader:
        batch_size, transforms, _data = 1, BasicTransform(), Labelled(a=image)
        get_do_oversample = staticmethod(lambda position: False)
        get_indices = staticmethod(lambda: ["a"])

        def generate_train_batch(self):
            return {"data": torch.as_tensor(augment(self._data.load_image("a")[:])), "keys": ["a"]}

    return AugmentedItems(Loader(), 1, (0,))


def fail(image):
    raise RuntimeError("no kernel of this size")


@pytest.mark.parametrize(
    ("image", "augment", "sentence"),
    [
        (Torn(), fail, f"case a in folder cannot be read: RuntimeError: chunk 3 is damaged; {MEND}"),
        (SOUND, fail, "case a in folder, whose files can be read, gives no crop: RuntimeError: no kernel of this size"),
        (SOUND, lambda image: image * np.inf, f"case a in folder, {MADE}"),
        (SOUND * np.nan, lambda image: image, SPOILED),
    ],
)
def test_an_augmentation_that_fails_is_not_blamed_on_files(image, augment, sentence):
    with pytest.raises(CaseError) as error:
        augmented(image, augment)[0]
    assert str(error.value) == sentence


@pytest.mark.parametrize(
    ("item", "what"), [({"levels": [1]}, "levels: list"), ({"case": torch.ones(1)}, "case: Tensor")]
)
def test_items_hold_tensors_alone(item, what):
    class Other(KeypointViews):
        def draw(self, *_):
            return item

    images = CaseImages(Cases(a=ramp((8, 9, 10))), (1, 1, 1), Path("unused"))
    stream = ItemStream(Other((4, 4, 4), (2, 2, 2), 0.5), images, (0,), mirror=True)
    with pytest.raises(ValueError, match=rf'^Other.draw must give tensors under other names than "case", got {what}$'):
        stream[0]
