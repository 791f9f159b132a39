"""What a backbone is measured by, during training and by the protocols: its features, k-NN and label-free figures."""

DEFAULT_KS = (20, 100, 200)
"""How many neighbours vote in k-NN."""
DEFAULT_TEMPERATURE = 0.07
"""Of the weighted vote, exp(cosine / temperature)."""
MAX_BAD = 0.25
"""Share of a data set's images that may be unreadable before no figure is given; the figure is over the others."""
