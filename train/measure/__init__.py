"""What a backbone is measured by, during training and by the protocols: its features, k-NN and label-free figures."""
