"""Data of object detection: COCO JSON files, and folders with a JSON file for each image."""

import json

import pytest
from PIL import Image

from holdfast.core.errors import TargetError
from holdfast.io.data.boxes import open_boxes


def images(folder, *names):
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        Image.new("RGB", (80, 40)).save(folder / name)
    return folder


def write(path, content):
    path.write_text(json.dumps(content), encoding="utf-8")
    return path


def annotation(number, image, category, box, **more):
    return {"id": number, "image_id": image, "category_id": category, "bbox": box} | more


COCO = {
    "images": [
        {"id": 7, "file_name": "b.png", "width": 80, "height": 40},
        {"id": 3, "file_name": "a.png"},
        {"id": 9, "file_name": "c.png"},
    ],
    "categories": [{"id": 90, "name": "toothbrush"}, {"id": 1, "name": "person"}, {"id": 18, "name": "dog"}],
    "annotations": [
        annotation(1, 7, 90, [10, 5, 20, 30.5]),
        annotation(2, 3, 18, [0, 0, 80.4, 40]),
        annotation(3, 7, 1, [1, 2, 3, 4], iscrowd=1),
    ],
}
EMPTY = [0, 0, 0, 0, -1, 0]


def changed(**parts):
    return json.loads(json.dumps(COCO)) | parts


def test_a_coco_file_gives_positions_of_categories_in_the_order_of_ids(tmp_path):
    images(tmp_path / "images", "a.png", "b.png", "c.png")
    data = open_boxes(write(tmp_path / "instances.json", COCO))
    assert (data.names, data.ids) == (("person", "dog", "toothbrush"), (1, 18, 90))
    assert [path.name for path in data.paths] == ["a.png", "b.png", "c.png"]
    assert data.sizes.tolist() == [[80, 40]] * 3
    expected = [
        [[0, 0, 80.4, 40, 1, 0], EMPTY],
        [[10, 5, 30, 35.5, 2, 0], [1, 2, 4, 6, 0, 1]],
        [EMPTY, EMPTY],
    ]
    assert data.truth.tolist() == expected
    assert open_boxes(tmp_path).truth.tolist() == expected


def test_a_folder_has_numbers_as_labels_or_names_with_classes_json(tmp_path):
    images(tmp_path, "a.png", "b.png", "c.png")
    write(tmp_path / "a.json", {"boxes": [[0, 0, 10, 10], [5, 5, 9, 9]], "labels": [5, 2]})
    write(tmp_path / "c.json", {"boxes": [], "labels": []})
    data = open_boxes(tmp_path)
    assert (data.names, data.ids) == (("2", "5"), (2, 5))
    assert data.truth.tolist() == [[[0, 0, 10, 10, 1, 0], [5, 5, 9, 9, 0, 0]], [EMPTY] * 2, [EMPTY] * 2]
    write(tmp_path / "classes.json", ["person", "dog", "cat"])
    write(tmp_path / "a.json", {"boxes": [[0, 0, 10, 10], [5, 5, 9, 9]], "labels": [2, "dog"]})
    data = open_boxes(tmp_path)
    assert (data.names, data.ids) == (("person", "dog", "cat"), (0, 1, 2))
    assert data.truth[0, :, 4].tolist() == [2, 1]


BAD_COCO = {
    "annotation 1 of .* from .10, 5. to .10, 8., and has no area": [annotation(1, 7, 90, [10, 5, 0, 3])],
    "annotation 1 of .* has 80 x 40 pixels": [annotation(1, 7, 90, [70, 5, 20, 3])],
    "annotation 1 of .* four finite numbers": [annotation(1, 7, 90, [float("nan"), 5, 20, 3])],
    "category_id 2, which is none of the 3 ids": [annotation(1, 7, 2, [1, 5, 20, 3])],
    "image_id 4, which is none of the 3 ids": [annotation(1, 4, 1, [1, 5, 20, 3])],
    "entry 1 of the annotations of .* has the id 1": [annotation(1, 7, 1, [1, 5, 20, 3])] * 2,
    "has no annotations": [],
}


