"""A federated round as a torch programmer writes it: one model, one loop."""

import torch
import torch_model
from tasks import CLIENT_RATE, main

LOSS = torch.nn.CrossEntropyLoss()


def simulate(task, clients, start, server, rounds, round_done):
    model = torch_model.build(task, start)
    weights = list(model.parameters())
    central = [weight.detach().clone() for weight in weights]
    optimizer = torch_model.server_optimizer(server, central)
    data = [
        list(zip(torch.tensor(x).split(task.rows), torch.tensor(y).split(task.rows)))
        for x, y in clients
    ]
    for _ in range(rounds):
        total = [torch.zeros_like(weight) for weight in central]
        number = 0
        for batches in data:
            torch_model.put(model, central)
            local = torch.optim.SGD(weights, lr=CLIENT_RATE)
            examples = 0
            for x, y in batches:
                local.zero_grad()
                LOSS(model(x), y).backward()
                local.step()
                examples += len(y)
            with torch.no_grad():
                for t, c, w in zip(total, central, weights, strict=True):
                    t.add_(c - w, alpha=examples)
            number += examples
        for c, t in zip(central, total, strict=True):
            c.grad = t / number
        optimizer.step()
        round_done()
    return [weight.numpy() for weight in central]


if __name__ == "__main__":
    main("torch by hand", torch.__version__, simulate, layout="torch")
