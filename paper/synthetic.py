"""What a set of synthetic images is: recognised, near to real ones or not, copied or not; figures 2
and 3."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from classify import ClassifyError
from classify.features import Extractor, classifier, features, inception
from eval.figures import contact_sheet, tsne, tsne_grid
from eval.quality import (
    Memorisation,
    closest_pairs_figure,
    memorisation,
    pixel_features,
    quality_table,
)
from paper.document import draw
from paper.gain import WITH_LORA, Recognised
from paper.material import Selections
from paper.results import read_by
from planes.datasets import Record, read_synthetic
from planes.pictures import open_image

PER_SOURCE = 35  # images of a class and source in figure 3


@dataclass
class Findings:
    """What the report says of the synthetic images.

    quality: rows of eval.quality.quality_table
    figures: title -> paper.document.picture, figure 2 first
    notes: sentences
    """

    recognised: Recognised
    quality: list[dict]
    figures: dict[str, str]
    notes: list[str]


def recognised(classifier_file: Path, records: Sequence[Record]) -> dict[str, float]:
    """Share of the synthetic images that the classifier takes for the class of their prompt, by
    sampler."""
    targets, probabilities = read_by(classifier_file, records)
    hits = probabilities.argmax(axis=1) == targets
    samplers = np.array([record.center for record in records])
    return {str(name): float(hits[samplers == name].mean()) for name in dict.fromkeys(samplers)}


def extractor(layer: str, size: int, judges: Sequence[Path]) -> Extractor | None:
    """Inception v3 where its weights can be had, else the first of our own classifiers, else
    nothing."""
    try:
        return inception(layer=layer, size=size)
    except ClassifyError:
        return classifier(judges[0]) if judges else None


def describe(
    out: Path,
    selections: Selections,
    panels: Mapping[str, Path],
    lora: str,
    without: Path,
    judges: Mapping[str, Path],
) -> Findings:
    """Measure the synthetic images and draw them into out/figures.

    panels: LoRA -> the folder of its images; `lora` is the one whose images classifiers are trained
        on
    without: a folder of images made without LoRA, to see what it does
    judges: data model of real images alone -> the file of a classifier that is trained on it
    """
    found, classes = Findings({}, [], {}, []), selections.classes
    real, unseen = selections.images("all"), selections.target(train=False)
    lora_images, sites = selections.images("lora"), dict(zip(selections.names, (real, unseen)))
    images = {n: read_synthetic(path / "manifest.csv", classes) for n, path in panels.items()}
    synthetic, plain = images[lora], read_synthetic(without / "manifest.csv", classes)

    kinds = (f"{len(synthetic):,} {WITH_LORA}", synthetic), (f"{len(plain):,} without", plain)
    for name, file in judges.items():
        for kind, records in kinds:
            found.recognised[name, kind] = recognised(file, records)

    files, caption = [*judges.values()], "The first image of each class; synthetic ones by LoRA,"
    caption += f" {lora}."
    if lacking := [name for name in classes if name not in {record.plane for record in unseen}]:
        caption += f" {selections.names[1]} has no {' and no '.join(lacking)}."
    figure = figure_2(sites, synthetic, classes)
    found.figures["Samples"] = draw(out, "samples.png", figure, caption)

    if network := extractor("logits", 224, files):
        caption = f"t-SNE of {network.name}; at most {PER_SOURCE} images per class and source."
        figure = figure_3(sites, images, network, selections.seed, classes)
        found.figures["Where the sources lie"] = draw(out, "sources.png", figure, caption)
    try:
        if network := extractor("penultimate", 299, files):
            sets = real, synthetic
            planes = ([str(record.plane) for record in records] for records in sets)
            samplers = [record.center for record in synthetic]
            vectors = [features(network, records) for records in sets]
            found.quality = quality_table(*vectors, *planes, samplers, seed=selections.seed)
            near = memorisation(features(network, lora_images), vectors[1])
            found.notes.append(near_copies(network.name, near, len(lora_images)))
        copies = memorisation(pixel_features(lora_images), pixel_features(synthetic))
    except ValueError as error:
        found.notes.append(f"Copies of training images: not measured, since {error}.")
        return found
    found.notes.append(
        f"Of {len(synthetic):,} synthetic images {int(copies.copied.sum())} are copies of an image"
        f" that the LoRA was trained on. The nearest is at {copies.ratio.min():.2f} of the usual"
        " distance between neighbouring training images, the median at"
        f" {np.median(copies.ratio):.2f}."
    )
    figure = closest_pairs_figure(copies, lora_images, synthetic)
    caption = "Above each pair its distance, as a share of the usual one of training images."
    found.figures["Closest to a training image"] = draw(out, "closest_pairs.png", figure, caption)
    return found


def near_copies(network: str, copies: Memorisation, train: int) -> str:
    """How many of so many training images have a near copy among the synthetic ones in a network's
    features; what that says."""
    owners = len({*copies.index[copies.copied]})
    return (
        f"In features of {network}, {owners} of the {train} images that the LoRA was trained on"
        f" ({100 * owners / train:.0f} %) have a near copy among the synthetic ones: one at less"
        " than a third of the usual distance between neighbouring training images. This can exclude"
        " that an image was given back as it was, shifted, or in other grey levels. It cannot"
        " exclude that a detail of a patient was learned and stands in an image that is otherwise"
        " new, nor that the LoRA's file gives away more than these samples show; and views of one"
        " kind may be near by chance. A share of 0 is no proof of privacy."
    )


def figure_2(
    sites: Mapping[str, Sequence[Record]], synthetic: Sequence[Record], classes: Sequence[str]
):
    """The first image of each class: a row for each sampler and site."""
    samplers = dict.fromkeys(record.center for record in synthetic)
    groups = {name: [r for r in synthetic if r.center == name] for name in samplers} | sites
    cells = []
    for records in groups.values():
        first = {record.plane: record for record in reversed(records)}
        shown = map(first.get, classes)
        cells.append([record and open_image(record.path, record.levels) for record in shown])
    return contact_sheet(cells, list(groups), classes)


def figure_3(
    sites: Mapping[str, Sequence[Record]],
    panels: Mapping[str, Sequence[Record]],
    network: Extractor,
    seed: int,
    classes: Sequence[str],
):
    """For each LoRA and class that all sites have, t-SNE of equally many images of each source;
    real ones are the same in every row."""
    shared = set.intersection(*({record.plane for record in site} for site in sites.values()))
    rows: dict[str, dict] = {}
    for lora, synthetic in panels.items():
        rng, row = np.random.default_rng(seed), rows.setdefault(lora, {})
        for plane in [name for name in classes if name in shared]:
            chosen = []
            for images in (*sites.values(), synthetic):
                group = [record for record in images if record.plane == plane]
                chosen += [group[n] for n in rng.permutation(len(group))[:PER_SOURCE]]
            points = tsne(features(network, chosen), seed=seed)
            row[str(plane)] = points, [record.source for record in chosen]
    return tsne_grid(rows, {site[0].source: name for name, site in sites.items()})
