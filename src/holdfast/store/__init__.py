"""What runs and pools of weights leave on disk: columns, hash chains, leases. Nothing here computes."""
