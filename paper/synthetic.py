"""What a set of synthetic images is: recognised, near to real ones or not, copied or not; figures 2
and 3."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image

from classify import ClassifyError
from classify.data import PlaneImages, batches
from classify.features import Extractor, classifier, features, inception
from classify.models import load
from classify.train import predict
from eval.figures import samples_figure, save, tsne, tsne_grid
from eval.quality import closest_pairs_figure, memorisation, pixel_features, quality_table
from planes import PLANES
from planes.datasets import Record

PER_SOURCE = 35  # images of a plane and source in figure 3


@dataclass
class Findings:
    """What the report says of the synthetic images.

    recognised: label -> sampler -> fraction of images taken for the plane of their prompt
    quality: rows of eval.quality.quality_table
    figures: (title, file, caption), figure 2 first
    notes: sentences
    """

    recognised: dict[str, dict[str, float]] = field(default_factory=dict)
    quality: list[dict] = field(default_factory=list)
    figures: list[tuple[str, Path, str]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def recognised(classifier_file: Path, records: Sequence[Record]) -> dict[str, float]:
    """Share of the synthetic images that the classifier takes for the plane of their prompt, by
    sampler."""
    model, description = load(classifier_file)
    images = PlaneImages(records, description["size"], description["classes"])
    predictions = (
        predict(model, batches(images, 64), description["input_range"]).argmax(dim=1).numpy()
    )
    hits = predictions == np.array(images.targets)
    centers = np.array([record.center for record in records])
    return {
        str(sampler): float(hits[centers == sampler].mean()) for sampler in dict.fromkeys(centers)
    }


def extractor(layer: str, size: int, judge: Path | None) -> Extractor | None:
    """Inception v3 where its weights can be had, else a classifier of our own, else nothing."""
    try:
        return inception(layer=layer, size=size)
    except ClassifyError:
        return classifier(judge) if judge else None


def describe(
    out: Path,
    sites: Mapping[str, Sequence[Record]],
    lora_images: Sequence[Record],
    panels: Mapping[int, Sequence[Record]],
    rank: int,
    judges: Mapping[str, Path],
    without: Sequence[Record],
    seed: int,
    classes: Sequence[str] = PLANES,
) -> Findings:
    """Measure the synthetic images and draw them into out/figures.

    sites: the source of the first site's images and of the second's, such as "spain" and "africa"
        -> their images
    lora_images: what the LoRA was trained on
    panels: rank of the LoRA -> its synthetic images; `rank` is the one that classifiers are trained
        on
    judges: label -> a classifier of real images alone, written by classify.py
    without: images made without LoRA, to see what it does
    """
    found, figures = Findings(), out / "figures"
    figures.mkdir(parents=True, exist_ok=True)
    synthetic, judge = panels[rank], next(iter(judges.values()), None)
    for label, file in judges.items():
        found.recognised |= {f"{label}, with LoRA": recognised(file, synthetic)}
        found.recognised |= {f"{label}, without": recognised(file, without)} if without else {}

    (_, real), (second, unseen) = sites.items()
    save(figure_2(sites, synthetic, classes), figures / "samples.png")
    caption = f"The first image of each class; synthetic ones by the LoRA of rank {rank}."
    if lacking := [name for name in classes if not any(record.plane == name for record in unseen)]:
        caption += f" {second.capitalize()} has no {' and no '.join(lacking)}."
    found.figures.append(("Samples (figure 2)", figures / "samples.png", caption))

    if network := extractor("logits", 224, judge):
        save(figure_3(sites, panels, network, seed, classes), figures / "sources.png")
        caption = (
            f"t-SNE of {network.name}; {PER_SOURCE} images per class and source, rank of the LoRA"
            " to the left."
        )
        found.figures.append(("Where the sources lie (figure 3)", figures / "sources.png", caption))
    if network := extractor("penultimate", 299, judge):
        found.quality = quality_table(
            features(network, list(real)),
            features(network, list(synthetic)),
            [str(record.plane) for record in real],
            [str(record.plane) for record in synthetic],
            [record.center for record in synthetic],
            seed=seed,
        )
        found.notes.append(
            "Distances to the real images of the first site are between features of"
            f" {network.name}."
        )

    if network and len(lora_images) > 1:
        found.notes.append(near_copies(network, lora_images, synthetic))
    copies = memorisation(pixel_features(lora_images), pixel_features(synthetic))
    save(closest_pairs_figure(copies, lora_images, synthetic), figures / "closest_pairs.png")
    found.notes.append(
        f"Of {len(synthetic):,} synthetic images {int(copies.copied.sum())} are copies of an image"
        f" that the LoRA was trained on. The nearest is at {copies.ratio.min():.2f} of the usual"
        " distance between neighbouring training images, the median at"
        f" {np.median(copies.ratio):.2f}."
    )
    caption = (
        "Above each pair its distance as a share of the usual one between neighbouring training"
        " images."
    )
    found.figures.append(("Closest to a training image", figures / "closest_pairs.png", caption))
    return found


def near_copies(
    network: Extractor, lora_images: Sequence[Record], synthetic: Sequence[Record]
) -> str:
    """How many training images have a near copy among the synthetic ones in a network's features;
    what that says."""
    train, drawn = features(network, list(lora_images)), features(network, list(synthetic))
    try:
        copies = memorisation(train, drawn)
    except ValueError as error:
        return f"Copies in features of {network.name}: not measured, since {error}."
    owners = {int(index) for index, copied in zip(copies.index, copies.copied) if copied}
    return (
        f"In features of {network.name}, {len(owners)} of the {len(train)} images that the LoRA was"
        f" trained on ({100 * len(owners) / len(train):.0f} %) have a near copy among the synthetic"
        " ones: one at less than a third of the usual distance between neighbouring training"
        " images. What this can exclude: that an image was given back as it was, shifted, or in"
        " other grey levels. What it cannot: that a detail of a patient was learned and stands in"
        " an image that is otherwise new, that somebody who holds the LoRA's file gets out more"
        " than these samples show, or that a near copy is one by chance, as views of one kind are"
        " alike. A share of 0 is no proof of privacy."
    )


def figure_2(
    sites: Mapping[str, Sequence[Record]],
    synthetic: Sequence[Record],
    classes: Sequence[str] = PLANES,
):
    """The first image of each class: a row for each sampler and site."""
    groups = {
        name: [r for r in synthetic if r.center == name]
        for name in dict.fromkeys(r.center for r in synthetic)
    }
    groups |= {name.capitalize(): records for name, records in sites.items()}
    rows = {}
    for label, records in groups.items():
        first = {name: next((r for r in records if r.plane == name), None) for name in classes}
        rows[label] = {
            plane: Image.open(r.path).convert("L").resize((256, 256))
            for plane, r in first.items()
            if r
        }
    return samples_figure(rows, classes)


def figure_3(
    sites: Mapping[str, Sequence[Record]],
    panels: Mapping[int, Sequence[Record]],
    network: Extractor,
    seed: int,
    classes: Sequence[str] = PLANES,
):
    """For each rank and class that all sites have, t-SNE of equally many images of each source;
    real ones are the same in every row."""
    rows, seen = {}, [{record.plane for record in records} for records in sites.values()]
    for rank, synthetic in panels.items():
        rng = np.random.default_rng(seed)
        rows[f"r = {rank}"] = {}
        # Africa has no Other
        for plane in (name for name in classes if all(name in planes for planes in seen)):
            chosen = []
            for records in (*sites.values(), synthetic):
                candidates = [record for record in records if record.plane == plane]
                chosen += [candidates[n] for n in rng.permutation(len(candidates))[:PER_SOURCE]]
            points = tsne(features(network, chosen), seed=seed)
            rows[f"r = {rank}"][str(plane)] = points, [record.source for record in chosen]
    return tsne_grid(rows)
