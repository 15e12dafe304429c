"""The models in torch, for all rivals that train with it."""

import torch
from tasks import SERVER_RATES
from torch import nn


def build(task, start):
    layers = {
        "A": lambda: [nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10)],
        "B": lambda: [
            nn.Conv2d(1, 32, 3),
            nn.ReLU(),
            nn.Conv2d(32, 64, 3),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Linear(9216, 128),
            nn.ReLU(),
            nn.Linear(128, 62),
        ],
        "C": lambda: [nn.Linear(2500, 3000, bias=False)],
        "L": lambda: [nn.Linear(64, 10)],
    }
    layers["K"] = layers["A"]
    model = nn.Sequential(*layers[task.name]())
    put(model, start)
    return model


def put(model, weights):
    with torch.no_grad():
        for parameter, weight in zip(model.parameters(), weights, strict=True):
            parameter.copy_(torch.as_tensor(weight))


def get(model):
    return [parameter.detach().numpy() for parameter in model.parameters()]


def server_optimizer(name, parameters):
    return {"adam": torch.optim.Adam, "sgd": torch.optim.SGD}[name](
        parameters, lr=SERVER_RATES[name]
    )