@pytest.mark.parametrize("message", BAD_COCO)
def test_wrong_annotations_are_refused(tmp_path, message):
    images(tmp_path, "a.png", "b.png", "c.png")
    with pytest.raises(TargetError, match=message):
        open_boxes(write(tmp_path / "boxes.json", changed(annotations=BAD_COCO[message])))


@pytest.mark.parametrize(
    ("image", "message"),
    [
        ({"file_name": "missing.png"}, "image 3 of .*missing.png' does not exist"),
        ({"file_name": "../a.png"}, "name of a file inside of"),
        ({"file_name": "/etc/passwd"}, "name of a file inside of"),
        ({"file_name": "a.png", "width": 40}, "80 x 40 pixels, and .* states 40 x 40"),
    ],
)
def test_wrong_images_are_refused(tmp_path, image, message):
    images(tmp_path, "a.png")
    file = write(
        tmp_path / "boxes.json",
        changed(images=[{"id": 3} | image], annotations=[annotation(1, 3, 1, [0, 0, 9, 9])]),
    )
    with pytest.raises(TargetError, match=message):
        open_boxes(file)


def test_a_link_out_of_the_folder_is_refused(tmp_path):
    outside = images(tmp_path / "outside", "a.png")
    inside = images(tmp_path / "inside")
    (inside / "a.png").symlink_to(outside / "a.png")
    write(inside / "a.json", {"boxes": [[0, 0, 10, 10]], "labels": [0]})
    with pytest.raises(TargetError, match="outside of the folder"):
        open_boxes(inside)
    assert len(open_boxes(inside, follow_links=True).paths) == 1


BAD_FILES = {
    "is not JSON": "{",
    "1 boxes and 2 labels": {"boxes": [[0, 0, 1, 1]], "labels": [0, 1]},
    "box 0 of .* four finite numbers": {"boxes": [[0, 0, 1]], "labels": [0]},
    "label 0.5; a whole number": {"boxes": [[0, 0, 1, 1]], "labels": [0.5]},
    "label 'dog'; .* Names need the file classes.json": {"boxes": [[0, 0, 1, 1]], "labels": ["dog"]},
    "has no objects": {"boxes": [], "labels": []},
    "contains a list": [],
}


@pytest.mark.parametrize("message", BAD_FILES)
def test_wrong_files_of_an_image_are_refused(tmp_path, message):
    images(tmp_path, "a.png")
    content = BAD_FILES[message]
    (tmp_path / "a.json").write_text(content if content == "{" else json.dumps(content), encoding="utf-8")
    with pytest.raises(TargetError, match=message):
        open_boxes(tmp_path)


def test_labels_that_are_not_in_classes_json_are_refused(tmp_path):
    images(tmp_path, "a.png")
    write(tmp_path / "classes.json", ["person", "dog"])
    for label, message in (("dgo", "did you mean 'dog'"), (2, "2 names; 0 to 1 was expected")):
        write(tmp_path / "a.json", {"boxes": [[0, 0, 1, 1]], "labels": [label]})
        with pytest.raises(TargetError, match=message):
            open_boxes(tmp_path)


def test_missing_files_of_a_folder_are_named(tmp_path):
    with pytest.raises(TargetError, match="holds no images"):
        open_boxes(images(tmp_path / "empty"))
    with pytest.raises(TargetError, match="holds no JSON files"):
        open_boxes(images(tmp_path / "images", "a.png"))
    folder = images(tmp_path / "boxes", "a.png")
    for name in ("a.json", "b.json"):
        write(folder / name, {"boxes": [[0, 0, 1, 1]], "labels": [0]})
    with pytest.raises(TargetError, match=r"the image of .*b.json' is missing"):
        open_boxes(folder)
