"""Write a data set in VOC2007's layout in COCO's: python tests/from_voc.py VOC_DIR DATA_DIR

ImageSets/Main/trainval.txt becomes train2017, and test.txt val2017. Images are copied. Categories
are numbered from 1 in the order of their names. VOC counts pixels from 1, and a box includes both
corners; COCO has the upper left corner, counted from 0, and the size.
"""

import argparse
import json
import shutil
import xml.etree.ElementTree as ElementTree
from pathlib import Path

SPLITS = {"train": "trainval", "val": "test"}


def convert(voc_dir: Path, data_dir: Path) -> None:
    """Write both splits of a data set.

    VOC's "difficult" objects become crowds, so that finding them is neither right nor wrong.
    """
    trees = {}
    for split in SPLITS.values():
        names = (voc_dir / "ImageSets" / "Main" / f"{split}.txt").read_text().split()
        trees[split] = {name: ElementTree.parse(voc_dir / "Annotations" / f"{name}.xml")
                        for name in names}
    found = {element.findtext("name") for split in trees.values() for tree in split.values()
             for element in tree.iter("object")}
    category_ids = {name: i for i, name in enumerate(sorted(found), start=1)}
    (data_dir / "annotations").mkdir(parents=True, exist_ok=True)
    for split, voc_split in SPLITS.items():
        folder = data_dir / f"{split}2017"
        folder.mkdir(exist_ok=True)
        images, annotations = [], []
        for image_id, (name, tree) in enumerate(trees[voc_split].items(), start=1):
            shutil.copy(voc_dir / "JPEGImages" / f"{name}.jpg", folder)
            images.append({
                "id": image_id,
                "file_name": f"{name}.jpg",
                "width": int(tree.findtext("size/width")),
                "height": int(tree.findtext("size/height")),
            })
            for element in tree.iter("object"):
                annotation = {"id": len(annotations) + 1, "image_id": image_id}
                annotations.append(annotation | describe_object(element, category_ids))
        content = {
            "images": images,
            "annotations": annotations,
            "categories": [{"id": i, "name": name} for name, i in category_ids.items()],
        }
        file = data_dir / "annotations" / f"instances_{split}2017.json"
        file.write_text(json.dumps(content))
        print(f"{file}: {len(images)} images, {len(annotations)} boxes")


def describe_object(element: ElementTree.Element, category_ids: dict[str, int]) -> dict:
    """Return the fields of a COCO annotation that a VOC object gives."""
    corners = ("xmin", "ymin", "xmax", "ymax")
    x0, y0, x1, y1 = (round(float(element.findtext(f"bndbox/{name}"))) for name in corners)
    width, height = x1 - x0 + 1, y1 - y0 + 1
    return {
        "category_id": category_ids[element.findtext("name")],
        "bbox": [x0 - 1, y0 - 1, width, height],
        "area": width * height,
        "iscrowd": int(element.findtext("difficult", "0")),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="Write a data set in VOC's layout in COCO's.")
    parser.add_argument("voc_dir", type=Path)
    parser.add_argument("data_dir", type=Path)
    args = parser.parse_args()
    convert(args.voc_dir, args.data_dir)


if __name__ == "__main__":
    main()
