"""Recover a cut model with Lightning: python recover_lightning.py (pip install lightning)"""

import torch

import secateur

try:
    import lightning.pytorch as pl
except ImportError:
    import pytorch_lightning as pl

EPOCHS = 1


class Distillation(pl.LightningModule):
    """A student that learns from its teacher."""

    def __init__(self, student, teacher, task):
        super().__init__()
        self.student, self.others = student, (teacher, task)  # a tuple: the teacher is not trained

    def training_step(self, batch, _):
        """Return the loss of a batch."""
        (inputs, targets), (teacher, task) = batch, self.others
        with torch.no_grad():
            wanted = teacher(inputs)
        outputs = self.student(inputs)
        return task.imitation(outputs, wanted) + 0.1 * task.loss(outputs, targets)

    def configure_optimizers(self):
        """Return the optimizer."""
        return torch.optim.AdamW(self.student.parameters(), lr=1e-3)


class Batches:
    """A training split as an iterable that gives another order in every epoch."""

    def __init__(self, split, seed):
        self.split, self.seed, self.epoch = split, seed, 0

    def __iter__(self):
        self.epoch += 1
        return iter(self.split.batches(64, seed=self.seed, epoch=self.epoch))


def recover(student, teacher, data, context):
    """Train the student on the teacher's outputs, and a little on the targets."""
    trainer = pl.Trainer(
        max_epochs=EPOCHS,
        accelerator=context.device.type,
        devices=1,
        default_root_dir=context.folder,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
    )
    trainer.fit(Distillation(student, teacher, context.task), Batches(data.train, context.seed))
    return student


if __name__ == "__main__":
    model, source = secateur.load_model("digits_resnet")  # your trained model
    data = secateur.load_data("digits")
    print(secateur.compress(model, data, "macs=50%", recovery=recover, source=source, out="small"))
