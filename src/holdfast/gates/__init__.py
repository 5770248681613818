"""Gates: conditions on a metric, judged on its interval. `grammar` parses them and does not import torch."""
