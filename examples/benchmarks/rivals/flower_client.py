"""What Flower's workers do for a client; a file of its own, because they import it."""

import functools

import torch
import torch_model
from flwr.app import ArrayRecord, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from tasks import CLIENT_RATE, TASKS, cohort, start_weights

LOSS = torch.nn.CrossEntropyLoss()
client_app = ClientApp()


@functools.cache
def prepared(name):
    """A worker makes the data and the model once, not for every client."""
    task = TASKS[name]
    data = [
        list(zip(torch.tensor(x).split(task.rows), torch.tensor(y).split(task.rows)))
        for x, y in cohort(task, "torch")
    ]
    return data, torch_model.build(task, start_weights(task, "torch"))


@client_app.train()
def train(message, context):
    data, model = prepared(message.content["config"]["task"])
    model.load_state_dict(message.content["arrays"].to_torch_state_dict())
    optimizer = torch.optim.SGD(model.parameters(), lr=CLIENT_RATE)
    examples = 0
    for x, y in data[context.node_config["partition-id"]]:
        optimizer.zero_grad()
        LOSS(model(x), y).backward()
        optimizer.step()
        examples += len(y)
    found = {
        "arrays": ArrayRecord(model.state_dict()),
        "metrics": MetricRecord({"num-examples": examples}),
    }
    return Message(content=RecordDict(found), reply_to=message)
