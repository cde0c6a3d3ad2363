"""How large a reproduction is: the paper's own numbers, those of the embedded miniature, and those
of minutes."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from paper.material import PHANTOMS
from paper.plan import CLASSIFIERS, DataModel
from planes import PLANES


@dataclass(frozen=True)
class Scale:
    """How large each stage is, as the flags of its script; what is not named stands at the paper's
    setting there."""

    # Spanish images of each kind (paper.plan.DataModel); None: all there are
    per_plane: Mapping[str, int | None]
    train_lora: str
    repeats: int  # of each of the LoRA's images
    rank: int  # of the LoRA whose images classifiers are trained on
    sample: str
    count: int  # synthetic images per plane and sampler
    classify: str
    # of LoRAs of a rank, whatever train_lora says
    rates: Mapping[int, float] = field(default_factory=dict)
    # of each classifier, whatever its data; else by epochs
    passes: Mapping[str, int] = field(default_factory=dict)
    # classifiers that are in no average, and why
    left_out: Mapping[str, str] = field(default_factory=dict)

    def phantoms(self, data: DataModel) -> tuple[int, int]:
        """How many phantoms of the first and of the second site a data model has."""
        of_plane = self.per_plane.get(data.spanish)
        spanish = len(PLANES) * of_plane if of_plane else sum(PHANTOMS["train"].values())
        # two countries lack thorax
        african = (PHANTOMS["patients"] + 1) // 2 * (3 * 4 + 2 * 3) if data.african else 0
        return spanish if data.spanish else 0, african


PAPER = Scale(
    {"all": None, "balanced": 230, "lora": 20},
    train_lora="",
    repeats=100,
    rank=128,
    sample="",
    count=500,
    classify="",
)
EMBEDDED = Scale(  # a tenth of the paper's numbers of images, but for the LoRA's
    per_plane={"all": None, "balanced": 23, "lora": 20},
    train_lora=(
        "--target locon --lr 2e-3 --schedule cosine --debiased-estimation-loss --batch-size 20 "
        "--guidance-scale 1.5"
    ),
    repeats=140,
    rank=32,
    # alpha = r adds up r matrices of rank 1: at 2e-3 the loss of 128 goes from 0.04 to 2
    rates={128: 5e-4},
    sample="--guidance-scale 1.5 --batch-size 20",
    count=50,
    classify="--size 64 --lr 5e-3 --schedule cosine",
    # which takes ten times as long as ResNet18
    passes=dict.fromkeys(CLASSIFIERS, 6000) | {"vit_b_16": 1200},
    left_out={
        "vit_b_16": "from random weights, on a few hundred images of 64 px, it stays near chance"
    },
)
QUICK = replace(EMBEDDED, repeats=40, count=16, passes=dict.fromkeys(CLASSIFIERS, 2000))
QUICK = replace(QUICK, sample="--guidance-scale 2 --batch-size 20")  # a shorter LoRA wants more
