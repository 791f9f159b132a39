"""Semantic segmentation by fine-tuning a backbone: data layouts, augmentation, FCN and UPerNet, training, metrics."""
