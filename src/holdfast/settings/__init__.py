"""Settings of the commands, which are declared once. The modules do not import torch."""
