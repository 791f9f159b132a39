"""A method of Regatta as a Lightning module: `python lightning_module.py DATA [STEPS]`; needs `lightning`."""

import sys

import lightning
import regatta


class RegionCL(lightning.LightningModule):
    """RegionCL-M; Lightning has the loop, the devices and the loggers."""

    def __init__(self) -> None:
        super().__init__()
        self.task = regatta.Pretraining(
            "regioncl-m", recipe="regioncl-m-small", arch="resnet18", image_size=64, global_batch=16, queue_size=64
        )
        self.method = self.task.method  # so that Lightning finds the parameters

    def training_step(self, batch, number):
        """Loss of one step."""
        self.output = self.method(self.task.inputs(batch, self.global_step))
        self.log_dict({"loss": self.output.loss, **self.output.metrics})
        return self.output.loss

    def on_train_batch_end(self, outputs, batch, number):
        """After the optimizer: the momentum network moves, keys enter the queue."""
        self.task.after_step(self.output, self.global_step - 1, self.trainer.num_training_batches)

    def configure_optimizers(self):
        """The recipe's optimizer."""
        return self.task.optimizer()


module = RegionCL()
steps = int(sys.argv[2]) if len(sys.argv) > 2 else 100
trainer = lightning.Trainer(max_steps=steps, accelerator="auto", devices=1, log_every_n_steps=1)
trainer.fit(module, module.task.loader(sys.argv[1]))
