"""Recover a cut model as timm's train.py trains: python recover_timm.py"""

import torch
from timm.optim import create_optimizer_v2
from timm.scheduler import CosineLRScheduler
from timm.utils import AverageMeter, ModelEmaV3

import secateur

EPOCHS = 1


def recover(student, teacher, data, context):
    """Train the student on the teacher's outputs, and a little on the targets."""
    optimizer = create_optimizer_v2(student, opt="adamw", lr=1e-3, weight_decay=0.05)
    schedule = CosineLRScheduler(optimizer, t_initial=max(EPOCHS, 2), warmup_t=1, warmup_lr_init=1e-4)
    average = ModelEmaV3(student, decay=0.99, use_warmup=True)
    for epoch in range(EPOCHS):
        student.train()
        losses = AverageMeter()
        batches = data.train.batches(64, seed=context.seed, epoch=epoch, device=context.device)
        for step, (inputs, targets) in enumerate(batches):
            with torch.no_grad():
                wanted = teacher(inputs)
            outputs = student(inputs)
            loss = context.task.imitation(outputs, wanted) + 0.1 * context.task.loss(outputs, targets)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            average.update(student, step=step)
            losses.update(loss.item(), len(inputs))
        schedule.step(epoch + 1)
        print(f"epoch {epoch}: loss {losses.avg:.4f}, validation {context.score(average.module).text}")
    return average.module


if __name__ == "__main__":
    model, source = secateur.load_model("digits_resnet")  # your trained model
    data = secateur.load_data("digits")
    print(secateur.compress(model, data, "macs=50%", recovery=recover, source=source, out="small"))
