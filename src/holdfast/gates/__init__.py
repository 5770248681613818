"""Gates, which are conditions on a metric that are judged on its confidence interval. The module `grammar` parses them
and does not import torch.
"""
