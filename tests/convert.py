"""Write a data set of another layout in COCO's.

    python tests/convert.py voc VOC_DIR DATA_DIR
    python tests/convert.py masks FOLDER DATA_DIR [--side 256]

voc: PASCAL VOC's, boxes alone; trainval becomes train2017, and test val2017. "Difficult" objects
become crowds, so that finding them is neither right nor wrong.
masks: FOLDER/NAME/images/*.png is an image, and FOLDER/NAME/masks/*.png are its objects, white on
black, as the nuclei of the Data Science Bowl of 2018 are published. Of the images, sorted by name,
every fifth goes to val2017. Masks of another size than their image, or of fewer than 10 pixels, are
slips, and left out.
"""

import argparse
import json
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import numpy as np
from PIL import Image
from pycocotools import mask as coco_mask


def convert_voc(source: Path, data_dir: Path) -> None:
    """Convert VOC's layout. Categories are numbered from 1 in the order of their names."""
    trees = {}
    for split, voc_split in (("train", "trainval"), ("val", "test")):
        names = (source / "ImageSets" / "Main" / f"{voc_split}.txt").read_text().split()
        trees[split] = {name: ElementTree.parse(source / "Annotations" / f"{name}.xml")
                        for name in names}
    found = {element.findtext("name") for split in trees.values() for tree in split.values()
             for element in tree.iter("object")}
    categories = sorted(found)
    for split, by_name in trees.items():
        entries = []
        for name, tree in by_name.items():
            path = source / "JPEGImages" / f"{name}.jpg"
            objects = [describe_voc_object(element, categories) for element in tree.iter("object")]
            entries.append((path.name, path.read_bytes(), Image.open(path).size, objects))
        write_split(data_dir, split, entries, categories)


def describe_voc_object(element: ElementTree.Element, categories: list[str]) -> dict:
    """Return the fields of a COCO annotation that a VOC object gives.

    VOC counts pixels from 1, and a box includes both corners; COCO has the upper left corner,
    counted from 0, and the size.
    """
    corners = ("xmin", "ymin", "xmax", "ymax")
    x0, y0, x1, y1 = (round(float(element.findtext(f"bndbox/{name}"))) for name in corners)
    width, height = x1 - x0 + 1, y1 - y0 + 1
    return {"category_id": 1 + categories.index(element.findtext("name")),
            "bbox": [x0 - 1, y0 - 1, width, height], "area": width * height,
            "iscrowd": int(element.findtext("difficult", "0"))}


def convert_masks(source: Path, data_dir: Path, side: int | None = None) -> None:
    """Convert images with a mask file an object; side: take only square images of such a side."""
    paths = sorted(source.glob("*/images/*.png"))
    if side:
        paths = [path for path in paths if Image.open(path).size == (side, side)]
    entries = {"train": [], "val": []}
    for number, path in enumerate(paths):
        image = Image.open(path).convert("RGB")
        if len({band.tobytes() for band in image.split()}) == 1:
            image = image.convert("L")  # a smaller file
        masks = (np.asarray(Image.open(mask_path).convert("L")) > 127
                 for mask_path in sorted(path.parent.parent.glob("masks/*.png")))
        objects = [describe_mask(mask) for mask in masks
                   if mask.shape[::-1] == image.size and mask.sum() >= 10]
        split = "val" if number % 5 == 4 else "train"
        entries[split].append((f"{number:04}.png", image, image.size, objects))
    for split, of_split in entries.items():
        write_split(data_dir, split, of_split, ["object"])


def describe_mask(mask: np.ndarray) -> dict:
    """Return the fields of a COCO annotation that a mask (h, w) gives."""
    rle = coco_mask.encode(np.asfortranarray(mask, dtype=np.uint8))
    return {"category_id": 1, "bbox": coco_mask.toBbox(rle).tolist(),
            "area": int(coco_mask.area(rle)), "iscrowd": 0,
            "segmentation": {"size": rle["size"], "counts": rle["counts"].decode()}}


def write_split(data_dir: Path, split: str, entries: list[tuple], categories: list[str]) -> None:
    """Write images and annotations; entries: (file name, bytes or image, (w, h), objects)."""
    folder = data_dir / f"{split}2017"
    folder.mkdir(parents=True, exist_ok=True)
    images, annotations = [], []
    for image_id, (name, content, (width, height), objects) in enumerate(entries, start=1):
        if isinstance(content, bytes):
            (folder / name).write_bytes(content)
        else:
            content.save(folder / name, optimize=True)
        images.append({"id": image_id, "file_name": name, "width": width, "height": height})
        for fields in objects:
            annotations.append({"id": len(annotations) + 1, "image_id": image_id} | fields)
    file = data_dir / "annotations" / f"instances_{split}2017.json"
    file.parent.mkdir(exist_ok=True)
    file.write_text(json.dumps({
        "images": images, "annotations": annotations,
        "categories": [{"id": i, "name": name} for i, name in enumerate(categories, start=1)]}))
    print(f"{file}: {len(images)} images, {len(annotations)} objects")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("layout", choices=["voc", "masks"])
    parser.add_argument("source", type=Path, metavar="FOLDER")
    parser.add_argument("data_dir", type=Path)
    parser.add_argument("--side", type=int, help="take only square images of so many pixels")
    args = parser.parse_args()
    if args.layout == "voc":
        convert_voc(args.source, args.data_dir)
    else:
        convert_masks(args.source, args.data_dir, args.side)


if __name__ == "__main__":
    main()
