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
    for number, gradients in enumerate(case["steps"]):
        for weight, gradient in zip(weights, gradients):
            weight.grad = None if gradient is None else torch.tensor(gradient, dtype=weight.dtype)
        if number in case.get("rates", {}):
            optimizer.param_groups[0]["lr"] = case["rates"][number]
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
