"""Run parts of torchdistill 0.0.1, which made the published checkpoints, in today's torchvision.

Started by test_parity.py in a process of its own, with the folder of 0.0.1 first on PYTHONPATH, as
    python original.py student ARCH CHECKPOINT OUTPUT
    python original.py batches ANNOTATIONS OUTPUT
and by benchmark.py, which reads the JSON of the last line printed, as
    python original.py load DATA_DIR | start DATA_DIR
"""

import argparse
import collections
import functools
import json
import resource
import sys
import time
import types
from pathlib import Path

import numpy as np
import torch
import torchvision
from torch.utils.data import DistributedSampler

# the shims: names that torchvision has dropped since 0.7, none of which computes anything here
for name in ("faster_rcnn", "keypoint_rcnn", "mask_rcnn"):
    getattr(torchvision.models.detection, name).model_urls = {}
sys.modules["torchvision.models.utils"] = types.SimpleNamespace(load_state_dict_from_url=None)


def student(arch, checkpoint, output):
    """Load a checkpoint into the student that 0.0.1 builds by its published configuration, run it,
    and save it; all by 0.0.1's own functions, but without downloaded weights."""
    from torchdistill.common.main_util import load_ckpt, save_ckpt
    from torchdistill.models.custom.bottleneck.detection import rcnn, resnet_backbone

    model = getattr(rcnn, f"custom_{arch}_resnet_fpn")(
        {"name": "custom_resnet50", "params": {
            "pretrained": False, "trainable_backbone_layers": 6,
            "layer1": {"type": "Bottleneck4LargeResNet", "bottleneck_channel": 3}}},
        False, False, 91, False, min_size=96, max_size=160).eval()
    for module in model.modules():
        if isinstance(module, torchvision.ops.FrozenBatchNorm2d):
            module.eps = 0.0  # what torchvision 0.7's FrozenBatchNorm2d had
    trained = [p for name, p in model.named_parameters()
               if name.startswith(("backbone.body.conv1.", "backbone.body.layer1."))]
    optimizer = torch.optim.Adam(trained, lr=1e-3)
    scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, [5, 15], 0.1)
    best_value, _, _ = load_ckpt(
        checkpoint, model=model, optimizer=optimizer, lr_scheduler=scheduler, strict=True)
    images = [torch.rand(3, 90, 120, generator=torch.Generator().manual_seed(i)) for i in range(2)]
    with torch.no_grad():
        features = list(model.backbone.body(model.transform(images)[0].tensors).values())
        detections = model(images)
    torch.manual_seed(5)
    initial = resnet_backbone.Bottleneck4LargeResNet(3).state_dict()
    torch.save({"keys": list(model.state_dict()), "features": features, "detections": detections,
                "best_value": best_value, "initial": initial, "steps": len(optimizer.state)},
               f"{output}/seen.pt")
    scheduler.milestones = collections.Counter([5, 15])
    args, save = argparse.Namespace(config="x.yaml", seed=None), torch.save
    for suffix, zipped in (("zip", True), ("old", False)):
        torch.save = functools.partial(save, _use_new_zipfile_serialization=zipped)
        save_ckpt(model, optimizer, scheduler, np.float64(0.25), {"train": {"num_epochs": 20}},
                  args, f"{output}/{suffix}.pt")


def batches(annotations, output):
    """The chosen images, their groups, and the batches of every rank and epoch."""
    from torchdistill.datasets import coco, sampler

    chosen = coco.get_coco("", annotations, None, annotated_only=True, is_segment=False)
    groups = sampler.create_aspect_ratio_groups(chosen, k=3)
    found = {"ids": [chosen.dataset.ids[i] for i in chosen.indices], "groups": [*map(int, groups)]}
    for world_size in (1, 2, 3):
        for rank in range(world_size):
            shuffle = DistributedSampler(chosen, world_size, rank)
            grouped = sampler.GroupedBatchSampler(shuffle, groups, 4)
            for epoch in range(4):
                shuffle.set_epoch(epoch)
                found[f"{world_size} {rank} {epoch}"] = [list(map(int, batch)) for batch in grouped]
    Path(output).write_text(json.dumps(found))


def coco_dataset(folder):
    """The training set of 0.0.1 as its configuration builds it: flips, polygons turned to masks."""
    from torchdistill.datasets import coco

    transforms = coco.Compose([coco.ImageToTensor(), coco.CocoRandomHorizontalFlip(0.5)])
    return coco.get_coco(
        f"{folder}/train2017", f"{folder}/annotations/instances_train2017.json", transforms,
        annotated_only=True, is_segment=False)


def load(folder):
    """Seconds to load and prepare one image, of three passes the fastest."""
    torch.set_num_threads(1)
    dataset, passes = coco_dataset(folder), []
    for _ in range(3):
        begin = time.perf_counter()
        for position in range(len(dataset)):
            dataset[position]
        passes.append((time.perf_counter() - begin) / len(dataset))
    print(json.dumps(min(passes)))


def start(folder):
    """Seconds and MiB that the training set takes until its first batch is known."""
    from torchdistill.datasets import sampler

    def resident():
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return pages * resource.getpagesize() / 2**20

    before, begin = resident(), time.perf_counter()
    dataset = coco_dataset(folder)
    next(iter(sampler.GroupedBatchSampler(
        DistributedSampler(dataset, 3, 0), sampler.create_aspect_ratio_groups(dataset, k=3), 4)))
    print(json.dumps([time.perf_counter() - begin, resident() - before]))


if __name__ == "__main__":
    globals()[sys.argv[1]](*sys.argv[2:])
