"""Run parts of torchdistill 0.0.1, which made the published checkpoints, under today's torchvision.

Started by test_parity.py in a process of its own, with the folder of 0.0.1 first on PYTHONPATH, as
    python original.py student ARCH CHECKPOINT OUTPUT
    python original.py batches ANNOTATIONS OUTPUT
and by benchmark.py, which reads the JSON of the last line printed, as
    python original.py load DATA_DIR | start DATA_DIR | masks OUTPUTS
"""

import argparse
import collections
import json
import resource
import sys
import time
import types

import numpy as np
import torch
import torchvision

# the shims: names that torchvision has dropped since 0.7, none of which computes anything here
for name in ("faster_rcnn", "keypoint_rcnn", "mask_rcnn"):
    getattr(torchvision.models.detection, name).model_urls = {}
utils = types.ModuleType("torchvision.models.utils")
utils.load_state_dict_from_url = None
sys.modules["torchvision.models.utils"] = utils


def build(arch):
    """The student of 0.0.1 as its published configuration builds it, but for the downloaded weights."""
    from torchdistill.models.custom.bottleneck.detection import rcnn

    backbone = {
        "name": "custom_resnet50",
        "params": {
            "pretrained": False,
            "trainable_backbone_layers": 6,
            "layer1": {"type": "Bottleneck4LargeResNet", "bottleneck_channel": 3},
        },
    }
    student = getattr(rcnn, f"custom_{arch}_resnet_fpn")(
        backbone, False, False, 91, False, min_size=96, max_size=160
    )
    for module in student.modules():
        if isinstance(module, torchvision.ops.FrozenBatchNorm2d):
            module.eps = 0.0  # what torchvision 0.7's FrozenBatchNorm2d had
    return student.eval()


def student(arch, checkpoint, output):
    """Load a checkpoint by 0.0.1's own function, run the student, and save it by 0.0.1's own function."""
    from torchdistill.common.main_util import load_ckpt, save_ckpt
    from torchdistill.models.custom.bottleneck.detection.resnet_backbone import (
        Bottleneck4LargeResNet,
    )

    model = build(arch)
    optimizer = torch.optim.Adam(
        [
            p
            for n, p in model.named_parameters()
            if n.startswith(("backbone.body.conv1.", "backbone.body.layer1."))
        ],
        lr=1e-3,
    )
    scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, [5, 15], 0.1)
    best_value, _, _ = load_ckpt(
        checkpoint, model=model, optimizer=optimizer, lr_scheduler=scheduler, strict=True
    )
    images = [torch.rand(3, 90, 120, generator=torch.Generator().manual_seed(i)) for i in range(2)]
    with torch.no_grad():
        features = model.backbone.body(model.transform(images)[0].tensors)
        detections = model(images)
    torch.manual_seed(5)
    initial = Bottleneck4LargeResNet(3).state_dict()
    torch.save(
        {
            "keys": list(model.state_dict()),
            "features": list(features.values()),
            "detections": detections,
            "best_value": best_value,
            "initial": initial,
            "steps": len(optimizer.state),
        },
        f"{output}/seen.pt",
    )
    scheduler.milestones = collections.Counter([5, 15])
    args = argparse.Namespace(config="x.yaml", seed=None)
    for suffix, zipped in (("zip", True), ("old", False)):
        original_save = torch.save
        torch.save = lambda content, path, z=zipped, s=original_save: s(
            content, path, _use_new_zipfile_serialization=z
        )
        save_ckpt(
            model,
            optimizer,
            scheduler,
            np.float64(0.25),
            {"train": {"num_epochs": 20}},
            args,
            f"{output}/{suffix}.pt",
        )
        torch.save = original_save


def batches(annotations, output):
    """The chosen images, their groups, and the batches of every rank and epoch."""
    from torch.utils.data import DistributedSampler
    from torchdistill.datasets import coco, sampler

    dataset = coco.get_coco("", annotations, None, annotated_only=True, is_segment=False)
    groups = sampler.create_aspect_ratio_groups(dataset, k=3)
    found = {
        "ids": [dataset.dataset.ids[i] for i in dataset.indices],
        "groups": list(map(int, groups)),
    }
    for world_size in (1, 2, 3):
        for rank in range(world_size):
            shuffle = DistributedSampler(dataset, world_size, rank)
            grouped = sampler.GroupedBatchSampler(shuffle, groups, 4)
            for epoch in range(4):
                shuffle.set_epoch(epoch)
                found[f"{world_size} {rank} {epoch}"] = [list(map(int, batch)) for batch in grouped]
    with open(output, "w") as file:
        json.dump(found, file)


def coco_dataset(folder):
    """The training set of 0.0.1 as its configuration builds it: flips, polygons turned to masks."""
    from torchdistill.datasets import coco

    transforms = coco.Compose([coco.ImageToTensor(), coco.CocoRandomHorizontalFlip(0.5)])
    return coco.get_coco(
        f"{folder}/train2017",
        f"{folder}/annotations/instances_train2017.json",
        transforms,
        annotated_only=True,
        is_segment=False,
    )


def load(folder):
    """Seconds to load and prepare one image, of three passes the fastest."""
    torch.set_num_threads(1)
    dataset, passes = coco_dataset(folder), []
    for _ in range(3):
        begin = time.perf_counter()
        for i in range(len(dataset)):
            dataset[i]
        passes.append((time.perf_counter() - begin) / len(dataset))
    print(json.dumps(min(passes)))


def start(folder):
    """Seconds and MiB that the training set takes until its first batch is known."""
    from torch.utils.data import DistributedSampler
    from torchdistill.datasets import sampler

    def resident():
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * resource.getpagesize() / 2**20

    before, begin = resident(), time.perf_counter()
    dataset = coco_dataset(folder)
    grouped = sampler.GroupedBatchSampler(
        DistributedSampler(dataset, 3, 0), sampler.create_aspect_ratio_groups(dataset, k=3), 4
    )
    next(iter(grouped))
    print(json.dumps([time.perf_counter() - begin, resident() - before]))


def masks(file):
    """Seconds an image to turn detections with masks into COCO results, for boxes and for masks."""
    from torchdistill.eval.coco import CocoEvaluator

    outputs, evaluator = torch.load(file), CocoEvaluator.__new__(CocoEvaluator)
    passes = []
    for _ in range(3):
        begin = time.perf_counter()
        for image_id, output in outputs.items():
            evaluator.prepare({image_id: output}, "bbox")
            evaluator.prepare({image_id: output}, "segm")
        passes.append((time.perf_counter() - begin) / len(outputs))
    print(json.dumps(sorted(passes)[1]))


if __name__ == "__main__":
    {"student": student, "batches": batches, "load": load, "start": start, "masks": masks}[
        sys.argv[1]
    ](*sys.argv[2:])
