"""Object detection and instance segmentation: formats, models, training and AP."""
