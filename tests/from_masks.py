"""Write a data set of one mask file an object in COCO's layout.

    python tests/from_masks.py FOLDER DATA_DIR [--side 256]

The nuclei of the Data Science Bowl of 2018 are published so: FOLDER/NAME/images/*.png is an image,
and FOLDER/NAME/masks/*.png are its objects, white on black. Of the images, sorted by name, every
fifth goes to val2017, the others to train2017.
"""

import argparse
import json
from pathlib import Path

import numpy as np
from PIL import Image
from pycocotools import mask as coco_mask

MIN_PIXELS = 10  # of an object; fewer are a slip


def convert(source: Path, data_dir: Path, side: int | None = None) -> None:
    """Write both splits of a data set.

    side: of the square images that are taken, in pixels; None for all of any shape.
    Masks of another size than their image are left out.
    """
    paths = sorted(source.glob("*/images/*.png"))
    if side:
        paths = [path for path in paths if Image.open(path).size == (side, side)]
    (data_dir / "annotations").mkdir(parents=True, exist_ok=True)
    for split in ("train", "val"):
        folder = data_dir / f"{split}2017"
        folder.mkdir(exist_ok=True)
        images, annotations = [], []
        for number, path in enumerate(paths):
            if (number % 5 == 4) != (split == "val"):
                continue
            image = Image.open(path).convert("RGB")
            if len({band.tobytes() for band in image.split()}) == 1:
                image = image.convert("L")  # a smaller file
            image.save(folder / f"{number:04}.png", optimize=True)
            images.append({"id": number + 1, "file_name": f"{number:04}.png",
                           "width": image.width, "height": image.height})
            for mask_path in sorted(path.parent.parent.glob("masks/*.png")):
                mask = np.asarray(Image.open(mask_path).convert("L")) > 127
                if mask.shape == (image.height, image.width) and mask.sum() >= MIN_PIXELS:
                    annotation = {"id": len(annotations) + 1, "image_id": number + 1}
                    annotations.append(annotation | describe_object(mask))
        file = data_dir / "annotations" / f"instances_{split}2017.json"
        file.write_text(json.dumps({"images": images, "annotations": annotations,
                                    "categories": [{"id": 1, "name": "nucleus"}]}))
        print(f"{file}: {len(images)} images, {len(annotations)} objects")


def describe_object(mask: np.ndarray) -> dict:
    """Return the fields of a COCO annotation that a mask (h, w) gives."""
    rle = coco_mask.encode(np.asfortranarray(mask, dtype=np.uint8))
    return {
        "category_id": 1,
        "bbox": coco_mask.toBbox(rle).tolist(),
        "area": int(coco_mask.area(rle)),
        "iscrowd": 0,
        "segmentation": {"size": rle["size"], "counts": rle["counts"].decode()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("source", type=Path, metavar="FOLDER")
    parser.add_argument("data_dir", type=Path)
    parser.add_argument("--side", type=int, help="take only square images of so many pixels")
    args = parser.parse_args()
    convert(args.source, args.data_dir, args.side)


if __name__ == "__main__":
    main()
