"""The paper's experiments as data: tables 1 and 2, the controls it left out, and what this project
adds.

A row is a data model and a classifier. Nothing here runs: reproduce.py turns rows into runs of
classify.py.
"""

from collections.abc import Sequence
from dataclasses import dataclass

CLASSIFIERS = {  # as classify.py calls them, and as the paper does
    "densenet169": "DenseNet169",
    "mobilenet_v2": "MobileNet v2",
    "efficientnet_b0": "EfficientNet b0",
    "resnet18": "ResNet18",
    "vit_b_16": "ViT b16",
}
PROBES = {"probe": "linear probe", "knn": "nearest neighbours", "prompts": "its prompts"}
"""What is done with a frozen vision model, as classify.py calls it -> in words."""
RANKS = (8, 32, 128)  # of the LoRAs in figure 3; alpha = rank
MANIFESTS = {  # the authors' lists of the Spanish images
    "all": "all_train_no_cer.csv",
    "balanced": "spain_train_1150_balanced.csv",
    "lora": "lora_train_data.csv",
}


@dataclass(frozen=True)
class DataModel:
    """What a classifier is trained on.

    spanish: "all" training images (6148), the "balanced" ones (1150), or none
    synthetic: how the synthetic images were made: "lora" (the paper), "styles", "prompts", "token",
        "dreambooth", none
    african: with the African training images, which is no longer zero-shot
    augment: random rotation, flips and crops
    contrast: random brightness, contrast and gamma
    balanced_sampling: every class is drawn equally often, however many images it has
    """

    name: str
    spanish: str = ""
    synthetic: str = ""
    african: bool = False
    augment: bool = False
    contrast: bool = False
    balanced_sampling: bool = False


@dataclass(frozen=True)
class Row:
    """A row of a table. Rows of two tables with the same data and classifier are one run."""

    table: str  # "1", "2", "controls", "styles", "beyond" or "probes"
    data: DataModel
    classifier: str  # a key of CLASSIFIERS, or a frozen model as "probe:owner/name"

    @property
    def name(self) -> str:
        return f"{self.data.name}/{classifier_name(self.classifier)}"


ES, ES_DA = DataModel("ES", "all"), DataModel("ES+DA", "all", augment=True)
HB, HB_DA = (
    DataModel("HB", "balanced", "lora"),
    DataModel("HB+DA", "balanced", "lora", augment=True),
)
TABLE_2 = (
    DataModel("AF", african=True),
    ES,
    DataModel("ES+AF", "all", african=True),
    DataModel("HB-all", "all", "lora"),
)
# what else may explain the gain: ES is 42 % Other and 6 % abdomen, HB has as many of each class
CONTROLS = (
    DataModel("BAL", "balanced"),  # HB without its synthetic images
    DataModel("BAL+DA", "balanced", augment=True),
    DataModel("ES+DA+balanced", "all", augment=True, balanced_sampling=True),
    DataModel("ES+DA+contrast", "all", augment=True, contrast=True),
)
# prompts that name brightness and contrast: ours, the paper's future work ("more detailed texts")
STYLES = (
    DataModel("HB-styles", "balanced", "styles"),
    DataModel("HB-styles+DA", "balanced", "styles", augment=True),
)
BEYOND = (  # what the paper names as future work, each in the place of HB+DA
    DataModel("HB-prompts+DA", "balanced", "prompts", augment=True),
    DataModel("HB-token+DA", "balanced", "token", augment=True),
    DataModel("HB-dreambooth+DA", "balanced", "dreambooth", augment=True),
)
ROWS = (
    *(Row("1", data, classifier) for data in (ES, ES_DA, HB, HB_DA) for classifier in CLASSIFIERS),
    *(Row("2", data, "vit_b_16") for data in TABLE_2),
    *(Row("controls", data, classifier) for data in CONTROLS for classifier in CLASSIFIERS),
    *(Row("styles", data, classifier) for data in STYLES for classifier in CLASSIFIERS),
)
BEYOND_ROWS = tuple(Row("beyond", data, "resnet18") for data in BEYOND)
QUICK_DATA = ("ES", "ES+DA", "HB+DA", "BAL+DA", "ES+DA+contrast", "HB-styles+DA")
QUICK_ROWS = tuple(
    row for row in ROWS if row.data.name in QUICK_DATA and row.classifier == "resnet18"
)


def classifier_name(classifier: str) -> str:
    """As the report calls it: one of the paper's five, or a frozen model and what is done with
    it."""
    head, _, name = classifier.partition(":")
    return (
        CLASSIFIERS[classifier]
        if classifier in CLASSIFIERS
        else f"{name.rstrip('/')} ({PROBES[head]})"
    )


def probe_rows(models: Sequence[str]) -> tuple[Row, ...]:
    """Rows for frozen models, such as "probe:owner/name": on the data models that are not
    augmented."""
    data = (ES, HB, DataModel("AF", african=True))
    # which learn from nothing: one row each
    prompted = [m for m in models if m.startswith("prompts:")]
    return tuple(
        Row("probes", d, model)
        for model in models
        for d in (data[:1] if model in prompted else data)
    )


def choose(rows: Sequence[Row], names: Sequence[str]) -> tuple[Row, ...]:
    """The rows called so, in the plan's order; a data model, a classifier or a table ("table 1",
    "controls") names all of its own.

    Case and spaces do not count. ValueError for a name that fits none.
    """

    def fits(row: Row, name: str) -> bool:
        known = (
            row.name,
            f"{row.data.name}/{row.classifier}",
            row.data.name,
            row.classifier,
            f"table {row.table}",
        )
        known += (row.table,) if row.table.isalpha() else ()
        return _plain(name) in map(_plain, (*known, classifier_name(row.classifier)))

    for name in names:
        if not any(fits(row, name) for row in rows):
            raise ValueError(
                f"no row is called {name!r}; there are"
                f" {', '.join(dict.fromkeys(r.name for r in rows))}"
            )
    return tuple(row for row in rows if not names or any(fits(row, name) for name in names))


def _plain(name: str) -> str:
    return "".join(name.lower().split())
