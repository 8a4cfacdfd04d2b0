"""Run parts of torchdistill 0.0.1, which made the published checkpoints, in today's torchvision.

Started by test_parity.py in a process of its own, with the folder of 0.0.1 first on PYTHONPATH, as
    python original.py FOLDER
It reads our ARCH.pt and instances.json from the folder, and writes there, for each architecture,
ARCH_seen.pt and two checkpoints, ARCH_zip.pt and ARCH_old.pt; and batches.json.
"""

import argparse
import collections
import functools
import json
import sys
import types
from pathlib import Path

import numpy as np
import torch
import torchvision
from torch.utils.data import DistributedSampler

# Names that torchvision has dropped since 0.7, none of which computes anything here.
for name in ("faster_rcnn", "keypoint_rcnn", "mask_rcnn"):
    getattr(torchvision.models.detection, name).model_urls = {}
sys.modules["torchvision.models.utils"] = types.SimpleNamespace(load_state_dict_from_url=None)

from torchdistill.common.main_util import load_ckpt, save_ckpt  # noqa: E402
from torchdistill.datasets import coco, sampler  # noqa: E402
from torchdistill.models.custom.bottleneck.detection import rcnn, resnet_backbone  # noqa: E402


def run_student(arch, folder):
    """Load our checkpoint into 0.0.1's student, run it, write what it gives, and save it.

    All is done by its own functions and published configuration, without downloaded weights.
    """
    model = getattr(rcnn, f"custom_{arch}_resnet_fpn")(
        {"name": "custom_resnet50", "params": {
            "pretrained": False, "trainable_backbone_layers": 6,
            "layer1": {"type": "Bottleneck4LargeResNet", "bottleneck_channel": 3}}},
        False, False, 91, False, min_size=96, max_size=160, rpn_post_nms_top_n_test=40,
        box_score_thresh=0.0).eval()
    for module in model.modules():
        if isinstance(module, torchvision.ops.FrozenBatchNorm2d):
            module.eps = 0.0  # what torchvision 0.7's FrozenBatchNorm2d had
    trained = [p for name, p in model.named_parameters()
               if name.startswith(("backbone.body.conv1.", "backbone.body.layer1."))]
    optimizer = torch.optim.Adam(trained, lr=1e-3)
    scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, [5, 15], 0.1)
    best_value, _, _ = load_ckpt(
        f"{folder}/{arch}.pt", model=model, optimizer=optimizer, lr_scheduler=scheduler,
        strict=True)
    image = torch.rand(3, 90, 120, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        features = list(model.backbone.body(model.transform([image])[0].tensors).values())
        detections = model([image])
    torch.manual_seed(5)
    initial = resnet_backbone.Bottleneck4LargeResNet(3).state_dict()
    torch.save({"keys": list(model.state_dict()), "features": features, "detections": detections,
                "best_value": best_value, "initial": initial, "steps": len(optimizer.state)},
               f"{folder}/{arch}_seen.pt")
    scheduler.milestones = collections.Counter([5, 15])
    args, save = argparse.Namespace(config="x.yaml", seed=None), torch.save
    for suffix, is_zipped in (("zip", True), ("old", False)):
        torch.save = functools.partial(save, _use_new_zipfile_serialization=is_zipped)
        save_ckpt(model, optimizer, scheduler, np.float64(0.25), {"train": {"num_epochs": 20}},
                  args, f"{folder}/{arch}_{suffix}.pt")
    torch.save = save


def make_batches(folder):
    """Write the chosen images, their groups, and the batches of every rank and epoch."""
    chosen = coco.get_coco(
        "", f"{folder}/instances.json", None, annotated_only=True, is_segment=False)
    groups = sampler.create_aspect_ratio_groups(chosen, k=3)
    found = {"ids": [chosen.dataset.ids[i] for i in chosen.indices], "groups": [*map(int, groups)]}
    for world_size in (1, 2, 3):
        for rank in range(world_size):
            shuffle = DistributedSampler(chosen, world_size, rank)
            grouped = sampler.GroupedBatchSampler(shuffle, groups, 4)
            for epoch in range(4):
                shuffle.set_epoch(epoch)
                found[f"{world_size} {rank} {epoch}"] = [list(map(int, batch)) for batch in grouped]
    Path(folder, "batches.json").write_text(json.dumps(found))


if __name__ == "__main__":
    torch.set_num_threads(1)  # as in conftest.py: sums are in the same order
    make_batches(sys.argv[1])
    for arch in ("fasterrcnn", "maskrcnn"):
        run_student(arch, sys.argv[1])
