"""The metrics under the name that they had; they live in `eapcore.tasks.metrics`."""

from eapcore.tasks.metrics import METRICS as METRICS
from eapcore.tasks.metrics import Metric as Metric
from eapcore.tasks.metrics import MetricBatch as MetricBatch
