"""Torchvision's Faster R-CNN on an export: `python detector.py EXPORT.safetensors COCO_FOLDER [ARCH] [STEPS] [SIDE]`.

EXPORT is what `regatta export RUN EXPORT.safetensors --format torchvision` writes for a ResNet (default: resnet50). The
folder holds `images` and `annotations/instances_train.json`. `regatta evaluate detect` follows the published protocols.
"""

import itertools
import sys

import torch
from safetensors.torch import load_file, save_file
from torchvision.datasets import CocoDetection, wrap_dataset_for_transforms_v2
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone
from torchvision.transforms import v2

export, folder = sys.argv[1:3]
arch = sys.argv[3] if len(sys.argv) > 3 else "resnet50"
steps = int(sys.argv[4]) if len(sys.argv) > 4 else 1000
side = int(sys.argv[5]) if len(sys.argv) > 5 else 800

backbone = resnet_fpn_backbone(backbone_name=arch, weights=None, trainable_layers=5)
backbone.body.load_state_dict(load_file(export))  # all of it, or an error
detector = FasterRCNN(backbone, num_classes=91, min_size=side)

augment = v2.Compose([v2.ToImage(), v2.RandomHorizontalFlip(), v2.ToDtype(torch.float32, scale=True)])
photos = CocoDetection(f"{folder}/images", f"{folder}/annotations/instances_train.json", transforms=augment)
photos.ids = [each for each in photos.ids if photos.coco.getAnnIds(each)]  # a detector learns from images with objects
photos = wrap_dataset_for_transforms_v2(photos, target_keys=("boxes", "labels"))
batches = torch.utils.data.DataLoader(photos, 2, shuffle=True, collate_fn=lambda batch: tuple(zip(*batch, strict=True)))
optimizer = torch.optim.SGD([p for p in detector.parameters() if p.requires_grad], lr=0.005, momentum=0.9)
epochs = itertools.chain.from_iterable(itertools.repeat(batches))
for step, (images, targets) in enumerate(itertools.islice(epochs, steps), 1):
    loss = sum(detector(list(images), list(targets)).values())
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    print(f"step {step} of {steps}, loss {loss.item():.3f}")
save_file(detector.state_dict(), "detector.safetensors")
