"""The training loop of the recipes, and the parts that several recipes share."""
