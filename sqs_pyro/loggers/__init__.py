"""Where training is told to beside the terminal: CSV files, TensorBoard, MLflow, Weights & Biases, one's own.

with logged([TensorBoard("logs")], "mine", recipe) as log:
    result = compress(net, data, recipe, progress=log.steps("compression"))
    log.finish({"ratio": size_report(result.network).ratio})
"""

from sqs_pyro.loggers.csv_files import CSVFiles
from sqs_pyro.loggers.logger import Log, Logger, Outcome, logged
from sqs_pyro.loggers.mlflow_run import MLflow
from sqs_pyro.loggers.tensorboard import TensorBoard
from sqs_pyro.loggers.wandb_run import WandB

__all__ = ["CSVFiles", "Log", "Logger", "MLflow", "Outcome", "TensorBoard", "WandB", "logged"]
