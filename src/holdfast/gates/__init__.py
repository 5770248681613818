"""Gates: conditions on a metric, judged on its confidence interval. `grammar` parses them and does not import torch."""
