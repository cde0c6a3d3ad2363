"""The paper's experiments as data: the rows of tables 1 and 2, the controls it left out, what this
project adds, and how large each stage is.

A row is a data model and a classifier. Nothing here runs: reproduce.py turns rows into runs of
classify.py.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

CLASSIFIERS = {  # as classify.py calls them, and as the paper does
    "densenet169": "DenseNet169",
    "mobilenet_v2": "MobileNet v2",
    "efficientnet_b0": "EfficientNet b0",
    "resnet18": "ResNet18",
    "vit_b_16": "ViT b16",
}
RANKS = (8, 32, 128)  # of the LoRAs in figure 3; alpha = rank


@dataclass(frozen=True)
class DataModel:
    """What a classifier is trained on.

    source: "all" training images of the first site (the paper's 6148 Spanish ones), the "balanced"
        ones (1150), or none
    synthetic: how the synthetic images were made: "lora" (the paper), "styles", "prompts", "token",
        "dreambooth", none
    flags: of classify.py: --augment (random rotation and flips), --contrast (random
        brightness, contrast and gamma), --balanced-sampling (every class is drawn equally often)
    target: with the second site's training images, which is no longer zero-shot
    """

    name: str
    source: str = ""
    synthetic: str = ""
    flags: str = ""
    target: bool = False


@dataclass(frozen=True)
class Row:
    """A row of a table. Rows of two tables with the same data and classifier are one run."""

    table: str  # "1", "2", "controls", "styles", "beyond" or "probes"
    data: DataModel
    classifier: str  # a key of CLASSIFIERS, or a frozen model as "probe:owner/name"

    @property
    def name(self) -> str:
        return f"{self.data.name}/{classifier_name(self.classifier)}"


ES, HB = DataModel("ES", "all"), DataModel("HB", "balanced", "lora")
AF = DataModel("AF", target=True)
TABLE_1 = (
    ES,
    DataModel("ES+DA", "all", flags="--augment"),
    HB,
    DataModel("HB+DA", "balanced", "lora", "--augment"),
)
TABLE_2 = AF, ES, DataModel("ES+AF", "all", target=True), DataModel("HB-all", "all", "lora")
# what else may explain the gain: ES is 42 % Other and 6 % abdomen, HB has as many of each class
CONTROLS = (
    DataModel("BAL", "balanced"),  # HB without its synthetic images
    DataModel("BAL+DA", "balanced", flags="--augment"),
    DataModel("ES+DA+balanced", "all", flags="--augment --balanced-sampling"),
    DataModel("ES+DA+contrast", "all", flags="--augment --contrast"),
    DataModel("BAL+DA+contrast", "balanced", flags="--augment --contrast"),
    # what synthetic images add to the best that real ones do
    DataModel("HB+DA+contrast", "balanced", "lora", "--augment --contrast"),
)
# prompts that name brightness and contrast: ours, the paper's future work ("more detailed texts")
STYLES = (
    DataModel("HB-styles", "balanced", "styles"),
    DataModel("HB-styles+DA", "balanced", "styles", "--augment"),
    DataModel("HB-styles+DA+contrast", "balanced", "styles", "--augment --contrast"),
)
BEYOND = (  # what the paper names as future work, each in the place of HB+DA
    DataModel("HB-prompts+DA", "balanced", "prompts", "--augment"),
    DataModel("HB-token+DA", "balanced", "token", "--augment"),
    DataModel("HB-dreambooth+DA", "balanced", "dreambooth", "--augment"),
)
VARIED = tuple(  # not in reproduce.py, but in benchmarks/real_images.py
    replace(data, name=f"{data.name}+contrast", flags="--contrast") for data in (ES, HB, STYLES[0])
)
TABLES = {"1": TABLE_1, "2": TABLE_2, "controls": CONTROLS, "styles": STYLES}
ROWS = tuple(
    Row(table, data, classifier)
    for table, models in TABLES.items()
    for data in models
    for classifier in (["vit_b_16"] if table == "2" else CLASSIFIERS)
)
DATA = {row.data.name: row.data for row in ROWS} | {data.name: data for data in BEYOND + VARIED}
BEYOND_ROWS = tuple(Row("beyond", data, "resnet18") for data in BEYOND)
QUICK_DATA = (
    "ES+DA",
    "BAL+DA",
    "HB+DA",
    "HB-styles+DA",
    "BAL+DA+contrast",
    "HB-styles+DA+contrast",
)
QUICK_ROWS = tuple(
    row for row in ROWS if row.data.name in QUICK_DATA and row.classifier == "resnet18"
)


# a data model's parts in plain words: its real images, how synthetic ones were made, and its flags
REAL = {"all": "real images", "balanced": "balanced real images"}
MADE = {
    "lora": "",
    "styles": " with prompts that name brightness and contrast",
    "prompts": " with detailed prompts",
    "token": " by Textual Inversion",
    "dreambooth": " by DreamBooth",
}
TREATED = {
    "--augment": "augmented",
    "--balanced-sampling": "each class drawn equally often",
    "--contrast": "brightness and contrast varied",
}


Own = tuple[str, str] | None
"""The names of source and target where they are a user's own sites."""


def data_name(name: str, own: Own = None) -> str:
    """A data model as the report calls it: as the paper does, or, of own sites, in plain words."""
    if not own:
        return name
    data = DATA[name]
    images = [f"{REAL[data.source]} of {own[0]}"] if data.source else []
    images += [f"real images of {own[1]}"] * data.target
    images += [f"synthetic ones{MADE[data.synthetic]}"] if data.synthetic else []
    return ", ".join([" and ".join(images), *(TREATED[flag] for flag in data.flags.split())])


def classifier_name(classifier: str) -> str:
    """As the report calls it: one of the paper's five, or a frozen model, "probe:owner/name"."""
    probe = f"{classifier.removeprefix('probe:').rstrip('/')} (linear probe)"
    return CLASSIFIERS.get(classifier, probe)


def probe_rows(models: Sequence[str]) -> tuple[Row, ...]:
    """Rows for frozen models, such as "owner/name" or "probe:owner/name": on the data models that
    are not augmented."""
    names = [f"probe:{model.removeprefix('probe:')}" for model in models]
    return tuple(Row("probes", data, name) for name in names for data in (ES, HB, AF))


def choose(rows: Sequence[Row], names: Sequence[str]) -> tuple[Row, ...]:
    """The rows called so, in the plan's order; a data model, a classifier or a table ("table 1",
    "controls") names all of its own.

    Case, spaces and underscores do not count. ValueError for a name that fits none.
    """

    def plain(*names: str) -> set[str]:
        return {re.sub(r"[\s_]|^table\s", "", name.lower()) for name in names}

    called = {}
    for row in rows:
        data, classifier = row.data.name, row.classifier
        called[row] = plain(row.name, data, classifier, f"{data}/{classifier}", row.table)
    for name in names:
        if not plain(name) & set().union(*called.values()):
            known = ", ".join(dict.fromkeys(row.name for row in rows))
            raise ValueError(f"no row is called {name!r}; there are {known}")
    return tuple(row for row in rows if not names or plain(*names) & called[row])


def image_kinds(rows: Iterable[Row]) -> list[str]:
    """Which images rows and LoRAs take: `DataModel.source`, "lora", "target"."""
    return [*dict.fromkeys(row.data.source for row in rows if row.data.source), "lora", "target"]


# --- how large each stage is ---


@dataclass(frozen=True)
class Scale:
    """The flags of each stage's script; what is not named stands at the paper's setting, here and
    there.

    per_plane: source images of each class, by kind (`DataModel.source`, and "lora"); None: all
    repeats: of each of the LoRA's images; rank: of the LoRA whose images classifiers are trained on
    count: synthetic images per class and sampler; without: and of those without LoRA
    beyond: of Textual Inversion and DreamBooth
    rates: learning rate of LoRAs of a rank, whatever train_lora says
    passes: images that a classifier sees, whatever its data; else by epochs
    left_out: classifiers that are in no average, and why
    """

    per_plane: Mapping[str, int | None]
    train_lora: str = ""
    repeats: int = 100
    rank: int = 128
    sample: str = ""
    count: int = 500
    without: int = 10
    classify: str = ""
    beyond: str = ""
    rates: Mapping[int, float] = field(default_factory=dict)
    passes: Mapping[str, int] = field(default_factory=dict)
    left_out: Mapping[str, str] = field(default_factory=dict)


PAPER = Scale({"all": None, "balanced": 230, "lora": 20})
EMBEDDED = Scale(  # a tenth of the paper's numbers of images, but for the LoRA's
    per_plane={"all": None, "balanced": 23, "lora": 20},
    train_lora=(
        "--layers locon --lr 2e-3 --schedule cosine --debiased-estimation-loss --batch-size 20 "
        "--guidance-scale 1.5"
    ),
    repeats=120,
    rank=32,
    # alpha = r adds up r matrices of rank 1: at 2e-3 the loss of 128 goes from 0.04 to 2
    rates={128: 5e-4},
    sample="--guidance-scale 1.5 --batch-size 20",
    count=50,
    classify="--size 64 --lr 5e-3 --schedule cosine",
    beyond="--steps 700 --batch-size 20",
    # a pass through ViT takes ten times as long as through ResNet18, and learns little here
    passes=dict.fromkeys(CLASSIFIERS, 4000) | {"vit_b_16": 200},
    left_out={
        "vit_b_16": "from random weights, on a few hundred images of 64 px, it stays near chance"
    },
)
QUICK = replace(
    EMBEDDED,
    repeats=26,
    count=16,
    without=2,
    sample="--guidance-scale 2 --batch-size 20",  # a shorter LoRA wants more
    beyond="--steps 200 --batch-size 20",
    passes=dict.fromkeys(CLASSIFIERS, 1500),
)
