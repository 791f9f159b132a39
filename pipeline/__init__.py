"""From bytes on disk to augmented views; knows nothing of models."""
