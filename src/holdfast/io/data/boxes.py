"""Data of object detection: images with the boxes of their objects, from a COCO JSON file or one JSON file for each
image.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, TypeAlias

import numpy as np
from numpy.typing import NDArray

from holdfast.core.errors import TargetError
from holdfast.core.names import did_you_mean, kind_of
from holdfast.io.data.pictures import SUFFIXES, image_inside, refuse_leaving, size_and_mode, with_suffix
from holdfast.io.files import existing, refusing
from holdfast.io.models.weights import read_once

CLASSES: Final = "classes.json"
"""file in a folder of images with the names of the classes, in the order of their labels"""
_ROUNDING = 1.0  # pixels by which a box may reach beyond its image, as boxes of COCO do
_MOST_ROWS = 10_000_000  # rows of images times those of objects, which take half a gigabyte
_LARGEST = 2**53  # from which floats are not all whole numbers
_EXAMPLE = '{"boxes": [[x1, y1, x2, y2]], "labels": [2]}'

Json: TypeAlias = "str | int | float | bool | list[Json] | dict[str, Json] | None"
Box: TypeAlias = tuple[float, float, float, float]
Row: TypeAlias = tuple[float, float, float, float, int, int]
"""x1, y1, x2, y2 in pixels, label of the file, and 1 for a crowd, 0 otherwise"""


@dataclass(frozen=True)
class BoxData:
    """Images with the boxes of their objects. The images may differ in size, and are not read."""

    paths: tuple[Path, ...]
    """files of the images (n)"""
    sizes: NDArray[np.int64]
    """width and height of each image in pixels, (n, 2)"""
    truth: NDArray[np.float64]
    """objects (n, k, 6): x1, y1, x2, y2 in pixels of the stored image, label, crowd; the label is a position in
    `names`, and -1 for padding"""
    names: tuple[str, ...]
    """names of the classes"""
    ids: tuple[int, ...]
    """label by which each class is named in the files, such as the ids of the categories of COCO, which have gaps; a
    model may return these labels (see `holdfast.tasks.box_outputs.read_boxes`)"""


def open_boxes(path: Path, *, follow_links: bool = False) -> BoxData:
    """Return the objects of a COCO JSON file, or of a folder of images with a JSON file for each.

    The images of a COCO file are those of `file_name` in the folder `images` beside it, or in its own folder, in the
    order of their ids. An object is `bbox` with x, y, width and height, a `category_id`, and `iscrowd`. A folder whose
    only JSON file has the name of no image is that of a COCO file.

    In a folder of images, `NAME.json` beside `NAME.png` contains `{"boxes": [[x1, y1, x2, y2]], "labels": [2]}`, in
    pixels. Labels are the whole numbers that the model returns. With `classes.json`, a list of the names of all
    classes, they are positions in it, or names. An image without a JSON file, or without an annotation of COCO, has no
    objects.

    Raises `TargetError` for boxes that are not finite, have no area, or reach more than a pixel beyond the image, for
    labels without a class, missing images, and without any object. A link that leads out of the folder is refused
    without `follow_links`.
    """
    existing(path, "file of boxes")
    if not path.is_dir():
        return _of_coco(path, follow_links=follow_links)
    images = [*with_suffix(path, SUFFIXES)]
    files = {file.stem: file for file in with_suffix(path, (".json",)) if file.name != CLASSES}
    if len(files) == 1 and not files.keys() & {image.stem for image in images}:
        return _of_coco(*files.values(), follow_links=follow_links)
    return _of_folder(path, images, files, follow_links=follow_links)


def _of_folder(
    folder: Path, images: Sequence[Path], files: Mapping[str, Path], *, follow_links: bool
) -> BoxData:
    if not images or not files:
        lacking = "images" if not images else "JSON files with their boxes"
        raise TargetError(
            f"{str(folder)!r} holds no {lacking}; NAME.json was expected beside NAME.png: {_EXAMPLE}"
        )
    declared = folder / CLASSES if (folder / CLASSES).exists() else None
    if not follow_links:
        refuse_leaving([*images, *files.values(), *([declared] if declared else [])], folder)
    stray = next((file for stem, file in files.items() if stem not in {image.stem for image in images}), None)
    if stray is not None:
        raise TargetError(f"the image of {str(stray)!r} is missing; put it into the same folder")
    names = None if declared is None else _names(declared)
    sizes = [size_and_mode(image)[0] for image in images]
    rows: list[list[Row]] = [
        _of_image(files[image.stem], size, names) if image.stem in files else []
        for image, size in zip(images, sizes, strict=True)
    ]
    ids = [*range(len(names))] if names else sorted({row[4] for each in rows for row in each})
    return _packed(str(folder), images, sizes, rows, names or [str(each) for each in ids], ids)


def _names(file: Path) -> list[str]:
    names = _read(file)
    texts = [name for name in names if isinstance(name, str)] if isinstance(names, list) else []
    if not isinstance(names, list) or not names or len({*texts}) < len(names):
        raise TargetError(
            f"{str(file)!r} contains {kind_of(names)}; a list of different names was expected, such as "
            '["car", "person"], in the order of the labels that the model returns'
        )
    return texts


def _of_image(file: Path, size: tuple[int, int], names: Sequence[str] | None) -> list[Row]:
    content = _read(file)
    boxes, labels = (content.get(key) if isinstance(content, dict) else None for key in ("boxes", "labels"))
    if not isinstance(boxes, list) or not isinstance(labels, list) or len(boxes) != len(labels):
        counted = (
            f"{len(boxes)} boxes and {len(labels)} labels"
            if isinstance(boxes, list) and isinstance(labels, list)
            else kind_of(content)
        )
        raise TargetError(
            f"{str(file)!r} contains {counted}; as many labels as boxes were expected: {_EXAMPLE}"
        )
    return [
        (*_inside(_numbers(box, where), size, where), _label(label, names, file), 0)
        for number, (box, label) in enumerate(zip(boxes, labels, strict=True))
        for where in (f"box {number} of {str(file)!r}",)
    ]


def _label(label: Json, names: Sequence[str] | None, file: Path) -> int:
    if isinstance(label, str) and names is not None and label in names:
        return names.index(label)
    number = _whole(label)
    if number is not None and number >= 0 and (names is None or number < len(names)):
        return number
    if names is None:
        advice = f" Names need the file {CLASSES}, a list of all names" if isinstance(label, str) else ""
        raise TargetError(
            f"{str(file)!r} has the label {label!r}; a whole number of at least 0 was expected.{advice}"
        )
    advice = did_you_mean(label, names) if isinstance(label, str) else f"; 0 to {len(names) - 1} was expected"
    raise TargetError(f"{str(file)!r} has the label {label!r}, and {CLASSES} has {len(names)} names{advice}")


def _of_coco(file: Path, *, follow_links: bool) -> BoxData:
    content = _read(file)
    if not isinstance(content, dict):
        raise TargetError(f"{str(file)!r} contains {kind_of(content)}; a COCO JSON file was expected")
    images, annotations, categories = (
        _by_id(content, key, file) for key in ("images", "annotations", "categories")
    )
    folder = file.parent / "images" if (file.parent / "images").is_dir() else file.parent
    ids = sorted(categories)
    names = [str(categories[each].get("name", each)) for each in ids]
    paths = {
        each: image_inside(folder, image.get("file_name"), f"image {each} of {str(file)!r}")
        for each, image in sorted(images.items())
    }
    if not follow_links:
        refuse_leaving(paths.values(), folder)
    sizes = {each: size_and_mode(path)[0] for each, path in paths.items()}
    for each, (width, height) in sizes.items():
        stated = images[each].get("width", width), images[each].get("height", height)
        if stated != (width, height):
            raise TargetError(
                f"{str(paths[each])!r} has {width} x {height} pixels, and {str(file)!r} states {stated[0]} x "
                f"{stated[1]}, to which its boxes refer; give the image of that size"
            )
    rows: dict[int, list[Row]] = {each: [] for each in paths}
    for each, annotation in annotations.items():
        where = f"annotation {each} of {str(file)!r}"
        image, category = (_whole(annotation.get(key)) for key in ("image_id", "category_id"))
        if image not in rows or category not in categories:
            key, known = ("image_id", images) if image not in rows else ("category_id", categories)
            raise TargetError(
                f"{where} has the {key} {annotation.get(key)!r}, which is none of the {len(known)} ids of the file"
            )
        assert image is not None
        assert category is not None
        x, y, *sides = _numbers(annotation.get("bbox"), where)
        box = _inside((x, y, x + sides[0], y + sides[1]), sizes[image], where)
        rows[image].append((*box, category, int(annotation.get("iscrowd") == 1)))
    return _packed(str(file), [*paths.values()], [*sizes.values()], [*rows.values()], names, ids)


def _by_id(content: Mapping[str, Json], key: str, file: Path) -> dict[int, dict[str, Json]]:
    """The entries of a list of a COCO file by their ids."""
    entries = content.get(key)
    if not isinstance(entries, list) or not entries:
        raise TargetError(
            f"{str(file)!r} has no {key}; lists of images, annotations and categories were expected, as in COCO"
        )
    found: dict[int, dict[str, Json]] = {}
    for number, entry in enumerate(entries):
        each = _whole(entry.get("id")) if isinstance(entry, dict) else None
        if not isinstance(entry, dict) or each is None or each < 0 or each in found:
            what = "no object" if not isinstance(entry, dict) else f"the id {entry.get('id')!r}"
            raise TargetError(
                f"entry {number} of the {key} of {str(file)!r} has {what}; a whole number that no other entry has was "
                "expected"
            )
        found[each] = entry
    return found


def _read(file: Path) -> Json:
    content = read_once(file, "file of boxes")
    with refusing(f"{str(file)!r} is not JSON", (ValueError, RecursionError), "a file in UTF-8 was expected"):
        parsed: Json = json.loads(content)
    return parsed


def _whole(value: Json) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) and abs(value) < _LARGEST else None


def _numbers(box: Json, where: str) -> Box:
    """The four numbers of a box."""
    values = [
        float(value)
        for value in (box if isinstance(box, list) else ())
        if isinstance(value, int | float) and abs(value) < _LARGEST
    ]
    if not isinstance(box, list) or not len(box) == len(values) == 4:
        raise TargetError(f"{where} is {str(box)[:60]}; four finite numbers were expected")
    return values[0], values[1], values[2], values[3]


def _inside(box: Box, size: tuple[int, int], where: str) -> Box:
    """The corners of a box that has an area inside of its image."""
    (x1, y1, x2, y2), (width, height) = box, size
    shown = f"from ({x1:g}, {y1:g}) to ({x2:g}, {y2:g})"
    if x2 <= x1 or y2 <= y1:
        raise TargetError(
            f"{where} is {shown}, and has no area; a box that ends right of and below its begin was expected: correct "
            "it or remove it"
        )
    if min(x1, y1) < -_ROUNDING or x2 > width + _ROUNDING or y2 > height + _ROUNDING:
        raise TargetError(
            f"{where} is {shown}, and the image has {width} x {height} pixels; a box inside of the image was expected: "
            "correct it, or give the image to which it refers"
        )
    return box


def _packed(
    name: str,
    paths: Sequence[Path],
    sizes: Sequence[tuple[int, int]],
    rows: Sequence[Sequence[Row]],
    names: Iterable[str],
    ids: Sequence[int],
) -> BoxData:
    most = max(map(len, rows))
    if not most:
        raise TargetError(f"{name!r} has no objects; give images of which at least one has a box")
    if len(rows) * most > _MOST_ROWS:
        raise TargetError(
            f"{name!r} has {len(rows):,} images and up to {most:,} objects in one; at most {_MOST_ROWS:,} rows are "
            "read, the product of both: give fewer images"
        )
    truth = np.zeros((len(rows), most, 6))
    truth[..., 4] = -1
    for image, each in enumerate(rows):
        truth[image, : len(each)] = np.array(each).reshape(-1, 6)
    labels = truth[..., 4]
    labels[labels >= 0] = np.searchsorted(ids, labels[labels >= 0])
    return BoxData(tuple(paths), np.array(sizes, np.int64), truth, tuple(names), tuple(ids))
