"""RegionCL-M in a loop of one's own: `python region_loop.py DATA [STEPS]`. One call builds the regions of a step."""

import sys

import regatta

task = regatta.Pretraining(
    "regioncl-m", recipe="regioncl-m-small", arch="resnet18", image_size=64, global_batch=16, queue_size=64
)
loader, optimizer = task.loader(sys.argv[1]), task.optimizer()
last = int(sys.argv[2]) if len(sys.argv) > 2 else 100
step = 0
while step < last:
    for batch in loader:
        task.set_learning_rate(optimizer, step, len(loader))
        output = task.method(task.inputs(batch, step))
        output.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        task.after_step(output, step, len(loader))
        step += 1
        print(f"step {step} of {last}, loss {output.loss.item():.3f}")
        if step == last:
            break
