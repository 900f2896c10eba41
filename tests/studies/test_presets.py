import pytest

from nnunet_topomae.methods.alice import AliceConfig
from nnunet_topomae.methods.mim import MiMConfig
from nnunet_topomae.settings import read_block
from nnunet_topomae.studies.presets import KINDS, PRESETS, baseline_of, kinds_of


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_compare_each_pretrained_row_with_one_from_scratch(preset):
    kinds = kinds_of([], preset)
    for name, kind in kinds.items():
        baseline = baseline_of(name, kinds)
        assert (baseline is None) == (kind.pretrainer is None)
        assert baseline is None or kinds[baseline].pretrainer is None


def test_table_vi_of_the_paper():
    kinds = kinds_of([], "table6")
    assert {name: baseline_of(name, kinds) for name in kinds} == {
        "unetrpp": None, "vit": "unetrpp", "spatial": "unetrpp", "topology": "unetrpp", "copretrained": "unetrpp",
    }  # fmt: skip
    assert kinds["unetrpp"].without_vit
    assert kinds["vit"].settings == {
        "pretraining.branches": ["vit"],
        "pretraining.spatial.enabled": False,
        "pretraining.topology.enabled": False,
    }
    assert kinds["spatial"].settings == {"pretraining.branches": ["vit"], "pretraining.topology.enabled": False}
    assert kinds["topology"].settings == {"pretraining.branches": ["vit"]}
    assert kinds["copretrained"].settings == {}


def test_ablations_of_mim_differ_in_the_settings_of_their_tables():
    kinds = kinds_of([], "mim")
    assert {baseline_of(name, kinds) for name in kinds} == {None, "hybrid"}
    assert {name: kind.settings for name, kind in kinds.items() if kind.pretrainer} == {
        "mim": {},
        "mimr1": {"pretraining.levels": 1},
        "mimr2": {"pretraining.levels": 2, "pretraining.alignment": "off"},
        "mimr3": {"pretraining.alignment": "off"},
        "mimc12": {"pretraining.alignment_weights": [0.1, 0.0]},
        "mimtwolevels": {"pretraining.levels": 2},
        "mimvisible": {"pretraining.children": "visible"},
        "mimbyol": {"pretraining.alignment": "byol"},
        "mimcoarse": {"pretraining.weight_schedule": "coarse_to_fine"},
        "mimfine": {"pretraining.weight_schedule": "fine_to_coarse"},
    }
    for kind in kinds.values():
        settings = {key.removeprefix("pretraining."): value for key, value in kind.settings.items()}
        read_block(MiMConfig, settings, "pretraining")


def test_ablations_of_alice():
    """Tables 4 and 5 of its paper, with the same rate as its defaults, on plans that hold MAE's."""
    kinds = kinds_of([], "alice")
    config = AliceConfig()
    rate = {f"pretraining.{key}": getattr(config, key) for key in ("base_lr", "scale_lr", "weight_decay")}
    assert {name: kind.settings for name, kind in kinds.items() if name.startswith("alice")} == {
        "alice": rate,
        "aliceposition": {**rate, "pretraining.matcher": "position"},
        "aliceonevolume": {**rate, "pretraining.matcher": "same_volume", "pretraining.l_dv": False},
        "alicewithoutcasa": {**rate, "pretraining.casa": False},
    }
    assert {baseline_of(name, kinds) for name in kinds} == {None, "unetr"}


def test_labels_adds_the_same_network_from_scratch():
    assert list(kinds_of([], "labels")) == ["scratch", "topomae"]
    assert list(kinds_of(["anatomask", "spark"], "labels")) == ["resenc", "anatomask", "spark"]


def test_rows_of_ones_own():
    kinds = kinds_of(["mine=MyPlans:MyTrainer", "pre=MyPlans:MyTrainer:SparKPretrainer", "scratch"], None)
    assert (kinds["pre"].plans, kinds["pre"].finetuner, kinds["pre"].pretrainer) == (
        "MyPlans", "MyTrainer", "SparKPretrainer",
    )  # fmt: skip
    assert baseline_of("pre", kinds) == "mine"
    assert kinds["scratch"] is KINDS["scratch"]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "a study needs --rows or --preset"),
        (["topomea"], "there is no row topomea; there are scratch, topomae"),
        (["a_b=Plans:Trainer"], "with a NAME of letters and digits"),
        (["own=Plans"], "NAME=PLANS:FINETUNER or NAME=PLANS:FINETUNER:PRETRAINER"),
        (["spark", "spark"], "the row spark is there twice"),
    ],
)
def test_rows_that_there_are_not(rows, message):
    with pytest.raises(ValueError, match=message):
        kinds_of(rows, None)
