"""The rounds in Apple's pfl-research, with torch: its `FederatedAveraging` and `SimulatedBackend`."""

import importlib.metadata

import torch
import torch_model
from pfl.aggregate.simulate import SimulatedBackend
from pfl.aggregate.weighting import WeightByDatapoints
from pfl.algorithm.base import NNAlgorithmParams
from pfl.algorithm.federated_averaging import FederatedAveraging
from pfl.callback.base import TrainingProcessCallback
from pfl.data import FederatedDataset
from pfl.data.pytorch import PyTorchTensorDataset
from pfl.data.sampling import get_user_sampler
from pfl.hyperparam import NNTrainHyperParams
from pfl.metrics import Metrics
from pfl.model.pytorch import PyTorchModel
from tasks import CLIENT_RATE, main

LOSS = torch.nn.CrossEntropyLoss()


def with_loss(model):
    """What `PyTorchModel` asks of a module: a loss, and metrics, of which there are none."""
    model.loss = lambda x, y, **_: LOSS(model(x), y)
    model.metrics = lambda x, y, **_: {}
    return model


def simulate(task, clients, start, server, rounds, round_done):
    data = [PyTorchTensorDataset(tensors=[torch.tensor(x), torch.tensor(y)]) for x, y in clients]
    sampler = get_user_sampler("minimize_reuse", range(len(data)))  # all of them, in each round
    module = with_loss(torch_model.build(task, start))
    model = PyTorchModel(
        module, torch.optim.SGD, torch_model.server_optimizer(server, module.parameters())
    )

    class RoundDone(TrainingProcessCallback):
        def after_central_iteration(self, aggregate_metrics, model, *, central_iteration):
            round_done()
            return False, Metrics()

    FederatedAveraging().run(
        backend=SimulatedBackend(
            training_data=FederatedDataset(data.__getitem__, sampler),
            val_data=None,
            postprocessors=[WeightByDatapoints()],
        ),
        model=model,
        model_train_params=NNTrainHyperParams(
            local_num_epochs=1, local_learning_rate=CLIENT_RATE, local_batch_size=task.rows
        ),
        model_eval_params=None,
        callbacks=[RoundDone()],
        algorithm_params=NNAlgorithmParams(
            central_num_iterations=rounds,
            evaluation_frequency=rounds,
            train_cohort_size=len(data),
            val_cohort_size=None,
        ),
    )
    return torch_model.get(module)


if __name__ == "__main__":
    main("pfl-research", importlib.metadata.version("pfl"), simulate, layout="torch")
