"""Plain torch, run as a script by torch's own Python: the truth for `test_torch_optimizer.py`."""

import inspect
import json
import sys

import torch


def public(module, base):
    return sorted(
        name
        for name, value in vars(module).items()
        if inspect.isclass(value)
        and issubclass(value, base)
        and value is not base
        and name[0] != "_"
    )


def average_update(case, weights):
    """What clients take from a linear model, averaged by their numbers of examples."""
    total, updates = 0, [torch.zeros_like(w) for w in weights]
    for batches in case["clients"]:
        local = [w.detach().clone().requires_grad_() for w in weights]
        optimizer = torch.optim.SGD(local, lr=case["client_rate"])
        count = sum(len(x) for x, _ in batches)
        for x, y in batches:
            optimizer.zero_grad()
            torch.mean((torch.tensor(x) @ local[0] + local[1] - torch.tensor(y)) ** 2).backward()
            optimizer.step()
        total += count
        for update, old, new in zip(updates, weights, local):
            update += count * (old.detach() - new.detach())
    return [update / total for update in updates]


def train(case):
    torch.manual_seed(0)
    weights = [
        torch.nn.Parameter(torch.tensor(w, dtype=getattr(torch, case["dtype"])))
        for w in case["weights"]
    ]
    arguments = {k: tuple(v) if isinstance(v, list) else v for k, v in case["arguments"].items()}
    optimizer = getattr(torch.optim, case["optimizer"])(weights, **arguments)
    scheduler = None
    if case["scheduler"]:
        name, given = case["scheduler"]
        scheduler = getattr(torch.optim.lr_scheduler, name)(optimizer, **given)
    federated = (average_update(case, weights) for _ in range(case.get("rounds", 0)))
    for gradients in federated if "clients" in case else case["steps"]:
        for weight, gradient in zip(weights, gradients):
            weight.grad = torch.as_tensor(gradient, dtype=weight.dtype)
        optimizer.step()
        if scheduler:
            scheduler.step()
    return [weight.tolist() for weight in weights]


lists = {
    "optimizers": public(torch.optim, torch.optim.Optimizer),
    "schedulers": public(torch.optim.lr_scheduler, torch.optim.lr_scheduler.LRScheduler),
}
cases = json.load(sys.stdin)
json.dump({"lists": lists, "weights": [train(case) for case in cases]}, sys.stdout)
