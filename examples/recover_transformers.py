"""Recover a cut model with Hugging Face's Trainer: python recover_transformers.py (pip install transformers[torch])"""

import tempfile

import torch
from transformers import Trainer, TrainingArguments

import secateur

EPOCHS = 1


class Distillation(Trainer):
    """A Trainer whose loss looks at the teacher."""

    def __init__(self, *, teacher, task, **settings):
        super().__init__(**settings)
        self.teacher, self.task = teacher, task

    def compute_loss(self, model, inputs, return_outputs=False, **_):
        """Return the loss of a batch."""
        with torch.no_grad():
            wanted = self.teacher(inputs["pixel_values"])
        outputs = model(inputs["pixel_values"])
        loss = self.task.imitation(outputs, wanted) + 0.1 * self.task.loss(outputs, inputs["labels"])
        return (loss, outputs) if return_outputs else loss


def recover(student, teacher, data, context):
    """Train the student on the teacher's outputs, and a little on the targets."""
    batches = data.train.batches(64)
    items = [
        {"pixel_values": x, "labels": y} for images, labels in batches for x, y in zip(images, labels, strict=True)
    ]
    settings = TrainingArguments(
        output_dir=str(context.folder or tempfile.mkdtemp()),
        num_train_epochs=EPOCHS,
        per_device_train_batch_size=64,
        learning_rate=1e-3,
        seed=context.seed,
        use_cpu=context.device.type == "cpu",
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        remove_unused_columns=False,
    )
    Distillation(teacher=teacher, task=context.task, model=student, args=settings, train_dataset=items).train()
    return student


if __name__ == "__main__":
    model, source = secateur.load_model("digits_resnet")  # your trained model
    data = secateur.load_data("digits")
    print(secateur.compress(model, data, "macs=50%", recovery=recover, source=source, out="small"))
