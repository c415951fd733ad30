"""Recover a cut model with a plain PyTorch loop: python recover_plain.py"""

import torch

import secateur

EPOCHS = 1


def recover(student, teacher, data, context):
    """Train the student on the teacher's outputs, and a little on the targets."""
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-3)
    metric = context.task.metric
    best, weights = metric.key(context.score(student).value), None
    for epoch in range(EPOCHS):
        student.train()
        for inputs, targets in data.train.batches(64, seed=context.seed, epoch=epoch, device=context.device):
            with torch.no_grad():
                wanted = teacher(inputs)
            outputs = student(inputs)
            loss = context.task.imitation(outputs, wanted) + 0.1 * context.task.loss(outputs, targets)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        score = metric.key(context.score(student).value)  # on the validation split; higher is better
        if score >= best:
            best, weights = score, {name: tensor.clone() for name, tensor in student.state_dict().items()}
    if weights is not None:
        student.load_state_dict(weights)
    return student


if __name__ == "__main__":
    model, source = secateur.load_model("digits_resnet")  # your trained model
    data = secateur.load_data("digits")
    print(secateur.compress(model, data, "macs=50%", recovery=recover, source=source, out="small"))
