"""What a run leaves on disk: column files, the hash chain, and the ledger of leases and time. Nothing here computes."""
