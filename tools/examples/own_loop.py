"""SimCLR in a loop of one's own: `python own_loop.py DATA [EPOCHS]`. Regatta delivers the views."""

import sys

import regatta
import torch
import torch.nn.functional as F
from torchvision.models import resnet18

loader = regatta.Loader(sys.argv[1], views=2, size=64, augment="mocov2", batch_size=16)
epochs = int(sys.argv[2]) if len(sys.argv) > 2 else 10
network = resnet18(num_classes=128)
optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3)
for epoch in range(epochs):
    for batch in loader:
        first, second = (F.normalize(network(view)) for view in batch.views.values())
        similarity = first @ second.T / 0.2
        own = torch.arange(len(similarity))
        loss = (F.cross_entropy(similarity, own) + F.cross_entropy(similarity.T, own)) / 2
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    print(f"epoch {epoch + 1} of {epochs}, loss {loss.item():.3f}")
